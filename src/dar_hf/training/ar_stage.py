"""Stage 2: the language model on the codes of a finished tokenizer (D-AR, section 3.3)."""

import copy
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..acceleration_dar import SHORT_SEQUENCE
from ..data import DataError, ImageSamples, SeedFor, StreamedImages, bernoulli_mask, image_splits, normal_noise
from ..modeling_dar import DARForCausalLM
from ..pipeline_dar import DARPipeline
from ..presets import PRESETS, get_preset, parse_options
from ..scheduling_dar import FlowMatchAdamsBashforthScheduler
from ..text_dar import encode_texts
from ..tokenizer_dar import DARTokenizer
from ..utils.fingerprint import weights_fingerprint
from ..utils.loading import load
from ..utils.pictures import image_grid
from .arguments import ARArguments
from .codes import ENCODE_BATCH, CodeSamples, code_splits, encode_all, in_batches
from .distillation import GuidedTeacher, divergence_sum
from .fingerprint import data_fingerprint
from .losses import LossTerm, cross_entropy_sum
from .models import build_text_tokenizer, build_transformer, class_names, sizes_of, text_sizes
from .muon import matrices_of_blocks
from .stage import Stage
from .text import caption_tokens, text_fingerprint

logger = logging.getLogger(__name__)

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_SAMPLE_ROWS = 10
SAMPLE_COLUMNS = 8
STREAMED_CAPTIONS = 10_000  # of a stream, from which a text tokenizer is learned


def add_adapters(model: DARForCausalLM, rank: int, alpha: int, train_classes: bool = False) -> nn.Module:
    """The model with trainable low-rank adapters on every linear layer but the head, and all else frozen (peft).

    Args:
        rank, alpha: of the adapters.
        train_classes: train the embeddings of the classes, too; new ones would else stay as they start.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('adapters come with peft: pip install "dar-hf[peft]".') from error
    classes = list(range(model.config.codebook_size, model.config.vocab_size))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTED)
    if train_classes:
        config.trainable_token_indices = {"embed_tokens": classes}
    return get_peft_model(model, config)


def _captions_of(samples: ImageSamples | StreamedImages | CodeSamples) -> list[str]:
    """All captions, or the first ones of a stream."""
    if isinstance(samples, StreamedImages):
        return samples.captions(STREAMED_CAPTIONS)
    return samples.labels


def _load_samples(args: ARArguments, tokenizer: DARTokenizer, num_classes: int | None) -> tuple[Any, Any, Any]:
    """Images or codes to train on, images to validate on, and classes; all None where the teacher draws the codes."""
    if args.distill_samples:
        return None, None, None
    if args.codes:
        return code_splits(args, args.codes, tokenizer)
    channels = tokenizer.config.in_channels
    return image_splits(args, tokenizer.image_size, channels, with_labels=True, num_classes=num_classes)


class ARStage(Stage):
    """Trains a `DARForCausalLM`; the finished folder is a whole `DARPipeline`.

    Args:
        model: the language model.
        tokenizer: the trained tokenizer, frozen.
        samples: training images with labels or captions, or their codes.
        args: the recipe.
        validation: such images for validation, or None.
        id2label: class names.
        text_tokenizer: of models that draw from text.
        teacher: whose distribution is learned, instead of the codes.
    """

    name = "ar"
    saved_class = "DARPipeline"

    def __init__(
        self,
        model: DARForCausalLM,
        tokenizer: DARTokenizer,
        samples: ImageSamples | StreamedImages | CodeSamples,
        args: ARArguments,
        validation: ImageSamples | None = None,
        id2label: dict[int, str] | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: GuidedTeacher | None = None,
    ):
        self.model: Any = model
        self.args = args
        self.id2label = id2label
        self.text_tokenizer = text_tokenizer
        self.teacher = teacher
        self._accelerator: Accelerator | None = None
        if args.lora_rank:
            self.model = add_adapters(
                model, args.lora_rank, args.lora_alpha or args.lora_rank, train_classes=bool(args.new_classes)
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.samples: Any = samples
        self._data: dict[str, str] = {}
        if not args.distill_samples:  # of the images: codes may differ between machines
            self._data = data_fingerprint(samples)
        if args.cache_codes and isinstance(samples, ImageSamples):
            self.samples = encode_all(samples, tokenizer)
            num_corrupt = len(samples) - len(self.samples)
            if num_corrupt > args.max_corrupt_images:
                raise DataError(
                    f"{num_corrupt} images could not be read, more than max_corrupt_images={args.max_corrupt_images}; "
                    "the warnings above name them."
                )
        self.validation = validation
        self.sample_conditions = self._prepare_conditions()
        self.terms = [LossTerm("cross_entropy", 1.0, "tokens", self._cross_entropy)]
        if teacher is not None:
            self.terms = [LossTerm("divergence", 1.0, "tokens", self._divergence)]
        if args.guidance_scale is not None:
            scale = args.guidance_scale
            model.generation_config.guidance_scale = scale[0] if len(scale) == 1 else scale
        model.generation_config.update(do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        self._check(model)

    @classmethod
    def build(cls, args: ARArguments, device: torch.device | str = "cpu") -> "ARStage":
        """The stage from its arguments; ``device`` is where the frozen tokenizer encodes.

        Raises:
            ValueError: for an unknown preset, option, data set or column, a missing tokenizer, or data without labels.
            DataError: if too many of the images to be encoded now cannot be read.
        """
        if not get_preset(args.preset).transformer:
            names = ", ".join(name for name, preset in PRESETS.items() if preset.transformer)
            raise ValueError(f"preset {args.preset!r} has no language model; there are {names}.")
        if not args.tokenizer:
            raise ValueError("stage 2 needs --tokenizer: the folder or Hub id of a trained tokenizer.")
        tokenizer = load(DARTokenizer, args.tokenizer, "tokenizer").to(device)
        overrides = parse_options(args.model_overrides)
        sizes = sizes_of(tokenizer, overrides)
        text_tokenizer = None
        samples, validation, classes = _load_samples(args, tokenizer, overrides.get("num_classes"))
        if args.caption_column:
            captions = _captions_of(samples)
            text_tokenizer = build_text_tokenizer(args, captions)
            sizes |= text_sizes(args, text_tokenizer, captions)
        names = classes.names if classes else []
        model = build_transformer(args, sizes, names)
        length = model.config.prompt_length + model.config.num_image_tokens - 1  # the last code is not put in
        if torch.device(device).type == "cpu" and length <= SHORT_SEQUENCE:
            model.set_attn_implementation("eager")  # for training only: it is not saved
        id2label = class_names(args, model.config.num_classes, names) or None
        teacher = None
        if args.distill_guidance is not None:
            teacher = GuidedTeacher(model, args.distill_guidance)
        if teacher is not None and args.distill_samples:
            teacher.to(device)
            samples = teacher.draw(args.distill_samples, args.seed)
        return cls(model, tokenizer, samples, args, validation, id2label, text_tokenizer, teacher)

    def _prepare_conditions(self) -> dict[str, list]:
        """What validation draws, as `DARForCausalLM.stream_codes` takes it; captions of all images become tokens."""
        if self.text_tokenizer is None:
            rows = min(self.model.config.num_classes, MAX_SAMPLE_ROWS)
            return {"class_labels": [label for label in range(rows) for _ in range(SAMPLE_COLUMNS)]}
        splits = [samples for samples in (self.samples, self.validation) if samples is not None]
        captions = list(dict.fromkeys(_captions_of(splits[-1])))
        shown = captions[:: -(-len(captions) // MAX_SAMPLE_ROWS)]  # spread evenly
        logger.info("samples are drawn of: %s", "; ".join(shown))
        encode = partial(caption_tokens, self.text_tokenizer, self.model.config)
        for samples in splits:
            if isinstance(samples, StreamedImages):
                samples.encode_captions = partial(encode, warn=False)
            else:
                samples.labels = encode(samples.labels)
        ids = encode_texts(self.text_tokenizer, shown, self.model.config.max_text_tokens)
        return {"text_ids": [row for row in ids for _ in range(SAMPLE_COLUMNS)]}

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.tokenizer.to(accelerator.device)
        if self.teacher is not None:
            self.teacher.to(accelerator.device)

    def parameter_groups(self) -> list[dict]:
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        groups: list[dict] = []
        if self.args.muon_learning_rate:
            of_blocks, trained = matrices_of_blocks(trained)
            groups = [{"params": list(of_blocks.values()), "lr": self.args.muon_learning_rate, "muon": True}]
        matrices = [p for p in trained.values() if p.ndim > 1]
        vectors = [p for p in trained.values() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}, *groups]
        return [group for group in groups if group["params"]]  # adapters are matrices only

    def loss_denominators(self, batch: dict) -> dict[str, float]:
        images = len(batch["seed"])
        return {"images": float(images), "tokens": float(images * self.model.config.num_image_tokens)}

    def forward(self, model: nn.Module, batch: dict, step: int) -> torch.Tensor:
        if "codes" not in batch:
            batch["codes"] = self.tokenizer.encode(batch["pixel_values"]).codes  # the loss term reads them there
        drop_class = bernoulli_mask(batch["seed"], self.model.config.class_dropout, SeedFor.CLASS_DROPOUT)
        batch["drop_class"] = drop_class.to(batch["codes"].device)  # the teacher's prompts are dropped as well
        return self._logits(model, batch["codes"], batch["label"], batch["drop_class"])

    def _cross_entropy(self, logits: torch.Tensor, batch: dict, step: int) -> torch.Tensor:
        return cross_entropy_sum(logits, batch["codes"])

    def _divergence(self, logits: torch.Tensor, batch: dict, step: int) -> torch.Tensor:
        assert self.teacher is not None and self._accelerator is not None
        with self._accelerator.autocast():
            targets = self.teacher.logits(self._tokens(batch["codes"], batch["label"]), batch["drop_class"])
        return divergence_sum(logits, targets)

    def _tokens(self, codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the language model reads: prompts, and all codes but the last, which is a target only.

        ``labels`` are classes ``(B,)`` or the tokens of texts ``(B, max_text_tokens)``.
        """
        prompts = labels
        if labels.ndim == 1:
            prompts = (labels + self.model.config.codebook_size)[:, None]
        return torch.cat([prompts, codes[:, :-1]], dim=1)

    def _logits(
        self, model: nn.Module, codes: torch.Tensor, labels: torch.Tensor, drop_class: torch.Tensor
    ) -> torch.Tensor:
        """Logits of every code."""
        tokens = self._tokens(codes, labels)
        return model(input_ids=tokens, use_cache=False, drop_class=drop_class, logits_to_keep=codes.shape[1]).logits

    @torch.no_grad()
    def validate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Cross-entropy on the validation images, and a grid of samples, one row per class or caption."""
        metrics = {}
        if self.validation is not None:
            all_labels = torch.as_tensor(self.validation.labels)
            total = 0.0
            count = 0
            for batch in in_batches(range(len(self.validation)), ENCODE_BATCH):
                indices, images = self.validation.stack_readable(batch)
                if not indices:
                    continue
                codes = self.tokenizer.encode(images.to(self.model.device)).codes
                labels = all_labels[indices].to(codes.device)
                kept = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
                logits = self._logits(self.model, codes, labels, kept)
                total += float(cross_entropy_sum(logits, codes))
                count += len(indices)
            if count:
                metrics["cross_entropy"] = total / (count * self.model.config.num_image_tokens)
        generator = torch.Generator(self.model.device).manual_seed(self.args.seed)
        codes = torch.cat(list(self.model.stream_codes(**self.sample_conditions, generator=generator)), dim=1)
        shape = (self.tokenizer.config.in_channels, *self.tokenizer.image_size)
        noise = normal_noise(torch.arange(len(codes)), shape, codes.device)
        images = self.tokenizer.decode(codes, noise=noise, scheduler=self._scheduler()).sample
        return metrics, {"samples": image_grid(images, SAMPLE_COLUMNS)}

    def save(self, folder: Path) -> None:
        model: Any = self.model
        if self.args.lora_rank:
            model = copy.deepcopy(model).merge_and_unload()
        self._pipeline(model).save_pretrained(folder)

    def _pipeline(self, model: DARForCausalLM) -> DARPipeline:
        return DARPipeline(self.tokenizer, model, self._scheduler(), self.id2label, self.text_tokenizer)

    def _scheduler(self) -> FlowMatchAdamsBashforthScheduler:
        return FlowMatchAdamsBashforthScheduler(
            shift=self.tokenizer.config.time_shift, solver_order=self.args.solver_order
        )

    def _check(self, model: DARForCausalLM) -> None:
        """Reject now what saving would reject after the whole training.

        Raises:
            ValueError: for parts that make no pipeline, or configurations that cannot be written.
        """
        pipeline = self._pipeline(model)
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_config(folder)
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)

    def describe(self) -> dict:
        adapters = {"lora_rank": self.args.lora_rank} if self.args.lora_rank else {}
        tokenizer = weights_fingerprint(self.tokenizer.state_dict())
        config = self.model.config.to_diff_dict()
        config.pop("transformers_version", None)  # a run may be resumed with another one
        texts = {}
        if self.text_tokenizer is not None:
            texts["text_tokenizer"] = text_fingerprint(self.text_tokenizer)
        distillation = {}
        if self.teacher is not None:
            distillation = {
                "teacher": weights_fingerprint(self.teacher.model.state_dict()),
                "distill_guidance": self.args.distill_guidance,
                "distill_samples": self.args.distill_samples,
            }
        return {**config, "tokenizer": tokenizer, **texts, **adapters, **distillation}

    def describe_data(self) -> dict[str, str]:
        return self._data
