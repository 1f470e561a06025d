"""Feature extractors: what they are called, what identifies them, and what they refuse."""

import math

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from dar_hf.metrics import FeatureExtractor, ImageFeatures, load_feature_extractor
from dar_hf.metrics.weights import write_weights
from dar_hf.utils.fingerprint import weights_fingerprint

IMAGES = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Constant(nn.Module):
    """Returns what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output


def test_what_a_network_may_return():
    pool, logits = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 2)
    for output in (pool, {"pool": pool}, ImageFeatures(pool)):
        features = FeatureExtractor(Constant(output), "x")(IMAGES)
        assert features.pool.dtype == torch.float32 and features.pool.tolist() == pool.tolist()
        assert features.spatial is None and features.logits is None
    features = FeatureExtractor(Constant({"pool": pool, "logits": logits}), "x")(IMAGES)
    assert dict(features.items()).keys() == {"pool", "logits"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 4), r"pool must have the shape \(3, D\), got \(2, 4\)"),
        (torch.zeros(3, 4, 1), r"pool must have the shape \(3, D\)"),
        ({"pool": torch.zeros(3, 4), "logits": torch.full((3, 2), math.nan)}, "logits features that are not finite"),
        ([torch.zeros(3, 4)], "returned a list"),
    ],
)
def test_bad_features_are_refused(output, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(Constant(output), "x")(IMAGES)


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES[:, :1], IMAGES[0], IMAGES[:0]])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 images \(B, 3, H, W\)"):
        FeatureExtractor(Constant(torch.zeros(3, 4)), "x")(images)


MODULE = """
from dataclasses import dataclass
import torch
from dar_hf.metrics.weights import read_weights

@dataclass
class Options:
    size: int = 4

class Network(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.linear = torch.nn.Linear(3, Options().size)
        self.dropout = torch.nn.Dropout(0.5)
        if weights:
            self.load_state_dict(read_weights(weights))

    def forward(self, images):
        return self.dropout(self.linear(images.float().mean((2, 3))))

def nothing(weights):
    return "no module"
"""


@pytest.fixture
def module_file(tmp_path):
    path = tmp_path / "my_features.py"
    path.write_text(MODULE)
    return path


def test_a_module_from_a_file_with_its_weights(module_file, tmp_path):
    state = {"linear.weight": torch.randn(4, 3), "linear.bias": torch.zeros(4)}
    expected = write_weights(state, tmp_path / "model.safetensors")
    extractor = load_feature_extractor(f"{module_file}:Network", str(tmp_path), expected[:8])
    assert extractor.weights_hash == expected == weights_fingerprint(state)
    assert extractor.describe() == {
        "name": f"{module_file}:Network",
        "weights": str(tmp_path),
        "weights_hash": expected,
    }
    pool = extractor(IMAGES).pool  # without dropout and gradient
    torch.testing.assert_close(pool, IMAGES.float().mean((2, 3)) @ state["linear.weight"].T)
    assert not pool.requires_grad
    with pytest.raises(ValueError, match="wrong weights"):
        load_feature_extractor(f"{module_file}:Network", str(tmp_path), "0" * 64)


def test_a_module_from_a_package(module_file, monkeypatch):
    monkeypatch.syspath_prepend(module_file.parent)
    assert load_feature_extractor("my_features:Network", None)(IMAGES).pool.shape == (3, 4)


def test_unknown_features_are_refused(module_file, tmp_path):
    for reference, message in (
        ("no_such_module:x", "cannot import"),
        (f"{tmp_path}/none.py:x", "no such Python file"),
        (f"{module_file}:missing", "no attribute 'missing'"),
        (f"{module_file}:MODULE_NAME", "cannot import"),
        (f"{module_file}:nothing", "gave a str, not a torch module"),
        ("no/such-model", "neither inception, nor"),
        ("inception", "need weights"),
    ):
        with pytest.raises(ValueError, match=message):
            load_feature_extractor(reference)
    with pytest.raises(ValueError, match="brings its own weights"):
        load_feature_extractor("some/model", "weights.safetensors")


@pytest.fixture
def vision_folder(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, intermediate_size=32
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    # what the "pil" backend saves is read by either backend
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    return tmp_path


def test_a_transformers_model_with_its_own_preparation(vision_folder):
    extractor = load_feature_extractor(str(vision_folder))
    model = Dinov2Model.from_pretrained(vision_folder).eval()
    features = extractor(IMAGES)
    assert features.pool.shape == (3, 32) and features.logits is None
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate(IMAGES.float() / 255, size=28, mode="bilinear")
        expected = model((pixels - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(features.pool, expected, atol=0.05, rtol=0)  # resized in 8 bit
    assert extractor.source == str(vision_folder) and len(extractor.weights_hash) == 64
