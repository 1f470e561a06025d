"""Make a trained pipeline one of those that the package ships: in half precision, without the files of its training.

    python examples/make_sample.py --pipeline outputs/mnist/distilled --name mnist

Replaces the folder of `dar_hf.sample_pipeline` in one step, once the new one is complete and loads.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dar_hf.utils.commands import check_output, command, path_option
from dar_hf.utils.files import new_folder, read_object, write_json
from dar_hf.utils.loading import check_weights, load_pipeline
from dar_hf.utils.sample import FOLDER, SAMPLES

MAX_BYTES = 14_000_000
CONFIGS = (
    "model_index.json",
    "tokenizer/config.json",
    "transformer/config.json",
    "transformer/generation_config.json",
    "scheduler/scheduler_config.json",
)
TEXT_TOKENIZER = "text_tokenizer"  # of a pipeline that draws from text
WEIGHTS = ("tokenizer/diffusion_pytorch_model.safetensors", "transformer/model.safetensors")


def write_config(source: Path, target: Path) -> None:
    """Copy a configuration without the path of the folder it was trained in."""
    config = read_object(source)
    config.pop("_name_or_path", None)
    target.parent.mkdir(exist_ok=True)
    write_json(target, config)


def write_half(source: Path, target: Path) -> None:
    """Copy weights in float16, which is closer to float32 than bfloat16 wherever the weights are within its range.

    Raises:
        ValueError: if one of them is not.
    """
    check_weights(source)
    weights = {}
    for name, tensor in load_file(source).items():
        weights[name] = tensor
        if tensor.is_floating_point():
            weights[name] = tensor.half()
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{source}: {name} holds values beyond the range of float16.")
    save_file(weights, target, metadata={"format": "pt"})


def convert(source: Path, target: Path) -> int:
    """Write the small copy of a pipeline folder, check that it loads, and return its size in bytes.

    Raises:
        OSError: if a file is missing, for example because the folder is not a pipeline.
        ValueError: for weights beyond float16, or a copy that is larger than ``MAX_BYTES``.
    """
    for name in CONFIGS:
        write_config(source / name, target / name)
    for path in sorted((source / TEXT_TOKENIZER).glob("*.json")):
        write_config(path, target / TEXT_TOKENIZER / path.name)
    for name in WEIGHTS:
        write_half(source / name, target / name)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        limit = f"at most {MAX_BYTES / 1e6:.0f} are shipped"
        raise ValueError(f"{source} takes {size / 1e6:.1f} MB in half precision; {limit}.")
    load_pipeline(target)
    return size


def replace(source: Path, target: Path) -> int:
    """Replace ``target`` by the small copy of ``source``; the old folder stays until the new one is complete.

    Raises:
        OSError: if the target cannot be replaced (a volume, say); the message says where the copy is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
    try:
        with new_folder(aside / "new") as folder:
            size = convert(source, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        if target.exists():
            os.replace(target, aside / "old")
        os.replace(aside / "new", target)
    except OSError as error:
        if (aside / "old").exists():
            os.replace(aside / "old", target)
        raise OSError(f"{error} The copy is complete and kept in {aside / 'new'}.") from error
    shutil.rmtree(aside, ignore_errors=True)
    return size


@command("make_sample.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=path_option, required=True, help="folder that stage 2 wrote")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--name", choices=SAMPLES, help="the package's own sample of this name is replaced")
    target.add_argument("--output_dir", type=path_option, help="or any folder")
    args = parser.parse_args(argv)
    if args.output_dir is None:
        args.output_dir = FOLDER / args.name
    check_output(args.output_dir)
    size = replace(args.pipeline, args.output_dir)
    print(f"{args.output_dir}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
