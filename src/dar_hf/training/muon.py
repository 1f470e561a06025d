"""Muon for matrices, AdamW for all else, as one optimizer.

Muon (Keller Jordan, 2024) replaces the averaged gradient of a matrix by the nearest matrix with orthonormal rows or
columns, so that every direction is learned at the same rate. ``torch.optim.Muon`` does the same, but one matrix after
the other and always in bfloat16, which processors that only emulate it compute twenty times as slowly; here matrices
of one shape are one batch, in the precision of the run.
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
        muon_dtype: in which matrices are made orthogonal; bfloat16 is exact enough.
        options: AdamW's. Rate and weight decay mean the same for Muon's groups.

    Raises:
        ValueError: for a parameter in one of Muon's groups that is no matrix.
    """

    def __init__(
        self, params: Any, muon_momentum: float = 0.95, muon_dtype: torch.dtype = torch.float32, **options: Any
    ):
        super().__init__(params, **options)
        self.muon_momentum = muon_momentum
        self.muon_dtype = muon_dtype
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
            updates = orthogonalized(torch.stack(gradients).to(self.muon_dtype)).to(parameters[0].dtype)
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
    """Matrices ``(n, rows, columns)`` with their singular values near 1, by Newton-Schulz iterations.

    Five of them leave singular values between about 0.7 and 1.2, which is as good as 1 for training.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    rows, columns = x.shape[-2:]
    # in bfloat16 the short way is not exact enough for matrices of low rank
    iterate = _by_gram_matrices if columns > 2 * rows and x.dtype == torch.float32 else _newton_schulz
    x = iterate(x)
    return x.mT if is_tall else x


def _newton_schulz(x: torch.Tensor) -> torch.Tensor:
    for _ in range(NUM_ITERATIONS):
        x = _polynomial(x @ x.mT) @ x
    return x


def _by_gram_matrices(x: torch.Tensor) -> torch.Tensor:
    """The same for wide matrices, of which only the first and the last product are large.

    Every iteration multiplies x from the left by a polynomial in its Gram matrix. So the polynomials are collected,
    and the next Gram matrix is computed from the last one.
    """
    gram = x @ x.mT
    product = _polynomial(gram)
    factor = product
    for _ in range(NUM_ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    return product @ x


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result
