"""Images and labels for both stages: where they come from, how they are cut, and the order in which they are seen.

The files, each of which imports from those above it alone:

- `loading`: around `datasets.load_dataset`; `classes`: which labels there are, and their numbers; `captions`: texts;
- `folders`: which files of a local folder are which split; `image_folders`: folders of images as data sets;
- `sources`: a data set by its name, loaded whole or as a stream (`load_images`, `stream_images`);
- `transforms`: an image to a tensor; `batches`: samples, their order and their randomness; `streaming`: of a stream;
- `splits`: the images to train and to validate on, from the options of a run;
- `inputs`: the few images that a command looks at, from its options.
"""

from ..images_dar import center_crop, convert_channels, image_to_pixels, read_image, to_tensor
from .batches import (
    UNREADABLE,
    DataError,
    GlobalBatchSampler,
    ImageSamples,
    SeedFor,
    bernoulli_mask,
    collate,
    draw_seed,
    normal_noise,
    sample_times,
)
from .inputs import add_input_options, load_inputs
from .sources import available_splits, load_images, stream_images
from .splits import DataArguments, image_splits
from .streaming import BatchStream, StreamedImages
from .transforms import ImageTransform, random_crop, ten_crop

__all__ = [
    "BatchStream",
    "DataArguments",
    "DataError",
    "GlobalBatchSampler",
    "ImageSamples",
    "ImageTransform",
    "SeedFor",
    "StreamedImages",
    "UNREADABLE",
    "add_input_options",
    "available_splits",
    "bernoulli_mask",
    "center_crop",
    "collate",
    "convert_channels",
    "draw_seed",
    "image_splits",
    "image_to_pixels",
    "load_images",
    "load_inputs",
    "normal_noise",
    "random_crop",
    "read_image",
    "sample_times",
    "stream_images",
    "ten_crop",
    "to_tensor",
]
