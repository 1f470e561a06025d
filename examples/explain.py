"""What each group of codes holds: decode one image with groups of its codes replaced by another image's.

    python examples/explain.py --pipeline outputs/digits/pipeline --images cat.png dog.jpg
    python examples/explain.py --pipeline outputs/digits/pipeline --dataset_name digits --split test --num_images 20

Writes one picture with one column per group: the solver's noisy state above the previews of image A; A with the codes
of one group from B; where that changes it; and A with the codes of all groups up to this one from B. Prints how much
"this group" and all "groups so far" change A: the root mean squared change of its pixels, as a percentage of their
range. Of a data set each image is changed by the next one; the picture shows the first two, the numbers are means.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dar_hf.data import ImageTransform, add_input_options, load_inputs
from dar_hf.evaluation import GroupSwaps, draw_swaps, swap_groups
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
from dar_hf.utils.pictures import save_picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help="folder or Hub id")
    add_input_options(parser, files=2, num_images=8)
    parser.add_argument("--output", type=path_option, default=Path("outputs/groups.png"))
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--height", type=positive_option, help="for a tokenizer that takes other sizes than its own")
    parser.add_argument("--width", type=positive_option)
    parser.add_argument("--seed", type=seed_option, default=0, help="of the first pair's start noise")
    add_precision_options(parser)
    return parser.parse_args(argv)


def load_pairs(args: argparse.Namespace, crop: ImageTransform) -> list[tuple[Image.Image, Image.Image]]:
    """A and B: the two files, or each image of the data set and the next one, the last and the first.

    Raises:
        ValueError: as `load_inputs`, or for fewer than two images.
    """
    images = load_inputs(args, crop, spread=True)
    if len(images) < 2:
        raise ValueError(f"two images are needed, and there is only {len(images)}.")
    pairs = list(zip(images, [*images[1:], images[0]], strict=True))
    if args.images:
        return pairs[:1]
    return pairs


def print_effects(results: Sequence[GroupSwaps]) -> None:
    """Print a table with the mean effects of all pairs."""
    single = torch.tensor([swaps.effects() for swaps in results]).mean(dim=0).tolist()
    leading = torch.tensor([swaps.leading_effects() for swaps in results]).mean(dim=0).tolist()
    print(f"{'group':>5}  {'codes':>9}  {'this group':>10}  {'groups so far':>13}")
    for index, (start, stop) in enumerate(results[0].groups):
        codes = f"{start + 1}-{stop}"
        print(f"{index + 1:>5}  {codes:>9}  {single[index]:>10.2%}  {leading[index]:>13.2%}")


@command("explain.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output, folder=False)
    pipe = load_pipeline(args.pipeline, getattr(torch, args.dtype), args.device)
    height, width = pipe.tokenizer.image_size
    size = (args.height or height, args.width or width)
    crop = ImageTransform(size, channels=pipe.tokenizer.config.in_channels)
    results = []
    for index, (first, second) in enumerate(load_pairs(args, crop)):
        steps = swap_groups(
            pipe,
            first,
            second,
            num_inference_steps=args.num_inference_steps,
            height=size[0],
            width=size[1],
            generator=torch.Generator().manual_seed(args.seed + index),
        )
        *_, finished = steps
        results.append(finished)
    print_effects(results)
    with writing(args.output):
        save_picture(draw_swaps(results[0]), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
