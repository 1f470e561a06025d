"""Models whose parameters are spread over processes (FSDP): whole copies, to validate and to save."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gather_into(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy a sharded model's parameters into an unsharded model of the same names.

    All processes call this together. They gather one parameter after the other, so that none holds more than one whole
    parameter beside its shards.

    Args:
        model: parameters may be sharded (`DTensor`) or not.
        whole: the model to fill; None on processes that only take part.

    Raises:
        ValueError: if the models have different parameters.
    """
    targets = {} if whole is None else dict(whole.named_parameters())
    names = {name for name, _ in model.named_parameters()}
    if whole is not None and names != targets.keys():
        raise ValueError(f"the models have different parameters: {', '.join(sorted(names ^ targets.keys())[:3])}, …")
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if whole is not None:
            targets[name].copy_(full)
