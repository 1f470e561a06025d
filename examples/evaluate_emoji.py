"""Judge a pipeline that draws emoji from text: is the right drawing drawn, in the right style, and is it copied?

    python examples/evaluate_emoji.py --pipeline outputs/emoji/pipeline --dataset_name outputs/emoji/data \\
        --judge outputs/emoji/judge --output_dir outputs/emoji

For 500 captions of the training split and all of the validation split, an image is drawn, and the judge (see
emoji_judge.py, which has seen real drawings only) looks for the nearest of the real drawings of those captions.
Several values of --guidance_scale are tried on 200 other training captions first; the best one is judged. Writes
report.json, samples.png (real drawings above generated ones) and preview_strip.png (previews of validation captions,
one row per group).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from emoji_judge import Judge, Split, load, load_split, ranks

from dar_hf import DARPipeline
from dar_hf.data import normal_noise
from dar_hf.evaluation import metric, versions, write_report
from dar_hf.evaluation.measure import table
from dar_hf.evaluation.report import public_name
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
TOP = 5
NAMES = {
    "top1": "right drawing is the nearest",
    "top5": "right drawing is among the nearest 5",
    "style": "style is right",
    "nearest_pixels": "pixels' distance to the nearest training drawing",
    "nearest_similarity": "cosine to the nearest training drawing",
}


def generate(pipe: DARPipeline, captions: list[str], guidance_scale: float | None, seed: int) -> list[torch.Tensor]:
    """Every preview of an image of each caption: one tensor ``(n, 3, H, W)`` in [-1, 1] for each group."""
    batches = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(captions), BATCH):
        outputs = pipe.stream(
            prompt=captions[start : start + BATCH],
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        )
        batches.append([output.images * 2 - 1 for output in outputs])
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@torch.no_grad()
def reconstruct(pipe: DARPipeline, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every preview of the images' reconstructions, and their codes."""
    batches = []
    all_codes = []
    for indices in torch.arange(len(images)).split(BATCH):
        codes = pipe.tokenizer.encode(images[indices]).codes
        noise = normal_noise(indices, images.shape[1:], images.device)
        previews = pipe.tokenizer.decode_stream([codes], noise=noise, scheduler=pipe.scheduler)
        batches.append([preview.sample.clamp(-1, 1) for preview in previews])
        all_codes.append(codes)
    return [torch.cat(parts) for parts in zip(*batches, strict=True)], torch.cat(all_codes)


def retrieval(judge: Judge, made: torch.Tensor, split: Split) -> dict[str, float]:
    """How often the right drawing of the split is the nearest, or among the nearest five, and the style is right."""
    embeddings, styles = judge.judge(made)
    drawings, _ = judge.judge(split.images)
    found = ranks(embeddings, drawings)
    return {
        "top1": float((found == 0).double().mean()),
        "top5": float((found < TOP).double().mean()),
        "style": float((styles == split.styles).double().mean()),
    }


def distance(judge: Judge, made: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance of the judge's embeddings, times 100."""
    first = GaussianStatistics().update(judge.judge(made)[0])
    second = GaussianStatistics().update(judge.judge(real)[0])
    return 100 * frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def copying(judge: Judge, images: torch.Tensor, training: torch.Tensor) -> dict[str, float]:
    """Medians over images of how near the nearest training drawing is: the root mean square of the pixels' differences
    (pixels in [-1, 1]), and the cosine of the judge's embeddings."""
    pixels = torch.cdist(images.flatten(1), training.flatten(1)).amin(-1) / images[0].numel() ** 0.5
    similarity = (judge.judge(images)[0] @ judge.judge(training)[0].T).amax(-1)
    return {"nearest_pixels": float(pixels.median()), "nearest_similarity": float(similarity.median())}


def draw(folder: Path, real: torch.Tensor, steps: list[torch.Tensor]) -> None:
    shown = min(4 * COLUMNS, len(real))
    pairs = interleave_rows(real[:shown], steps[-1][:shown], columns=COLUMNS)
    save_picture(image_grid(pairs, COLUMNS), folder / "samples.png")
    save_picture(image_grid(torch.cat([step[:COLUMNS] for step in steps]), COLUMNS), folder / "preview_strip.png")


def choose_scale(pipe: DARPipeline, judge: Judge, split: Split, scales: list[float], seed: int) -> float:
    """The guidance scale with the most right drawings and styles."""
    best = (-1.0, scales[0])
    for scale in scales:
        found = retrieval(judge, generate(pipe, split.captions, scale, seed)[-1], split)
        print(f"guidance {scale:g}:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        best = max(best, (found["top1"] + found["style"], scale))
    return best[1]


def measure_generation(judge: Judge, steps: list[torch.Tensor], split: Split, which: str, lengths: list[int]) -> list:
    """Metrics of every preview of the images of a split's captions."""
    metrics = []
    for step, length in zip(steps, lengths, strict=True):
        for kind, value in retrieval(judge, step, split).items():
            metrics.append(metric(kind, value, f"{NAMES[kind]} ({which} captions)", num_tokens=length))
        value = distance(judge, step, split.images)
        metrics.append(metric("frechet", value, f"Fréchet distance × 100 ({which} captions)", num_tokens=length))
    return metrics


def measure_reconstruction(pipe: DARPipeline, judge: Judge, split: Split, lengths: list[int]) -> list:
    """Metrics of every preview of the split's drawings through the tokenizer."""
    previews, codes = reconstruct(pipe, split.images)
    metrics = []
    for step, length in zip(previews, lengths, strict=True):
        which = {"num_tokens": length, "mode": "reconstruction"}
        metrics.append(metric("psnr", float(psnr(step, split.images).mean()), **which))
        value = distance(judge, step, split.images)
        metrics.append(metric("frechet", value, "Fréchet distance × 100 (reconstructions)", **which))
    for kind, value in retrieval(judge, previews[-1], split).items():
        metrics.append(metric(kind, value, f"{NAMES[kind]} (reconstructions)", mode="reconstruction"))
    for name, value in codebook_statistics(codes, pipe.tokenizer.config.codebook_size).items():
        metrics.append(metric(f"codebook_{name}", value, mode="reconstruction"))
    return metrics


@command("evaluate_emoji.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="outputs/emoji/pipeline")
    parser.add_argument("--dataset_name", default="outputs/emoji/data", help="made by emoji_dataset.py")
    parser.add_argument("--judge", type=path_option, default="outputs/emoji/judge", help="made by emoji_judge.py")
    parser.add_argument("--output_dir", type=path_option, default="outputs/emoji")
    parser.add_argument("--num_captions", type=positive_option, default=500, help="of the training split")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
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
    order = torch.randperm(len(training.captions), generator=torch.Generator().manual_seed(args.seed))
    known = training.take(order[: args.num_captions])
    tuning = training.take(order[args.num_captions :][:TUNING_CAPTIONS])
    scale = choose_scale(pipe, judge, tuning, args.guidance_scale, args.seed + 1)
    groups = pipe.tokenizer.config.num_groups
    lengths = [pipe.tokenizer.config.tokens_per_group * group for group in range(1, groups + 1)]
    metrics = measure_generation(judge, generate(pipe, known.captions, scale, args.seed), known, "training", lengths)
    steps = generate(pipe, held_out.captions, scale, args.seed)
    metrics += measure_generation(judge, steps, held_out, "validation", lengths)
    for what, images in (("generated", steps[-1]), ("real", held_out.images)):
        for kind, value in copying(judge, images, training.images).items():
            metrics.append(metric(kind, value, f"{NAMES[kind]}, {what} (validation captions)"))
    metrics += measure_reconstruction(pipe, judge, held_out, lengths)
    with writing(folder):
        draw(folder, held_out.images, steps)
    report = {
        "mode": "generation",
        "model": {"name": args.pipeline, "revision": None},
        "data": {
            "dataset": public_name(args.dataset_name),
            "split": "validation",
            "description": f"{len(training.captions)} to train, {len(held_out.captions)} to test",
            "count": len(held_out.captions),
        },
        "settings": {
            "count": len(held_out.captions),
            "training_captions": args.num_captions,
            "seed": args.seed,
            "guidance_scale": scale,
            "num_tokens": lengths[-1],
            "judge": "contrastive network of the real training drawings (emoji_judge.py)",
            "judge_style_accuracy_on_real_drawings": retrieval(judge, held_out.images, held_out)["style"],
        },
        "metrics": metrics,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    with writing(folder):
        write_report(folder, report)
    print(json.dumps(report["settings"], indent=2), table(report["metrics"]), sep="\n")


if __name__ == "__main__":
    main()
