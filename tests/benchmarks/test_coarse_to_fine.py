"""The benchmark of condition scopes and time shifts: it trains, measures, and does not train twice."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from dar_hf import DARTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_scopes_and_shifts_are_trained_once_and_measured_after_every_group(tmp_path, capsys):
    import coarse_to_fine

    train_features = runpy.run_path(str(ROOT / "examples" / "small_features.py"))["main"]
    train_features(["--output_dir", str(tmp_path / "features"), "--steps", "5"])
    options = ["--dataset_name", "digits", "--preset", "digits", "--features_weights", str(tmp_path / "features")]
    options += ["--scopes", "group", "prefix", "--shifts", "2", "--steps", "8", "--output_dir", str(tmp_path / "runs")]
    coarse_to_fine.main(options)
    lines = (tmp_path / "runs" / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["scope"] for result in results] == ["group", "prefix"]
    assert all(len(result["psnr"]) == len(result["distance"]) == 8 for result in results)
    for scope in ("group", "prefix"):
        folder = tmp_path / "runs" / f"{scope}-2-8-0"
        assert DARTokenizer.from_pretrained(folder).config.condition_scope == scope
        assert (folder / "previews.png").stat().st_size > 0
    assert all((tmp_path / "runs" / name).stat().st_size > 0 for name in ("psnr.png", "distance.png"))
    capsys.readouterr()
    coarse_to_fine.main(options)
    assert (tmp_path / "runs" / "results.jsonl").read_text().splitlines() == lines
    assert "step 8" not in capsys.readouterr().out  # nothing was trained again
