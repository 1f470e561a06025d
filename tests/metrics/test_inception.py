"""FID's Inception: shapes by the names of the usual files, arithmetic against the graph written out once more."""

import math

import pytest
import torch
import torch.nn.functional as F

from dar_hf.metrics import InceptionNetwork, convert_inception, load_inception
from dar_hf.metrics.inception import resize_like_tensorflow
from dar_hf.metrics.weights import read_original, write_weights
from dar_hf.utils.fingerprint import weights_fingerprint


def block_shapes(kind, dim, extra=0):
    """Convolutions of a block in the usual files: name to (out, in, height, width)."""
    if kind == "A":
        return {
            "branch1x1": (64, dim, 1, 1),
            "branch5x5_1": (48, dim, 1, 1),
            "branch5x5_2": (64, 48, 5, 5),
            "branch3x3dbl_1": (64, dim, 1, 1),
            "branch3x3dbl_2": (96, 64, 3, 3),
            "branch3x3dbl_3": (96, 96, 3, 3),
            "branch_pool": (extra, dim, 1, 1),
        }
    if kind == "B":
        return {
            "branch3x3": (384, dim, 3, 3),
            "branch3x3dbl_1": (64, dim, 1, 1),
            "branch3x3dbl_2": (96, 64, 3, 3),
            "branch3x3dbl_3": (96, 96, 3, 3),
        }
    if kind == "C":
        return {
            "branch1x1": (192, dim, 1, 1),
            "branch7x7_1": (extra, dim, 1, 1),
            "branch7x7_2": (extra, extra, 1, 7),
            "branch7x7_3": (192, extra, 7, 1),
            "branch7x7dbl_1": (extra, dim, 1, 1),
            "branch7x7dbl_2": (extra, extra, 7, 1),
            "branch7x7dbl_3": (extra, extra, 1, 7),
            "branch7x7dbl_4": (extra, extra, 7, 1),
            "branch7x7dbl_5": (192, extra, 1, 7),
            "branch_pool": (192, dim, 1, 1),
        }
    if kind == "D":
        return {
            "branch3x3_1": (192, dim, 1, 1),
            "branch3x3_2": (320, 192, 3, 3),
            "branch7x7x3_1": (192, dim, 1, 1),
            "branch7x7x3_2": (192, 192, 1, 7),
            "branch7x7x3_3": (192, 192, 7, 1),
            "branch7x7x3_4": (192, 192, 3, 3),
        }
    return {
        "branch1x1": (320, dim, 1, 1),
        "branch3x3_1": (384, dim, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, dim, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, dim, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": ("A", 192, 32),
    "Mixed_5c": ("A", 256, 64),
    "Mixed_5d": ("A", 288, 64),
    "Mixed_6a": ("B", 288),
    "Mixed_6b": ("C", 768, 128),
    "Mixed_6c": ("C", 768, 160),
    "Mixed_6d": ("C", 768, 160),
    "Mixed_6e": ("C", 768, 192),
    "Mixed_7a": ("D", 768),
    "Mixed_7b": ("E", 1280),
    "Mixed_7c": ("E", 2048),
}
STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}


@pytest.fixture(scope="module")
def released():
    """Random weights under the names of the released files."""
    convolutions = dict(STEM)
    for block, options in BLOCKS.items():
        convolutions |= {f"{block}.{name}": shape for name, shape in block_shapes(*options).items()}
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    state = {}
    for name, shape in convolutions.items():
        state[f"{name}.conv.weight"] = normal(*shape) * math.sqrt(2 / math.prod(shape[1:]))
        state[f"{name}.bn.weight"] = 1 + 0.1 * normal(shape[0])
        state[f"{name}.bn.bias"] = 0.2 * normal(shape[0])
        state[f"{name}.bn.running_mean"] = 0.2 * normal(shape[0])
        state[f"{name}.bn.running_var"] = 1 + 0.1 * normal(shape[0]).abs()
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state | {"fc.weight": normal(1008, 2048) / 50, "fc.bias": 9 * normal(1008)}


@pytest.fixture(scope="module")
def network(released, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    write_weights(convert_inception(released), path)
    return load_inception(str(path))


def resized_by_hand(image, size):
    """One channel, pixel by pixel: TensorFlow 1 reads output pixel i at i * length / size."""
    height, width = image.shape
    result = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = image[top, left] * (1 - dx) + image[top, right] * dx
            lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
            result[i, j] = upper * (1 - dy) + lower * dy
    return result


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 13), (40, 30)])
def test_resize_is_tensorflow_1s(height, width):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    result = resize_like_tensorflow(images, 21)
    for image, expected in zip(result.flatten(0, 1), images.flatten(0, 1), strict=True):
        torch.testing.assert_close(image.double(), resized_by_hand(expected.double(), 21), atol=1e-3, rtol=0)


def test_resize_is_not_the_one_of_pixel_centres():
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(
        resize_like_tensorflow(images, 21), F.interpolate(images, size=21, mode="bilinear"), atol=1e-2
    )
    torch.testing.assert_close(resize_like_tensorflow(images, 8), images)


class Graph:
    """The graph once more, block by block on plain functions, as the published descriptions have it."""

    def __init__(self, state):
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def conv(self, x, name, stride=1, padding=0):
        w = self.state
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + 0.001).sqrt()
        shift = w[f"{name}.bn.bias"] - w[f"{name}.bn.running_mean"] * scale
        return (x * scale[:, None, None] + shift[:, None, None]).clamp_min(0)

    def chain(self, x, block, *steps):
        for name, *padding in steps:
            x = self.conv(x, f"{block}.{name}", padding=tuple(padding) or 0)
        return x

    @staticmethod
    def average(x):
        ones = torch.ones_like(x[:, :1])
        total = F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
        return total / F.avg_pool2d(ones, 3, 1, 1, divisor_override=1)  # only pixels of the image count

    def a(self, x, b):
        return torch.cat(
            [
                self.chain(x, b, ("branch1x1",)),
                self.chain(x, b, ("branch5x5_1",), ("branch5x5_2", 2, 2)),
                self.chain(x, b, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)),
                self.chain(self.average(x), b, ("branch_pool",)),
            ],
            1,
        )

    def b(self, x, b):
        inner = self.chain(x, b, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1))
        return torch.cat(
            [
                self.conv(x, f"{b}.branch3x3", 2),
                self.conv(inner, f"{b}.branch3x3dbl_3", 2),
                F.max_pool2d(x, 3, 2),
            ],
            1,
        )

    def c(self, x, b):
        long = [("branch7x7dbl_1",), ("branch7x7dbl_2", 3, 0), ("branch7x7dbl_3", 0, 3), ("branch7x7dbl_4", 3, 0)]
        return torch.cat(
            [
                self.chain(x, b, ("branch1x1",)),
                self.chain(x, b, ("branch7x7_1",), ("branch7x7_2", 0, 3), ("branch7x7_3", 3, 0)),
                self.chain(x, b, *long, ("branch7x7dbl_5", 0, 3)),
                self.chain(self.average(x), b, ("branch_pool",)),
            ],
            1,
        )

    def d(self, x, b):
        inner = self.chain(x, b, ("branch7x7x3_1",), ("branch7x7x3_2", 0, 3), ("branch7x7x3_3", 3, 0))
        return torch.cat(
            [
                self.conv(self.chain(x, b, ("branch3x3_1",)), f"{b}.branch3x3_2", 2),
                self.conv(inner, f"{b}.branch7x7x3_4", 2),
                F.max_pool2d(x, 3, 2),
            ],
            1,
        )

    def e(self, x, b, pooled):
        short = self.chain(x, b, ("branch3x3_1",))
        long = self.chain(x, b, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1))
        return torch.cat(
            [
                self.chain(x, b, ("branch1x1",)),
                self.chain(short, b, ("branch3x3_2a", 0, 1)),
                self.chain(short, b, ("branch3x3_2b", 1, 0)),
                self.chain(long, b, ("branch3x3dbl_3a", 0, 1)),
                self.chain(long, b, ("branch3x3dbl_3b", 1, 0)),
                self.chain(pooled, b, ("branch_pool",)),
            ],
            1,
        )

    def run(self, x):
        """Images resized and scaled already."""
        x = self.conv(x, "Conv2d_1a_3x3", 2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        x = self.conv(self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = F.max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(x, block)
        x = self.c(self.c(self.b(x, "Mixed_6a"), "Mixed_6b"), "Mixed_6c")
        spatial = self.conv(x, "Mixed_6d.branch1x1")
        x = self.d(self.c(self.c(x, "Mixed_6d"), "Mixed_6e"), "Mixed_7a")
        x = self.e(x, "Mixed_7b", self.average(x))
        x = self.e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.state["fc.weight"].T


def test_features_are_the_graphs(network, released):
    images = torch.randint(0, 256, (2, 3, 40, 33), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    output = network.double()(images)
    network.float()
    resized = resize_like_tensorflow(images.double(), 299)
    pool, spatial, logits = Graph(released).run((resized - 128) / 128)
    assert pool.shape == (2, 2048) and spatial.shape[2:] == (17, 17)
    torch.testing.assert_close(output.pool, pool, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.logits, logits, rtol=1e-6, atol=1e-6)
    # TensorFlow's order: row, column, channel
    torch.testing.assert_close(output.spatial.unflatten(1, (17, 17, 7)), spatial[:, :7].permute(0, 2, 3, 1))


def test_logits_have_no_bias(network):
    assert network.fc.bias is None


# Converting


def as_module(released):
    """The state dict of pytorch-fid's module, which holds the parts in sequences."""
    sequences = [
        ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", None],
        ["Conv2d_3b_1x1", "Conv2d_4a_3x3", None],
        [name for name in BLOCKS if name < "Mixed_7"],
        [name for name in BLOCKS if name > "Mixed_7"],
    ]
    places = {name: f"blocks.{i}.{j}" for i, names in enumerate(sequences) for j, name in enumerate(names) if name}
    parts = {name: name.split(".", 1) for name in released if not name.startswith("fc.")}
    return {f"{places[first]}.{rest}": released[name] for name, (first, rest) in parts.items()}


def test_the_released_file_converts_by_name(released, network, tmp_path):
    torch.save(released, tmp_path / "pt_inception.pth")
    converted = convert_inception(read_original(tmp_path / "pt_inception.pth"))
    state = network.state_dict()
    assert converted.keys() == {name for name in state if not name.endswith(".num_batches_tracked")}
    assert all(torch.equal(converted[name], state[name]) for name in converted)


def test_files_without_counters_with_prefix_or_auxiliary_head_convert_to_the_same(released):
    expected = weights_fingerprint(convert_inception(released))
    bare = {name: tensor for name, tensor in released.items() if not name.endswith("num_batches_tracked")}
    assert weights_fingerprint(convert_inception(bare)) == expected
    wrapped = {f"module.{name}": tensor for name, tensor in released.items()}
    assert weights_fingerprint(convert_inception(wrapped | {"module.AuxLogits.fc.bias": torch.zeros(1)})) == expected


def test_pytorch_fids_module_converts_without_logits(released, network, tmp_path):
    converted = convert_inception(as_module(released))
    write_weights(converted, tmp_path / "model.safetensors")
    headless = load_inception(str(tmp_path))
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    output, expected = headless(images), network(images)
    assert torch.equal(output.pool, expected.pool) and torch.equal(output.spatial, expected.spatial)
    assert output.logits is None


def test_wrong_files_are_refused(released):
    missing = {name: tensor for name, tensor in released.items() if not name.startswith("Mixed_6d")}
    with pytest.raises(ValueError, match="50 tensors are missing .Mixed_6d"):
        convert_inception(missing)
    with pytest.raises(ValueError, match="1 are unknown .head.weight"):
        convert_inception(released | {"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"fc.weight is \(1000, 2048\), not \(1008, 2048\).*pytorch-fid"):
        convert_inception(released | {"fc.weight": torch.zeros(1000, 2048)})  # torchvision's own
    with pytest.raises(ValueError, match="fc.weight is not finite"):
        convert_inception(released | {"fc.weight": torch.full((1008, 2048), math.nan)})
    with pytest.raises(ValueError, match="unknown part of pytorch-fid's Inception: blocks.4"):
        convert_inception({"blocks.4.0.conv.weight": torch.zeros(1)})


def test_without_weights_the_error_says_how_to_get_them():
    with pytest.raises(ValueError, match="convert_metric_weights.py inception"):
        load_inception(None)


def test_frozen_and_in_evaluation_mode(network):
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert isinstance(InceptionNetwork(with_logits=False).fc, type(None))
