"""Codes of a whole data set, made once: the tokenizer need not run while the language model trains.

A stored set is a folder of parquet shards with ``codes.json`` next to them, the stamp that says which tokenizer, crops
and size the codes are of. `dar_hf.training` reads no set whose stamp does not fit.
"""

import glob
import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from ..data import ImageSamples, ImageTransform, load_images
from ..data.loading import clear_errors
from ..data.splits import DataArguments, load_validation, random_subset, validation_samples
from ..tokenizer_dar import DARTokenizer
from ..utils.files import read_object
from ..utils.fingerprint import weights_fingerprint

logger = logging.getLogger(__name__)

STAMP_FILE = "codes.json"
SHARDS = "train-*.parquet"
MUST_AGREE = ("tokenizer", "size", "crop", "flip", "codebook_size", "num_tokens")
ENCODE_BATCH = 128


def num_variants(transform: ImageTransform) -> int:
    """How many codes each image has.

    Raises:
        ValueError: if they cannot be counted (random crops, noise).
    """
    if transform.num_variants is None:
        raise ValueError("codes are stored of variants that can be counted: crop=center or ten, and no pixel_noise.")
    return transform.num_variants


def encode_variants(samples: ImageSamples, indices: range, tokenizer: DARTokenizer) -> tuple[torch.Tensor, list[int]]:
    """Codes of all countable variants of some images, ``(n, variants, tokens)`` on the CPU, and which images they are.

    Images that cannot be read are left out, with a warning.
    """
    transform = samples.transform
    found = {index: image for index in indices if (image := samples.readable_image(index)) is not None}
    kept = list(found)
    if not kept:
        return torch.empty(0, num_variants(transform), tokenizer.config.num_tokens, dtype=torch.long), kept
    stacks = (
        torch.stack([transform.render(image, variant) for image in found.values()])
        for variant in range(num_variants(transform))
    )
    return torch.stack([tokenizer.encode(stack.to(tokenizer.device)).codes.cpu() for stack in stacks], dim=1), kept


def in_batches(indices: range, size: int) -> list[range]:
    """The indices in batches of ``size``, the last one perhaps smaller."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def encode_images(
    samples: ImageSamples, batches: list[range], tokenizer: DARTokenizer, progress: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Codes of the images that can be read, encoded batch by batch, and their labels."""
    batches = batches or [range(0)]  # nothing to do makes one empty part
    shown = tqdm(batches, desc="codes", disable=not progress, mininterval=1.0)
    parts = [encode_variants(samples, batch, tokenizer) for batch in shown]
    labels = [samples.labels[index] for _, kept in parts for index in kept]
    return torch.cat([codes for codes, _ in parts]), labels


class CodeSamples(torch.utils.data.Dataset):
    """Codes and labels by ``(index, seed)``; the seed picks the crop, as it does for images.

    Args:
        codes: ``codes[index]`` is ``(variants, tokens)``.
        labels: what each image is of, as in `ImageSamples`.
        transform: what makes the variants of images.
    """

    def __init__(self, codes: Any, labels: Any, transform: ImageTransform):
        self.codes = codes
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        codes = self.codes[index][self.transform.variant(seed)]
        return {"codes": codes, "label": self.labels[index], "seed": seed}


def encode_all(samples: ImageSamples, tokenizer: DARTokenizer) -> CodeSamples:
    """Every image's codes in the memory of each process; all processes together make them, in the same batches as one.

    Raises:
        ValueError: if the transform's variants cannot be counted (random crops, noise), or no image can be read.
    """
    num_variants(samples.transform)
    state = PartialState()
    with state.split_between_processes(in_batches(range(len(samples)), ENCODE_BATCH)) as mine:
        parts = gather_object([encode_images(samples, mine, tokenizer, progress=state.is_main_process)])
    labels = [label for _, labels in parts for label in labels]
    if not labels:
        raise ValueError(f"none of the {len(samples)} images can be read.")
    return CodeSamples(torch.cat([codes for codes, _ in parts]), labels, samples.transform)


class _StoredCodes:
    """Rows of a stored set as tensors; the set stays on disk."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.select_columns("codes").with_format("numpy")

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.dataset[index]["codes"].astype("int64"))


def load_codes(source: str, tokenizer: DARTokenizer, transform: ImageTransform) -> datasets.Dataset:
    """A stored set of codes, with the columns "codes" and "label" (a `datasets.ClassLabel`) or "caption".

    Args:
        source: folder or Hub id.
        tokenizer, transform: what the codes must be of.

    Raises:
        ValueError: if there is no finished set, it is damaged, or it is of another tokenizer, crop or size.
    """
    stamp, files = _find_codes(source)
    wanted = make_stamp(tokenizer, transform)
    wrong = [f"{name} {stamp.get(name)}, not {wanted[name]}" for name in MUST_AGREE if stamp.get(name) != wanted[name]]
    if wrong:
        raise ValueError(
            f"the codes in {source} do not fit this run: they are of {'; '.join(wrong)}. Extract them again with "
            "examples/extract_codes.py, or give the options that they were made with."
        )
    with clear_errors(source):
        dataset = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
    if len(dataset) != stamp.get("num_rows"):
        raise ValueError(f"{source} holds {len(dataset)} rows, its stamp says {stamp.get('num_rows')}.")
    return dataset


def code_splits(
    args: DataArguments, source: str, tokenizer: DARTokenizer
) -> tuple[CodeSamples, ImageSamples | None, datasets.ClassLabel | None]:
    """Stored codes to train on, images to validate on where ``args`` name a data set, and the classes of both.

    With captions, where ``args`` name a column of them, there are no classes.

    Raises:
        ValueError: for codes without the labels or captions that are needed, and as `load_codes`.
    """
    size = tokenizer.image_size
    channels = tokenizer.config.in_channels
    transform = args.train_transform(size, channels)
    dataset = load_codes(source, tokenizer, transform)
    column = "caption" if args.caption_column else "label"
    if column not in dataset.features:
        held = "captions: give --caption_column" if column == "label" else "labels: leave out --caption_column"
        raise ValueError(f"the codes in {source} have no {column}s but {held}, or extract them again.")
    classes = dataset.features.get("label")
    validation = None
    if args.dataset_name:
        class_names = classes.names if classes else None
        load_split = partial(load_images, **args.source(with_labels=True), class_names=class_names)
        validation = load_validation(args, load_split)
    if validation is None:
        logger.warning("no split to validate on: images of stored codes cannot be held out")
    dataset = random_subset(dataset, args.max_train_samples, args.seed)
    samples = CodeSamples(_StoredCodes(dataset), dataset[column][:], transform)
    return samples, validation_samples(validation, size, channels, args), classes


def _find_codes(source: str) -> tuple[dict, list[str]]:
    """Stamp of a finished set, and patterns for its shards."""
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            return read_object(folder / STAMP_FILE), [glob.escape(str(path)) for path in sorted(folder.glob(SHARDS))]
        stamp = read_object(Path(hf_hub_download(source, STAMP_FILE, repo_type="dataset")))
    except (OSError, ValueError) as error:  # of the Hub's client, too
        raise ValueError(
            f"no finished set of codes at {source!r}: no readable {STAMP_FILE}, which examples/extract_codes.py "
            f"leaves last. ({error})"
        ) from error
    return stamp, [f"hf://datasets/{source}/train-*.parquet"]


def make_stamp(tokenizer: DARTokenizer, transform: ImageTransform) -> dict[str, Any]:
    """What codes are of: tokenizer, crops and size."""
    return {
        "tokenizer": weights_fingerprint(tokenizer.state_dict()),
        "size": list(tokenizer.image_size),
        "crop": transform.crop,
        "flip": transform.flip and transform.crop != "ten",  # the ten crops hold mirrored ones in any case
        "codebook_size": tokenizer.config.codebook_size,
        "num_tokens": tokenizer.config.num_tokens,
        "variants": num_variants(transform),
    }
