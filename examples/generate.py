"""Generate images with a D-AR pipeline, and write them, a grid of them, and their previews.

    python examples/generate.py --pipeline outputs/digits/pipeline --class_labels 3 1 4 --previews strip gif
    python examples/generate.py --pipeline outputs/text --prompt "a red apple" "a green book"    # from text
    python examples/generate.py --pipeline outputs/digits/pipeline \\
        --layout_image outputs/samples/0000.png --layout_tokens 4    # every class with the layout of one image

Writes grid.png (one row per class or prompt, or one row of single images; above it the layout or start image, as the
tokenizer reconstructs it) and 0000.png, 0001.png, ... (each image in its own size); --previews adds previews.png (one
row per step), noisy.png (in addition each step's noisy state above its preview) and previews.gif. Image i is generated
with seed + i, whatever else is generated with it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dar_hf import DARPipeline
from dar_hf.data import read_image
from dar_hf.utils.commands import add_precision_options, check_output, command, path_option, seed_option, writing
from dar_hf.utils.labels import ids_and_names
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, save_animation, save_picture

MAX_COLUMNS = 10
TIMED_RUNS = 20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="folder or Hub id")
    parser.add_argument("--output_dir", type=path_option, default=Path("outputs/samples"))
    parser.add_argument("--class_labels", nargs="+", help="names or ids; default the first ten classes")
    parser.add_argument("--prompt", nargs="+", help="texts, for a pipeline that draws from text")
    parser.add_argument(
        "--negative_prompt", nargs="+", help="what guidance leads away from: one text, or one for each"
    )
    parser.add_argument("--num_images_per_prompt", type=int, default=1, help="images per class or prompt")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="one scale, or start and end of a linear one")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--num_tokens", type=int, help="generate only the first tokens: a preview")
    parser.add_argument("--layout_image", type=path_option, help="an image whose layout every class gets")
    parser.add_argument("--layout_tokens", type=int, help="how many of its tokens are kept")
    parser.add_argument("--image", type=path_option, help="image-to-image: the image to start from")
    parser.add_argument("--strength", type=float, help="share of the steps that are generated anew, in [0, 1]")
    parser.add_argument("--previews", nargs="+", choices=["strip", "noisy", "gif"], default=[])
    parser.add_argument("--seed", type=seed_option, default=0)
    add_precision_options(parser)
    parser.add_argument(
        "--timing", action="store_true", help="also print the time to the first preview and of the whole call"
    )
    return parser.parse_args(argv)


def call_options(args: argparse.Namespace, pipe: DARPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call, without its generators."""
    labels: list[str | int] = list(range(min(pipe.transformer.config.num_classes, MAX_COLUMNS)))  # none for text
    if args.class_labels:
        labels = ids_and_names(args.class_labels, pipe.labels)
    guidance = args.guidance_scale
    if guidance and len(guidance) == 1:
        guidance = guidance[0]
    plain = (
        "prompt",
        "negative_prompt",
        "num_images_per_prompt",
        "temperature",
        "top_k",
        "top_p",
        "num_inference_steps",
        "num_tokens",
    )
    return {
        "class_labels": labels or None,
        "guidance_scale": guidance,
        "layout_image": args.layout_image and read_image(args.layout_image),
        "image": args.image and read_image(args.image),
        "layout_tokens": args.layout_tokens,
        "strength": args.strength,
        **{name: getattr(args, name) for name in plain},
    }


def generate(
    pipe: DARPipeline, options: dict[str, Any], generators: list[torch.Generator], with_states: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Previews and, where asked for, noisy states after every step, ``(B, C, H, W)``, previews in [-1, 1]."""
    states: list[torch.Tensor] = []

    def keep(pipe: DARPipeline, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> None:
        states.append(tensors["latents"].cpu() / pipe.tokenizer.config.data_std)

    stream = pipe.stream(
        **options,
        generator=generators,
        output_type="pt",
        callback_on_step_end=keep if with_states else None,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    return [output.images.cpu() * 2 - 1 for output in stream], states


def write(
    args: argparse.Namespace,
    pipe: DARPipeline,
    options: dict[str, Any],
    steps: list[torch.Tensor],
    states: list[torch.Tensor],
) -> None:
    """Write the images of the last step, and what led to them, see `generate`."""
    images = steps[-1]
    folder = args.output_dir
    columns = args.num_images_per_prompt
    if columns == 1:
        columns = min(len(images), MAX_COLUMNS)
    reference = options["layout_image"] or options["image"]
    tiles = images
    if reference is not None:
        generator = torch.Generator().manual_seed(args.seed)
        first = pipe.reconstruct(reference, generator=generator, output_type="pt").images.cpu() * 2 - 1
        blank = torch.ones_like(first).expand(columns - 1, -1, -1, -1)
        tiles = torch.cat([first, blank, images])
    save_picture(image_grid(tiles, columns), folder / "grid.png")
    for index, image in enumerate(images):
        save_picture(pipe.image_processor.postprocess(image[None], "pil")[0], folder / f"{index:04d}.png")
    if "strip" in args.previews:
        save_picture(image_grid(torch.cat(steps), len(images)), folder / "previews.png")
    if "noisy" in args.previews:
        rows = [row for pair in zip(states, steps, strict=True) for row in pair]
        save_picture(image_grid(torch.cat(rows), len(images)), folder / "noisy.png")
    if "gif" in args.previews:
        save_animation([image_grid(step, columns) for step in steps], folder / "previews.gif")


def measure(pipe: DARPipeline, options: dict[str, Any], generators: list[torch.Generator]) -> dict[str, float]:
    """Median times over a few calls, warmed up by the call before; images are PIL's, as the user gets them."""
    seconds: dict[str, list[float]] = {"first_preview": [], "whole_call": []}
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        next(pipe.stream(**options, generator=generators))
        seconds["first_preview"].append(time.perf_counter() - started)
        started = time.perf_counter()
        pipe(**options, generator=generators)
        seconds["whole_call"].append(time.perf_counter() - started)
    report = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    return report | {"share": round(report["first_preview_seconds"] / report["whole_call_seconds"], 3)}


@command("generate.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output_dir)
    pipe = load_pipeline(args.pipeline, getattr(torch, args.dtype), args.device)
    pipe.set_progress_bar_config(disable=True)
    options = call_options(args, pipe)
    count = len(options["class_labels"] or args.prompt or []) * max(args.num_images_per_prompt, 1)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
    steps, states = generate(pipe, options, generators, with_states="noisy" in args.previews)
    with writing(args.output_dir):
        write(args, pipe, options, steps, states)
    print(f"{len(steps[-1])} images in {args.output_dir}")
    if args.timing:
        print(json.dumps(measure(pipe, options, generators)))


if __name__ == "__main__":
    main()
