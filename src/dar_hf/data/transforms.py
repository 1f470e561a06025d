"""What training makes of an image: the random crops of ADM, the ten crops of LlamaGen, flips and noise.

torchvision is left out on purpose: it cannot be imported next to every build of torch, and nothing here needs it.
"""

import math
import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from ..images_dar import MODES, center_crop, convert_channels, covering_size, cut, halve, resize_and_cut, to_tensor

CROPS = ("center", "random", "ten")
TEN_CROP_MARGIN = 1.1  # LlamaGen cuts its ten crops out of a centre crop this much larger


def random_crop(
    image: Image.Image, height: int, width: int, rng: random.Random, min_scale: float = 0.8
) -> Image.Image:
    """ADM's random crop: a random window of ``min_scale`` to 1.0 of the largest one that fits."""
    side = min(height, width)
    scale = rng.randint(side, math.ceil(side / min_scale)) / side
    covered = round(height * scale), round(width * scale)
    image = halve(image, *covered)
    rows, columns = covering_size(image, *covered)
    top = rng.randint(0, rows - height)
    left = rng.randint(0, columns - width)
    return resize_and_cut(image, (rows, columns), top, left, height, width)


def ten_crop(image: Image.Image, height: int, width: int, index: int) -> Image.Image:
    """One of ten crops: four corners and the centre of a 1.1 times larger centre crop, plain (0-4) or mirrored (5-9).

    Raises:
        ValueError: for an index outside [0, 10).
    """
    if not 0 <= index < 10:
        raise ValueError(f"ten_crop has crops 0 to 9, got {index}.")
    image = center_crop(image, int(height * TEN_CROP_MARGIN), int(width * TEN_CROP_MARGIN))
    bottom = image.height - height
    right = image.width - width
    top, left = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)][index % 5]
    image = cut(image, top, left, height, width)
    return ImageOps.mirror(image) if index >= 5 else image


@dataclass(frozen=True)
class ImageTransform:
    """A PIL image to a ``(channels, height, width)`` float32 tensor in [-1, 1].

    Args:
        size: (height, width) in pixels.
        channels: 1 or 3.
        crop: "center", "random" (scale 0.8 to 1.0) or "ten" (one of ten crops, mirrored ones included).
        flip: mirror half of the images; with "ten" the crops decide.
        noise: standard deviation of normal noise on the pixels (in the units of [-1, 1]); the result is clamped.

    Raises:
        ValueError: for a size that is not two positive integers, other channels than 1 and 3, an unknown crop, or
            noise that is not a finite number >= 0.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    noise: float = 0.0

    def __post_init__(self):
        sides = self.size if isinstance(self.size, (tuple, list)) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"size must be (height, width) in pixels, got {self.size!r}.")
        if self.channels not in MODES:
            raise ValueError(f"images have 1 or 3 channels, got {self.channels!r}.")
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}.")
        if not isinstance(self.noise, (int, float)) or not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must not be negative, and be finite, got {self.noise!r}.")

    @property
    def _num_cuts(self) -> int | None:
        return {"center": 1 + self.flip, "ten": 10}.get(self.crop)

    @property
    def num_variants(self) -> int | None:
        """How many different tensors one image can become; None where they cannot be counted."""
        return None if self.noise else self._num_cuts

    def variant(self, seed: int) -> int:
        """Which of the countable variants a seed selects."""
        return random.Random(seed).randrange(self._num_cuts or 1)

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """Transform; everything random about it follows from ``seed``."""
        if self._num_cuts is not None:
            pixels = self.render(image, self.variant(seed))
        else:
            rng = random.Random(seed)
            image = random_crop(convert_channels(image, self.channels), *self.size, rng)
            if self.flip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
            pixels = to_tensor(image)
        if self.noise:
            generator = torch.Generator().manual_seed(seed)
            pixels = (pixels + self.noise * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
        return pixels

    def render(self, image: Image.Image, variant: int) -> torch.Tensor:
        """One of the countable variants of an image."""
        image = convert_channels(image, self.channels)
        if self.crop == "ten":
            return to_tensor(ten_crop(image, *self.size, variant))
        image = center_crop(image, *self.size)
        if variant:
            image = ImageOps.mirror(image)
        return to_tensor(image)
