"""Encode images, decode their tokens, and write both into one image: look at it before training stage 2.

    python examples/reconstruct.py --pipeline outputs/digits/pipeline --images cat.png dog.jpg
    python examples/reconstruct.py --pipeline outputs/digits/pipeline --dataset_name digits --split test --previews

Writes a grid with the inputs, cropped as in training, above their reconstructions (with --previews above the
previews of every step) and prints the mean PSNR of every step in dB.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dar_hf.data import ImageTransform, add_input_options, load_inputs
from dar_hf.metrics import psnr
from dar_hf.utils.commands import (
    add_precision_options,
    check_output,
    command,
    path_option,
    positive_option,
    seed_option,
    writing,
)
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, interleave_rows, save_picture

MAX_COLUMNS = 8


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="folder or Hub id")
    add_input_options(parser, files="+", num_images=MAX_COLUMNS)
    parser.add_argument("--output", type=path_option, default=Path("outputs/reconstructions.png"))
    parser.add_argument("--previews", action="store_true", help="one row per step")
    parser.add_argument("--num_tokens", type=int, help="decode only the first tokens")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--height", type=positive_option, help="for a tokenizer that takes other sizes than its own")
    parser.add_argument("--width", type=positive_option)
    parser.add_argument("--seed", type=seed_option, default=0, help="of the start noise")
    add_precision_options(parser)
    return parser.parse_args(argv)


@command("reconstruct.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output, folder=False)
    pipe = load_pipeline(args.pipeline, getattr(torch, args.dtype), args.device)
    height, width = pipe.tokenizer.image_size
    size = (args.height or height, args.width or width)
    crop = ImageTransform(size, channels=pipe.tokenizer.config.in_channels)
    images = load_inputs(args, crop)
    output = pipe.reconstruct(
        images,
        height=size[0],
        width=size[1],
        num_inference_steps=args.num_inference_steps,
        num_tokens=args.num_tokens,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
        previews=True,
    )
    inputs = torch.stack([crop(image) for image in images])
    steps = [step.cpu() * 2 - 1 for step in output.previews]
    print("PSNR of every step in dB: " + ", ".join(f"{float(psnr(step, inputs).mean()):.2f}" for step in steps))
    columns = min(len(inputs), MAX_COLUMNS)
    rows = [inputs, steps[-1]]
    if args.previews:
        rows = [inputs, *steps]
    with writing(args.output):
        save_picture(image_grid(interleave_rows(*rows, columns=columns), columns), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
