"""Both evaluations from start to report: make the sets in shards, measure, draw.

Everything about sample i, its class, noise and codes, follows from (seed, i). Features are taken in batches of their
own size, from the 8-bit images that are saved. So figures depend neither on the number of processes nor on how often a
run was interrupted; another batch size changes them only where rounding of the model's arithmetic changes a pixel or,
rarely, a sampled code.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..data import SeedFor, draw_seed, normal_noise
from ..metrics import CodeStatistics, FeatureExtractor, load_feature_extractor, mean_squared_error, psnr, ssim
from ..metrics.features import INCEPTION
from ..metrics.lpips import MIN_SIZE, LPIPSNetwork, load_lpips
from ..metrics.weights import check_hash, weights_hash
from ..sampling_dar import guidance_schedule, sampling_warpers
from .arguments import EvaluationArguments, GenerationArguments, ReconstructionArguments
from .images import EXTRACTOR, DatasetImages, NpzImages, read_reference, to_float, to_uint8, write_npz
from .measure import (
    Findings,
    References,
    mean_of,
    measure_agreement,
    measure_distances,
    measure_generation,
    set_statistics,
)
from .models import load_model
from .pictures import draw_generation, draw_reconstruction
from .report import metric, public_name, versions, write_report
from .shards import ShardFolder

DEFAULT_COUNT = 50_000  # generated images of the usual figure
FEATURE_BATCH = 50
NUM_SHOWN = 80  # images kept for the grids
NUM_STRIPS = 10  # images whose previews are kept
SSIM_WINDOW = 7
ROUNDING = "8 bit, rounded to nearest"
ReferenceImages = DatasetImages | NpzImages


class _Evaluation:
    """What both evaluations share."""

    mode = ""

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator):
        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.started = time.perf_counter()
        self.folder = Path(args.output_dir)
        self.model = load_model(args, self.device)
        self.size = self.model.tokenizer.image_size
        self.extractor: FeatureExtractor = load_feature_extractor(
            args.features, args.features_weights, args.features_hash, self.device
        )
        network = public_name(self.extractor.name)  # in the names of figures, which are published
        local = network == INCEPTION != self.extractor.name  # FID is a name for the one network alone
        self.network = f"local {network}" if local else network
        self.windows = self.model.windows(args.num_inference_steps)
        self.lengths = sorted(set(self.windows))
        self.prefixes = self._prefixes()
        probe = torch.full((1, 3, *self.size), 128, dtype=torch.uint8)
        self.feature_sizes = {name: tensor.shape[1] for name, tensor in self.extractor(probe).items()}
        self.findings = Findings()

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
            self.findings.warn(f"{len(images.left_out)} images cannot be read and are left out: {names}.")
        settings = {"data": images.description, "features": self.extractor.identity}
        shards = self.shards("references", settings, images.count)

        def compute(indices: range) -> dict[str, torch.Tensor]:
            pixels = images.read(indices)
            labels = images.labels(indices)
            return self.features(pixels, "") | ({} if labels is None else {"labels": labels})

        shards.fill(self.accelerator, compute, "references")
        return shards

    def features(self, pixels: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
        """Features of uint8 images by ``prefix`` and kind."""
        parts = [dict(self.extractor(batch).items()) for batch in pixels.split(FEATURE_BATCH)]
        return {f"{prefix}{kind}": torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    def previews(self, shown: dict[int, torch.Tensor], indices: range) -> dict[str, torch.Tensor]:
        """What the pictures need: the first images, and the first few after every step.

        Args:
            shown: images of the shard by step, counted from 1.
        """
        last = shown[max(shown)]
        kept = {"shown": last[: max(0, NUM_SHOWN - indices.start)]}
        strips = max(0, NUM_STRIPS - indices.start)
        kept["previews"] = torch.stack([shown[step][:strips] for step in sorted(shown)], dim=1)
        return {name: tensor for name, tensor in kept.items() if len(tensor)}

    def batches(self, indices: range) -> Iterator[range]:
        for start in range(indices.start, indices.stop, self.args.batch_size):
            yield range(start, min(start + self.args.batch_size, indices.stop))

    def by_step(self, parts: list[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
        return {step: torch.cat([part[step] for part in parts]) for step in parts[0]}

    def measured(self, shown: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Features of the previews at every measured prefix: the last step that needs no more tokens."""
        tensors: dict[str, torch.Tensor] = {}
        for tokens in self.prefixes:
            step = max(step for step in shown if self.windows[step - 1] == tokens)
            tensors |= self.features(shown[step], f"{tokens}/")
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

    def report(self, data: dict, settings: dict) -> dict[str, Any]:
        """The report, written."""
        report = {
            "mode": self.mode,
            "model": self.model.description,
            "data": data,
            "settings": {
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
            | settings,
            "metrics": self.findings.metrics,
            "warnings": self.findings.warnings,
            "not_measured": self.findings.not_measured,
            "versions": versions(),
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        return report

    def write_statistics(self, name: str, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Mean and covariance of a set's features, under the names of ADM's files."""
        arrays: dict[str, np.ndarray] = {EXTRACTOR: np.array(self.extractor.identity)}
        for kind, names in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
            if kind in statistics:
                arrays |= {n: tensor.numpy() for n, tensor in zip(names, statistics[kind], strict=True)}
        write_npz(self.folder / f"{name}_statistics.npz", arrays)

    def write_references(self, images: ReferenceImages, references: References) -> str | None:
        """Reference crops and statistics; returns the crops' hash."""
        self.write_statistics("reference", references.statistics)
        if not self.args.save_images or isinstance(images, NpzImages):
            return None
        crops = (images.read(range(i, min(i + 100, images.count))) for i in range(0, images.count, 100))
        return write_npz(self.folder / "references.npz", {}, crops, images.count)


class _Reconstruction(_Evaluation):
    mode = "reconstruction"
    args: ReconstructionArguments

    def __init__(self, args: ReconstructionArguments, accelerator: Accelerator):
        super().__init__(args, accelerator)
        self.images = DatasetImages(args, self.size, self.model.tokenizer.config.in_channels, args.num_images)
        _check_count(self.images.count, "images")
        self.lpips: LPIPSNetwork | None = None
        self.lpips_hash: str | None = None
        if args.lpips_weights:
            self.lpips = load_lpips(args.lpips_weights).to(self.device)
            self.lpips_hash = weights_hash(self.lpips.state_dict())
            check_hash(self.lpips_hash, args.lpips_hash, args.lpips_weights)
        if self.lpips is None:
            self.findings.not_measured["lpips"] = "no lpips_weights given"
        elif min(self.size) < MIN_SIZE:
            self.lpips = None
            self.findings.not_measured["lpips"] = f"images of {self.size} are smaller than {MIN_SIZE} pixels"
        if min(self.size) < SSIM_WINDOW:
            self.findings.not_measured["ssim"] = f"images of {self.size} are smaller than the window of {SSIM_WINDOW}"

    @torch.no_grad()
    def compute(self, indices: range) -> dict[str, torch.Tensor]:
        """One shard: reconstructions of these images."""
        references = self.images.read(indices)
        codes, parts = [], []
        for batch in self.batches(indices):
            pixels = references[batch.start - indices.start : batch.stop - indices.start]
            batch_codes, shown = self.reconstruct(to_float(pixels), batch)
            codes.append(batch_codes)
            parts.append(shown)
        shown = self.by_step(parts)
        wanted = to_float(references, torch.float64)
        decoded = [to_float(shown[step], torch.float64) for step in sorted(shown)]
        tensors = {"codes": torch.cat(codes).int()} | self.measured(shown) | self.previews(shown, indices)
        tensors["errors"] = torch.stack([mean_squared_error(images, wanted) for images in decoded], dim=1)
        tensors["psnr"] = torch.stack([psnr(images, wanted) for images in decoded], dim=1)
        if "ssim" not in self.findings.not_measured:
            tensors["ssim"] = ssim(decoded[-1], wanted, SSIM_WINDOW)
        if self.lpips is not None:
            pairs = zip(*(to_float(x).split(FEATURE_BATCH) for x in (shown[max(shown)], references)), strict=True)
            tensors["lpips"] = torch.cat([self.lpips(x.to(self.device), y.to(self.device)).cpu() for x, y in pairs])
        labels = self.images.labels(indices)
        if labels is not None:
            tensors["labels"] = labels
        kept = references[: max(0, NUM_SHOWN - indices.start)]
        if len(kept):
            tensors["references"] = kept
        if self.args.save_images:
            tensors["images"] = shown[max(shown)]
        return tensors

    def reconstruct(self, images: torch.Tensor, indices: range) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Codes of images in [-1, 1] and the pictures after every step."""
        tokenizer = self.model.tokenizer
        images = images[:, : tokenizer.config.in_channels].to(self.device, tokenizer.dtype)
        codes = tokenizer.encode(images).codes
        seeds = torch.tensor([draw_seed(self.args.seed, SeedFor.SAMPLE, i) for i in indices])
        noise = normal_noise(seeds, images.shape[1:], self.device)
        steps = tokenizer.decode_stream(
            [codes], noise=noise, num_inference_steps=len(self.windows), scheduler=self.model.scheduler
        )
        return codes.cpu(), {step.step: to_uint8(step.sample) for step in steps}

    def run(self) -> dict[str, Any] | None:
        settings = self.sample_settings() | {"data": self.images.description, "lpips": self.lpips_hash}
        shards = self.shards("reconstructions", settings, self.images.count)
        reference_shards = self.reference_shards(self.images)
        shards.fill(self.accelerator, self.compute, "reconstructions")
        if not self.accelerator.is_main_process:
            return None
        references = References(set_statistics(reference_shards), reference_shards, self.images.count)
        steps = self.measure(shards, references)
        data = self.images.description | {"count": self.images.count}
        data["references_sha256"] = self.write_references(self.images, references)
        self.write_statistics("reconstruction", set_statistics(shards, f"{self.lengths[-1]}/"))
        if self.args.save_images:
            path = self.folder / "reconstructions.npz"
            data["samples_sha256"] = write_npz(path, {}, shards.parts("images"), shards.count)
        report = self.report(
            data, {"count": shards.count, "ssim_window": SSIM_WINDOW, "lpips_hash": self.lpips_hash}
        ) | {"steps": steps}
        draw_reconstruction(self.folder, report, shards)
        write_report(self.folder, report)
        return report

    def measure(self, shards: ShardFolder, references: References) -> list[dict[str, Any]]:
        """Fills the findings; returns the error after every step."""
        findings, full = self.findings, self.lengths[-1]
        for tokens in self.prefixes:
            measure_distances(findings, shards, references, self.network, self.mode, tokens)
            measure_agreement(
                findings,
                shards,
                f"{tokens}/logits",
                self.images.num_classes,
                self.network,
                num_tokens=tokens,
            )
        if references.shards is not None:
            measure_agreement(
                findings,
                references.shards,
                "logits",
                self.images.num_classes,
                self.network,
                kind="reference_label_agreement",
            )
        steps = [
            {
                "step": step + 1,
                "num_tokens": tokens,
                "psnr": mean_of(part[:, step] for part in shards.parts("psnr")),
                "mse": mean_of(part[:, step] for part in shards.parts("errors")),
            }
            for step, tokens in enumerate(self.windows)
        ]
        last_of_prefix = {step["num_tokens"]: step for step in steps}
        findings.metrics += [metric("psnr", last_of_prefix[n]["psnr"], num_tokens=n) for n in self.prefixes]
        for kind in ("ssim", "lpips"):
            if shards.has(kind):
                findings.metrics.append(metric(kind, mean_of(shards.parts(kind)), num_tokens=full))
        usage = CodeStatistics(self.model.tokenizer.config.codebook_size)
        for part in shards.parts("codes"):
            usage.update(part)
        for kind, value in usage.figures().items():
            findings.metrics.append(metric(f"codebook_{kind}", value))
        return steps


class _Generation(_Evaluation):
    mode = "generation"
    args: GenerationArguments

    def __init__(self, args: GenerationArguments, accelerator: Accelerator):
        super().__init__(args, accelerator)
        if self.model.pipeline is None:
            raise ValueError(f"{args.pipeline} holds a tokenizer only: generation needs a pipeline.")
        self.pipeline = self.model.pipeline
        self.count = args.num_images or DEFAULT_COUNT
        self.num_classes = self.pipeline.transformer.config.num_classes
        scale = args.guidance_scale
        self.guidance = None if scale is None else scale[0] if len(scale) == 1 else (scale[0], scale[1])
        guidance_schedule(self.guidance, self.lengths[-1])  # both raise ValueError, before the folder is claimed
        sampling_warpers(args.temperature, args.top_k, args.top_p)
        self.images: ReferenceImages | None = None
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reference: dict[str, Any] = {}
        self._find_references()
        _check_count(self.count, "samples")
        if self.images is not None and not self.known:
            _check_count(self.images.count, "references")
        if self.count % self.num_classes:
            self.findings.warn(f"{self.count} images are not equally many of each of {self.num_classes} classes.")

    def _find_references(self) -> None:
        """Reference images or statistics, checked against the samples before any is made."""
        args = self.args
        if args.reference is None:
            self.images = DatasetImages(args, self.size, self.model.tokenizer.config.in_channels, None)
            return
        found = read_reference(args.reference)
        self.images, self.reference = found.images, found.description
        if found.images is not None and tuple(found.images.size) != self.size:
            raise ValueError(
                f"{args.reference} holds images of {tuple(found.images.size)}, the model's are {self.size}."
            )
        same_network = found.extractor == self.extractor.identity or (
            found.extractor is None and args.features == "inception"  # ADM's files are Inception's
        )
        if same_network:
            self.known = found.statistics
        elif found.images is None:
            theirs = found.extractor or "Inception, as far as can be told"
            raise ValueError(
                f"the statistics in {args.reference} are of another network ({theirs}) than {self.extractor.identity}."
            )
        for kind, (mean, _) in self.known.items():
            size = self.feature_sizes.get(kind)
            if size != len(mean):
                raise ValueError(
                    f"{args.reference} has {kind} features of size {len(mean)}, the network's are {size}."
                )

    @torch.no_grad()
    def compute(self, indices: range) -> dict[str, torch.Tensor]:
        """One shard: samples of these numbers."""
        codes, parts = [], []
        for batch in self.batches(indices):
            batch_codes, shown = self.generate(batch)
            codes.append(batch_codes)
            parts.append(shown)
        shown = self.by_step(parts)
        tensors = {"codes": torch.cat(codes).int(), "labels": torch.tensor([self.label(i) for i in indices])}
        tensors |= self.measured(shown) | self.previews(shown, indices)
        if self.args.save_images:
            tensors["images"] = shown[max(shown)]
        return tensors

    def label(self, index: int) -> int:
        """Classes in turn, so that every stretch of the set is balanced."""
        return index % self.num_classes

    def generate(self, indices: range) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Codes and the pictures after every step."""
        codes: list[torch.Tensor] = []
        seeds = [draw_seed(self.args.seed, SeedFor.SAMPLE, i) for i in indices]
        outputs = self.pipeline.stream(
            [self.label(i) for i in indices],
            guidance_scale=self.guidance,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            num_inference_steps=len(self.windows),
            generator=[torch.Generator(self.device).manual_seed(seed) for seed in seeds],
            output_type="pt",
            callback_on_step_end=lambda pipe, step, timestep, tensors: codes.append(tensors["codes"]),
            callback_on_step_end_tensor_inputs=["codes"],
        )
        shown: dict[int, torch.Tensor] = {}
        for output in outputs:
            assert isinstance(output.images, torch.Tensor) and output.step is not None  # asked for above
            shown[output.step] = to_uint8(output.images * 2 - 1)
        return codes[-1].cpu(), shown

    def run(self) -> dict[str, Any] | None:
        args = self.args
        guidance = (
            self.pipeline.transformer.generation_config.guidance_scale if self.guidance is None else self.guidance
        )
        sampler = {
            "guidance_scale": guidance,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
        }
        shards = self.shards("samples", self.sample_settings() | sampler, self.count)
        reference_shards = None if self.images is None else self.reference_shards(self.images)
        shards.fill(self.accelerator, self.compute, "samples")
        if not self.accelerator.is_main_process:
            return None
        references = self.references(reference_shards)
        for tokens in self.prefixes:
            measure_generation(
                self.findings,
                shards,
                references,
                self.network,
                tokens,
                self.num_classes,
                self.device,
            )
        usage = CodeStatistics(self.model.tokenizer.config.codebook_size)
        for part in shards.parts("codes"):
            usage.update(part)
        for kind in ("usage", "perplexity"):
            self.findings.metrics.append(metric(f"codebook_{kind}", usage.figures()[kind]))
        data: dict[str, Any] = {"count": references.count}
        if self.images is not None:
            data = self.images.description | data
            data["references_sha256"] = self.write_references(self.images, references)
        else:
            data |= self.reference
        self.write_statistics("sample", set_statistics(shards, f"{self.lengths[-1]}/"))
        if args.save_images:
            labels = shards.rows("labels").numpy()
            path = self.folder / "samples.npz"
            data["samples_sha256"] = write_npz(path, {"arr_1": labels}, shards.parts("images"), shards.count)
        report = self.report(data, {"count": self.count, "reference": args.reference} | sampler)
        draw_generation(self.folder, report, shards)
        write_report(self.folder, report)
        return report

    def references(self, shards: ShardFolder | None) -> References:
        """Known statistics first: ADM's files hold those of all training images beside 10,000 images."""
        if shards is None:
            return References(self.known, None, None)
        if self.known:
            return References(self.known, shards, None)
        return References(set_statistics(shards), shards, shards.count)


def _check_count(count: int, what: str) -> None:
    if count < 2:
        raise ValueError(f"sets are compared by mean and covariance, which need 2 {what} or more, got {count}.")


def evaluate_reconstruction(args: ReconstructionArguments, accelerator: Accelerator) -> dict[str, Any] | None:
    """Reconstruct a data set, measure, and leave report.json, pictures and .npz files in ``args.output_dir``.

    All processes call this together; the report comes back on the main one.

    Raises:
        ValueError: for whatever does not fit together, before anything is computed.
    """
    return _Reconstruction(args, accelerator).run()


def evaluate_generation(args: GenerationArguments, accelerator: Accelerator) -> dict[str, Any] | None:
    """Generate a set, measure, and leave report.json, pictures and .npz files in ``args.output_dir``.

    All processes call this together; the report comes back on the main one.

    Raises:
        ValueError: for whatever does not fit together, before anything is computed.
    """
    return _Generation(args, accelerator).run()
