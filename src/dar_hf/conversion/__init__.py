"""Checkpoints of the original code to this package's models and back, and the language model as a plain Llama.

A converted model computes what the original computes (codes and greedy sequences equal, everything else to about
3e-7 in float32). Nothing of a file is ever executed, see `reading`.
"""

import torch

from ..modeling_dar import DARForCausalLM
from ..tokenizer_dar import DARTokenizer
from .llama import codes_tokenizer, save_llama, to_llama
from .reading import CheckpointError
from .tokenizer import convert_tokenizer, original_config, tokenizer_to_original
from .transformer import convert_transformer, name_arguments, transformer_to_original

__all__ = [
    "CheckpointError",
    "codes_tokenizer",
    "convert_tokenizer",
    "convert_transformer",
    "original_config",
    "save_llama",
    "to_llama",
    "to_original",
]


def to_original(model: DARTokenizer | DARForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a model under the original code's names and in its shapes.

    The original's tokenizer also has a buffer ``quantize.codebook_used`` (a training statistic), which this package
    does not keep: load there with ``strict=False``. `original_config` gives the tokenizer's configuration.

    Raises:
        TypeError: for any other model.
    """
    if isinstance(model, DARTokenizer):
        return tokenizer_to_original(model)
    if isinstance(model, DARForCausalLM):
        name_arguments(model.config)
        return transformer_to_original(model)
    raise TypeError(f"to_original takes a DARTokenizer or a DARForCausalLM, got {type(model).__name__}.")
