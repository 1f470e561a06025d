"""Images and labels for both stages: where they come from, how they are cut, and the order in which they are seen."""

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
from .transforms import ImageTransform, center_crop, convert_channels, random_crop, ten_crop

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
    "load_images",
    "normal_noise",
    "random_crop",
    "sample_times",
    "stream_images",
    "ten_crop",
]
