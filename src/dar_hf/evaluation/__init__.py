"""Evaluation from images to a report: reconstruction and generation, over any number of processes, resumable."""

from .arguments import GenerationArguments, ReconstructionArguments
from .images import read_reference, write_npz
from .report import dataset_names, eval_results, metric, read_report, versions, write_report
from .run import evaluate_generation, evaluate_reconstruction

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
