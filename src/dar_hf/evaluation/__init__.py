"""Evaluation from images to a report: reconstruction and generation, over any number of processes, resumable."""

from .arguments import GenerationArguments, ReconstructionArguments
from .generation import evaluate_generation
from .images import read_reference, write_npz
from .reconstruction import evaluate_reconstruction
from .report import dataset_names, eval_results, metric, read_report, versions, write_report

__all__ = [
    "GenerationArguments",
    "ReconstructionArguments",
    "dataset_names",
    "eval_results",
    "evaluate_generation",
    "evaluate_reconstruction",
    "metric",
    "read_reference",
    "read_report",
    "versions",
    "write_npz",
    "write_report",
]
