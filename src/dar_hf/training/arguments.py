"""The options that both stages share."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..utils.options import check_texts, option


@dataclass
class LoopArguments:
    """Options of both stages. Presets set many of them; the command line has the last word."""

    can_be_sharded: ClassVar[bool] = True  # over processes, by FSDP or DeepSpeed

    preset: str = option("v1", "named size and recipe, see dar_hf.presets")
    output_dir: str = option("outputs/run", "folder for the model, checkpoints, curves and pictures")
    dataset_name: str = option("", "digits, a folder of images, parquet files or webdataset tars, a file, a Hub id")
    streaming: bool = option(False, "read the training images as they are needed, without an index or a copy on disk")
    stream_block_size: int = option(1024, "rows of a stream that are shuffled together")
    dataset_config_name: str | None = option(None, "configuration of a Hub data set")
    train_split: str = option("train", "split to train on")
    validation_split: str | None = option(None, "split for validation; default validation or test, where there is one")
    image_column: str = option("image", "column with the images")
    label_column: str = option("label", "column with the classes")
    max_train_samples: int | None = option(None, "use only the first so many images")
    max_corrupt_images: int = option(100, "stop when more images than these cannot be read; fewer are left out")
    max_validation_samples: int = option(256, "validate on the first so many images")
    crop: str = option("center", "center, random or ten")
    flip: bool = option(False, "mirror half of the images")
    pixel_noise: float = option(0.0, "deviation of noise on training pixels, in units of [-1, 1]; for stage 2")
    model_overrides: list[str] | None = option(None, "changes to the preset's model, as name=value")
    init_from: str | None = option(None, "fine-tune this saved model instead of a new one: a folder or Hub id")

    max_train_steps: int = option(1000, "optimizer steps of the whole run; a resumed run can be given more")
    train_batch_size: int = option(64, "images per process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate")
    warmup_steps: int = option(0, "steps of linear warm-up")
    decay_fraction: float = option(0.0, "last share of the run over which the rate falls linearly")
    final_learning_rate_ratio: float = option(0.0, "rate at the very end, as a share of the peak")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.95, "AdamW beta 2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this")
    ema_decay: float | None = option(None, "decay of the averaged weights that are validated and saved; none if unset")
    mixed_precision: str = option(
        "auto", "auto (what the launcher says; without one, bf16 where native), no, bf16 or fp16"
    )
    torch_compile: bool = option(False, "compile the model's forward pass with torch's inductor")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    seed: int = option(0, "seed of everything random")

    checkpointing_steps: int = option(1000, "steps between checkpoints, of which the last is at the end; 0 for none")
    checkpoints_total_limit: int | None = option(2, "keep only the last so many checkpoints; 0 for all")
    resume_from_checkpoint: str | None = option(
        None, "latest (also starts a run where there is none), a checkpoint's name or its path"
    )
    overwrite_output_dir: bool = option(False, "start over in a folder that holds an earlier run, and delete that")
    validation_steps: int = option(500, "steps between validations; 0 for none before the end")
    logging_steps: int = option(10, "steps between lines of history.jsonl")
    dataloader_num_workers: int = option(0, "worker processes per data loader")
    report_to: str | None = option(None, "tracker for accelerate, e.g. tensorboard")
    push_to_hub: bool = option(False, "upload the finished model, its card and pictures to the Hub")
    hub_model_id: str | None = option(None, "repository to upload to; default the name of output_dir")
    hub_private_repo: bool = option(False, "create that repository as a private one")
    push_steps: int = option(0, "upload the model so far after every so many steps, too; 0 for the finished one alone")

    def __post_init__(self):
        check_texts(self)
        precision = str(self.mixed_precision).lower()
        if precision in ("false", "off"):  # YAML's reading of a bare no, and of its other spellings
            precision = "no"
        self.mixed_precision = precision
        positive = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in (*positive, "max_train_samples", "max_validation_samples", "stream_block_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value) and name != "max_grad_norm":  # inf clips nothing
                raise ValueError(f"{name} must be a finite number, got {value}.")
        for name in ("decay_fraction", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        counts = (
            "warmup_steps",
            "checkpointing_steps",
            "validation_steps",
            "push_steps",
            "seed",
            "max_corrupt_images",
        )
        for name in (*counts, "checkpoints_total_limit", "dataloader_num_workers", "weight_decay", "pixel_noise"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.push_steps and not self.push_to_hub:
            raise ValueError("push_steps says when to upload: give --push_to_hub beside it.")
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
