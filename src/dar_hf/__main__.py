"""What is installed, where it runs, and images of texts or classes: ``python -m dar_hf``, or ``dar-hf``.

The first word ``serve`` starts a server instead.

python -m dar_hf "noto red apple" "twemoji octopus"      # with the package's emoji pipeline
python -m dar_hf                                         # the same, with example prompts
python -m dar_hf --sample mnist 3 7                      # the package's digits, by class name or id
python -m dar_hf --pipeline outputs/digits/pipeline      # one image of each class
python -m dar_hf serve --model outputs/digits/pipeline   # a server with OpenAI's images API
python -m dar_hf -- serve                                # the text "serve"
"""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from . import DARPipeline, __version__, sample_pipeline
from .hub import describe
from .utils.commands import CommandError, check_output, command, path_option, seed_option, writing
from .utils.labels import ids_and_names
from .utils.loading import load_pipeline
from .utils.pictures import image_grid, save_picture
from .utils.sample import EMOJI_PROMPTS, SAMPLES
from .utils.threads import limit_threads

PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "huggingface_hub")
SERVER_PACKAGES = ("ray", "fastapi", "prometheus_client")
MAX_CLASSES = 10  # of a model with more, the first
COLUMNS = 5


def device_name() -> str:
    """The device that computes here, as people call it."""
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} cores in use)"


def subjects(pipe: DARPipeline, words: list[str]) -> dict[str, Any]:
    """What to draw, as the argument of the pipeline's call: prompts or classes, default each class.

    Raises:
        CommandError: if the pipeline draws from text and there is none, or from classes and a word is none of them.
    """
    config = pipe.transformer.config
    if config.text_vocab_size:
        if not words:
            raise CommandError('this pipeline draws from text: say what to draw, as in dar-hf "a red apple".')
        return {"prompt": words}
    if not words:
        return {"class_labels": list(range(min(config.num_classes, MAX_CLASSES)))}
    try:
        return {"class_labels": pipe.prepare_labels(ids_and_names(words, pipe.labels))}
    except ValueError as error:
        raise CommandError(f"this pipeline draws from classes: {error}") from error


def draw(pipe: DARPipeline, subject: dict[str, Any], seed: int, path: Path) -> int:
    """One image of each subject into one picture; returns how many. Image i is drawn with ``seed + i``."""
    (count,) = map(len, subject.values())
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    images = torch.as_tensor(pipe(**subject, generator=generators, output_type="pt", return_dict=False)[0])
    with writing(path):
        save_picture(image_grid(images * 2 - 1, min(count, COLUMNS)), path)
    return count


def serve(argv: Sequence[str]) -> None:
    """``dar-hf serve``.

    Raises:
        CommandError: where Ray Serve is not installed.
    """
    # Ray reads these when it is imported. Its ports accept commands from anyone who can reach them: so they listen on
    # this machine only, as on systems for which Ray has no clusters, and require a token
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    try:
        from .serving import command as serving
    except ModuleNotFoundError as error:
        if error.name in SERVER_PACKAGES:
            raise CommandError(
                f'serve needs Ray Serve ({error.name} is missing): pip install -c constraints.txt -e ".[serve]"'
            ) from error
        raise
    serving.main(argv)


@command("dar-hf: error")  # as argparse begins its own
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "serve":
        serve(argv[1:])
        return
    parser = argparse.ArgumentParser(prog="dar-hf", description=__doc__.splitlines()[0])
    parser.add_argument(
        "words",
        nargs="*",
        help="what to draw: texts; or class names or ids, for a class pipeline, default each class. "
        "The first word serve starts a server: dar-hf serve --help; to draw it, dar-hf -- serve",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pipeline", "--model", help="folder or Hub id")
    source.add_argument("--sample", choices=SAMPLES, default=SAMPLES[0], help="or one that comes with the package")
    parser.add_argument("--output", type=path_option, default=Path("samples.png"), help="picture to write (PNG)")
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output, folder=False)
    print(", ".join([f"dar_hf {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]))
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = args.pipeline
    words = args.words
    if model is None:
        model = sample_pipeline(args.sample)
        if args.sample == "emoji":
            words = words or EMOJI_PROMPTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(model, device=device)
    subject = subjects(pipe, words)
    pipe.set_progress_bar_config(disable=True)
    limit_threads(pipe.tokenizer, pipe.transformer)
    print(f"device: {device_name()}")
    print("model:", model)
    for name, fact in describe(pipe).items():
        print(f"  {name}: {fact}")
    started = time.perf_counter()
    count = draw(pipe, subject, args.seed, args.output)
    print(f"{args.output}: {count} images in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
