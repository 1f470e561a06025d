"""The images of the README, from the pipelines that come with the package: what they draw, and how.

    python examples/quickstart.py --output_dir docs

Writes samples.png (one column per prompt), previews.png (one row per drawing, one column per step) and layout.png
(digits: per row one reference, and every class with its layout). `generate.py` has all options; this is the short
version to read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dar_hf import DARPipeline, sample_pipeline
from dar_hf.utils.commands import check_output, command, path_option, positive_option, seed_option, writing
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, save_picture
from dar_hf.utils.sample import EMOJI_PROMPTS
from dar_hf.utils.threads import limit_threads

PER_PROMPT = 3  # images in samples.png
DRAWINGS = ["noto red apple", "twemoji octopus", "fluent pizza"]  # in previews.png
CLASSES = list(range(10))  # in layout.png
REFERENCES = [4, 7, 0]
LAYOUT_GUIDANCE = 2.0  # more than usual, as the first token was drawn for another class


def seeded(count: int, seed: int) -> list[torch.Generator]:
    """A generator for each of ``count`` images."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def samples(pipe: DARPipeline, seed: int) -> torch.Tensor:
    """Images ``(PER_PROMPT * len(EMOJI_PROMPTS), C, H, W)`` in [0, 1]: in each row one of every prompt."""
    prompts = EMOJI_PROMPTS * PER_PROMPT
    return pipe(prompt=prompts, generator=seeded(len(prompts), seed), output_type="pt").images


def previews(pipe: DARPipeline, seed: int) -> torch.Tensor:
    """For each drawing a row of previews in [0, 1], one column per step."""
    stream = pipe.stream(prompt=DRAWINGS, generator=seeded(len(DRAWINGS), seed), output_type="pt")
    return torch.stack([output.images for output in stream], dim=1).flatten(0, 1)


def layouts(pipe: DARPipeline, seed: int, layout_tokens: int) -> torch.Tensor:
    """Rows of a reference, a blank, and every class with the reference's first ``layout_tokens`` tokens."""
    rows = []
    for label in REFERENCES:
        reference = pipe(label, generator=seeded(1, seed), output_type="pt").images
        layout = {"layout_image": reference, "layout_tokens": layout_tokens, "guidance_scale": LAYOUT_GUIDANCE}
        drawn = pipe(CLASSES, generator=seeded(len(CLASSES), seed), output_type="pt", **layout).images
        rows += [reference, torch.ones_like(reference), drawn]
    return torch.cat(rows)


def load(name: str) -> DARPipeline:
    """A pipeline that comes with the package."""
    pipe = load_pipeline(sample_pipeline(name))
    pipe.set_progress_bar_config(disable=True)
    limit_threads(pipe.tokenizer, pipe.transformer)
    return pipe


@command("quickstart.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=path_option, default=Path("outputs/quickstart"))
    parser.add_argument("--layout_tokens", type=positive_option, default=1, help="tokens taken from the references")
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    pipe = load("emoji")
    digits = load("mnist")
    grids = {
        "samples": (samples(pipe, args.seed), len(EMOJI_PROMPTS)),
        "previews": (previews(pipe, args.seed), pipe.tokenizer.config.num_inference_steps),
        "layout": (layouts(digits, args.seed, args.layout_tokens), len(CLASSES) + 2),
    }
    for name, (images, columns) in grids.items():
        with writing(args.output_dir):
            save_picture(image_grid(images * 2 - 1, columns), args.output_dir / f"{name}.png")
    print(f"{', '.join(grids)} in {args.output_dir}")


if __name__ == "__main__":
    main()
