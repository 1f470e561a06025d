"""What makes groups divide the work: tokenizers of other condition scopes and time shifts, measured after every group.

    python examples/small_features.py --dataset_name path/to/photos --size 32 --output_dir outputs/photos/features
    python benchmarks/coarse_to_fine.py --dataset_name path/to/photos --features_weights outputs/photos/features

Trains one tokenizer for each scope, shift and seed, unless it is there already, and measures the reconstructions of
images that were held out: PSNR, and a Fréchet distance on the features of a network, the small classifier of
`examples/small_features.py` unless another is given. Writes results.jsonl, psnr.png and distance.png.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

import torch

from dar_hf import DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.data import ImageSamples, ImageTransform, load_images
from dar_hf.evaluation import reconstruct_steps, to_uint8
from dar_hf.metrics import FeatureExtractor, GaussianStatistics, frechet_distance, load_feature_extractor, psnr
from dar_hf.presets import get_preset
from dar_hf.training import TokenizerArguments, TokenizerStage, make_accelerator, train
from dar_hf.utils.memory import keep_freed_memory
from dar_hf.utils.pictures import draw_curves, image_grid, save_picture

FEATURES = Path(__file__).resolve().parent.parent / "examples" / "small_features.py"
BATCH = 256
NUM_SHOWN = 8


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="a folder, a parquet file or a Hub id")
    parser.add_argument("--features", default=f"{FEATURES}:load", help="as of examples/measure.py")
    parser.add_argument("--features_weights", required=True)
    parser.add_argument("--held_out", default="test", help="split that is measured")
    parser.add_argument("--preset", default="photos32")
    parser.add_argument("--scopes", nargs="+", default=["group", "prefix"])
    parser.add_argument("--shifts", nargs="+", type=float, default=[2.0, 8.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/coarse_to_fine"))
    return parser.parse_args(argv)


def load_pixels(args: argparse.Namespace, split: str) -> torch.Tensor:
    """Images ``(n, C, H, W)`` in [-1, 1]."""
    options = get_preset(args.preset).tokenizer
    size = options["sample_size"]
    transform = ImageTransform((size, size), channels=options.get("in_channels", 3))
    samples = ImageSamples(load_images(args.dataset_name, split, label_column=None), transform)
    return samples.stack(range(len(samples)))


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


def statistics_of(images: torch.Tensor, features: FeatureExtractor) -> GaussianStatistics:
    """Mean and covariance of the features of images in [-1, 1]."""
    return GaussianStatistics().update(features(to_uint8(images)).pool)


def measure(tokenizer: DARTokenizer, images: torch.Tensor, features: FeatureExtractor) -> tuple[dict, torch.Tensor]:
    """Metrics after every group, and the first images above their previews."""
    scheduler = FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift, solver_order=1)
    steps = [sample for _, sample in reconstruct_steps(tokenizer, images, scheduler, BATCH)[0]]
    real = statistics_of(images, features)
    distances = []
    for step in steps:
        made = statistics_of(step, features)
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    features = load_feature_extractor(args.features, args.features_weights)
    held_out = load_pixels(args, args.held_out)
    print(f"{len(held_out)} images to measure", flush=True)
    results = []
    for seed, scope, shift in product(args.seeds, args.scopes, args.shifts):
        folder = args.output_dir / f"{scope}-{shift:g}-{args.steps}-{seed}"
        if not (folder / "config.json").is_file():
            train_tokenizer(args, folder, scope, shift, seed)
        metrics, shown = measure(DARTokenizer.from_pretrained(folder), held_out, features)
        save_picture(image_grid(shown, NUM_SHOWN), folder / "previews.png")
        results.append(
            {
                "scope": scope,
                "shift": shift,
                "seed": seed,
                "steps": args.steps,
                "features": features.identity,
                **metrics,
            }
        )
        for name in ("psnr", "distance"):
            print(f"{folder.name}: {name}", *(f"{value:.2f}" for value in metrics[name]), flush=True)
    (args.output_dir / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    draw(results, args.output_dir)


if __name__ == "__main__":
    main()
