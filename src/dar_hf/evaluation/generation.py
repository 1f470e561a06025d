"""Generation from start to report: sample a set in shards, compare it with a reference set, draw."""

from typing import Any

import torch
from accelerate import Accelerator

from ..data import SeedFor, draw_seed
from ..metrics.features import INCEPTION
from ..metrics.modules import InceptionScore, PrecisionRecall
from ..metrics.names import metric_name
from ..sampling_dar import guidance_schedule, sampling_warpers
from .arguments import GenerationArguments
from .base import Evaluation, ReferenceImages, Samples, check_count
from .drawing import draw_generation
from .images import DatasetImages, NpzReference, read_reference, to_uint8, write_npz
from .measure import References, measure_agreement, measure_distances, set_statistics
from .report import write_report
from .shards import ShardFolder

DEFAULT_COUNT = 50_000  # generated images of the usual FID
NUM_NEIGHBOURS = 3  # of precision and recall


class Generation(Evaluation):
    """Generated images, equally many of each class, compared as a set."""

    mode = "generation"
    args: GenerationArguments

    def __init__(self, args: GenerationArguments, accelerator: Accelerator):
        super().__init__(args, accelerator)
        if self.model.pipeline is None:
            raise ValueError(f"{args.pipeline} holds a tokenizer only: generation needs a pipeline.")
        self.pipeline = self.model.pipeline
        if self.pipeline.transformer.config.text_vocab_size:
            raise ValueError(f"{args.pipeline} draws from text: measuring generation supports class models only.")
        self.count = args.num_images or DEFAULT_COUNT
        self.num_classes = self.pipeline.transformer.config.num_classes
        self.guidance = _guidance(args.guidance_scale)
        # both raise a ValueError for options that do not fit, before the folder is claimed
        guidance_schedule(self.guidance, self.lengths[-1])
        sampling_warpers(args.temperature, args.top_k, args.top_p)
        self.images: ReferenceImages | None = None
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reference: dict[str, Any] = {}
        if args.reference is None:
            self.images = DatasetImages(args, self.size, self.model.tokenizer.config.in_channels, None)
        else:
            self._take_reference(args.reference)
        check_count(self.count, "samples")
        if self.images is not None and not self.known:
            check_count(self.images.count, "references")
        if self.count % self.num_classes:
            self.results.warn(f"{self.count} images are not equally many of each of {self.num_classes} classes.")

    def _take_reference(self, path: str) -> None:
        """Reference images or statistics of a file, checked against the samples before any is made."""
        found = read_reference(path)
        self.images = found.images
        self.reference = found.description
        if found.images is not None and tuple(found.images.size) != self.size:
            raise ValueError(f"{path} holds images of {tuple(found.images.size)}, the model's are {self.size}.")
        if self._is_of_our_network(found):
            self.known = found.statistics
        elif found.images is None:
            theirs = found.extractor or "Inception, as far as can be told"
            raise ValueError(
                f"the statistics in {path} are of another network ({theirs}) than {self.extractor.identity}."
            )
        for kind, (mean, _) in self.known.items():
            size = self.feature_sizes.get(kind)
            if size != len(mean):
                raise ValueError(f"{path} has {kind} features of size {len(mean)}, the network's are {size}.")

    def _is_of_our_network(self, reference: NpzReference) -> bool:
        if reference.extractor is None:
            return self.args.features == INCEPTION  # ADM's files are Inception's
        return reference.extractor == self.extractor.identity

    def run(self) -> dict[str, Any] | None:
        """The report, on the main process."""
        args = self.args
        default_guidance = self.pipeline.transformer.generation_config.guidance_scale
        sampler = {
            "guidance_scale": default_guidance if self.guidance is None else self.guidance,
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
        self.measure(shards, references)
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

    @torch.no_grad()
    def compute(self, indices: range) -> dict[str, torch.Tensor]:
        """One shard: samples of these numbers."""
        codes, steps = self.in_batches(self.generate, indices)
        tensors = {"codes": codes.int(), "labels": torch.tensor([self.label(i) for i in indices])}
        tensors |= self.preview_features(steps) | self.previews(steps, indices)
        if self.args.save_images:
            tensors["images"] = steps[max(steps)]
        return tensors

    def label(self, index: int) -> int:
        """Classes in turn, so that every stretch of the set is balanced."""
        return index % self.num_classes

    def generate(self, indices: range) -> Samples:
        """One batch of samples."""
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
        steps: dict[int, torch.Tensor] = {}
        for output in outputs:
            assert isinstance(output.images, torch.Tensor) and output.step is not None  # asked for above
            steps[output.step] = to_uint8(output.images * 2 - 1)
        return codes[-1].cpu(), steps

    def references(self, shards: ShardFolder | None) -> References:
        """Known statistics first: ADM's files hold those of all training images next to 10,000 images."""
        if shards is None:
            return References(self.known, None, None)
        if self.known:
            return References(self.known, shards, None)
        return References(set_statistics(shards), shards, shards.count)

    def measure(self, shards: ShardFolder, references: References) -> None:
        """Every metric into the results."""
        for tokens in self.prefixes:
            measure_distances(self.results, shards, references, self.network, self.mode, tokens)
            self._measure_logits(shards, tokens)
            self._measure_precision_recall(shards, references, tokens)
        usage = self.codebook_usage(shards)
        for kind in ("usage", "perplexity"):
            self.results.add(f"codebook_{kind}", usage[kind])

    def _measure_logits(self, shards: ShardFolder, tokens: int) -> None:
        """Inception score and label agreement, where the network gives logits."""
        kind = "inception_score"
        logits = f"{tokens}/logits"
        if not shards.has(logits):
            self.results.not_measured[kind] = f"{self.network} gives no logits"
            return
        score = InceptionScore()
        for part in shards.parts(logits):
            score.add_batch(predictions=part)
        self.results.add(kind, score.compute()[kind], self._named(kind), num_tokens=tokens)
        size = score.split_size
        if shards.count % size:
            self.results.warn(f"{shards.count} samples are no whole number of the Inception score's splits of {size}.")
        measure_agreement(self.results, shards, logits, self.num_classes, self.network, num_tokens=tokens)

    def _measure_precision_recall(self, shards: ShardFolder, references: References, tokens: int) -> None:
        reason = ""
        if references.shards is None:
            reason = "the reference holds statistics, no images"
        elif min(shards.count, references.shards.count) <= NUM_NEIGHBOURS:
            reason = f"a set has {NUM_NEIGHBOURS} images or fewer"
        if references.shards is None or reason:
            self.results.not_measured |= {"precision": reason, "recall": reason}
            return
        metric = PrecisionRecall(NUM_NEIGHBOURS, self.device)
        for part in shards.parts(f"{tokens}/pool"):
            metric.add_batch(predictions=part)
        for part in references.shards.parts("pool"):
            metric.add_batch(references=part)
        for kind, value in metric.compute().items():
            self.results.add(kind, value, self._named(kind), num_tokens=tokens)

    def _named(self, kind: str) -> str:
        """Display name of a metric that is computed on the features of a network."""
        network = "" if self.network == INCEPTION else self.network
        return metric_name(kind, network=network)


def _guidance(scale: list[float] | None) -> float | tuple[float, float] | None:
    """The option's one or two numbers as the pipeline takes them."""
    if scale is None:
        return None
    if len(scale) == 1:
        return scale[0]
    return scale[0], scale[1]


def evaluate_generation(args: GenerationArguments, accelerator: Accelerator) -> dict[str, Any] | None:
    """Generate a set, measure, and leave report.json, grids and .npz files in ``args.output_dir``.

    All processes call this together; the report comes back on the main one.

    Raises:
        ValueError: for whatever does not fit together, before anything is computed.
    """
    return Generation(args, accelerator).run()
