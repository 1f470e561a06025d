"""Reports: read back, and turned into the entries of a model card."""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData

from dar_hf.evaluation import eval_results, metric, model_index, read_report, versions, write_report

REPORT = {
    "mode": "generation",
    "model": {"name": "user/model", "revision": "abc"},
    "data": {"dataset": "digits", "config": None, "split": "train", "count": 1437},
    "settings": {"num_tokens": 16, "count": 50000, "seed": 0, "guidance_scale": [1.1, 8.0], "reference": None},
    "metrics": [
        metric("gFID", "fid", 3.9, num_tokens=8),
        metric("gFID", "fid", 2.5, num_tokens=16),
        metric("codebook usage", "codebook_usage", 1.0),
    ],
    "warnings": [],
    "not_measured": {},
    "versions": versions(),
}


def test_reports_are_written_and_read(tmp_path):
    write_report(tmp_path / "new", REPORT)
    assert read_report(tmp_path / "new") == REPORT == read_report(tmp_path / "new" / "report.json")
    assert REPORT["versions"].keys() >= {"dar_hf", "torch", "transformers", "diffusers"}


def test_what_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="no report can be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="no report can be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"mode": "generation", "metrics": []}))
    with pytest.raises(ValueError, match="it has no model, data, settings"):
        read_report(tmp_path)


def test_figures_at_full_length_become_results():
    results = eval_results(REPORT)
    assert [(r.metric_name, r.metric_type, r.metric_value) for r in results] == [
        ("gFID", "fid", 2.5),
        ("codebook usage", "codebook_usage", 1.0),
    ]
    assert all((r.dataset_name, r.dataset_split) == ("digits", "train") for r in results)
    assert results[0].metric_args == {"count": 50000, "seed": 0, "guidance_scale": [1.1, 8.0]}


def test_the_model_index_survives_a_card():
    card = ModelCardData(model_name="digits", eval_results=eval_results(REPORT), license="mit")
    text = f"---\n{card.to_yaml()}\n---\n# Card\n"
    data = ModelCard(text).data
    assert [result.metric_value for result in data.eval_results] == [2.5, 1.0]
    (entry,) = model_index(REPORT, "digits")
    assert entry["name"] == "digits" and len(entry["results"][0]["metrics"]) == 2


def test_a_reference_file_stands_for_the_data_set():
    report = REPORT | {"data": {"reference": "VIRTUAL_imagenet256_labeled.npz"}}
    assert eval_results(report)[0].dataset_name == "VIRTUAL_imagenet256_labeled.npz"
