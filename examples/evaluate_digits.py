"""Load a finished pipeline of digits, measure it, and draw its images.

    python examples/evaluate_digits.py --pipeline outputs/digits/pipeline --output_dir outputs/digits
    python examples/evaluate_digits.py --pipeline outputs/mnist/pipeline --dataset_name path/to/mnist \\
        --num_images 1000 --output_dir outputs/mnist

Any data set with a train and a test split and the labels 0 to 9 will do. Writes reconstructions.png (inputs above
outputs), samples.png (one row per class), previews.png (the same samples after each group, side by side),
preview_strip.png (one of each class, one row per group), loss.png (of the runs in the output folder's tokenizer/ and
pipeline/) and report.json. The judge is a support-vector classifier trained on the real training digits; it never saw
a generated one.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from dar_hf import DARPipeline
from dar_hf.data import ImageSamples, ImageTransform, load_images
from dar_hf.evaluation import draw_losses, generation_report, metric, reconstruct_steps, write_report
from dar_hf.evaluation.measure import table
from dar_hf.metrics import codebook_statistics, psnr
from dar_hf.utils.commands import CommandError, check_output, command, path_option, seed_option, writing
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, interleave_rows, save_picture

SHOWN = 8  # samples of each class in samples.png
JUDGED_SIZE = 16  # pixels per side that the judge sees at most: enough for digits, and four times as fast as 32
BATCH = 500
DESCRIPTIONS = {"digits": "scikit-learn digits: first 1437 for training, other 360 for testing"}


def load_split(name: str, split: str, pipe: DARPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split as the tokenizer takes them, ``(n, C, H, W)`` in [-1, 1], and their labels."""
    transform = ImageTransform(pipe.tokenizer.image_size, channels=pipe.tokenizer.config.in_channels)
    samples = ImageSamples(load_images(name, split), transform)
    return samples.stack(range(len(samples))), torch.tensor(samples.labels)


class Judge:
    """Support-vector classifier on real training digits."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.classifier = SVC(C=10, gamma="scale").fit(self._features(images), labels)

    @staticmethod
    def _features(images: torch.Tensor):
        grey = images.clamp(-1, 1).mean(dim=1, keepdim=True)
        if min(grey.shape[2:]) > JUDGED_SIZE:
            grey = F.adaptive_avg_pool2d(grey, JUDGED_SIZE)
        return grey.flatten(1).numpy()

    def agreement(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of images read as their label."""
        return float((torch.from_numpy(self.classifier.predict(self._features(images))) == labels).double().mean())


def measure_reconstruction(pipe: DARPipeline, images: torch.Tensor, labels: torch.Tensor, judge: Judge) -> tuple:
    """Metrics of every preview of the test digits' reconstructions, and the finished images."""
    steps, codes = reconstruct_steps(pipe.tokenizer, images, pipe.scheduler, BATCH)
    metrics = []
    for num_tokens, sample in steps:
        which = {"num_tokens": num_tokens, "mode": "reconstruction"}
        metrics.append(metric("psnr", float(psnr(sample, images).mean()), **which))
        agreement = judge.agreement(sample, labels)
        metrics.append(metric("label_agreement", agreement, "label agreement of reconstructions (SVM)", **which))
    for name, value in codebook_statistics(codes, pipe.tokenizer.config.codebook_size).items():
        metrics.append(metric(f"codebook_{name}", value, mode="reconstruction"))
    return metrics, steps[-1][1]


def measure_generation(pipe: DARPipeline, count: int, judge: Judge, guidance_scale: float | None, seed: int) -> tuple:
    """Metrics of every preview of generated digits, equally many of each class, and the images of each step."""
    labels = torch.arange(count) % pipe.transformer.config.num_classes
    generator = torch.Generator().manual_seed(seed)
    metrics = []
    steps = []
    for output in pipe.stream(labels.tolist(), guidance_scale=guidance_scale, generator=generator, output_type="pt"):
        images = output.images * 2 - 1
        steps.append(images)
        agreement = judge.agreement(images, labels)
        metrics.append(metric("label_agreement", agreement, "label agreement (SVM)", num_tokens=output.num_tokens))
    return metrics, steps


def draw(folder: Path, images: torch.Tensor, reconstructions: torch.Tensor, steps: list[torch.Tensor]) -> None:
    """The grids. Generated samples go round the classes, so sample i is of class i % 10."""
    pairs = interleave_rows(images[:16], reconstructions[:16], columns=8)
    save_picture(image_grid(pairs, 8), folder / "reconstructions.png")
    shown = min(SHOWN, len(steps[0]) // 10)
    by_class = [step[: 10 * shown].unflatten(0, (shown, 10)).transpose(0, 1) for step in steps]  # (10, shown, C, H, W)
    save_picture(image_grid(by_class[-1].flatten(0, 1), shown), folder / "samples.png")
    blank = torch.ones_like(by_class[0][:, :1])  # a white column between the groups
    columns = torch.cat([part for step in by_class for part in (step, blank)][:-1], dim=1)
    save_picture(image_grid(columns.flatten(0, 1), columns.shape[1]), folder / "previews.png")
    save_picture(image_grid(torch.cat([step[:, 0] for step in by_class]), 10), folder / "preview_strip.png")


@command("evaluate_digits.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="outputs/digits/pipeline")
    parser.add_argument("--dataset_name", default="digits", help="digits, a folder, a parquet file or a Hub id")
    parser.add_argument("--output_dir", type=path_option, default="outputs/digits")
    parser.add_argument("--num_images", type=int, default=500, help="digits to generate")
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: the pipeline's own")
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    if args.num_images < 10:
        parser.error(f"--num_images must be at least 10, one of each class, got {args.num_images}")
    started = time.perf_counter()
    folder = args.output_dir
    check_output(folder)
    pipe = load_pipeline(args.pipeline)
    train_images, train_labels = load_split(args.dataset_name, "train", pipe)
    images, labels = load_split(args.dataset_name, "test", pipe)
    if (count := pipe.transformer.config.num_classes) != 10:
        raise CommandError(f"{args.pipeline} has {count} classes; digits have 10 classes.")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(train_images, train_labels)
    reconstruction, reconstructed = measure_reconstruction(pipe, images, labels, judge)
    generation, steps = measure_generation(pipe, args.num_images, judge, args.guidance_scale, args.seed)
    with writing(folder):
        draw(folder, images, reconstructed, steps)
        draw_losses(folder)
    data = {
        "dataset": args.dataset_name,
        "split": "test",
        "description": DESCRIPTIONS.get(args.dataset_name, f"{len(train_images)} to train, {len(images)} to test"),
        "count": len(images),
    }
    settings = {
        "count": args.num_images,
        "seed": args.seed,
        "guidance_scale": pipe.guidance_scale,
        "num_tokens": generation[-1]["num_tokens"],
        "judge": "support-vector classifier of the training digits",
        "judge_accuracy_on_test_digits": judge.agreement(images, labels),
    }
    report = generation_report(args.pipeline, data, settings, generation + reconstruction, started)
    with writing(folder):
        write_report(folder, report)
    print(json.dumps(report["settings"], indent=2), table(report["metrics"]), sep="\n")


if __name__ == "__main__":
    main()
