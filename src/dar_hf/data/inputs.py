"""The images that a command looks at: files, or a few of a data set."""

import argparse

from PIL import Image

from ..images_dar import read_image
from ..utils.commands import path_option
from .batches import ImageSamples
from .sources import load_images
from .transforms import ImageTransform


def add_input_options(parser: argparse.ArgumentParser, *, files: int | str, num_images: int) -> None:
    """Add the options that name the images: ``--images``, or ``--dataset_name``, ``--split`` and ``--num_images``.

    Args:
        files: how many files ``--images`` takes, as argparse's ``nargs``.
        num_images: default of that option.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", nargs=files, type=path_option, help="image files")
    source.add_argument("--dataset_name", help="digits, a folder of images, parquet files or a Hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--num_images", type=int, default=num_images, help="at most N images of the data set")


def load_inputs(args: argparse.Namespace, transform: ImageTransform, *, spread: bool = False) -> list[Image.Image]:
    """The images that the options of `add_input_options` name, as they are stored.

    Args:
        transform: says how many channels they are to have.
        spread: take the images of a data set from all over it instead of its first ones, which are often of one class.

    Raises:
        ValueError: for an unreadable file, or a data set without a readable image.
    """
    if args.images:
        return [read_image(path) for path in args.images]
    if args.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {args.num_images}.")
    dataset = load_images(args.dataset_name, args.split, label_column=None)
    samples = ImageSamples(dataset, transform)
    count = min(args.num_images, len(dataset))
    indices = list(range(count))
    if spread:
        indices = [index * len(dataset) // count for index in indices]
    images = [image for index in indices if (image := samples.readable_image(index)) is not None]
    if not images:
        raise ValueError(f"none of the {count} images looked at in {args.dataset_name} can be read.")
    return images
