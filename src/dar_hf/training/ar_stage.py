"""Stage 2: the language model on the codes of a finished tokenizer (D-AR, section 3.3)."""

import copy
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..data import ImageSamples, StreamedImages, dropped, normal_noise
from ..modeling_dar import DARForCausalLM
from ..pipeline_dar import DARPipeline
from ..scheduling_dar import FlowMatchAdamsBashforthScheduler
from ..tokenizer_dar import DARTokenizer
from ..utils.fingerprint import weights_fingerprint
from ..utils.options import option
from ..utils.pictures import image_grid
from .arguments import LoopArguments
from .codes import ENCODE_BATCH, CodeSamples, encode_all
from .fingerprint import data_fingerprint
from .losses import LossTerm, cross_entropy_sum
from .stage import Stage, readable_batches

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_SAMPLE_ROWS = 10
SAMPLE_COLUMNS = 8


@dataclass
class ARArguments(LoopArguments):
    """Options of stage 2."""

    tokenizer: str = option("", "folder or Hub id of the trained tokenizer")
    codes: str | None = option(None, "codes made by extract_codes.py, a folder or Hub id, instead of training images")
    cache_codes: bool = option(False, "encode the whole set once, before training: for small sets")
    new_classes: str | None = option(
        None, "with --init_from, choose its classes anew, starting from: null (the null class), mean (of all) or fresh"
    )
    lora_rank: int = option(0, "train only low-rank adapters of this rank, which are merged at the end; 0 for all")
    lora_alpha: int | None = option(None, "scale of the adapters times their rank; default the rank")
    guidance_scale: list[float] | None = option(None, "default guidance saved with the model: one scale, or two ends")
    solver_order: int = option(2, "solver saved with the pipeline: 2 is the original's Adams-Bashforth, 1 Euler")

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_scale is not None and len(self.guidance_scale) not in (1, 2):
            raise ValueError(f"guidance_scale takes one scale or two ends, got {self.guidance_scale}.")
        if not all(0 <= scale < math.inf for scale in self.guidance_scale or []):
            raise ValueError(f"guidance_scale must be finite and not negative, got {self.guidance_scale}.")
        if self.solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {self.solver_order}.")
        if self.lora_rank < 0 or (self.lora_alpha is not None and not self.lora_alpha > 0):
            raise ValueError("lora_rank must not be negative, and lora_alpha must be positive.")
        if self.new_classes not in (None, "null", "mean", "fresh"):
            raise ValueError(f"new_classes must be null, mean or fresh, got {self.new_classes!r}.")
        if self.new_classes and not self.init_from:
            raise ValueError("new_classes are those of a saved model: give --init_from beside --new_classes.")
        if self.lora_rank and not self.init_from:
            raise ValueError("adapters need a model to adapt: give --init_from beside --lora_rank.")
        if self.codes and self.cache_codes:
            raise ValueError("codes are stored already: --codes and --cache_codes exclude each other.")
        if self.streaming and (self.codes or self.cache_codes):
            raise ValueError("--streaming reads images: it excludes --codes and --cache_codes.")


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


class ARStage(Stage):
    """Trains a `DARForCausalLM`; the finished folder is a whole `DARPipeline`.

    Args:
        model: the language model.
        tokenizer: the trained tokenizer, frozen.
        samples: labelled training images, or their codes.
        args: the recipe.
        validation: labelled images for validation, or None.
        id2label: class names.
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
    ):
        self.model: Any = model
        self.args, self.id2label = args, id2label
        if args.lora_rank:
            self.model = add_adapters(
                model, args.lora_rank, args.lora_alpha or args.lora_rank, train_classes=bool(args.new_classes)
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.samples: Any = samples
        self._data = data_fingerprint(samples)  # of the images: their codes may differ between machines
        if args.cache_codes and isinstance(samples, ImageSamples):
            self.samples = encode_all(samples, tokenizer)
        self.validation = validation
        self.terms = [
            LossTerm("cross_entropy", 1.0, "tokens", lambda logits, batch: cross_entropy_sum(logits, batch["codes"]))
        ]
        if args.guidance_scale is not None:
            scale = args.guidance_scale
            model.generation_config.guidance_scale = scale[0] if len(scale) == 1 else scale
        model.generation_config.update(do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        self._check(model)

    def parameter_groups(self) -> list[dict]:
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        groups: list[dict] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]  # adapters are matrices only

    def amounts(self, batch: dict) -> dict[str, float]:
        images = len(batch["seed"])
        return {"images": float(images), "tokens": float(images * self.model.config.num_image_tokens)}

    def forward(self, model: nn.Module, batch: dict, step: int) -> torch.Tensor:
        if "codes" not in batch:
            batch["codes"] = self._encode(batch["pixel_values"])
        return self._logits(
            model, batch["codes"], batch["label"], dropped(batch["seed"], self.model.config.class_dropout)
        )

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.to(images.device).encode(images).codes

    def _logits(
        self, model: nn.Module, codes: torch.Tensor, labels: torch.Tensor, drop_class: torch.Tensor
    ) -> torch.Tensor:
        """Logits of every code: the last code is a target only, so it is not put in."""
        class_tokens = (labels + self.model.config.codebook_size)[:, None]
        tokens = torch.cat([class_tokens, codes[:, :-1]], dim=1)
        return model(input_ids=tokens, use_cache=False, drop_class=drop_class.to(tokens.device)).logits

    @torch.no_grad()
    def validate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Cross-entropy on the validation images, and a grid of samples, one class a row."""
        figures = {}
        if self.validation is not None:
            total, count = 0.0, 0
            for indices in readable_batches(self.validation, self.args.max_validation_samples, ENCODE_BATCH):
                codes = self._encode(self.validation.stack(indices).to(self.model.device))
                labels = torch.tensor([self.validation.labels[i] for i in indices], device=codes.device)
                logits = self._logits(self.model, codes, labels, torch.zeros(len(codes), dtype=torch.bool))
                total += float(cross_entropy_sum(logits, codes))
                count += len(indices)
            if count:
                figures["cross_entropy"] = total / (count * self.model.config.num_image_tokens)
        rows = min(self.model.config.num_classes, MAX_SAMPLE_ROWS)
        labels = [label for label in range(rows) for _ in range(SAMPLE_COLUMNS)]
        generator = torch.Generator(self.model.device).manual_seed(self.args.seed)
        codes = torch.cat(list(self.model.stream_codes(labels, generator=generator)), dim=1)
        shape = (self.tokenizer.config.in_channels, *self.tokenizer.image_size)
        noise = normal_noise(torch.arange(len(labels)), shape, codes.device)
        images = self.tokenizer.to(codes.device).decode(codes, noise=noise).sample
        return figures, {"samples": image_grid(images, SAMPLE_COLUMNS)}

    def save(self, folder: Path) -> None:
        model: Any = self.model
        if self.args.lora_rank:
            model = copy.deepcopy(model).merge_and_unload()
        self._pipeline(model).save_pretrained(folder)

    def _pipeline(self, model: DARForCausalLM) -> DARPipeline:
        scheduler = FlowMatchAdamsBashforthScheduler(
            shift=self.tokenizer.config.time_shift, solver_order=self.args.solver_order
        )
        return DARPipeline(self.tokenizer, model, scheduler, self.id2label)

    def _check(self, model: DARForCausalLM) -> None:
        """Refuse now what saving would refuse after the whole training.

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
        return {**self.model.config.to_diff_dict(), "tokenizer": tokenizer, **adapters}

    def describe_data(self) -> dict[str, str]:
        return self._data
