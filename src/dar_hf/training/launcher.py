"""What accelerate's launcher and its configuration say about a run, beside the options of train.py.

They arrive as environment variables. Each is taken over, or refused where it contradicts an option; none is ignored.
"""

import os

import torch

from ..acceleration_dar import has_fast_bf16
from .arguments import LoopArguments

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"
CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
COMPILER = "ACCELERATE_DYNAMO_BACKEND"
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context or sequence parallel)",
}


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
    """Take over the launcher's compiler, and refuse what contradicts the options or is not supported.

    Raises:
        ValueError: saying what to give instead.
    """
    for name, what in REFUSED.items():
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
    """Refuse a number from accelerate's or DeepSpeed's configuration that contradicts an option.

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
