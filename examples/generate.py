"""Generate images with a D-AR pipeline and write them, a grid of them, and how they came about.

    python examples/generate.py --pipeline outputs/digits/pipeline --class_labels 3 1 4 --previews strip gif
    python examples/generate.py --pipeline outputs/digits/pipeline \\
        --layout_image outputs/samples/0000.png --layout_tokens 4    # every class with the layout of one image

Writes grid.png (a row a class, or one row of single images; above it the layout or start image, as the tokenizer
reconstructs it), 0000.png, 0001.png, ... (each image in its own size), and where asked for previews.png (a row a step)
and previews.gif. Image i is drawn with seed + i, whatever else is generated beside it.
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
from dar_hf.utils.commands import check_output, command, device_option, path_option, seed_option, writing
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, save_animation, save_picture

MAX_COLUMNS = 10
TIMED_RUNS = 20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="folder or Hub id")
    parser.add_argument("--output_dir", type=path_option, default=Path("outputs/samples"))
    parser.add_argument("--class_labels", nargs="+", help="names or ids; default the first ten classes")
    parser.add_argument("--num_images_per_prompt", type=int, default=1, help="images of each class")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="a scale, or its start and end")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--num_tokens", type=int, help="generate only the first tokens: a preview")
    parser.add_argument("--layout_image", type=path_option, help="an image whose layout every class takes over")
    parser.add_argument("--layout_tokens", type=int, help="how many of its tokens are kept")
    parser.add_argument("--image", type=path_option, help="image-to-image: the image to start from")
    parser.add_argument("--strength", type=float, help="share of the steps generated anew, in [0, 1]")
    parser.add_argument("--previews", nargs="+", choices=["strip", "gif"], default=[])
    parser.add_argument("--seed", type=seed_option, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timing", action="store_true", help="also print the time to the first preview and in all")
    return parser.parse_args(argv)


def call_options(args: argparse.Namespace, pipe: DARPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call, without its generators."""
    known, count = pipe.labels, pipe.transformer.config.num_classes
    names = args.class_labels or range(min(count, MAX_COLUMNS))
    labels = [name if name in known or not str(name).isdecimal() else int(name) for name in names]
    pictures = {
        name: None if path is None else read_image(path)
        for name, path in (("layout_image", args.layout_image), ("image", args.image))
    }
    guidance = args.guidance_scale
    plain = ("num_images_per_prompt", "temperature", "top_k", "top_p", "num_inference_steps", "num_tokens")
    return {
        "class_labels": labels,
        "guidance_scale": guidance[0] if guidance and len(guidance) == 1 else guidance,
        "layout_tokens": args.layout_tokens,
        "strength": args.strength,
        **{name: getattr(args, name) for name in plain},
        **pictures,
    }


def write(args: argparse.Namespace, pipe: DARPipeline, options: dict[str, Any], steps: list[torch.Tensor]) -> None:
    """The pictures of all steps' images ``(B, C, H, W)`` in [-1, 1]."""
    images, folder, repeats = steps[-1], args.output_dir, args.num_images_per_prompt
    columns = repeats if repeats > 1 else min(len(images), MAX_COLUMNS)
    reference = options["layout_image"] or options["image"]
    shown = images
    if reference is not None:
        generator = torch.Generator().manual_seed(args.seed)
        first = pipe.reconstruct(reference, generator=generator, output_type="pt").images.cpu() * 2 - 1
        blank = torch.ones_like(first).expand(columns - 1, -1, -1, -1)
        shown = torch.cat([first, blank, images])
    save_picture(image_grid(shown, columns), folder / "grid.png")
    for index, image in enumerate(images):
        save_picture(pipe.image_processor.postprocess(image[None], "pil")[0], folder / f"{index:04d}.png")
    if "strip" in args.previews:
        save_picture(image_grid(torch.cat(steps), len(images)), folder / "previews.png")
    if "gif" in args.previews:
        save_animation([image_grid(step, columns) for step in steps], folder / "previews.gif")


def measure(pipe: DARPipeline, options: dict[str, Any], generators: list[torch.Generator]) -> dict[str, float]:
    """Medians over a few calls, after the one that warmed everything up: images as the user gets them, in PIL."""
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
    count = len(options["class_labels"]) * max(args.num_images_per_prompt, 1)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
    steps = [o.images.cpu() * 2 - 1 for o in pipe.stream(**options, generator=generators, output_type="pt")]
    with writing(args.output_dir):
        write(args, pipe, options, steps)
    print(f"{len(steps[-1])} images in {args.output_dir}")
    if args.timing:
        print(json.dumps(measure(pipe, options, generators)))


if __name__ == "__main__":
    main()
