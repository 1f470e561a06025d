"""Reconstruction from start to report: encode and decode a data set in shards, measure, draw."""

from typing import Any

import torch
from accelerate import Accelerator

from ..data import SeedFor, draw_seed, normal_noise
from ..metrics import load_lpips, mean_squared_error
from ..metrics.lpips import MIN_SIZE
from ..metrics.modules import LPIPS, PSNR, SSIM, PairedMetric
from ..metrics.weights import check_hash
from ..utils.fingerprint import weights_fingerprint
from .arguments import ReconstructionArguments
from .base import NUM_SHOWN, Evaluation, Samples, check_count
from .drawing import draw_reconstruction
from .images import DatasetImages, to_float, to_uint8, write_npz
from .measure import References, measure_agreement, measure_distances, set_statistics
from .report import write_report
from .shards import ShardFolder

SSIM_WINDOW = 7


class Reconstruction(Evaluation):
    """Reconstructions of a data set, compared image by image and as a set."""

    mode = "reconstruction"
    args: ReconstructionArguments

    def __init__(self, args: ReconstructionArguments, accelerator: Accelerator):
        super().__init__(args, accelerator)
        self.images = DatasetImages(args, self.size, self.model.tokenizer.config.in_channels, args.num_images)
        check_count(self.images.count, "images")
        self.psnr = PSNR()  # after every step
        self.paired: dict[str, PairedMetric] = {}  # of the finished images
        self.lpips_hash: str | None = None
        not_measured = self.results.not_measured
        if min(self.size) >= SSIM_WINDOW:
            self.paired["ssim"] = SSIM(SSIM_WINDOW)
        else:
            not_measured["ssim"] = f"images of {self.size} are smaller than the window of {SSIM_WINDOW}"
        if args.lpips_weights is None:
            not_measured["lpips"] = "no lpips_weights given"
            return
        network = load_lpips(args.lpips_weights).to(self.device)
        self.lpips_hash = weights_fingerprint(network.state_dict())
        check_hash(self.lpips_hash, args.lpips_hash, args.lpips_weights)
        if min(self.size) >= MIN_SIZE:
            self.paired["lpips"] = LPIPS(network)
        else:
            not_measured["lpips"] = f"images of {self.size} are smaller than {MIN_SIZE} pixels"

    def run(self) -> dict[str, Any] | None:
        """The report, on the main process."""
        settings = self.sample_settings() | {"data": self.images.description, "lpips": self.lpips_hash}
        shards = self.shards("reconstructions", settings, self.images.count)
        reference_shards = self.reference_shards(self.images)
        shards.fill(self.accelerator, self.compute, "reconstructions")
        if not self.accelerator.is_main_process:
            return None
        references = References(set_statistics(reference_shards), reference_shards, self.images.count)
        steps = self.step_errors(shards)
        self.measure(shards, reference_shards, references, steps)
        data = self.images.description | {"count": self.images.count}
        data["references_sha256"] = self.write_references(self.images, references)
        self.write_statistics("reconstruction", set_statistics(shards, f"{self.lengths[-1]}/"))
        if self.args.save_images:
            path = self.folder / "reconstructions.npz"
            data["samples_sha256"] = write_npz(path, {}, shards.parts("images"), shards.count)
        settings = {"count": shards.count, "ssim_window": SSIM_WINDOW, "lpips_hash": self.lpips_hash}
        report = self.report(data, settings) | {"steps": steps}
        draw_reconstruction(self.folder, report, shards)
        write_report(self.folder, report)
        return report

    @torch.no_grad()
    def compute(self, indices: range) -> dict[str, torch.Tensor]:
        """One shard: reconstructions of these images."""
        references = self.images.read(indices)

        def reconstruct(batch: range) -> Samples:
            return self.reconstruct(references[batch.start - indices.start : batch.stop - indices.start], batch)

        codes, steps = self.in_batches(reconstruct, indices)
        tensors = {"codes": codes.int()} | self.preview_features(steps) | self.previews(steps, indices)
        tensors |= self.pair_values(steps, references)
        labels = self.images.labels(indices)
        if labels is not None:
            tensors["labels"] = labels
        shown = references[: max(0, NUM_SHOWN - indices.start)]
        if len(shown):
            tensors["references"] = shown
        if self.args.save_images:
            tensors["images"] = steps[max(steps)]
        return tensors

    def reconstruct(self, pixels: torch.Tensor, indices: range) -> Samples:
        """One batch of reconstructions, of uint8 images."""
        tokenizer = self.model.tokenizer
        images = to_float(pixels)[:, : tokenizer.config.in_channels].to(self.device, tokenizer.dtype)
        codes = tokenizer.encode(images).codes
        seeds = torch.tensor([draw_seed(self.args.seed, SeedFor.SAMPLE, i) for i in indices])
        noise = normal_noise(seeds, images.shape[1:], self.device)
        steps = tokenizer.decode_stream(
            [codes], noise=noise, num_inference_steps=len(self.windows), scheduler=self.model.scheduler
        )
        return codes.cpu(), {step.step: to_uint8(step.sample) for step in steps}

    def pair_values(self, steps: dict[int, torch.Tensor], references: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each image and its reference give: ``errors`` and ``psnr (n, steps)``, the other metrics ``(n,)``."""
        decoded = [steps[step] for step in sorted(steps)]
        wanted = to_float(references, torch.float64)
        errors = [mean_squared_error(to_float(images, torch.float64), wanted) for images in decoded]
        values = {kind: metric.values(decoded[-1], references) for kind, metric in self.paired.items()}
        values["errors"] = torch.stack(errors, dim=1)
        values["psnr"] = torch.stack([self.psnr.values(images, references) for images in decoded], dim=1)
        return values

    def step_errors(self, shards: ShardFolder) -> list[dict[str, Any]]:
        """PSNR and error after every step."""
        errors = shards.rows("errors").mean(dim=0).tolist()
        psnr = shards.rows("psnr")
        steps = []
        for index, tokens in enumerate(self.windows):
            self.psnr.add_values(psnr[:, index])
            step = {"step": index + 1, "num_tokens": tokens, **self.psnr.compute(), "mse": errors[index]}
            steps.append(step)
        return steps

    def measure(
        self, shards: ShardFolder, reference_shards: ShardFolder, references: References, steps: list[dict[str, Any]]
    ) -> None:
        """Every metric into the results."""
        results = self.results
        classes = self.images.num_classes
        for tokens in self.prefixes:
            measure_distances(results, shards, references, self.network, self.mode, tokens)
            measure_agreement(results, shards, f"{tokens}/logits", classes, self.network, num_tokens=tokens)
        kind = "reference_label_agreement"
        measure_agreement(results, reference_shards, "logits", classes, self.network, kind=kind)
        last_of_prefix = {step["num_tokens"]: step for step in steps}
        for tokens in self.prefixes:
            results.add("psnr", last_of_prefix[tokens]["psnr"], num_tokens=tokens)
        for kind, metric in self.paired.items():
            for values in shards.parts(kind):
                metric.add_values(values)
            results.add(kind, metric.compute()[kind], num_tokens=self.lengths[-1])
        for kind, value in self.codebook_usage(shards).items():
            results.add(f"codebook_{kind}", value)


def evaluate_reconstruction(args: ReconstructionArguments, accelerator: Accelerator) -> dict[str, Any] | None:
    """Reconstruct a data set, measure, and leave report.json, grids and .npz files in ``args.output_dir``.

    All processes call this together; the report comes back on the main one.

    Raises:
        ValueError: for whatever does not fit together, before anything is computed.
    """
    return Reconstruction(args, accelerator).run()
