"""LPIPS v0.1 on VGG16 (Zhang et al. 2018), in plain torch: a metric, and a differentiable loss."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .weights import load_exactly, read_weights

# VGG16's convolutions by stage; a stage ends where its features are compared, and the next begins with a pooling
_STAGES = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]
# in torchvision's numbering of `features`, where ReLUs and poolings count too
_TORCHVISION_LAYERS = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
MIN_SIZE = 16  # four poolings leave one pixel
EPS = 1e-10
ADVICE = (
    "LPIPS weights: take torchvision's vgg16-397923af.pth (download.pytorch.org/models) and vgg.pth from "
    "lpips/weights/v0.1 of richzhang/PerceptualSimilarity, and convert them by "
    "`python examples/convert_metric_weights.py lpips VGG16 HEADS lpips.safetensors`."
)


class LPIPSNetwork(nn.Module):
    """Perceptual distance of two images: weighted squared differences of unit-length VGG16 features.

    Frozen, in evaluation mode, and differentiable with respect to both images. A fresh one has random weights:
    `load_lpips` loads the real ones.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        stages = []
        for widths in _STAGES:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ParameterList([nn.Parameter(torch.rand(widths[-1])) for widths in _STAGES])
        # ImageNet's mean and standard deviation, for pixels in [-1, 1], in the rounding of the original
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features of the five stages."""
        x = (images - self.shift) / self.scale
        features = []
        for index, stage in enumerate(self.stages):
            if index:
                x = F.max_pool2d(x, 2)
            for conv in stage:  # type: ignore[union-attr]
                x = F.relu(conv(x))
            # the gradient of this norm is 0, not NaN, where all channels are
            features.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS))
        return features

    def forward(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Distance of each image to its reference, ``(B,)``, at least 0.

        Args:
            images, references: ``(B, 3, H, W)`` in [-1, 1], at least 16 pixels wide and high.

        Raises:
            ValueError: for other shapes.
        """
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares images (B, 3, H, W), got {tuple(images.shape)} and {tuple(references.shape)}."
            )
        if min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(f"LPIPS needs images of {MIN_SIZE} pixels or more, got {tuple(images.shape[2:])}.")
        distance = images.new_zeros(len(images))
        for head, x, y in zip(self.heads, self.features(images), self.features(references), strict=True):
            difference = (x - y).square().mean(dim=(2, 3))
            distance = distance + (difference * head).sum(dim=1)
        return distance


def load_lpips(source: str | None, image_size: tuple[int, int] | None = None) -> LPIPSNetwork:
    """The network with weights from a converted file or a Hub repository (see `dar_hf.metrics.weights.find_weights`).

    Args:
        source: the file or repository.
        image_size: (height, width) of the images to compare, where it is known.

    Raises:
        ValueError: for images that are too small, and without weights or with others', saying how to get them.
    """
    if image_size is not None and min(image_size) < MIN_SIZE:
        raise ValueError(
            f"LPIPS needs images of {MIN_SIZE} pixels or more, these are {image_size}: --perceptual_weight 0."
        )
    if source is None:
        raise ValueError(f"LPIPS needs weights. {ADVICE}")
    network = LPIPSNetwork()
    load_exactly(network, read_weights(source), source, ADVICE)
    return network


def convert_lpips(vgg: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under our names, float32.

    Args:
        vgg: torchvision's VGG16, ``features.N.weight`` and ``.bias``; its classifier is left out.
        heads: LPIPS v0.1 for VGG, ``lin{0..4}.model.1.weight (1, C, 1, 1)``.

    Raises:
        ValueError: for other names or shapes.
    """
    converted = {}
    try:
        for stage, layers in enumerate(_TORCHVISION_LAYERS):
            for place, layer in enumerate(layers):
                for part in ("weight", "bias"):
                    converted[f"stages.{stage}.{place}.{part}"] = vgg[f"features.{layer}.{part}"].float()
            converted[f"heads.{stage}"] = heads[f"lin{stage}.model.1.weight"].float().flatten()
    except KeyError as error:
        raise ValueError(f"no {error} in the file to convert. {ADVICE}") from error
    load_exactly(LPIPSNetwork(), converted, "the files to convert", ADVICE)
    return converted
