"""What identifies weights."""

import hashlib
from collections.abc import Mapping

import torch


def weights_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of a state dict: the same whatever file they come from.

    Batch norm's counters are left out: they say nothing about a frozen network, and converted files do not have them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith(".num_batches_tracked"):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
