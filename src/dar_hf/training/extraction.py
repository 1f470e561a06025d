"""Codes of a whole data set, made and stored once; `codes` reads them."""

import fnmatch
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from accelerate import Accelerator
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi
from pyarrow.parquet import read_metadata
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from ..data import ImageSamples, ImageTransform, load_images
from ..data.batches import LABELS
from ..hub import advice, matching_files, prepare_repository, push_card
from ..hub.blocks import sign
from ..tokenizer_dar import DARTokenizer
from ..utils.files import read_object, write_json, write_text
from ..utils.loading import load
from ..utils.options import expand_path, reject_empty_texts
from .codes import SHARDS, STAMP_FILE, encode_images, in_batches, make_stamp
from .fingerprint import data_fingerprint

logger = logging.getLogger(__name__)

UNFINISHED_FILE = "extraction.json"  # the stamp of a set whose shards are not all there
UINT16_CODES = 1 << 16
CARD = """---
tags: [dar, image-codes]
---

<!-- dar-hf:about -->
# Image codes

Codes of `{dataset}` ({split}, {num_images:,} images) under a D-AR tokenizer, {variants} per row: `codes` is
(variants, tokens), in the order of the crops of `dar_hf.data.ImageTransform`. `codes.json` says which tokenizer
(a hash of its weights), crop and size they are of; `examples/train.py ar --codes` takes no others.
<!-- /dar-hf:about -->
"""


@dataclass
class ExtractArguments:
    """Options of examples/extract_codes.py."""

    tokenizer: str = HfArg(default="", help="folder or Hub id of the trained tokenizer")
    dataset_name: str = HfArg(default="", help="digits, a folder, a parquet or tar file, or a Hub id")
    output_dir: str = HfArg(default="outputs/codes", help="folder for the codes; an unfinished one is continued")
    split: str = HfArg(default="train", help="split to encode")
    dataset_config_name: str | None = HfArg(default=None, help="configuration of a Hub data set")
    image_column: str = HfArg(default="image", help="column with the images")
    label_column: str = HfArg(default="label", help="column with the classes")
    caption_column: str | None = HfArg(default=None, help="column with captions, to be stored instead of classes")
    crop: str = HfArg(default="ten", help="center or ten")
    flip: bool = HfArg(default=False, help="also the mirrored images; the ten crops hold them in any case")
    batch_size: int = HfArg(default=128, help="images per forward pass")
    shard_size: int = HfArg(default=8192, help="images per shard, the unit of an interrupted extraction")
    push_to_hub: bool = HfArg(default=False, help="upload the finished set")
    hub_dataset_id: str | None = HfArg(default=None, help="repository to upload to; default the name of output_dir")
    hub_private_repo: bool = HfArg(default=False, help="create that repository as a private one")

    def __post_init__(self):
        self.output_dir = expand_path(self.output_dir)
        reject_empty_texts(self)
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
    tokenizer = load(DARTokenizer, args.tokenizer, "tokenizer").to(accelerator.device).eval()
    transform = ImageTransform(tokenizer.image_size, tokenizer.config.in_channels, args.crop, args.flip)
    with accelerator.main_process_first():
        dataset = load_images(
            args.dataset_name,
            args.split,
            config_name=args.dataset_config_name,
            image_column=args.image_column,
            label_column=args.label_column,
            caption_column=args.caption_column,
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
    (column,) = set(LABELS) & set(samples.dataset.features)
    features = datasets.Features({"codes": datasets.Array2D(shape, dtype), column: samples.dataset.features[column]})
    starts = range(0, len(samples), stamp["shard_size"])
    own = range(accelerator.process_index, len(starts), accelerator.num_processes)
    for shard in tqdm(own, desc="shards", disable=not accelerator.is_main_process, mininterval=1.0):
        path = folder / f"train-{shard:05d}-of-{len(starts):05d}.parquet"
        if _is_whole(path):
            continue
        stop = min(starts[shard] + stamp["shard_size"], len(samples))
        codes, labels = encode_images(samples, in_batches(range(starts[shard], stop), batch_size), tokenizer)
        columns = {"codes": codes.numpy().astype(dtype), column: labels}
        temporary = path.with_name(f".{path.name}.tmp")
        datasets.Dataset.from_dict(columns, features=features).to_parquet(temporary)
        os.replace(temporary, path)
