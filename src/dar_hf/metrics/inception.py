"""The Inception network of FID: the TensorFlow graph of 2015-12-05 in plain torch.

The graph differs from the published Inception v3, and from torchvision's, where the usual metrics depend on it:

- images 0 to 255 are resized to 299 by TensorFlow 1's bilinear rule (pixel corners, no antialiasing), then scaled
  as (x - 128) / 128;
- average pooling inside the blocks does not count the padding;
- the last block pools by maximum;
- there are 1008 classes, and the score uses their logits without bias.

Module names are torchvision's, which the two usual weight files share. Facts from the graph itself, pytorch-fid,
torch-fidelity and guided-diffusion's evaluator; sFID's layer is `mixed_6/conv`, here the first branch of Mixed_6d.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .image_features import ImageFeatures
from .weights import load_exactly, read_weights

INPUT_SIZE = 299
NUM_SPATIAL_CHANNELS = 7  # of mixed_6/conv, for sFID
ADVICE = (
    "FID's Inception weights: download pt_inception-2015-12-05-6726825d.pth from mseitzer/pytorch-fid's releases, or "
    "weights-inception-2015-12-05-6726825d.pth from toshas/torch-fidelity's, and convert it by "
    "`python examples/convert_metric_weights.py inception FILE inception.safetensors`."
)


def resize_like_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of ``(B, C, H, W)`` to ``(B, C, size, size)``, without aligned corners.

    Output pixel i is read at ``i * H / size``, not at pixel centres, as is usual today.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        # positions in float32, as the graph computes them
        positions = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = positions.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        weight = (positions - low).to(images.dtype).unflatten(0, (-1,) + (1,) * (3 - axis))
        start = images.index_select(axis, low)
        images = start + (images.index_select(axis, high) - start) * weight
    return images


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _same(in_channels: int, out_channels: int, kernel: int | tuple[int, int] = 1) -> BasicConv2d:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return BasicConv2d(in_channels, out_channels, kernel, padding=(height // 2, width // 2))


def _average_pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionBlock(nn.Module):
    """One block: branches of named convolutions on the same input, concatenated.

    Subclasses set ``branches``: names of the convolutions of each branch, in order; a tuple instead of a name
    stands for convolutions side by side. The name "pool" is the block's pooling.
    """

    branches: list[list]

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return _average_pool(x)

    def run(self, branch: list, x: torch.Tensor) -> torch.Tensor:
        for name in branch:
            if isinstance(name, tuple):
                x = torch.cat([getattr(self, part)(x) for part in name], dim=1)
            else:
                x = getattr(self, name)(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.run(branch, x) for branch in self.branches], dim=1)


class InceptionA(InceptionBlock):
    """35x35: 1x1, 5x5, two 3x3."""

    branches = [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        ["pool", "branch_pool"],
    ]

    def __init__(self, dim: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = _same(dim, 64)
        self.branch5x5_1 = _same(dim, 48)
        self.branch5x5_2 = _same(48, 64, 5)
        self.branch3x3dbl_1 = _same(dim, 64)
        self.branch3x3dbl_2 = _same(64, 96, 3)
        self.branch3x3dbl_3 = _same(96, 96, 3)
        self.branch_pool = _same(dim, pool_channels)


class InceptionB(InceptionBlock):
    """35x35 to 17x17."""

    branches = [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["pool"]]

    def __init__(self, dim: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(dim, 384, 3, stride=2)
        self.branch3x3dbl_1 = _same(dim, 64)
        self.branch3x3dbl_2 = _same(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=2)


class InceptionC(InceptionBlock):
    """17x17: 1x1, 7x7 in two steps, 7x7 twice in four."""

    branches = [
        ["branch1x1"],
        ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
        ["pool", "branch_pool"],
    ]

    def __init__(self, dim: int, inner: int):
        super().__init__()
        row = (1, 7)
        column = (7, 1)
        self.branch1x1 = _same(dim, 192)
        self.branch7x7_1 = _same(dim, inner)
        self.branch7x7_2 = _same(inner, inner, row)
        self.branch7x7_3 = _same(inner, 192, column)
        self.branch7x7dbl_1 = _same(dim, inner)
        self.branch7x7dbl_2 = _same(inner, inner, column)
        self.branch7x7dbl_3 = _same(inner, inner, row)
        self.branch7x7dbl_4 = _same(inner, inner, column)
        self.branch7x7dbl_5 = _same(inner, 192, row)
        self.branch_pool = _same(dim, 192)


class InceptionD(InceptionBlock):
    """17x17 to 8x8."""

    branches = [
        ["branch3x3_1", "branch3x3_2"],
        ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
        ["pool"],
    ]

    def __init__(self, dim: int):
        super().__init__()
        self.branch3x3_1 = _same(dim, 192)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _same(dim, 192)
        self.branch7x7x3_2 = _same(192, 192, (1, 7))
        self.branch7x7x3_3 = _same(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=2)


class InceptionE(InceptionBlock):
    """8x8: branches that split into a row and a column convolution."""

    branches = [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        ["pool", "branch_pool"],
    ]

    def __init__(self, dim: int, max_pool: bool):
        super().__init__()
        row = (1, 3)
        column = (3, 1)
        self.max_pool = max_pool
        self.branch1x1 = _same(dim, 320)
        self.branch3x3_1 = _same(dim, 384)
        self.branch3x3_2a = _same(384, 384, row)
        self.branch3x3_2b = _same(384, 384, column)
        self.branch3x3dbl_1 = _same(dim, 448)
        self.branch3x3dbl_2 = _same(448, 384, 3)
        self.branch3x3dbl_3a = _same(384, 384, row)
        self.branch3x3dbl_3b = _same(384, 384, column)
        self.branch_pool = _same(dim, 192)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)


class InceptionNetwork(nn.Module):
    """FID's Inception: images to pooled features, sFID's spatial features and the score's logits.

    A fresh one has random weights: `load_inception` loads the real ones.

    Args:
        with_logits: False leaves out the last layer, for weights that do not have it.
    """

    def __init__(self, with_logits: bool = True):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = _same(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008, bias=False) if with_logits else None

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        """Features of images.

        Args:
            images: ``(B, 3, H, W)`` of any size, 0 to 255 (uint8 or float).

        Returns:
            ``pool (B, 2048)``, ``spatial (B, 2023)`` in the graph's order (row, column, channel), ``logits (B, 1008)``
            without bias, or None.
        """
        x = resize_like_tensorflow(images.to(self.Conv2d_1a_3x3.conv.weight.dtype), INPUT_SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean(dim=(2, 3))
        logits = None if self.fc is None else self.fc(pool)
        return ImageFeatures(pool=pool, spatial=spatial, logits=logits)


def load_inception(source: str | None) -> InceptionNetwork:
    """The network with weights from a converted file or a Hub repository (see `dar_hf.metrics.weights.find_weights`).

    Raises:
        ValueError: without weights or with others', saying how to get them.
    """
    if source is None:
        raise ValueError(f"the features inception need weights. {ADVICE}")
    return _build(read_weights(source), source)


def _build(state: Mapping[str, torch.Tensor], source: str) -> InceptionNetwork:
    network = InceptionNetwork(with_logits="fc.weight" in state)
    # batch norm's counters say nothing about a frozen network and are not stored
    counters = {name: value for name, value in network.state_dict().items() if name.endswith(".num_batches_tracked")}
    load_exactly(network, counters | dict(state), source, ADVICE)
    return network.eval().requires_grad_(False)


# pytorch-fid's module holds the same parts in four sequences, without the last layer
_SEQUENCES = [
    ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"],
    ["Conv2d_3b_1x1", "Conv2d_4a_3x3"],
    ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"],
    ["Mixed_7a", "Mixed_7b", "Mixed_7c"],
]


def convert_inception(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under our names, float32, from the released files of pytorch-fid or torch-fidelity, or from the state
    dict of pytorch-fid's module (``blocks.0.0.conv.weight``; that one has no logits, which the Inception score needs).

    Raises:
        ValueError: for other names or shapes.
    """
    converted = {}
    for key, tensor in state.items():
        key = key.removeprefix("module.")
        match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.*)", key)
        if match:
            block = int(match[1])
            place = int(match[2])
            if block >= len(_SEQUENCES) or place >= len(_SEQUENCES[block]):
                raise ValueError(f"unknown part of pytorch-fid's Inception: {key}.")
            key = f"{_SEQUENCES[block][place]}.{match[3]}"
        if key != "fc.bias" and not key.startswith("AuxLogits.") and not key.endswith(".num_batches_tracked"):
            converted[key] = tensor.float()
    _build(converted, "the file to convert")
    return converted
