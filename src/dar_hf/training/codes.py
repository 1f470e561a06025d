"""Codes of a whole data set, made once: the tokenizer need not run while the language model trains.

A stored set is a folder of parquet shards with ``codes.json`` beside them, the stamp that says which tokenizer, crops
and size the codes are of. `dar_hf.training` reads no set whose stamp does not fit.
"""

import fnmatch
import glob
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, hf_hub_download
from pyarrow.parquet import read_metadata
from tqdm.auto import tqdm

from ..data import ImageSamples, ImageTransform, load_images
from ..data.loading import clear_errors
from ..hub import advice, matching_files, prepare_repository, push_card
from ..hub.blocks import sign
from ..tokenizer_dar import DARTokenizer
from ..utils.files import read_object, write_json, write_text
from ..utils.fingerprint import weights_fingerprint
from ..utils.loading import load
from ..utils.options import check_texts, option

logger = logging.getLogger(__name__)

STAMP_FILE = "codes.json"
SHARDS = "train-*.parquet"
UNFINISHED_FILE = "extraction.json"  # the stamp of a set whose shards are not all there
MUST_AGREE = ("tokenizer", "size", "crop", "flip", "codebook_size", "num_tokens")
UINT16_CODES = 1 << 16
ENCODE_BATCH = 128
CARD = """---
tags: [dar, image-codes]
---

<!-- dar-hf:about -->
# Image codes

Codes of `{dataset}` ({split}, {num_images:,} images) under a D-AR tokenizer, {variants} a row: `codes` is
(variants, tokens), in the order of the crops of `dar_hf.data.ImageTransform`. `codes.json` says which tokenizer
(a hash of its weights), crop and size they are of; `examples/train.py ar --codes` takes no others.
<!-- /dar-hf:about -->
"""


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
    kept, images = list(found), list(found.values())
    if not images:
        return torch.empty(0, num_variants(transform), tokenizer.config.num_tokens, dtype=torch.long), kept
    stacks = (
        torch.stack([transform.render(image, variant) for image in images])
        for variant in range(num_variants(transform))
    )
    return torch.stack([tokenizer.encode(stack.to(tokenizer.device)).codes.cpu() for stack in stacks], dim=1), kept


def _batches(indices: range, size: int) -> list[range]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _encode(
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
        labels: class of each image.
        transform: what makes the variants of images.
    """

    def __init__(self, codes: Any, labels: list[int], transform: ImageTransform):
        self.codes, self.labels, self.transform = codes, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        codes = self.codes[index][self.transform.variant(seed)]
        return {"codes": codes, "label": self.labels[index], "index": index, "seed": seed}


def encode_all(samples: ImageSamples, tokenizer: DARTokenizer) -> CodeSamples:
    """Every image's codes in the memory of each process; all processes together make them, in the same batches as one.

    Raises:
        ValueError: if the transform's variants cannot be counted (random crops, noise), or no image can be read.
    """
    num_variants(samples.transform)
    state = PartialState()
    with state.split_between_processes(_batches(range(len(samples)), ENCODE_BATCH)) as mine:
        parts = gather_object([_encode(samples, mine, tokenizer, progress=state.is_main_process)])
    codes, labels = torch.cat([codes for codes, _ in parts]), [label for _, labels in parts for label in labels]
    if not labels:
        raise ValueError(f"none of the {len(samples)} images can be read.")
    return CodeSamples(codes, labels, samples.transform)


class _StoredCodes:
    """Rows of a stored set as tensors; the set stays on disk."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.select_columns("codes").with_format("numpy")

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.dataset[index]["codes"].astype("int64"))


def load_codes(source: str, tokenizer: DARTokenizer, transform: ImageTransform) -> datasets.Dataset:
    """A stored set of codes, with the columns "codes" and "label" (a `datasets.ClassLabel`).

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


def stored_samples(dataset: datasets.Dataset, transform: ImageTransform) -> CodeSamples:
    """Samples of a stored set from `load_codes`."""
    return CodeSamples(_StoredCodes(dataset), dataset["label"][:], transform)


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


# Extraction


@dataclass
class ExtractArguments:
    """Options of examples/extract_codes.py."""

    tokenizer: str = option("", "folder or Hub id of the trained tokenizer, or of a pipeline's tokenizer folder")
    dataset_name: str = option("", "digits, a folder of images or parquet files, a parquet file, or a Hub id")
    output_dir: str = option("outputs/codes", "folder for the codes; an unfinished one is continued")
    split: str = option("train", "split to encode")
    dataset_config_name: str | None = option(None, "configuration of a Hub data set")
    image_column: str = option("image", "column with the images")
    label_column: str = option("label", "column with the classes")
    crop: str = option("ten", "center or ten")
    flip: bool = option(False, "also the mirrored images; the ten crops hold them in any case")
    batch_size: int = option(128, "images per forward pass")
    shard_size: int = option(8192, "images per shard; an interrupted extraction repeats at most one of each process")
    push_to_hub: bool = option(False, "upload the finished set")
    hub_dataset_id: str | None = option(None, "repository to upload to; default the name of output_dir")
    hub_private_repo: bool = option(False, "create that repository as a private one")

    def __post_init__(self):
        check_texts(self)
        for name in ("tokenizer", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def extract_codes(args: ExtractArguments, accelerator: Accelerator) -> dict[str, Any]:
    """Encode a data set into ``args.output_dir``; processes share the shards, and shards that are there stay.

    Returns:
        The stamp of the finished set.

    Raises:
        ValueError: for a missing tokenizer or data set, a folder that holds other codes, or no image that can be read.
    """
    from .fingerprint import data_fingerprint  # which imports this file

    tokenizer = load(DARTokenizer, args.tokenizer, "tokenizer").to(accelerator.device).eval()
    transform = ImageTransform(tokenizer.image_size, tokenizer.config.in_channels, args.crop, args.flip)
    with accelerator.main_process_first():
        dataset = load_images(
            args.dataset_name,
            args.split,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            label_column=args.label_column,
        )
    samples = ImageSamples(dataset, transform, memory_budget=0)
    stamp = make_stamp(tokenizer, transform) | {
        "data": data_fingerprint(samples),
        "dataset": Path(args.dataset_name).name if Path(args.dataset_name).exists() else args.dataset_name,
        "split": args.split,
        "num_images": len(dataset),
        "shard_size": args.shard_size,
    }
    folder = Path(args.output_dir)
    with accelerator.main_process_first():
        finished = _claim_folder(folder, stamp)
    if not finished:
        _write_shards(samples, tokenizer, stamp, folder, args.batch_size, accelerator)
        accelerator.wait_for_everyone()
        _finish(folder, stamp, accelerator)
    accelerator.wait_for_everyone()
    return stamp


def _finish(folder: Path, stamp: dict[str, Any], accelerator: Accelerator) -> None:
    """Write card and stamp of a set whose shards are there; all processes call this together.

    Raises:
        ValueError: if no image could be read. The folder then is as it was before.
    """
    shards = sorted(folder.glob(SHARDS))
    rows = sum(read_metadata(path).num_rows for path in shards)
    accelerator.wait_for_everyone()  # until each has counted
    if rows == 0:
        if accelerator.is_main_process:
            for path in (*shards, folder / UNFINISHED_FILE):
                path.unlink(missing_ok=True)
        raise ValueError(f"none of the {stamp['num_images']} images can be read: there are no codes.")
    if not accelerator.is_main_process:
        return
    if rows < stamp["num_images"]:
        left_out = stamp["num_images"] - rows
        logger.warning("%d of %d images cannot be read, and have no codes", left_out, stamp["num_images"])
    write_text(folder / "README.md", sign(CARD.format(**stamp)))
    write_json(folder / STAMP_FILE, stamp | {"num_rows": rows})
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)


def push_codes(args: ExtractArguments) -> str:
    """Upload a finished set as a data set of the Hub; returns its address.

    Shards of an earlier set there are deleted; what people wrote into its card stays.

    Raises:
        ValueError: for a folder without a finished set, or whose files are links that lead out of it.
        huggingface_hub.errors.HfHubHTTPError: and the client's other exceptions, with a line of advice.
    """
    folder = Path(args.output_dir)
    files = matching_files(folder, [SHARDS, STAMP_FILE, "README.md"])
    if missing := {STAMP_FILE, "README.md"} - set(files):
        raise ValueError(f"{folder} holds no finished set of codes: it lacks {' and '.join(sorted(missing))}.")
    card = DatasetCard(files.pop("README.md").read_text(encoding="utf-8"))
    api = HfApi()
    name = args.hub_dataset_id or folder.resolve().name
    repo_id = prepare_repository(name, None, repo_type="dataset", private=args.hub_private_repo or None)
    with advice(repo_id):
        there = fnmatch.filter(api.list_repo_files(repo_id, repo_type="dataset"), SHARDS)
        operations = [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in there if name not in files),
        ]
        message = f"Upload {len(files) - 1} shards of codes"
        api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset")
    push_card(card, repo_id)
    return f"{api.endpoint}/datasets/{repo_id}"


def _claim_folder(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether the folder holds this set already, finished; an empty or unfinished one is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (STAMP_FILE, UNFINISHED_FILE):
        if (folder / name).is_file():
            found = read_object(folder / name)
            if any(found.get(key, value) != value for key, value in stamp.items()):
                raise ValueError(
                    f"{folder} holds codes of another tokenizer, data set or crop (see {name}): choose another folder."
                )
            return name == STAMP_FILE
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no codes: choose another folder.")
    write_json(folder / UNFINISHED_FILE, stamp)
    return False


def _is_whole(shard: Path) -> bool:
    """Whether a shard is there, and not cut off by a crash of the machine."""
    try:
        read_metadata(shard)
    except (FileNotFoundError, pyarrow.ArrowInvalid):
        return False
    return True


def _write_shards(
    samples: ImageSamples,
    tokenizer: DARTokenizer,
    stamp: dict[str, Any],
    folder: Path,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    """This process's share of the shards, each complete or absent."""
    dtype = "uint16" if stamp["codebook_size"] <= UINT16_CODES else "int32"
    shape = (stamp["variants"], stamp["num_tokens"])
    features = datasets.Features({"codes": datasets.Array2D(shape, dtype), "label": samples.dataset.features["label"]})
    starts = range(0, len(samples), stamp["shard_size"])
    own = range(accelerator.process_index, len(starts), accelerator.num_processes)
    for shard in tqdm(own, desc="shards", disable=not accelerator.is_main_process, mininterval=1.0):
        path = folder / f"train-{shard:05d}-of-{len(starts):05d}.parquet"
        if _is_whole(path):
            continue
        stop = min(starts[shard] + stamp["shard_size"], len(samples))
        codes, labels = _encode(samples, _batches(range(starts[shard], stop), batch_size), tokenizer)
        columns = {"codes": codes.numpy().astype(dtype), "label": labels}
        temporary = path.with_name(f".{path.name}.tmp")
        datasets.Dataset.from_dict(columns, features=features).to_parquet(temporary)
        os.replace(temporary, path)
