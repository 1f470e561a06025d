"""Training of both stages: one loop (`loop.train`), two stages that bring model, batch and losses."""

from .ar_stage import ARStage
from .arguments import ARArguments, LoopArguments, TokenizerArguments
from .launcher import make_accelerator
from .loop import train
from .losses import LossTerm
from .tokenizer_stage import TokenizerStage

__all__ = [
    "ARArguments",
    "ARStage",
    "LoopArguments",
    "LossTerm",
    "TokenizerArguments",
    "TokenizerStage",
    "make_accelerator",
    "train",
]
