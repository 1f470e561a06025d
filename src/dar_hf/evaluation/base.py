"""What both evaluations share: the model, the features of its images, shards, and the report.

Everything about sample i, its class, noise and codes, follows from (seed, i). Features are taken in batches of their
own size, from the 8-bit images that are saved. So metrics depend neither on the number of processes nor on how often a
run was interrupted; another batch size changes them only where rounding of the model's arithmetic changes a pixel or,
rarely, a sampled code.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..metrics import load_feature_extractor
from ..metrics.features import INCEPTION
from ..metrics.modules import CodebookUsage
from .arguments import EvaluationArguments
from .images import EXTRACTOR, DatasetImages, NpzImages, write_npz
from .measure import MetricResults, References
from .models import load_model
from .report import public_name, versions
from .shards import ShardFolder

FEATURE_BATCH = 50
NUM_SHOWN = 80  # images kept for the grids
NUM_STRIPS = 10  # images whose previews are kept
ROUNDING = "8 bit, rounded to nearest"
ReferenceImages = DatasetImages | NpzImages
Samples = tuple[torch.Tensor, dict[int, torch.Tensor]]  # codes, and uint8 images after every step, counted from 1


class Evaluation:
    """What both evaluations share.

    Args:
        args: options of the evaluation.
        accelerator: the process it runs in, one of any number.
    """

    mode = ""

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator):
        self.args = args
        self.accelerator = accelerator
        self.device = accelerator.device
        self.started = time.perf_counter()
        self.folder = Path(args.output_dir)
        self.model = load_model(args, self.device)
        self.size = self.model.tokenizer.image_size
        self.extractor = load_feature_extractor(args.features, args.features_weights, args.features_hash, self.device)
        self.network = self._network_name()
        self.windows = self.model.windows(args.num_inference_steps)
        self.lengths = sorted(set(self.windows))
        self.prefixes = self._prefixes()
        probe = torch.full((1, 3, *self.size), 128, dtype=torch.uint8)
        self.feature_sizes = {name: tensor.shape[1] for name, tensor in self.extractor(probe).items()}
        self.results = MetricResults()

    def _network_name(self) -> str:
        """The feature network in the names of metrics, which are published."""
        name = public_name(self.extractor.name)
        # FID is a name for the one network alone, not for a local file that is called like it
        if name == INCEPTION and self.extractor.name != INCEPTION:
            return f"local {name}"
        return name

    def _prefixes(self) -> list[int]:
        """The lengths to measure, the full one last."""
        asked = self.lengths if self.args.prefixes is None else self.args.prefixes
        unknown = sorted(set(asked) - set(self.lengths))
        if unknown:
            raise ValueError(f"prefixes must be among {self.lengths}, where denoising steps end, got {unknown}.")
        return sorted({*asked, self.lengths[-1]})

    def shards(self, name: str, settings: dict, count: int) -> ShardFolder:
        """A claimed folder of shards."""
        folder = ShardFolder(self.folder / "shards" / name, settings, count, self.args.shard_size)
        with self.accelerator.main_process_first():
            folder.claim(self.args.overwrite_output_dir and self.accelerator.is_main_process)
        return folder

    def reference_shards(self, images: ReferenceImages) -> ShardFolder:
        """Features of the reference images."""
        if isinstance(images, DatasetImages) and images.left_out:
            names = ", ".join(images.left_out)
            self.results.warn(f"{len(images.left_out)} images cannot be read and are left out: {names}.")
        settings = {"data": images.description, "features": self.extractor.identity}
        shards = self.shards("references", settings, images.count)

        def compute(indices: range) -> dict[str, torch.Tensor]:
            tensors = self.features(images.read(indices), "")
            labels = images.labels(indices)
            if labels is not None:
                tensors["labels"] = labels
            return tensors

        shards.fill(self.accelerator, compute, "references")
        return shards

    def features(self, pixels: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
        """Features of uint8 images by ``prefix`` and kind."""
        parts = [dict(self.extractor(batch).items()) for batch in pixels.split(FEATURE_BATCH)]
        return {f"{prefix}{kind}": torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    def previews(self, steps: dict[int, torch.Tensor], indices: range) -> dict[str, torch.Tensor]:
        """What the grids need: the first images, and the first few after every step.

        Args:
            steps: images of the shard by step, counted from 1.
            indices: of the shard.
        """
        shown = max(0, NUM_SHOWN - indices.start)
        strips = max(0, NUM_STRIPS - indices.start)
        kept = {
            "shown": steps[max(steps)][:shown],
            "previews": torch.stack([steps[step][:strips] for step in sorted(steps)], dim=1),
        }
        return {name: tensor for name, tensor in kept.items() if len(tensor)}

    def in_batches(self, make: Callable[[range], Samples], indices: range) -> Samples:
        """A shard's samples, of which ``make`` makes a batch at a time."""
        codes = []
        parts = []
        for start in range(indices.start, indices.stop, self.args.batch_size):
            stop = min(start + self.args.batch_size, indices.stop)
            batch_codes, batch_steps = make(range(start, stop))
            codes.append(batch_codes)
            parts.append(batch_steps)
        return torch.cat(codes), {step: torch.cat([part[step] for part in parts]) for step in parts[0]}

    def preview_features(self, steps: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features of the previews at every measured prefix: the last step that needs no more tokens."""
        tensors: dict[str, torch.Tensor] = {}
        for tokens in self.prefixes:
            step = max(step for step in steps if self.windows[step - 1] == tokens)
            tensors |= self.features(steps[step], f"{tokens}/")
        return tensors

    def sample_settings(self) -> dict[str, Any]:
        """What the samples depend on."""
        return {
            "model": self.model.description,
            "seed": self.args.seed,
            "num_inference_steps": len(self.windows),
            "prefixes": self.prefixes,
            "save_images": self.args.save_images,
            "features": self.extractor.identity,
            "device_type": self.device.type,  # generators of other devices draw other numbers
        }

    def codebook_usage(self, shards: ShardFolder) -> dict[str, float]:
        """How much of the codebook the set's codes use."""
        usage = CodebookUsage(self.model.tokenizer.config.codebook_size)
        for codes in shards.parts("codes"):
            usage.add_batch(predictions=codes)
        return usage.compute()

    def report(self, data: dict, settings: dict) -> dict[str, Any]:
        """The report; ``settings`` are those of this evaluation alone."""
        common = {
            "seed": self.args.seed,
            "size": list(self.size),
            "num_tokens": self.lengths[-1],
            "num_inference_steps": len(self.windows),
            "images": ROUNDING,
            "feature_extractor": self.extractor.describe(),
            "batch_size": self.args.batch_size,
            "num_processes": self.accelerator.num_processes,
            "device": self.device.type,
        }
        return {
            "mode": self.mode,
            "model": self.model.description,
            "data": data,
            "settings": common | settings,
            "metrics": self.results.metrics,
            "warnings": self.results.warnings,
            "not_measured": self.results.not_measured,
            "versions": versions(),
            "seconds": round(time.perf_counter() - self.started, 1),
        }

    def write_statistics(self, name: str, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Mean and covariance of a set's features, under the names of ADM's files."""
        arrays: dict[str, np.ndarray] = {EXTRACTOR: np.array(self.extractor.identity)}
        for kind, suffix in (("pool", ""), ("spatial", "_s")):
            if kind in statistics:
                mean, covariance = statistics[kind]
                arrays[f"mu{suffix}"] = mean.numpy()
                arrays[f"sigma{suffix}"] = covariance.numpy()
        write_npz(self.folder / f"{name}_statistics.npz", arrays)

    def write_references(self, images: ReferenceImages, references: References) -> str | None:
        """Reference crops and statistics; returns the crops' hash."""
        self.write_statistics("reference", references.statistics)
        if not self.args.save_images or isinstance(images, NpzImages):
            return None
        crops = (images.read(range(i, min(i + 100, images.count))) for i in range(0, images.count, 100))
        return write_npz(self.folder / "references.npz", {}, crops, images.count)


def check_count(count: int, what: str) -> None:
    """Refuse sets that have no covariance.

    Raises:
        ValueError: for fewer than two ``what``.
    """
    if count < 2:
        raise ValueError(f"sets are compared by mean and covariance, which need 2 {what} or more, got {count}.")
