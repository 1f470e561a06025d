"""What is installed, where it runs, and one picture of each class: ``python -m dar_hf``, or ``dar-hf``."""

import argparse
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
import transformers

from . import DARPipeline, __version__, sample_pipeline
from .hub import describe
from .utils.commands import check_output, command, path_option, seed_option, writing
from .utils.loading import load_pipeline
from .utils.pictures import image_grid, save_picture
from .utils.threads import limit_threads

PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "huggingface_hub")
MAX_CLASSES = 10  # of a model with more, the first
COLUMNS = 5


def device_name() -> str:
    """The device that computes here, as people call it."""
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} cores in use)"


def draw(pipe: DARPipeline, seed: int, path: Path) -> int:
    """One image of each class into one picture; returns how many. Class i is drawn with ``seed + i``."""
    labels = list(range(min(pipe.transformer.config.num_classes, MAX_CLASSES)))
    generators = [torch.Generator().manual_seed(seed + label) for label in labels]
    images = torch.as_tensor(pipe(labels, generator=generators, output_type="pt", return_dict=False)[0])
    with writing(path):
        save_picture(image_grid(images * 2 - 1, COLUMNS), path)
    return len(labels)


@command("dar-hf: error")  # as argparse begins its own
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dar-hf", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="pipeline folder or Hub id; default the one that comes with the package")
    parser.add_argument("--output", type=path_option, default=Path("samples.png"), help="picture to write (PNG)")
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output, folder=False)
    print(", ".join([f"dar_hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]))
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = sample_pipeline() if args.model is None else args.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    limit_threads(pipe.tokenizer, pipe.transformer)
    print(f"device: {device_name()}")
    print("model:", model)
    for name, fact in describe(pipe).items():
        print(f"  {name}: {fact}")
    started = time.perf_counter()
    count = draw(pipe, args.seed, args.output)
    print(f"{args.output}: {count} images in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
