"""The optional PatchGAN discriminator of stage 1 (Isola et al. 2017; non-saturating losses of Goodfellow et al. 2014).

One backward pass serves both sides: the tokenizer's term sees the discriminator's weights as constants, and the
discriminator's own term sees the tokenizer's images as constants.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..data import SeedFor, draw_seed
from .arguments import TokenizerArguments

NUM_NORM_GROUPS = 32
MAX_WIDTH_FACTOR = 8


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of an image: ``(B, C, H, W)`` to logits ``(B, 1, h, w)``, high for real ones.

    Where pix2pix has BatchNorm this has GroupNorm: how a batch is split must change nothing, and real and generated
    images must not meet in its statistics.

    Args:
        in_channels: channels of the images.
        num_layers: convolutions of stride 2.
        width: channels after the first one; they double up to 8 times as many.
    """

    def __init__(self, in_channels: int = 3, num_layers: int = 3, width: int = 128):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, num_layers + 1):
            wider = width * min(2**index, MAX_WIDTH_FACTOR)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(min(NUM_NORM_GROUPS, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, 1, 1))
        for module in self.modules():  # pix2pix's start
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def min_size(num_layers: int) -> int:
        """Least height and width of an image, in pixels."""
        return 3 * 2**num_layers  # three pixels are left for the two convolutions of stride 1


def generator_sum(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss ``-log D(images)`` with D held fixed, averaged over patches, summed over images."""
    fixed = {name: parameter.detach() for name, parameter in network.named_parameters()}
    logits = torch.func.functional_call(network, fixed, (images,))
    return F.softplus(-logits.float()).flatten(1).mean(dim=1).sum()


def discriminator_sum(network: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """``(-log D(real) - log(1 - D(fake))) / 2`` with the images held fixed, summed over images."""
    wrong_real = F.softplus(-network(real.detach()).float())
    wrong_fake = F.softplus(network(fake.detach()).float())
    return 0.5 * (wrong_real.flatten(1).mean(dim=1) + wrong_fake.flatten(1).mean(dim=1)).sum()


class Adversary:
    """The discriminator with its optimizer; its ``state_dict`` belongs into checkpoints, and no model is saved of it.

    It is small and held whole by every process: gradients are reduced here, once a step, so that it takes no part in
    how the tokenizer is wrapped (DDP, FSDP, DeepSpeed).

    Args:
        network: the discriminator.
        learning_rate: its peak rate.
        betas, epsilon: of AdamW, without decay.
        max_grad_norm: its gradient norm is clipped to this.
    """

    def __init__(
        self,
        network: PatchDiscriminator,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        max_grad_norm: float,
    ):
        self.network = network
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self._scale = 1.0
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0
        )

    def note_scale(self, accelerator: Accelerator) -> None:
        """Remember by what fp16 multiplies the gradients that follow: the scaler may have moved on by `step`."""
        self._scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()

    def step(self, accelerator: Accelerator, rate_factor: float) -> None:
        """Take the gradients of a whole step, of all processes, and update.

        An update with non-finite gradients is skipped, in any precision.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        for gradient in gradients:
            # the loop has multiplied the losses by the number of processes, so the mean is their sum
            gradient.copy_(accelerator.reduce(gradient, "mean") / self._scale)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = self.learning_rate * rate_factor
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        options = {name: value for name, value in self.optimizer.param_groups[0].items() if name != "params"}
        self.optimizer.load_state_dict(state["optimizer"])
        # the checkpoint brings its run's options, too; those of this run count
        self.optimizer.param_groups[0].update(options)


def make_adversary(args: TokenizerArguments, image_size: tuple[int, int], in_channels: int) -> Adversary:
    """The discriminator that ``args`` ask for, for images of this size.

    Raises:
        ValueError: if they are too small for its layers.
    """
    least = PatchDiscriminator.min_size(args.discriminator_layers)
    if min(image_size) < least:
        raise ValueError(
            f"a discriminator of {args.discriminator_layers} layers needs images of {least} pixels or more, these "
            f"are {image_size}: fewer --discriminator_layers, or --discriminator_weight 0."
        )
    torch.manual_seed(draw_seed(args.seed, SeedFor.DISCRIMINATOR))  # training sets the seed anew
    network = PatchDiscriminator(in_channels, args.discriminator_layers, args.discriminator_width)
    rate = args.discriminator_learning_rate or args.learning_rate
    return Adversary(network, rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.max_grad_norm)
