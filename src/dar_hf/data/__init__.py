"""Images and labels for both stages: where they come from, how they are cut, and the order in which they are seen."""

from ..images_dar import center_crop, convert_channels, image_to_pixels, read_image, to_tensor
from .batches import (
    UNREADABLE,
    DataError,
    GlobalBatchSampler,
    ImageSamples,
    SeedFor,
    collate,
    draw_seed,
    dropped,
    normal_noise,
    sample_times,
)
from .sources import available_splits, load_images, stream_images
from .streaming import BatchStream, StreamedImages
from .transforms import ImageTransform, random_crop, ten_crop

__all__ = [
    "BatchStream",
    "DataError",
    "StreamedImages",
    "UNREADABLE",
    "collate",
    "GlobalBatchSampler",
    "ImageSamples",
    "ImageTransform",
    "SeedFor",
    "available_splits",
    "center_crop",
    "convert_channels",
    "draw_seed",
    "dropped",
    "image_to_pixels",
    "load_images",
    "normal_noise",
    "random_crop",
    "read_image",
    "sample_times",
    "stream_images",
    "ten_crop",
    "to_tensor",
]
