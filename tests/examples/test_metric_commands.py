"""The small commands around evaluation."""

from pathlib import Path

import pytest
import torch

from dar_hf.metrics import InceptionNetwork, load_feature_extractor

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_inception_weights_convert(run_command, tmp_path):
    torch.save(InceptionNetwork().state_dict() | {"fc.bias": torch.zeros(1008)}, tmp_path / "original.pth")
    target = str(tmp_path / "inception.safetensors")
    said = run_command("convert_metric_weights.py", "inception", tmp_path / "original.pth", target)
    # 94 convolutions with five tensors each, and the logits
    assert "471 tensors, hash " in said
    printed = said.split()[-1]
    assert load_feature_extractor("inception", target, expected_hash=printed).weights_hash == printed


def test_wrong_files_give_one_line_and_no_output(run_command, refusal, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "original.pth")
    original, target = tmp_path / "original.pth", tmp_path / "out"
    said = refusal(run_command, "convert_metric_weights.py", "inception", original, target)
    assert said.startswith("convert_metric_weights.py: wrong weights")
    assert len(said.splitlines()) == 1 and not target.exists()


@pytest.mark.slow
def test_the_digits_classifier_learns_and_measures(run_command, tmp_path):
    said = run_command("small_features.py", "--output_dir", tmp_path, "--steps", 600)
    assert float(said.split("images ")[1].split(",")[0]) > 0.9
    extractor = load_feature_extractor(f"{EXAMPLES / 'small_features.py'}:load", str(tmp_path))
    features = extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert features.pool.shape == (2, 32) and features.spatial.shape == (2, 64) and features.logits.shape == (2, 10)
    with pytest.raises(ValueError, match="needs features_weights"):
        load_feature_extractor(f"{EXAMPLES / 'small_features.py'}:load")
