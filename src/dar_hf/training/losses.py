"""Loss terms of both stages, as pure functions that return *sums*.

The loop divides each sum by what the whole step holds (images or tokens of all processes and accumulation steps), so
that eight batches of one, one batch of eight and two processes of four give the same gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..tokenizer_dar import DARTokenizerOutput

COMMITMENT = 0.25  # share of the commitment loss against the codebook loss, as the original code has it


@dataclass(frozen=True)
class LossTerm:
    """One term of a stage's loss: add an element to the stage's ``terms`` to plug in another.

    Attributes:
        name: how it is logged.
        weight: factor in the total.
        per: what its sum is divided by, "images" or "tokens".
        function: ``(model output, batch, step) -> sum`` over the micro-batch, a float32 scalar.
        in_total: False for the loss of another network than the stage's model, which the logged total leaves out.
    """

    name: str
    weight: float
    per: str
    function: Callable[..., torch.Tensor]
    in_total: bool = True


def flow_matching_sum(output: DARTokenizerOutput, data_std: float) -> torch.Tensor:
    """Mean squared velocity error of every image, over ``data_std`` squared, summed over images."""
    error = (output.velocity.float() - output.target.float()).square()
    # the velocity is data_std * image - noise; dividing by data_std**2 gives the loss of image - noise / data_std, as
    # in the original code
    return error.flatten(1).mean(dim=1).sum() / data_std**2


def codebook_sum(output: DARTokenizerOutput) -> torch.Tensor:
    """``(sg z - e)^2`` averaged over channels, summed over the tokens up to the end of each image's group."""
    return _masked_sum(output.latents.detach() - output.quantized, output.token_mask)


def commitment_sum(output: DARTokenizerOutput) -> torch.Tensor:
    """``0.25 (z - sg e)^2`` averaged over channels, summed over the tokens up to the end of each image's group."""
    return COMMITMENT * _masked_sum(output.latents - output.quantized.detach(), output.token_mask)


def _masked_sum(difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (difference.float().square().mean(dim=-1) * mask).sum()


def perceptual_sum(network: nn.Module, output: DARTokenizerOutput, images: torch.Tensor) -> torch.Tensor:
    """LPIPS of each image and its jump estimate, summed over images; grey ones are compared as RGB."""
    estimate = output.pred_original_sample
    return network(estimate.expand(-1, 3, -1, -1), images.expand(-1, 3, -1, -1)).float().sum()


def cross_entropy_sum(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of codes ``(B, N)`` under logits ``(B, N, V)``, summed over all tokens, in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="sum")
