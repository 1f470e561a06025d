"""The Hub: uploads that keep what people wrote, model cards, and folders that carry their own code."""

from .advice import advice
from .blocks import merge_cards
from .cards import describe, empty_model, model_card
from .contents import check_complete, matching_files, model_files
from .push import prepare_repository, push_card, push_folder, push_to_hub
from .remote_code import export_remote_code

__all__ = [
    "advice",
    "check_complete",
    "describe",
    "empty_model",
    "export_remote_code",
    "matching_files",
    "merge_cards",
    "model_card",
    "model_files",
    "prepare_repository",
    "push_card",
    "push_folder",
    "push_to_hub",
]
