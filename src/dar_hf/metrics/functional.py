"""PSNR and codebook figures."""

import torch


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``(B,)`` float32.

    Args:
        images, references: ``(B, C, H, W)`` in [-1, 1]; images are clamped to that range first, as they are shown.

    Raises:
        ValueError: for different shapes.
    """
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} differ in shape.")
    error = (images.float().clamp(-1, 1) - references.float()).div(2).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def codebook_statistics(codes: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """How much of the codebook a set of codes ``(B, N)`` uses.

    Returns:
        ``usage``: share of codes that occur at all, in [0, 1]. ``perplexity``: exponential of the entropy of all
        codes, from 1 to codebook_size. ``position_usage_min``, ``position_usage_max``: fewest and most different
        codes at one position; few at each with high usage overall are a codebook that knows places, not images.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    shares = counts[counts > 0] / counts.sum()
    per_position = [len(column.unique()) for column in codes.T]
    return {
        "usage": float((counts > 0).double().mean()),
        "perplexity": float((-shares * shares.log()).sum().exp()),
        "position_usage_min": float(min(per_position)),
        "position_usage_max": float(max(per_position)),
    }
