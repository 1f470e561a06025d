"""Evaluation from images to a report: reconstruction and generation, over any number of processes, resumable."""

from .arguments import GenerationArguments, ReconstructionArguments
from .generation import evaluate_generation
from .groups import GroupSwaps, draw_swaps, swap_groups
from .images import read_reference, to_uint8, write_npz
from .reconstruction import evaluate_reconstruction
from .report import dataset_names, eval_results, metric, read_report, versions, write_report
from .small_sets import draw_losses, generation_report, reconstruct_steps

__all__ = [
    "GenerationArguments",
    "GroupSwaps",
    "ReconstructionArguments",
    "dataset_names",
    "draw_losses",
    "draw_swaps",
    "eval_results",
    "evaluate_generation",
    "evaluate_reconstruction",
    "generation_report",
    "metric",
    "read_reference",
    "read_report",
    "reconstruct_steps",
    "swap_groups",
    "to_uint8",
    "versions",
    "write_npz",
    "write_report",
]
