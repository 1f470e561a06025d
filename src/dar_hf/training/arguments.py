"""Options of a run: what both stages share, and what each adds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers.hf_argparser import HfArg

from ..data.splits import DataArguments
from ..presets import NO_DROPOUT
from ..utils.options import expand_path, reject_empty_texts, renamed_option
from .text import NUM_BYTES


@dataclass
class LoopArguments(DataArguments):
    """Options of both stages. Presets set many of them; the command line has the last word."""

    can_be_sharded: ClassVar[bool] = True  # over processes, by FSDP or DeepSpeed

    preset: str = HfArg(default="v1", help="named size and recipe, see dar_hf.presets")
    output_dir: str = HfArg(default="outputs/run", help="folder for the model, checkpoints, curves and pictures")
    max_corrupt_images: int = HfArg(default=100, help="stop when more images than this cannot be read")
    model_overrides: list[str] | None = HfArg(default=None, help="changes to the preset's model, as name=value")
    init_from: str | None = HfArg(default=None, help="folder or Hub id of a model to fine-tune")

    max_train_steps: int = HfArg(default=1000, help="optimizer steps; a resumed run can be given more")
    train_batch_size: int = HfArg(default=64, help="images per process and forward pass")
    gradient_accumulation_steps: int = HfArg(default=1, help="forward passes per optimizer step")
    learning_rate: float = HfArg(default=1e-3, help="peak learning rate")
    muon_learning_rate: float = HfArg(
        default=0.0, help="train the matrices of the blocks by Muon, at this peak rate; 0 for AdamW alone"
    )
    warmup_steps: int = HfArg(default=0, help="steps of linear warm-up")
    decay_fraction: float = HfArg(default=0.0, help="last share of the run over which the rate falls linearly")
    final_learning_rate_ratio: float = HfArg(default=0.0, help="rate at the very end, as a share of the peak")
    adam_beta1: float = HfArg(default=0.9, help="AdamW beta 1")
    adam_beta2: float = HfArg(default=0.95, help="AdamW beta 2")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW epsilon")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm is clipped to this")
    ema_decay: float | None = HfArg(default=None, help="decay of the weights' average, which is validated and saved")
    mixed_precision: str = HfArg(
        default="auto", help="auto (what the launcher says; without one, bf16 where native), no, bf16 or fp16"
    )
    torch_compile: bool = HfArg(default=False, help="compile the model's forward pass with torch's inductor")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations to save memory")

    checkpointing_steps: int = HfArg(default=1000, help="steps between checkpoints, also at the end; 0 for none")
    checkpoints_total_limit: int | None = HfArg(default=2, help="keep only the last N checkpoints; 0 for all")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="latest (also starts a run where there is none), a checkpoint's name or its path"
    )
    overwrite_output_dir: bool = HfArg(default=False, help="delete an earlier run in output_dir and start over")
    validation_steps: int = HfArg(default=500, help="steps between validations; 0 for none before the end")
    logging_steps: int = HfArg(default=10, help="steps between lines of history.jsonl")
    dataloader_num_workers: int = HfArg(default=0, help="worker processes per data loader")
    report_to: str | None = HfArg(default=None, help="tracker for accelerate, e.g. tensorboard")
    push_to_hub: bool = HfArg(default=False, help="upload the finished model, its card and pictures to the Hub")
    hub_model_id: str | None = HfArg(default=None, help="repository to upload to; default the name of output_dir")
    hub_private_repo: bool = HfArg(default=False, help="create that repository as a private one")
    push_steps: int = HfArg(default=0, help="also upload the model so far every N steps")

    def __post_init__(self):
        self.output_dir = expand_path(self.output_dir)
        reject_empty_texts(self)
        precision = str(self.mixed_precision).lower()
        if precision in ("false", "off"):  # YAML's reading of a bare no, and of its other spellings
            precision = "no"
        self.mixed_precision = precision
        counts = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps")
        sizes = ("max_train_samples", "max_validation_samples", "stream_block_size")
        _require(self, counts + sizes, lambda value: value >= 1, "be at least 1")
        _require(self, ("learning_rate", "max_grad_norm", "adam_epsilon"), lambda value: value > 0, "be positive")
        # an infinite max_grad_norm clips nothing
        numbers = [name for name, value in vars(self).items() if isinstance(value, float) and name != "max_grad_norm"]
        _require(self, numbers, math.isfinite, "be a finite number")
        shares = ("decay_fraction", "final_learning_rate_ratio")
        _require(self, shares, lambda value: 0 <= value <= 1, "lie in [0, 1]")
        decays = ("ema_decay", "adam_beta1", "adam_beta2")
        _require(self, decays, lambda value: 0 <= value < 1, "lie in [0, 1)")
        intervals = ("checkpointing_steps", "validation_steps", "push_steps", "warmup_steps")
        limits = ("max_corrupt_images", "checkpoints_total_limit", "dataloader_num_workers")
        others = ("seed", "weight_decay", "pixel_noise", "muon_learning_rate")
        _require(self, intervals + limits + others, lambda value: value >= 0, "not be negative")
        if self.push_steps and not self.push_to_hub:
            raise ValueError("push_steps says when to upload: give --push_to_hub with it.")
        if self.mixed_precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be auto, no, bf16 or fp16, got {self.mixed_precision!r}.")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, constant, linear decay at the end."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        tail = self.decay_fraction * self.max_train_steps
        left = self.max_train_steps - step
        if tail and left < tail:
            factor *= self.final_learning_rate_ratio + (1 - self.final_learning_rate_ratio) * left / tail
        return factor


def _require(args: LoopArguments, names: Iterable[str], holds: Callable[[Any], bool], what: str) -> None:
    """Raise a ValueError for the first of these options that is set and does not hold."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must {what}, got {value}.")


@dataclass
class TokenizerArguments(LoopArguments):
    """Options of stage 1. By default all that is not flow matching or quantization is off; presets switch it on."""

    can_be_sharded: ClassVar[bool] = False

    encoder_learning_rate: float | None = HfArg(default=None, help="peak rate of the encoder; default learning_rate")
    vq_weight: float = HfArg(default=1.0, help="weight of the codebook loss")
    commit_weight: float = HfArg(default=1.0, help="weight of the commitment loss, which has a factor 0.25 of its own")
    perceptual_weight: float = HfArg(default=0.0, help="weight of LPIPS between the image and its jump estimate")
    lpips_weights: str | None = HfArg(default=None, help="converted weights of LPIPS: file, folder or Hub id")
    repa_weight: float = HfArg(default=0.0, help="weight of REPA: the denoiser learns repa_model's features")
    repa_model: str = HfArg(default="facebook/dinov2-base", help="folder or Hub id of REPA's image encoder")
    discriminator_weight: float = HfArg(default=0.0, help="weight of the PatchGAN discriminator's verdict; 0 for none")
    discriminator_start: int = HfArg(default=0, help="steps before the discriminator trains and counts")
    discriminator_layers: int = HfArg(default=3, help="convolutions of stride 2 of the discriminator")
    discriminator_width: int = HfArg(default=128, help="channels after the discriminator's first layer")
    discriminator_learning_rate: float | None = HfArg(default=None, help="its peak rate; default learning_rate")
    times_per_image: int = HfArg(
        default=1, help="times at which each image of a step is denoised, spread evenly; it is encoded once for all"
    )
    gate_start: float = HfArg(default=0.0, help="initial value of the block gates")
    modulation_std: float = HfArg(default=0.0, help="initial standard deviation of the denoiser's adaLN layers")
    output_std: float = HfArg(default=0.0, help="initial standard deviation of the denoiser's output layer")
    post_quant_std: float = HfArg(default=0.0, help="initial std of post_quant_proj; 0 for torch's own")
    rotary_bias_std: float = HfArg(
        default=0.0, help="initial std of the biases of rotated queries and keys; 0 for torch's own"
    )
    token_embed_std: float = HfArg(default=0.02, help="initial std of the embeddings of the codes' places")
    unquantized_steps: int = renamed_option(
        "continuous_steps", default=0, help="first steps without quantizing; the codebook then starts from k-means"
    )
    group_dropout: float = HfArg(
        default=0.0, help="probability that an image is denoised with zeros in place of its own group's codes"
    )
    dead_code_interval: int = renamed_option(
        "revive_every",
        default=0,
        help="every N steps, the codes that none of these N steps used are moved; 0 for never",
    )
    revive_until: float = HfArg(default=0.8, help="share of the run after which dead codes are left alone")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.unquantized_steps < self.max_train_steps:
            raise ValueError(
                f"unquantized_steps={self.unquantized_steps} must be less than max_train_steps={self.max_train_steps}."
            )
        if self.init_from and self.unquantized_steps:
            raise ValueError(
                "unquantized_steps would replace the codebook that --init_from brings: pass --unquantized_steps 0."
            )
        _require(self, ("times_per_image",), lambda value: value >= 1, "be at least 1")
        _require(self, ("group_dropout",), lambda value: 0 <= value < 1, "lie in [0, 1)")
        _require(self, ("revive_until",), lambda value: 0 <= value <= 1, "lie in [0, 1]")
        weights = [name for name in vars(self) if name.endswith("_weight")]
        deviations = ("modulation_std", "output_std", "post_quant_std", "rotary_bias_std", "token_embed_std")
        steps = ("dead_code_interval", "discriminator_start")
        _require(self, [*weights, *deviations, *steps], lambda value: value >= 0, "not be negative")
        sizes = ("discriminator_layers", "discriminator_width")
        rates = ("discriminator_learning_rate", "encoder_learning_rate")
        _require(self, sizes + rates, lambda value: value > 0, "be positive")


@dataclass
class ARArguments(LoopArguments):
    """Options of stage 2."""

    preset: str = HfArg(default="L", help="named size and recipe, see dar_hf.presets")  # v1 has no language model

    tokenizer: str = HfArg(default="", help="folder or Hub id of the trained tokenizer")
    codes: str | None = HfArg(default=None, help="train on the codes of extract_codes.py, a folder or Hub id")
    cache_codes: bool = HfArg(default=False, help="encode the whole set once, before training: for small sets")
    text_tokenizer: str | None = HfArg(
        default=None,
        help="with --caption_column, folder or Hub id of a tokenizer of transformers; default that of --init_from, or "
        "one learned from the captions",
    )
    text_vocab_size: int = HfArg(default=1024, help="maximum vocabulary of a learned text tokenizer, at least 256")
    max_text_tokens: int | None = HfArg(
        default=None, help="longer texts are cut to this many tokens; default the longest caption's, up to 128"
    )
    new_classes: str | None = HfArg(
        default=None,
        help="with --init_from, choose its classes anew, starting from: null (the null class), mean (of all) or fresh",
    )
    lora_rank: int = HfArg(default=0, help="train adapters of this rank, merged at the end; 0 for all weights")
    lora_alpha: int | None = HfArg(default=None, help="scale of the adapters times their rank; default the rank")
    guidance_scale: list[float] | None = HfArg(default=None, help="default guidance, saved: one scale or two ends")
    distill_guidance: list[float] | None = HfArg(
        default=None,
        help="learn the distribution that --init_from's model has with this guidance, one scale or two ends; the "
        "result needs no guidance: its saved default is 1, whatever --guidance_scale says",
    )
    distill_samples: int = HfArg(
        default=0, help="with --distill_guidance, train on N sequences that the model draws first, without a data set"
    )
    solver_order: int = HfArg(default=2, help="saved solver: 2 is the original's Adams-Bashforth, 1 Euler")

    def __post_init__(self):
        super().__post_init__()
        if not self.label_column:
            raise ValueError("label_column is missing: stage 2 needs the classes.")
        _require(self, ("max_text_tokens",), lambda value: value >= 1, "be at least 1")
        _require(self, ("text_vocab_size",), lambda value: value >= NUM_BYTES, f"be at least {NUM_BYTES}")
        if self.text_tokenizer and not self.caption_column:
            raise ValueError("a text tokenizer is for captions: give --caption_column with --text_tokenizer.")
        if self.new_classes and self.caption_column:
            raise ValueError("--new_classes cannot be combined with --caption_column.")
        if self.init_from and self.max_text_tokens:
            raise ValueError("max_text_tokens is that of the saved model: leave it out with --init_from.")
        for name in ("guidance_scale", "distill_guidance"):
            scales = getattr(self, name)
            if scales is not None and len(scales) not in (1, 2):
                raise ValueError(f"{name} takes one scale or two ends, got {scales}.")
            if not all(0 <= scale < math.inf for scale in scales or []):
                raise ValueError(f"{name} must be finite and not negative, got {scales}.")
        self._check_distillation()
        if self.solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {self.solver_order}.")
        if self.lora_rank < 0 or (self.lora_alpha is not None and not self.lora_alpha > 0):
            raise ValueError("lora_rank must not be negative, and lora_alpha must be positive.")
        if self.new_classes not in (None, "null", "mean", "fresh"):
            raise ValueError(f"new_classes must be null, mean or fresh, got {self.new_classes!r}.")
        if self.new_classes and not self.init_from:
            raise ValueError("new_classes are those of a saved model: give --init_from with --new_classes.")
        if self.lora_rank and not self.init_from:
            raise ValueError("adapters need a model to adapt: give --init_from with --lora_rank.")
        if self.codes and self.cache_codes:
            raise ValueError("codes are stored already: --codes and --cache_codes exclude each other.")
        if self.streaming and (self.codes or self.cache_codes):
            raise ValueError("--streaming reads images: it excludes --codes and --cache_codes.")

    def _check_distillation(self) -> None:
        _require(self, ("distill_samples",), lambda value: value >= 0, "not be negative")
        if self.distill_samples and self.distill_guidance is None:
            raise ValueError("distill_samples are drawn with guidance: give --distill_guidance with it.")
        if self.distill_guidance is None:
            return
        if not self.init_from or self.new_classes:
            raise ValueError(
                "distill_guidance is that of a saved model: give --init_from with it, and leave out --new_classes."
            )
        if self.distill_samples and self.caption_column:
            raise ValueError(
                "distill_samples are of classes: for a model that draws from text, give a data set instead."
            )
        for name in ("codes", "streaming"):
            if self.distill_samples and getattr(self, name):
                raise ValueError(f"distill_samples take the place of a data set: leave out {name}.")
        if self.distill_samples:
            self.dataset_name = ""  # which the preset may name: nothing is trained on it
        self.guidance_scale = [1.0]  # it is learned, whatever the preset says
        # a distribution is learned, not codes: there is nothing to memorize, and dropout only adds noise
        no_dropout = [f"{name}={value}" for name, value in NO_DROPOUT.items()]
        self.model_overrides = [*no_dropout, *(self.model_overrides or [])]
