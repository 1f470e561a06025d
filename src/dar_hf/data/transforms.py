"""Image transforms with pillow and torch: the crops of ADM, the ten crops of LlamaGen, and pixels in [-1, 1].

torchvision is left out on purpose: it cannot be imported next to every build of torch, and nothing here needs it.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

CROPS = ("center", "random", "ten")
TEN_CROP_MARGIN = 1.1  # LlamaGen cuts its ten crops out of a centre crop this much larger


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image upright and in the mode that 1 (grey) or 3 (RGB) channels ask for.

    The EXIF rotation is applied, transparency is laid on white, and 16-bit images are scaled to 8 bits instead of
    clipped.

    Raises:
        ValueError: for another number of channels.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"images have 1 or 3 channels, got {channels}.")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(modes[channels])


def _resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Shrink or grow until the image just covers ``height x width``: boxes by half first, then bicubic (ADM)."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _cut(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM's centre crop: resize until the size is just covered, keep the middle."""
    image = _resize_to_cover(image, height, width)
    return _cut(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def random_crop(
    image: Image.Image, height: int, width: int, rng: random.Random, min_scale: float = 0.8
) -> Image.Image:
    """ADM's random crop: a random window of ``min_scale`` to 1.0 of the largest one that fits."""
    side = min(height, width)
    scale = rng.randint(side, math.ceil(side / min_scale)) / side
    image = _resize_to_cover(image, round(height * scale), round(width * scale))
    return _cut(image, rng.randint(0, image.height - height), rng.randint(0, image.width - width), height, width)


def ten_crop(image: Image.Image, height: int, width: int, index: int) -> Image.Image:
    """One of ten crops: four corners and the centre of a 1.1 times larger centre crop, plain (0-4) or mirrored (5-9).

    Raises:
        ValueError: for an index outside [0, 10).
    """
    if not 0 <= index < 10:
        raise ValueError(f"ten_crop has crops 0 to 9, got {index}.")
    image = center_crop(image, int(height * TEN_CROP_MARGIN), int(width * TEN_CROP_MARGIN))
    bottom, right = image.height - height, image.width - width
    top, left = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)][index % 5]
    image = _cut(image, top, left, height, width)
    return ImageOps.mirror(image) if index >= 5 else image


@dataclass(frozen=True)
class ImageTransform:
    """A PIL image to a ``(channels, height, width)`` float32 tensor in [-1, 1].

    Args:
        size: (height, width) in pixels.
        channels: 1 or 3.
        crop: "center", "random" (scale 0.8 to 1.0) or "ten" (one of ten crops, mirrored ones included).
        flip: mirror half of the images; with "ten" the crops decide.
        noise: deviation of normal noise on the pixels (in the units of [-1, 1]); the result is clamped.

    Raises:
        ValueError: for an unknown crop or negative noise.
    """

    size: tuple[int, int]
    channels: int = 3
    crop: str = "center"
    flip: bool = False
    noise: float = 0.0

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}.")
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}.")

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
            pixels = to_tensor(ImageOps.mirror(image) if self.flip and rng.random() < 0.5 else image)
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
        return to_tensor(ImageOps.mirror(image) if variant else image)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit image to ``(C, H, W)`` float32 in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()
