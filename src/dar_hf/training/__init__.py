"""Training of both stages: one loop, and two stages that bring model, batch and losses.

Read `loop` first, then a stage:

- `tokenizer_stage` with `losses`, `repa`, `adversary` and `codebook`; `ar_stage` with `losses` and `codes`;
- what builds them: `arguments`, `models`, and `stage`, the interface between a stage and the loop;
- what the loop calls: `batches`, `records`, `trackers`, `checkpoints`, `resuming`, `pushing`, `stopping`, `sharding`;
- around a run: `launcher`, `run_folder`, `folder_lock`, `fingerprint`; and `extraction`, of codes before stage 2.
"""

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
