"""The accelerator of a run: what train.py's options, accelerate's launcher and its configuration say together.

The launcher's settings arrive as environment variables. Each is taken over, or rejected where it contradicts an
option; none is ignored.
"""

import gc
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from transformers.integrations import unset_hf_deepspeed_config

from ..acceleration_dar import has_fast_bf16
from ..utils.processes import join_processes
from .arguments import LoopArguments

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"
CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
COMPILER = "ACCELERATE_DYNAMO_BACKEND"
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sequence parallel)",
}


def make_accelerator(args: LoopArguments) -> Accelerator:
    """The accelerator of a run; says which precision was picked and why.

    Raises:
        ValueError: if the launcher's settings contradict the options, or would give a wrong model.
    """
    check_launcher(args)
    precision = pick_precision(args.mixed_precision)
    accelerator = join_processes(
        mixed_precision=precision,
        # given as a number, the launcher's variable would win over it
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        log_with=args.report_to,
        project_dir=args.output_dir,
        dynamo_backend="inductor" if args.torch_compile else None,
    )
    if args.report_to and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise ValueError(f"report_to: the package of {args.report_to} is not installed.")
    if args.mixed_precision == "auto":
        accelerator.print(f"mixed precision: {precision} ({precision_reason(precision)})")
    if accelerator.mixed_precision == "fp16" and args.muon_learning_rate:
        # the scaler leaves it to AdamW's fused step to pass over infinite gradients
        raise ValueError("Muon does not work in fp16: give --mixed_precision bf16 or no, or --muon_learning_rate 0.")
    check_layout(args, accelerator.distributed_type, accelerator.is_fsdp2)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(args, accelerator)
    return accelerator


def end_processes(accelerator: Accelerator) -> None:
    """End the processes' communication. Nothing but the accelerator may still hold the wrapped model.

    The model must go before the process group: otherwise its reducer destroys the group last, which joins the
    communication thread under the interpreter's lock and can wait for ever.
    """
    accelerator.free_memory()
    gc.collect()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed import comm

        comm.destroy_process_group()  # DeepSpeed holds the groups in places of its own
    accelerator.end_training()


def pick_precision(requested: str) -> str:
    """accelerate's name for the precision to train in.

    "auto" is what the launcher says, and without one bf16 where it is computed natively. The launcher always says
    something: its "no" may be its default, and contradicts no option.

    Raises:
        ValueError: if option and launcher contradict each other, or the launcher wants what is not supported.
    """
    launched = os.environ.get(PRECISION, "").lower()
    if launched and launched not in ("no", "bf16", "fp16"):
        raise ValueError(f"{PRECISION}={launched} is not supported: there are no, bf16 and fp16.")
    if requested == "auto":
        return launched or _native_precision()
    if launched not in ("", "no", requested):
        raise ValueError(
            f"mixed_precision is {requested}, but accelerate's launcher or configuration says {launched} "
            f"({PRECISION}): give both the same."
        )
    return requested


def _native_precision() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if has_fast_bf16(device) else "no"


def precision_reason(precision: str) -> str:
    """Why "auto" became this, for the log."""
    if os.environ.get(PRECISION):
        native = _native_precision()
        faster = f"; {native} is native here: --mixed_precision {native}" if native != "no" == precision else ""
        return f"from accelerate's launcher, {PRECISION}{faster}"
    return "computed natively here" if precision == "bf16" else "no native bf16 here"


def check_launcher(args: LoopArguments) -> None:
    """Take over the launcher's compiler, and reject what contradicts the options or is not supported.

    Raises:
        ValueError: saying what to give instead.
    """
    for name, what in UNSUPPORTED.items():
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise ValueError(f"accelerate's configuration asks for {what}, which is not supported: use DDP or FSDP.")
    # 1 is the launcher's default and contradicts nothing
    agree(
        ACCUMULATION, os.environ.get(ACCUMULATION), "gradient_accumulation_steps", args.gradient_accumulation_steps, 1
    )
    agree(CLIPPING, os.environ.get(CLIPPING), "max_grad_norm", args.max_grad_norm)
    backend = os.environ.get(COMPILER, "no").lower()
    if backend not in ("no", "inductor"):
        raise ValueError(f"{COMPILER}={backend} is not supported: the compiler is inductor, or no.")
    if backend == "inductor":
        args.torch_compile = True


def agree(source: str, said: object, option: str, value: float, default: float | None = None) -> None:
    """Reject a number from accelerate's or DeepSpeed's configuration that contradicts an option.

    Args:
        source: where the number stands, for the message.
        said: the number, as text or not; None, "auto" and ``default`` say nothing.
        option, value: the option of train.py and what it is set to.

    Raises:
        ValueError: if they differ, or ``said`` is no number.
    """
    if said in (None, "", "auto", "none"):
        return
    try:
        number = float(str(said))
    except ValueError as error:
        raise ValueError(f"{source}={said!r} is no number.") from error
    if number not in (value, default):
        raise ValueError(f"{source} says {number:g}, but {option} is {value:g}: give both the same.")


def check_layout(args: LoopArguments, kind: DistributedType, is_fsdp2: bool) -> None:
    """Reject unsupported configurations of FSDP and DeepSpeed.

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
    if args.muon_learning_rate:
        raise ValueError(
            "Muon needs whole matrices, which sharded models do not have: set muon_learning_rate to 0, or use DDP."
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
        config.get("train_micro_batch_size_per_gpu"),
        "train_batch_size",
        args.train_batch_size,
    )
    # 1 is accelerate's default and contradicts nothing
    agree(
        "DeepSpeed's gradient_accumulation_steps",
        config.get("gradient_accumulation_steps"),
        "gradient_accumulation_steps",
        args.gradient_accumulation_steps,
        1,
    )
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
