import pytest

from dar_hf.hub import paper_results, report_results
from dar_hf.hub.results import tables

REPORT = {
    "dataset": "digits",
    "reconstruction": {
        "images": 360,
        "psnr": 18.45,
        "previews": [{"num_tokens": 4, "psnr": 17.6}, {"num_tokens": 8, "psnr": 18.45}],
        "codebook": {"usage": 0.99, "perplexity": 220.0, "position_usage_min": 100},
    },
    "generation": {"guidance_scale": 2.0, "fid": 3.5, "previews": [{"num_tokens": 4, "fid": 9.0}]},
    "seconds": 2.4,
}


def flat(results):
    return {(r.task_name, r.metric_type, *(r.metric_args or {}).items()): r.metric_value for r in results}


def test_every_known_figure_of_a_report_once():
    results = report_results(REPORT, ("d", "D"))
    assert flat(results) == {
        ("Reconstruction", "psnr", ("num_tokens", 4)): 17.6,
        ("Reconstruction", "psnr", ("num_tokens", 8)): 18.45,
        ("Reconstruction", "usage"): 0.99,
        ("Reconstruction", "perplexity"): 220.0,
        ("Class-conditional generation", "fid", ("num_tokens", 4)): 9.0,
    }
    assert {(r.dataset_type, r.dataset_name) for r in results} == {("d", "D")}
    assert not any(r.source_url for r in results)


def test_a_report_without_figures_gives_none():
    assert report_results({"seconds": 3}, ("d", "D")) == []


def test_the_papers_figures_are_marked_as_the_papers():
    for name in ("v1", "L", "XL"):
        assert {r.source_url for r in paper_results(name)} == {"https://arxiv.org/abs/2505.23660"}
    by_steps = {r.metric_args["num_inference_steps"]: r.metric_value for r in paper_results("v1")}
    assert by_steps == {"4": 2.35, "8, Euler": 1.58, "8": 1.52, "12": 1.73, "16": 1.93}
    guided = [r for r in paper_results("XL") if r.metric_args["guidance_scale"] == "1.1 → 10"]
    figures = {"fid": 2.09, "inception_score": 298.4, "precision": 0.79, "recall": 0.62}
    assert {r.metric_type: r.metric_value for r in guided} == figures
    with pytest.raises(ValueError, match="no figures of 'B'"):
        paper_results("B")


def test_tables_have_a_row_a_metric_and_a_column_a_setting():
    previews, alone, generation = tables(report_results(REPORT, ("d", "D")))
    assert previews.title == "Reconstruction, D"
    assert previews.columns == ["num tokens", "4", "8"] and previews.rows == [["PSNR (dB)", "17.6", "18.45"]]
    assert [row[1] for row in alone.rows] == ["0.99", "220"]
    assert generation.columns == ["num tokens", "4"]
