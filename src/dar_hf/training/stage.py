"""Interface between a training stage and the loop."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from ..data import StreamedImages
from .fingerprint import data_fingerprint
from .losses import LossTerm


class Stage(ABC):
    """Model, data and losses of one stage; everything else is the loop's.

    Attributes:
        name: "tokenizer" or "ar", as in the command.
        saved_class: class that the finished output folder holds.
        model: the module that is trained; its forward is the one wrapped call of every step.
        samples: data set addressed by ``(index, seed)``, or a stream.
        terms: the losses. Append a `LossTerm` to add one.
        stateful: objects with ``state_dict`` that belong into checkpoints, always in the same order.
    """

    name: ClassVar[str]
    saved_class: ClassVar[str]
    model: nn.Module
    samples: torch.utils.data.Dataset | StreamedImages
    terms: list[LossTerm]
    stateful: Sequence[Any] = ()

    @classmethod
    @abstractmethod
    def build(cls, args: Any, device: torch.device | str = "cpu") -> "Stage":
        """The stage from its arguments; ``device`` is where a frozen model encodes data before training.

        Raises:
            ValueError: for options that name what is not there, or does not fit.
        """

    def prepare(self, accelerator: Accelerator) -> None:
        """Called once before training, with the model on its device.

        Bring the rest there, and set up what depends on the device.
        """
        return None

    @abstractmethod
    def parameter_groups(self) -> list[dict]:
        """AdamW's parameter groups.

        ``lr`` is a group's peak rate (default ``args.learning_rate``), and that of the first group is logged.
        """

    def prepare_batch(self, batch: dict) -> dict:
        """Called once for each collated micro-batch, on the host; what else is random about it is drawn here."""
        return batch

    @abstractmethod
    def loss_denominators(self, batch: dict) -> dict[str, float]:
        """How many images and how many tokens the losses of this micro-batch are sums over, keyed as `LossTerm.per`.

        It is called with what `prepare_batch` returns, on the host.
        """

    @abstractmethod
    def forward(self, model: nn.Module, batch: dict, step: int) -> Any:
        """Run the wrapped model on a micro-batch; what it returns goes to the loss terms."""

    def after_step(self, step: int, accelerator: Accelerator, optimizer: Any, ema: EMAModel | None) -> None:
        """Called after every optimizer step; nothing by default."""
        return None

    def statistics(self) -> dict[str, float]:
        """Further metrics for the log, about recent steps."""
        return {}

    @abstractmethod
    def validate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Metrics and images of the model as it is."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the finished model into an empty folder."""

    @abstractmethod
    def describe(self) -> dict:
        """What must agree between a checkpoint and the run that resumes it."""

    def describe_data(self) -> dict[str, str]:
        """What tells the training data from others; this, too, must agree."""
        return data_fingerprint(self.samples)
