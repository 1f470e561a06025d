"""Muon for matrices, AdamW for all else, as one optimizer.

Muon (Keller Jordan, 2024) replaces the averaged gradient of a matrix by the nearest matrix with orthonormal rows or
columns, so that every direction is learned at the same rate. ``torch.optim.Muon`` does the same, but one matrix after
the other and in bfloat16, which processors that only emulate it compute twenty times as slowly; here matrices of one
shape are one batch, in float32.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, steep at zero
NUM_ITERATIONS = 5
MATCH_ADAM = 0.2  # root mean square of an AdamW update, in units of the rate, which Muon's is scaled to (Moonlight)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but that groups with ``muon=True`` hold matrices, to which Muon's update is applied.

    Args:
        params: parameter groups.
        muon_momentum: decay of the averaged gradient, which is applied as Nesterov's.
        options: AdamW's. Rate and weight decay mean the same for Muon's groups.

    Raises:
        ValueError: for a parameter in one of Muon's groups that is no matrix.
    """

    def __init__(self, params: Any, muon_momentum: float = 0.95, **options: Any):
        super().__init__(params, **options)
        self.muon_momentum = muon_momentum
        for group in self.param_groups:
            group.setdefault("muon", False)
            others = [tuple(p.shape) for p in group["params"] if group["muon"] and p.ndim != 2]
            if others:
                raise ValueError(f"Muon updates matrices, not parameters of shape {others[0]}.")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if group["muon"]:
                self._update_matrices(group)
        return super().step(closure)

    def _update_matrices(self, group: dict) -> None:
        rate = group["lr"]
        for parameters in _of_one_shape(group["params"]):
            averages = [self._average(p) for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - self.muon_momentum)
            torch._foreach_lerp_(gradients, averages, self.muon_momentum)
            updates = orthogonalized(torch.stack(gradients)).to(parameters[0].dtype)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            scale = MATCH_ADAM * math.sqrt(max(parameters[0].shape))
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate * scale)
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over it

    def _average(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # not used, but AdamW reads it when its state is restored
        return state["momentum_buffer"]


Parameters = dict[str, torch.nn.Parameter]


def matrices_of_blocks(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """The weight matrices of a model's transformer blocks, which Muon is made for, and all other parameters.

    Embeddings, the codebook, input and output layers are among the others.
    """
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and ("blocks." in name or "layers." in name)}
    others = {name: p for name, p in parameters.items() if name not in matrices}
    return matrices, others


def _of_one_shape(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters that have a gradient, in lists of one shape each."""
    by_shape = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape[parameter.shape].append(parameter)
    yield from by_shape.values()


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices ``(n, rows, columns)`` with their singular values near 1, float32, by Newton-Schulz iterations.

    Five of them leave singular values between about 0.7 and 1.2, which is as good as 1 for training.
    """
    x = matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # products with the shorter side are the smaller ones
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
