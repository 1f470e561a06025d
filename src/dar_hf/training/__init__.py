"""Training of both stages: one loop (`loop.train`), two stages that bring model, batch and losses."""

from .ar_stage import ARArguments, ARStage
from .arguments import LoopArguments
from .loop import train
from .losses import LossTerm
from .tokenizer_stage import TokenizerArguments, TokenizerStage

__all__ = ["ARArguments", "ARStage", "LoopArguments", "LossTerm", "TokenizerArguments", "TokenizerStage", "train"]
