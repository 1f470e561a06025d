"""The Hub: uploads that keep what people wrote, model cards, and folders that carry their own code."""

from .advice import advice
from .blocks import merge_cards
from .cards import describe, empty_model, model_card
from .contents import check_complete, matching_files, model_files
from .methods import connect
from .push import prepare_repository, push_card, push_folder, push_to_hub
from .remote_code import export_remote_code
from .results import TASKS, metric_name, paper_results

__all__ = [
    "TASKS",
    "advice",
    "check_complete",
    "connect",
    "describe",
    "empty_model",
    "export_remote_code",
    "matching_files",
    "merge_cards",
    "metric_name",
    "model_card",
    "model_files",
    "paper_results",
    "prepare_repository",
    "push_card",
    "push_folder",
    "push_to_hub",
]
