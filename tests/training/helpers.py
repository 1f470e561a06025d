"""Small models, recipes and stages for the tests of training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState

from dar_hf import DARTokenizer
from dar_hf.data import collate
from dar_hf.presets import get_preset
from dar_hf.training import ARArguments, ARStage, TokenizerArguments, TokenizerStage

TINY_TOKENIZER = {
    "in_channels": 3,
    "encoder_dim": 32,
    "decoder_dim": 32,
    "diffusion_dim": 32,
    "attention_head_dim": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "diffusion_depth": 1,
    "codebook_size": 16,
    "num_groups": 4,
    "condition_scope": "prefix",
}
TINY_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

# a recipe of its own, so that tuning the presets changes no test
QUICK = {
    "preset": "digits",
    "dataset_name": "digits",
    "max_train_samples": 32,
    "max_validation_samples": 4,
    "train_batch_size": 4,
    "max_train_steps": 6,
    "checkpointing_steps": 0,
    "validation_steps": 0,
    "logging_steps": 1,
    "mixed_precision": "no",
    "learning_rate": 1.5e-3,
    "adam_epsilon": 1e-6,
    "ema_decay": 0.9,
}
OPEN_GATES = {"gate_start": 0.5, "modulation_std": 0.02, "output_std": 0.02, "post_quant_std": 0.35}


@contextmanager
def fresh_process() -> Iterator[None]:
    """accelerate as it is in a new process, and one thread: two are slower for such models, far more on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


def overrides(options):
    return [f"{name}={value}" for name, value in options.items()]


def tokenizer_args(folder, model=None, **changes):
    options = {"output_dir": str(folder), "model_overrides": overrides(TINY_TOKENIZER | (model or {}))}
    return TokenizerArguments(**QUICK | OPEN_GATES | {"encoder_learning_rate": 3e-4} | options | changes)


def ar_args(folder, tokenizer, model=None, **changes):
    options = {"output_dir": str(folder), "model_overrides": overrides(TINY_TRANSFORMER | (model or {}))}
    return ARArguments(**QUICK | {"tokenizer": str(tokenizer), "cache_codes": True} | options | changes)


def tokenizer_stage(folder, model=None, **changes):
    args = tokenizer_args(folder, model, **changes)
    return TokenizerStage.build(args), args


def ar_stage(folder, tokenizer, model=None, **changes):
    args = ar_args(folder, tokenizer, model, **changes)
    return ARStage.build(args), args


def tiny_tokenizer(seed=0, **changes):
    """A small tokenizer in which every part is alive from the start."""
    torch.manual_seed(seed)
    options = get_preset("digits").tokenizer | TINY_TOKENIZER | changes
    model = DARTokenizer(**options)
    model.reset_parameters(0.5, 0.02, 0.02, 0.35)
    return model


def batch_of(stage, keys):
    return stage.prepare_batch(collate([stage.samples[key] for key in keys]))
