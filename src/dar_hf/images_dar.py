"""Reading images: decoded, upright, in grey or RGB, cropped as ADM crops, as pixels in [-1, 1].

Training, commands, the page and `DARPipeline` all read images with these functions, so that one file gives the same
pixels everywhere. The file stands alone, because self-contained repositories carry it next to the pipeline.
"""

import io
import math
import os
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_KINDS = (Image.Image, np.ndarray, torch.Tensor)
ROUNDING = 1e-3  # how far pixels may lie outside their range
MODES = {1: "L", 3: "RGB"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# where pillow finds an image's orientation
ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
STRIP_PIXELS = 1 << 20  # large images are converted in strips of this size, so that little is held twice
MAX_RESIZED = 1 << 24  # pixels; of a resized image that would be larger, only the part that is kept is computed
BICUBIC_SUPPORT = 2  # source pixels on either side of a point, or output pixels where the image shrinks


def read_image(source: str | Path | bytes | IO[bytes], name: str | None = None) -> Image.Image:
    """A decoded image from a file or its content; of an animated one the first frame.

    Args:
        source: path, content, or an open file.
        name: what errors call it; default the path, if there is one.

    Raises:
        ValueError: if it cannot be read, with the name and the reason.
    """
    is_path = isinstance(source, (str, Path))
    if name is None and is_path:
        name = str(source)
    prefix = "" if name is None else f"{name}: "
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            load_image(image)
            return image
    except UnidentifiedImageError as error:
        raise ValueError(f"{prefix}this is no image in a known format.") from error
    except MemoryError:
        raise
    except Exception as error:  # pillow's readers raise nearly any type for damaged files
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(f"{prefix}{reason.rstrip('.')}.") from error


def load_image(image: Image.Image) -> None:
    """Decode an image that was opened, and check that its pixels have a known range.

    Raises:
        ValueError: for damaged files, images without pixels, and floating-point or 32-bit ones: nothing tells what is
            white in those.
    """
    if not isinstance(image.info.get("xmp"), bytes):
        image.info.pop("xmp", None)  # TIFF's reader searches it for the orientation, and fails for other types
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # pillow's readers raise nearly any type for damaged files
        raise ValueError(f"the image cannot be decoded: {str(error).rstrip('.')}.") from error
    if 0 in image.size or not _has_known_range(image):
        raise ValueError(
            f"an image must have pixels, of 8 bits a channel, got mode {image.mode!r} and size {image.size}; "
            "grey ones may also have 16 bits, with zero as black."
        )


def _has_known_range(image: Image.Image) -> bool:
    """Whether the values from black to white are known: 8 bits a channel, or 16 bits of grey.

    Pillow's mode "I" has 32 bits. It holds 16 bits where a PGM or PNG was opened; without a file behind it, values
    tell: those up to 255 may have any range.
    """
    if image.mode == "I":
        low, high = cast("tuple[int, int]", image.getextrema())
        if low < 0 or high >= 1 << 16:
            return False
        return image.format in ("PPM", "PNG") or (image.format is None and high > 255)
    if image.mode.startswith("I;16"):
        # pillow does not scale TIFFs of 12 bits, nor invert those whose white is zero, and swaps the bytes of FITS
        tags = getattr(image, "tag_v2", {})
        is_scaled = tags.get(ExifTags.Base.BitsPerSample) != (12,)
        return is_scaled and tags.get(ExifTags.Base.PhotometricInterpretation) != 0 and image.format != "FITS"
    return image.mode != "F"


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image upright and in the mode that 1 (grey) or 3 (RGB) channels ask for; itself, if it is that already.

    The EXIF rotation is applied, transparency is laid on white, and 16-bit images are scaled to 8 bits instead of
    clipped.

    Raises:
        ValueError: for another number of channels, and for images that `load_image` refuses.
        TypeError: for anything but a PIL image.
    """
    if isinstance(channels, bool) or channels not in MODES:
        raise ValueError(f"images have 1 or 3 channels, got {channels!r}.")
    if not isinstance(image, Image.Image):
        raise TypeError(f"the image must be a PIL image, got {type(image).__name__}.")
    load_image(image)
    turn = _turn(image)
    try:
        image = _in_mode(image, MODES[channels])
    except (TypeError, ValueError) as error:
        raise ValueError(f"an image of mode {image.mode!r} cannot be converted: {error}.") from error
    if turn is not None:
        image = image.transpose(turn)
        for source in ORIENTATION_SOURCES:  # or the image would be turned again the next time
            image.info.pop(source, None)
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What stands the image upright. A damaged EXIF block says nothing, and must not spoil the image."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # pillow raises SyntaxError, struct.error, ValueError, TypeError and others for such blocks
        return None


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    columns, rows = image.size
    rows_of_strip = max(1, STRIP_PIXELS // columns)
    if rows <= rows_of_strip:
        return _convert(image, mode)
    converted = Image.new(mode, image.size)
    for top in range(0, rows, rows_of_strip):
        strip = image.crop((0, top, columns, min(top + rows_of_strip, rows)))
        converted.paste(_convert(strip, mode), (0, top))
    return converted


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode[0] == "I":
        image = _to_8_bits(image)
    if image.mode == "La":  # grey, multiplied by alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # pillow converts it to RGB only
        image = image.convert("RGB")
    return image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits, with an alpha channel where one grey is transparent."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def halve(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image, halved by boxes while it is at least twice as large as ``height x width``."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the image when it is resized until it just covers ``height x width``."""
    scale = max(height / image.height, width / image.width)
    return max(height, round(image.height * scale)), max(width, round(image.width * scale))


def cut(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The part of an image below and right of (top, left)."""
    return image.crop((left, top, left + width, top + height))


def resize_and_cut(
    image: Image.Image, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> Image.Image:
    """Resize an image to ``size`` (height, width), bicubically, and cut a part out of the result.

    Of a long thin image, whose other parts would take gigabytes, only this part is computed.
    """
    rows, columns = size
    if (columns, rows) == image.size:
        return cut(image, top, left, height, width)
    if rows * columns <= MAX_RESIZED:
        return cut(image.resize((columns, rows), Image.Resampling.BICUBIC), top, left, height, width)
    first_row, last_row, rows_box = _source_range(image.height, rows, top, height)
    first_column, last_column, columns_box = _source_range(image.width, columns, left, width)
    image = image.crop((first_column, first_row, last_column, last_row))
    box = (columns_box[0], rows_box[0], columns_box[1], rows_box[1])
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _source_range(length: int, resized: int, start: int, count: int) -> tuple[int, int, tuple[float, float]]:
    """What ``count`` pixels from ``start`` on of an axis come from, when ``length`` pixels become ``resized``.

    Returns:
        First and last source pixel that the filter sees, and the exact range within them.
    """
    step = length / resized
    begin, end = start * step, (start + count) * step
    margin = BICUBIC_SUPPORT * max(step, 1.0) + 1
    first, last = max(0, int(begin - margin)), min(length, int(end + margin) + 1)
    return first, last, (begin - first, min(end, length) - first)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM's centre crop: halved by boxes, resized until the size is just covered, the middle kept."""
    image = halve(image, height, width)
    rows, columns = covering_size(image, height, width)
    return resize_and_cut(image, (rows, columns), (rows - height) // 2, (columns - width) // 2, height, width)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit image to ``(C, H, W)`` float32 in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def image_to_pixels(image: Image.Image, height: int, width: int, channels: int) -> torch.Tensor:
    """Pixels ``(channels, height, width)`` in [-1, 1] of an image of any size: its middle, upright.

    Raises:
        ValueError: for images that `load_image` refuses.
    """
    return to_tensor(center_crop(convert_channels(image, channels), height, width))


def image_list(name: str, images: Any) -> list:
    """Images of one kind as a list: PIL images, arrays or tensors.

    Raises:
        ValueError: for anything else, by the argument's ``name``.
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    kinds = {kind for image in images for kind in IMAGE_KINDS if isinstance(image, kind)}
    if len(kinds) != 1 or not all(isinstance(image, IMAGE_KINDS) for image in images):
        given = ", ".join(sorted({type(image).__name__ for image in images})) or "an empty list"
        raise ValueError(f"{name} must be PIL images, or arrays, or tensors, got {given}.")
    return images


def arrays_to_pixels(name: str, arrays: list, channels: int) -> torch.Tensor:
    """Pixels ``(B, C, H, W)`` in [-1, 1] of arrays ``([B,] H, W, C)`` or tensors ``([B,] C, H, W)`` of one size.

    Their values lie in [0, 1], or in [-1, 1] if any is negative.

    Raises:
        ValueError: for other shapes, types and ranges, by the argument's ``name``.
    """
    of_numpy = isinstance(arrays[0], np.ndarray)
    if of_numpy:
        floating = all(array.dtype.kind == "f" for array in arrays)
        form, axis = f"(height, width, {channels})", -1
    else:
        floating = all(array.is_floating_point() for array in arrays)
        form, axis = f"({channels}, height, width)", -3
    sizes = {tuple(array.shape[-3:]) for array in arrays}
    if not floating or len(sizes) != 1 or arrays[0].ndim not in (3, 4) or arrays[0].shape[axis] != channels:
        given = ", ".join(f"{array.dtype} of shape {tuple(array.shape)}" for array in arrays[:3])
        raise ValueError(f"{name} must be floating point in [0, 1], each of shape {form}, got {given}.")
    if of_numpy:
        arrays = [torch.from_numpy(array.astype(np.float32)).movedim(-1, -3) for array in arrays]
    pixels = torch.cat([array.reshape(-1, *array.shape[-3:]) for array in arrays])
    low, high = (float(value) for value in pixels.aminmax()) if pixels.numel() else (math.nan, math.nan)
    if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):  # also catches NaN
        raise ValueError(f"{name} must lie in [0, 1] or [-1, 1], got values from {low:.4g} to {high:.4g}.")
    if low >= -ROUNDING:
        pixels = 2 * pixels - 1
    return pixels.clamp(-1, 1)
