"""Reports: read back, and turned into the entries of a model card."""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData

from dar_hf.evaluation import dataset_names, eval_results, metric, read_report, versions, write_report
from dar_hf.evaluation.report import public_name

REPORT = {
    "mode": "generation",
    "model": {"name": "user/model", "revision": "abc"},
    "data": {"dataset": "a/b", "config": None, "split": "train", "count": 1437},
    "settings": {
        "num_tokens": 16,
        "count": 50000,
        "seed": 0,
        "guidance_scale": [1.1, 8.0],
        "reference": None,
        "feature_extractor": {
            "name": "/home/me/net.py:load",
            "weights": "/home/me/net",
            "weights_hash": "0123456789abcdef",
        },
    },
    "metrics": [
        metric("fid", 3.9, "gFID", num_tokens=8),
        metric("fid", 2.51234, "gFID", num_tokens=16),
        metric("codebook_usage", 1.0),
        metric("psnr", 18.4, num_tokens=16, mode="reconstruction"),
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
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="it has no mode, model"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(REPORT | {"mode": "../elsewhere"}))
    with pytest.raises(ValueError, match="has the mode '../elsewhere'; there are reconstruction, generation"):
        read_report(tmp_path)


def test_every_figure_becomes_a_result_with_what_it_depends_on():
    results = eval_results(REPORT)
    settings = {"count": 50000, "seed": 0, "guidance_scale": [1.1, 8.0], "feature_extractor": "net.py:load 01234567"}
    generation, reconstruction = "unconditional-image-generation", "image-to-image"
    assert [(r.task_type, r.metric_name, r.metric_type, r.metric_value, r.metric_args) for r in results] == [
        (generation, "gFID", "fid", 3.9, settings | {"num_tokens": 8}),
        (generation, "gFID", "fid", 2.512, settings | {"num_tokens": 16}),
        (generation, "codebook usage (share)", "codebook_usage", 1.0, settings),
        (reconstruction, "PSNR (dB)", "psnr", 18.4, {"num_tokens": 16}),  # the settings are not its own
    ]
    assert all((r.dataset_type, r.dataset_name, r.dataset_split) == ("a/b", "a/b", "train") for r in results)
    assert not any(r.source_url for r in results)


def test_a_report_without_settings_or_figures():
    assert eval_results(REPORT | {"metrics": []}) == []
    (result,) = eval_results(REPORT | {"settings": {}, "metrics": [metric("codebook_usage", 1.0)]})
    assert result.metric_args is None


def test_the_model_index_survives_a_card():
    card = ModelCardData(model_name="digits", eval_results=eval_results(REPORT), license="mit")
    text = f"---\n{card.to_yaml()}\n---\n# Card\n"
    data = ModelCard(text).data
    assert [(r.metric_value, (r.metric_args or {}).get("num_tokens")) for r in data.eval_results] == [
        *((3.9, 8), (2.512, 16), (1.0, None), (18.4, 16)),
    ]


def test_a_reference_file_stands_for_the_data_set():
    report = REPORT | {"data": {"reference": "VIRTUAL_imagenet256_labeled.npz"}}
    assert eval_results(report)[0].dataset_name == "VIRTUAL_imagenet256_labeled.npz"


def test_local_data_is_named_without_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "birds").mkdir(parents=True)
    for source in ("my/birds", str(tmp_path / "my" / "birds"), "/gone/birds", "./birds", "~/birds", "a/b/birds"):
        assert dataset_names(source) == ("birds", "birds")
    assert dataset_names("owner/birds") == ("owner/birds", "owner/birds")
    assert dataset_names("/data/digits") == ("digits", "digits")
    assert dataset_names("digits") == ("digits", "scikit-learn digits")
    assert public_name("examples/features.py:load") == "features.py:load"
    assert public_name("facebook/dinov2-base") == "facebook/dinov2-base"
