"""Models whose parameters are spread over processes, by FSDP or DeepSpeed: which may be, and whole copies of them."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

from .arguments import LoopArguments
from .launcher import agree

MICRO_BATCH = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


def check_layout(args: LoopArguments, kind: DistributedType, is_fsdp2: bool) -> None:
    """Refuse ways of spreading a run that would give a wrong model.

    Raises:
        ValueError: saying what to do instead.
    """
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if kind == DistributedType.FSDP and not is_fsdp2:
        raise ValueError("only version 2 of FSDP is supported: set fsdp_version: 2 in accelerate's configuration.")
    if not args.can_be_sharded:
        raise ValueError(
            "stage 1 changes its codebook between steps: train it with DDP; FSDP, DeepSpeed are for stage 2."
        )
    if args.ema_decay:
        raise ValueError("averaged weights are not kept of sharded models: set ema_decay to 0, or use DDP.")


def configure_deepspeed(args: LoopArguments, accelerator: Accelerator) -> None:
    """Give DeepSpeed what train.py was told: its engine clips, accumulates and scales by its own configuration.

    Raises:
        ValueError: for settings that belong to train.py or contradict its options, or would give a wrong model.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(f"DeepSpeed's configuration has its own {name}: remove it, train.py's options set it.")
    if config["zero_optimization"]["stage"] not in (2, 3):
        raise ValueError("of DeepSpeed, ZeRO 2 and 3 are supported: set zero_stage, or use DDP.")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 is not supported with DeepSpeed: give --mixed_precision bf16 or no, or use DDP.")
    if args.mixed_precision not in ("auto", accelerator.mixed_precision):
        raise ValueError(
            f"DeepSpeed's configuration trains in {accelerator.mixed_precision}, but mixed_precision is "
            f"{args.mixed_precision}: give both the same."
        )
    images = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    agree(
        "DeepSpeed's train_micro_batch_size_per_gpu",
        config.get(MICRO_BATCH),
        "train_batch_size",
        args.train_batch_size,
    )
    # 1 is accelerate's default and contradicts nothing
    agree("DeepSpeed's " + ACCUMULATION, config.get(ACCUMULATION), ACCUMULATION, args.gradient_accumulation_steps, 1)
    agree("DeepSpeed's train_batch_size", config.get("train_batch_size"), "the number of images in a step", images)
    agree("DeepSpeed's gradient_clipping", config.get("gradient_clipping"), "max_grad_norm", args.max_grad_norm)
    # models are made whole and split later: split by from_pretrained, so would be the copy that is validated and saved
    unset_hf_deepspeed_config()
    config.update(
        train_micro_batch_size_per_gpu=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        train_batch_size=images,
        gradient_clipping=args.max_grad_norm,
    )
    config.setdefault("data_types", {"grad_accum_dtype": "fp32"})  # the default would add up bf16 gradients in bf16


@torch.no_grad()
def gather_into(model: nn.Module, whole: nn.Module | None) -> None:
    """Copy a sharded model's parameters into an unsharded model of the same names.

    All processes call this together. They gather one parameter after the other, so that none holds more than one whole
    parameter beside its shards.

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
