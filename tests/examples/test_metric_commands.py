"""The small commands around evaluation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dar_hf.metrics import InceptionNetwork, load_feature_extractor

EXAMPLES = Path(__file__).parents[2] / "examples"


def command(name, *arguments):
    return subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True)


def test_inception_weights_convert(tmp_path):
    torch.save(InceptionNetwork().state_dict() | {"fc.bias": torch.zeros(1008)}, tmp_path / "original.pth")
    target = str(tmp_path / "inception.safetensors")
    result = command("convert_metric_weights.py", "inception", str(tmp_path / "original.pth"), target)
    assert result.returncode == 0, result.stderr
    # 94 convolutions with five tensors each, and the logits
    assert "471 tensors, hash " in result.stdout
    printed = result.stdout.split()[-1]
    assert load_feature_extractor("inception", target, expected_hash=printed).weights_hash == printed


def test_wrong_files_give_one_line_and_no_output(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "original.pth")
    result = command("convert_metric_weights.py", "inception", str(tmp_path / "original.pth"), str(tmp_path / "out"))
    assert result.returncode == 2 and result.stderr.startswith("convert_metric_weights.py: wrong weights")
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_digits_classifier_learns_and_measures(tmp_path):
    result = command("digits_features.py", "--output_dir", str(tmp_path), "--steps", "600")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("digits ")[1].split(",")[0]) > 0.9
    extractor = load_feature_extractor(f"{EXAMPLES / 'digits_features.py'}:load", str(tmp_path))
    features = extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert features.pool.shape == (2, 32) and features.spatial.shape == (2, 64) and features.logits.shape == (2, 10)
    with pytest.raises(ValueError, match="needs features_weights"):
        load_feature_extractor(f"{EXAMPLES / 'digits_features.py'}:load")
