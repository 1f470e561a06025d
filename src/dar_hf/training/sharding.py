"""Whole copies of models whose parameters are sharded over processes, by FSDP or DeepSpeed."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gather_into(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy a sharded model's parameters into an unsharded model of the same names.

    All processes call this together. They gather one parameter after the other, so that none holds more than one whole
    parameter next to its shards.

    Args:
        model: parameters may be sharded or not.
        whole: the model to fill; None on processes that only take part.

    Raises:
        ValueError: if the models have different parameters.
    """
    targets = {} if whole is None else dict(whole.named_parameters())
    names = {name for name, _ in model.named_parameters()}
    if whole is not None and names != targets.keys():
        raise ValueError(f"the models have different parameters: {', '.join(sorted(names ^ targets.keys())[:3])}, …")
    for name, parameter in model.named_parameters():
        full = _full(parameter)
        if whole is not None:
            targets[name].copy_(full)


def _full(parameter: nn.Parameter) -> torch.Tensor:
    """The whole parameter, in the precision that the optimizer keeps it in."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") and not parameter.requires_grad:  # frozen under ZeRO 3: there is no master copy
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO 2 and 3
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter
