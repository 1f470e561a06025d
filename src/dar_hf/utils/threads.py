"""How many processor cores a small model is given."""

import os

import torch
from torch import nn

SMALL = 20_000_000  # parameters of all parts together


def limit_threads(*models: nn.Module) -> None:
    """Let small models on a CPU compute with one thread, unless ``OMP_NUM_THREADS`` says how many.

    Their operations are short, and each of them waits for all threads: a second thread gains little where a core is
    free, and costs a multiple where another process (a browser, say) has the core. For commands, since it
    concerns the whole process.
    """
    on_cpu = all(parameter.device.type == "cpu" for model in models for parameter in model.parameters())
    small = sum(parameter.numel() for model in models for parameter in model.parameters()) < SMALL
    if on_cpu and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
