"""Judge a pipeline that draws emoji from text: right drawing, right style, and how near to training drawings.

    python examples/evaluate_emoji.py --pipeline outputs/emoji/pipeline --dataset_name outputs/emoji/data \\
        --judge outputs/emoji/judge --output_dir outputs/emoji

For 500 captions of the training split and all of the validation split, an image is drawn, and the judge (see
emoji_judge.py, which has seen real drawings only) looks for the nearest of the real drawings of those captions.
Several values of --guidance_scale are tried on 200 other training captions first; the best one is judged. Writes
report.json, samples.png (real drawings above those drawn from their captions, first of the training split and then of
the validation split), reconstructions.png (validation drawings above their reconstructions), preview_strip.png
(previews of captions of both, one row per group) and loss.png (of the runs in the output folder's tokenizer/ and
pipeline/).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from emoji_judge import Judge, Split, load, load_split, ranks

from dar_hf import DARPipeline
from dar_hf.evaluation import draw_losses, generation_report, metric, reconstruct_steps, write_report
from dar_hf.evaluation.measure import table
from dar_hf.metrics import GaussianStatistics, codebook_statistics, frechet_distance, psnr
from dar_hf.utils.commands import (
    CommandError,
    check_output,
    command,
    path_option,
    positive_option,
    seed_option,
    writing,
)
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, interleave_rows, save_picture

TUNING_CAPTIONS = 200
BATCH = 100
COLUMNS = 10
SHOWN = 4 * COLUMNS
TOP = 5
NAMES = {
    "top1": "right drawing is the nearest",
    "top5": "right drawing is among the nearest 5",
    "style": "style is right",
    "style_of_name": "right style is the nearest of three",
    "nearest_pixels": "pixels' distance to the nearest training drawing",
    "nearest_similarity": "cosine to the nearest training drawing",
}


Steps = list[tuple[int, torch.Tensor]]  # for each preview the number of codes so far, and images (n, 3, H, W)


def generate(pipe: DARPipeline, captions: list[str], guidance_scale: float, seed: int) -> Steps:
    """Every preview, in [-1, 1], of an image of each caption."""
    batches = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(captions), BATCH):
        outputs = pipe.stream(
            prompt=captions[start : start + BATCH],
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        )
        batches.append(list(outputs))
    return [
        (step[0].num_tokens, torch.cat([part.images for part in step]) * 2 - 1) for step in zip(*batches, strict=True)
    ]


class SeenDrawings(NamedTuple):
    """Names, styles ``(m,)`` and the judge's embeddings ``(m, 128)`` of real drawings."""

    names: list[str]
    styles: torch.Tensor
    embeddings: torch.Tensor


def see(judge: Judge, *splits: Split) -> SeenDrawings:
    names = [name for split in splits for name in split.names]
    embeddings = [judge.judge(split.images)[0] for split in splits]
    return SeenDrawings(names, torch.cat([split.styles for split in splits]), torch.cat(embeddings))


def other_styles(split: Split, seen: SeenDrawings) -> torch.Tensor:
    """``(n, m)`` bool: which of the drawings seen have the names of those of the split, in other styles."""
    numbers: dict[str, int] = {}
    first, second = (
        torch.tensor([numbers.setdefault(name, len(numbers)) for name in names]) for names in (split.names, seen.names)
    )
    return (first[:, None] == second) & (split.styles[:, None] != seen.styles)


class RealDrawings:
    """The real drawings of a split, as the judge sees them, and what it says of images of their captions.

    Drawings of the same names in other styles are looked for among those seen.
    """

    def __init__(self, judge: Judge, split: Split, seen: SeenDrawings):
        self.judge = judge
        self.split = split
        self.embeddings, self.styles_seen = judge.judge(split.images)
        self.statistics = GaussianStatistics().update(self.embeddings)
        self.seen = seen
        self.rivals = other_styles(split, seen)

    def compare(self, images: torch.Tensor) -> tuple[dict[str, float], float]:
        """How often the right drawing is the nearest, or among the nearest five, and the style is right; and the
        Fréchet distance of the embeddings, times 100.

        The style is told twice: by the judge's network for it, and, for names with one drawing in each style, by which
        of the three is the nearest.
        """
        embeddings, styles = self.judge.judge(images)
        found = ranks(embeddings, self.embeddings)
        shares = {"top1": found == 0, "top5": found < TOP, "style": styles == self.split.styles}
        in_three = self.rivals.sum(-1) == 2
        if in_three.any():
            right = (embeddings * self.embeddings).sum(-1)
            rival = (embeddings @ self.seen.embeddings.T).masked_fill(~self.rivals, -torch.inf).amax(-1)
            shares["style_of_name"] = (right > rival)[in_three]
        made = GaussianStatistics().update(embeddings)
        real = self.statistics
        distance = frechet_distance(made.mean, made.covariance, real.mean, real.covariance)
        return {name: float(share.double().mean()) for name, share in shares.items()}, 100 * distance

    def style_accuracy(self) -> float:
        """How often the judge names the style of the real drawings."""
        return float((self.styles_seen == self.split.styles).double().mean())


def measure_copying(
    judge: Judge, images: torch.Tensor, training: torch.Tensor, embeddings: torch.Tensor, what: str
) -> list:
    """Medians over images of how near the nearest training drawing is: the root mean square of the pixels' differences
    (pixels in [-1, 1]), and the cosine of the judge's embeddings; ``embeddings`` are those of the drawings."""
    pixels = torch.cdist(images.flatten(1), training.flatten(1)).amin(-1) / images[0].numel() ** 0.5
    similarity = (judge.judge(images)[0] @ embeddings.T).amax(-1)
    distances = {"nearest_pixels": pixels, "nearest_similarity": similarity}
    return [metric(kind, float(values.median()), f"{NAMES[kind]}, {what}") for kind, values in distances.items()]


def draw(
    folder: Path, splits: dict[str, RealDrawings], previews: dict[str, Steps], reconstructed: torch.Tensor
) -> None:
    """Write samples.png, preview_strip.png and reconstructions.png; each split has half of the first two."""
    samples = []
    strips = []
    for which, drawings in splits.items():
        steps = [images for _, images in previews[which]]
        samples.append(interleave_rows(drawings.split.images[: SHOWN // 2], steps[-1][: SHOWN // 2], columns=COLUMNS))
        strips.append(torch.stack([images[: COLUMNS // 2] for images in steps]))
    save_picture(image_grid(torch.cat(samples), COLUMNS), folder / "samples.png")
    save_picture(image_grid(torch.cat(strips, dim=1).flatten(0, 1), COLUMNS), folder / "preview_strip.png")
    pairs = interleave_rows(splits["validation"].split.images[:SHOWN], reconstructed[:SHOWN], columns=COLUMNS)
    save_picture(image_grid(pairs, COLUMNS), folder / "reconstructions.png")


def choose_scale(pipe: DARPipeline, drawings: RealDrawings, scales: list[float], seed: int) -> float:
    """The first guidance scale with the most right drawings and styles."""
    scores = {}
    for scale in scales:
        _, images = generate(pipe, drawings.split.captions, scale, seed)[-1]
        found, _ = drawings.compare(images)
        print(f"guidance {scale:g}:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        scores[scale] = found["top1"] + found.get("style_of_name", found["style"])
    return max(scores, key=scores.__getitem__)


def measure_generation(drawings: RealDrawings, steps: Steps, which: str) -> list:
    """Metrics of every preview of the images of a split's captions."""
    metrics = []
    for num_tokens, images in steps:
        found, distance = drawings.compare(images)
        for kind, value in found.items():
            metrics.append(metric(kind, value, f"{NAMES[kind]} ({which} captions)", num_tokens=num_tokens))
        name = f"Fréchet distance × 100 ({which} captions)"
        metrics.append(metric("frechet", distance, name, num_tokens=num_tokens))
    return metrics


def measure_reconstruction(pipe: DARPipeline, drawings: RealDrawings) -> tuple[list, torch.Tensor]:
    """Metrics of every preview of the split's drawings through the tokenizer, and the finished images."""
    originals = drawings.split.images
    steps, codes = reconstruct_steps(pipe.tokenizer, originals, pipe.scheduler, BATCH)
    metrics = []
    for num_tokens, images in steps:
        which = {"num_tokens": num_tokens, "mode": "reconstruction"}
        found, distance = drawings.compare(images)
        metrics.append(metric("psnr", float(psnr(images, originals).mean()), **which))
        metrics.append(metric("frechet", distance, "Fréchet distance × 100 (reconstructions)", **which))
    for kind, value in found.items():  # of the finished ones
        metrics.append(metric(kind, value, f"{NAMES[kind]} (reconstructions)", mode="reconstruction"))
    for name, value in codebook_statistics(codes, pipe.tokenizer.config.codebook_size).items():
        metrics.append(metric(f"codebook_{name}", value, mode="reconstruction"))
    return metrics, images


def measure_samples(
    pipe: DARPipeline, splits: dict[str, RealDrawings], guidance_scale: float, seed: int
) -> tuple[list, dict[str, Steps]]:
    """Metrics of images drawn from the captions of splits, and all their previews."""
    metrics = []
    previews = {}
    for which, drawings in splits.items():
        previews[which] = generate(pipe, drawings.split.captions, guidance_scale, seed)
        metrics += measure_generation(drawings, previews[which], which)
    return metrics, previews


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="outputs/emoji/pipeline")
    parser.add_argument("--dataset_name", default="outputs/emoji/data", help="made by emoji_dataset.py")
    parser.add_argument("--judge", type=path_option, default="outputs/emoji/judge", help="made by emoji_judge.py")
    parser.add_argument("--output_dir", type=path_option, default="outputs/emoji")
    parser.add_argument("--num_captions", type=positive_option, default=500, help="of the training split")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--seed", type=seed_option, default=0)
    return parser.parse_args(argv)


@command("evaluate_emoji.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()
    folder = args.output_dir
    check_output(folder)
    pipe = load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    judge = load(args.judge)
    size = pipe.tokenizer.config.sample_size
    training = load_split(args.dataset_name, "train", size)
    held_out = load_split(args.dataset_name, "validation", size)
    if args.num_captions >= len(training.captions):
        raise CommandError(
            f"--num_captions must be less than {len(training.captions)}, the captions of the training split: guidance "
            "is chosen on others."
        )
    seen = see(judge, training, held_out)
    order = torch.randperm(len(training.captions), generator=torch.Generator().manual_seed(args.seed))
    known = RealDrawings(judge, training.take(order[: args.num_captions]), seen)
    tuning = RealDrawings(judge, training.take(order[args.num_captions :][:TUNING_CAPTIONS]), seen)
    new = RealDrawings(judge, held_out, seen)
    scale = choose_scale(pipe, tuning, args.guidance_scale, args.seed + 1)
    splits = {"training": known, "validation": new}
    metrics, previews = measure_samples(pipe, splits, scale, args.seed)
    compared = {f"generated ({which} captions)": steps[-1][1] for which, steps in previews.items()}
    compared["real (validation captions)"] = held_out.images
    embeddings = seen.embeddings[: len(training.images)]
    for what, images in compared.items():
        metrics += measure_copying(judge, images, training.images, embeddings, what)
    reconstruction, reconstructed = measure_reconstruction(pipe, new)
    metrics += reconstruction
    with writing(folder):
        draw(folder, splits, previews, reconstructed)
        draw_losses(folder)
    data = {
        "dataset": args.dataset_name,
        "split": "validation",
        "description": f"{len(training.captions)} to train, {len(held_out.captions)} to validate",
        "count": len(held_out.captions),
    }
    settings = {
        "training_captions": args.num_captions,
        "validation_captions": len(held_out.captions),
        "seed": args.seed,
        "guidance_scale": scale,
        "num_tokens": pipe.tokenizer.config.num_tokens,
        "judge": "contrastive network of the real training drawings (emoji_judge.py)",
        "judge_style_accuracy_on_real_drawings": new.style_accuracy(),
    }
    report = generation_report(args.pipeline, data, settings, metrics, started)
    with writing(folder):
        write_report(folder, report)
    print(json.dumps(report["settings"], indent=2), table(report["metrics"]), sep="\n")


if __name__ == "__main__":
    main()
