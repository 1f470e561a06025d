"""What makes groups divide the work: tokenizers of other condition scopes and time shifts, measured after every group.

    python benchmarks/coarse_to_fine.py --dataset_name path/to/photos --output_dir outputs/coarse_to_fine

Trains one tokenizer for each scope, shift and seed, unless it is there already, and measures the reconstructions of
images that were held out: PSNR, and a Fréchet distance on the features of a small classifier, which is trained first
on the data set's labels. Writes results.jsonl, psnr.png and distance.png.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import nn

from dar_hf import DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.data import ImageSamples, ImageTransform, load_images, normal_noise
from dar_hf.metrics import GaussianStatistics, frechet_distance, psnr
from dar_hf.presets import get_preset
from dar_hf.training import TokenizerArguments, TokenizerStage, make_accelerator, train
from dar_hf.utils.memory import keep_freed_memory
from dar_hf.utils.pictures import draw_curves, image_grid, save_picture

FEATURES = 64
CLASSIFIER_BATCH = 64
BATCH = 256
NUM_SHOWN = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="images with labels")
    parser.add_argument("--held_out", default="test", help="split that is measured")
    parser.add_argument("--preset", default="photos32")
    parser.add_argument("--scopes", nargs="+", default=["group", "prefix"])
    parser.add_argument("--shifts", nargs="+", type=float, default=[2.0, 8.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--classifier_steps", type=int, default=1_000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/coarse_to_fine"))
    return parser.parse_args()


def load_pixels(args: argparse.Namespace, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(n, C, H, W)`` in [-1, 1], and their labels."""
    options = get_preset(args.preset).tokenizer
    size = options["sample_size"]
    transform = ImageTransform((size, size), channels=options.get("in_channels", 3))
    samples = ImageSamples(load_images(args.dataset_name, split), transform)
    return samples.stack(range(len(samples))), torch.tensor(samples.labels)


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Images to features; the last layer, to classes, is not used for them."""
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.MaxPool2d(2)]
        channels = width
    layers += [nn.Flatten(), nn.LazyLinear(FEATURES), nn.SiLU(), nn.Linear(FEATURES, num_classes)]
    return nn.Sequential(*layers)


def train_classifier(images: torch.Tensor, labels: torch.Tensor, steps: int) -> nn.Module:
    """A network whose output are the features of images."""
    torch.manual_seed(0)
    network = classifier(images.shape[1], int(labels.max()) + 1)
    network(images[:2])  # makes the lazy layer
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (CLASSIFIER_BATCH,))
        pixels = images[batch]
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        loss = F.cross_entropy(network(pixels), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network[:-1].eval()


def train_tokenizer(args: argparse.Namespace, folder: Path, scope: str, shift: float, seed: int) -> None:
    """The preset's recipe, with its warm-ups shortened or stretched to the number of steps."""
    recipe = get_preset(args.preset).tokenizer_recipe
    share = args.steps / recipe["max_train_steps"]
    for name in ("max_train_steps", "warmup_steps", "unquantized_steps"):
        recipe[name] = round(recipe[name] * share)
    recipe |= {"dataset_name": args.dataset_name, "validation_steps": 0, "checkpointing_steps": 500}
    options = TokenizerArguments(
        preset=args.preset,
        output_dir=str(folder),
        seed=seed,
        model_overrides=[f"condition_scope={scope}", f"time_shift={shift}"],
        resume_from_checkpoint="latest",
        **recipe,
    )
    accelerator = make_accelerator(options)
    train(TokenizerStage.build(options, accelerator.device), options, accelerator)


@torch.no_grad()
def measure(tokenizer: DARTokenizer, images: torch.Tensor, network: nn.Module) -> tuple[dict, torch.Tensor]:
    """Metrics after every group, and the first images above their previews."""
    scheduler = FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift, solver_order=1)
    by_batch = []
    for indices in torch.arange(len(images)).split(BATCH):
        codes = tokenizer.encode(images[indices]).codes
        noise = normal_noise(indices, images.shape[1:], images.device)
        by_batch.append([p.sample for p in tokenizer.decode_stream([codes], noise=noise, scheduler=scheduler)])
    steps = [torch.cat(parts).clamp(-1, 1) for parts in zip(*by_batch, strict=True)]
    real = GaussianStatistics().update(network(images))
    distances = []
    for step in steps:
        made = GaussianStatistics().update(network(step))
        distances.append(frechet_distance(made.mean, made.covariance, real.mean, real.covariance))
    shown = torch.cat([images[:NUM_SHOWN], *(step[:NUM_SHOWN] for step in steps)])
    return {"psnr": [float(psnr(step, images).mean()) for step in steps], "distance": distances}, shown


def draw(results: list[dict], folder: Path) -> None:
    """A curve for each scope and shift, averaged over its seeds."""
    for name, label in (("psnr", "PSNR (dB)"), ("distance", "Fréchet distance")):
        curves = {}
        for scope, shift in sorted({(r["scope"], r["shift"]) for r in results}):
            runs = [r[name] for r in results if (r["scope"], r["shift"]) == (scope, shift)]
            curves[f"{scope}, shift {shift:g}"] = [
                (float(group), mean(values)) for group, values in enumerate(zip(*runs, strict=True), start=1)
            ]
        axes = {"xlabel": "groups", "ylabel": label, "title": "held-out images"}
        draw_curves(curves, folder / f"{name}.png", from_zero=name == "distance", **axes)


def main() -> None:
    args = parse()
    keep_freed_memory()
    images, labels = load_pixels(args, "train")
    network = train_classifier(images, labels, args.classifier_steps)
    held_out, _ = load_pixels(args, args.held_out)
    print(f"{len(images)} images to train, {len(held_out)} to measure", flush=True)
    results = []
    for seed, scope, shift in product(args.seeds, args.scopes, args.shifts):
        folder = args.output_dir / f"{scope}-{shift:g}-{args.steps}-{seed}"
        if not (folder / "config.json").is_file():
            train_tokenizer(args, folder, scope, shift, seed)
        metrics, shown = measure(DARTokenizer.from_pretrained(folder), held_out, network)
        save_picture(image_grid(shown, NUM_SHOWN), folder / "previews.png")
        results.append({"scope": scope, "shift": shift, "seed": seed, "steps": args.steps, **metrics})
        for name in ("psnr", "distance"):
            print(f"{folder.name}: {name}", *(f"{value:.2f}" for value in metrics[name]), flush=True)
    (args.output_dir / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    draw(results, args.output_dir)


if __name__ == "__main__":
    main()
