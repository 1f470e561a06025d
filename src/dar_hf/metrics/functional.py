"""Metrics as pure functions on tensors. Distances between sets are computed in float64."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

MAX_PSNR_ERROR = 1e-10  # equal images get 100 dB instead of infinity
TIES = 1e-12  # of the squared norms: more than a product of matrices in float64 rounds
BLOCK_ROWS = 1024  # of pairwise distances: 400 MB against 50,000 features; the ADM suite's 10,000 rows would be 4 GB


def mean_squared_error(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image in units of the full range, ``(B,)`` in [0, 1]: float32, or float64 where the
    images are.

    Args:
        images, references: ``(B, C, H, W)`` in [-1, 1]; images are clamped to that range first, as they are shown.

    Raises:
        ValueError: for different shapes, or others.
    """
    _check_same_shape(images, references)
    dtype = torch.promote_types(torch.promote_types(images.dtype, references.dtype), torch.float32)
    return (images.to(dtype).clamp(-1, 1) - references.to(dtype)).div(2).square().flatten(1).mean(dim=1)


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``(B,)``; arguments and type as for `mean_squared_error`."""
    return -10 * torch.log10(mean_squared_error(images, references).clamp_min(MAX_PSNR_ERROR))


def ssim(images: torch.Tensor, references: torch.Tensor, window: int = 7) -> torch.Tensor:
    """Structural similarity of each image, ``(B,)`` float64 in [-1, 1].

    Wang et al. 2004 with a uniform window, sample covariances and the mean over channels and all full windows: what
    scikit-image computes by default, and with it the tokenizers of LlamaGen's line report. The Gaussian window of the
    original paper gives other values.

    Args:
        images, references: ``(B, C, H, W)`` in [-1, 1]; images are clamped to that range first.
        window: side of the window in pixels, odd.

    Raises:
        ValueError: for different shapes or others, or images smaller than the window.
    """
    _check_same_shape(images, references)
    if window < 3 or window % 2 == 0 or min(images.shape[2:]) < window:
        raise ValueError(f"window must be odd, at least 3 and fit images of {tuple(images.shape[2:])}, got {window}.")
    x = images.double().clamp(-1, 1)
    y = references.double()
    unbiased = window**2 / (window**2 - 1)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, window, stride=1)

    mean_x = local_mean(x)
    mean_y = local_mean(y)
    variances = unbiased * (local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2)
    covariance = unbiased * (local_mean(x * y) - mean_x * mean_y)
    # the constants are for a range of 2; SSIM changes when grey levels shift, so the levels are counted from black
    mean_x = mean_x + 1
    mean_y = mean_y + 1
    c1 = (0.01 * 2) ** 2
    c2 = (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(dim=1)


def precision_recall(references: torch.Tensor, samples: torch.Tensor, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), as the ADM suite computes them.

    A set's manifold is the union of balls around its features, each as large as the distance to the k-th nearest other
    feature of the set. Precision is the share of samples in the references' manifold, recall the share of references
    in the samples'. The suite computes distances in float16 where they fit; here they are float64, and what lies on a
    ball's surface, as equal features do, is inside.

    Args:
        references, samples: features ``(N, D)`` and ``(M, D)``.
        k: at least 1.

    Returns:
        ``precision`` and ``recall``, in [0, 1].

    Raises:
        ValueError: for features of different size, or sets of k or fewer.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if references.ndim != 2 or samples.ndim != 2 or references.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(references.shape)} and {tuple(samples.shape)}."
        )
    for name, features in (("references", references), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {name} are too few for the distance to the {k}-th neighbour.")
        if not torch.isfinite(features).all():
            raise ValueError(f"features of the {name} are not finite.")
    centre = references.double().mean(dim=0)  # smaller norms, less cancellation
    references = references.double() - centre
    samples = samples.double() - centre
    reference_radii = _radii(references, k)
    sample_radii = _radii(samples, k)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for rows, distances in _distance_blocks(references, samples, less=TIES):
        inside |= (distances <= reference_radii[rows, None]).any(dim=0)
        covered[rows] = (distances <= sample_radii).any(dim=1)
    return {"precision": float(inside.double().mean()), "recall": float(covered.double().mean())}


def _distance_blocks(
    left: torch.Tensor, right: torch.Tensor, less: float = 0.0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Squared distances of blocks of rows of ``left`` to all of ``right``, with the rows' slice; smaller by this share
    ``less`` of both squared norms."""
    right_norms = right.square().sum(dim=1) * (1 - less)
    for start in range(0, len(left), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = left[rows]
        distances = block.square().sum(dim=1, keepdim=True) * (1 - less) - 2 * block @ right.T + right_norms
        yield rows, distances.clamp_min(0)


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    # the nearest of k + 1 is the row itself
    parts = [d.topk(k + 1, dim=1, largest=False).values[:, -1] for _, d in _distance_blocks(features, features)]
    return torch.cat(parts)


def label_agreement(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose most probable class is their label.

    Args:
        logits: ``(B, classes)``, of a classifier that never saw these images.
        labels: ``(B,)``.

    Raises:
        ValueError: for other shapes, an empty set, labels the classifier does not know, or logits that are NaN.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(f"logits (B, classes) do not go with labels {tuple(labels.shape)}: {tuple(logits.shape)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}), the classifier's classes.")
    if logits.isnan().any():
        raise ValueError("logits are NaN.")
    return float((logits.argmax(dim=1) == labels).double().mean())


def count_codes(codes: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each code occurs, ``(codebook_size,)``, and whether at each position, ``(N, codebook_size)``.

    Args:
        codes: integers ``(B, N)``.
        codebook_size: number of codes.

    Raises:
        ValueError: for codes of another shape, or outside the codebook.
    """
    if codes.ndim != 2 or codes.is_floating_point():
        raise ValueError(f"codes must be integers of the shape (B, N), got {codes.dtype} {tuple(codes.shape)}.")
    codes = codes.detach().cpu().long()
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(f"codes must lie in [0, {codebook_size}).")
    counts = torch.bincount(codes.flatten(), minlength=codebook_size)
    seen = torch.zeros(codes.shape[1], codebook_size, dtype=torch.bool).scatter_(1, codes.T, True)
    return counts, seen


def codebook_usage(counts: torch.Tensor, seen: torch.Tensor) -> dict[str, float]:
    """How much of the codebook is used, from what `count_codes` gives for a set.

    Returns:
        ``usage``: share of codes that occur at all, in [0, 1]. ``perplexity``: exponential of the entropy of all
        codes, from 1 to codebook_size. ``position_usage_min``, ``position_usage_max``: fewest and most different
        codes at one position; few at each with high usage overall means the codebook knows places, not images.

    Raises:
        ValueError: for an empty set.
    """
    total = int(counts.sum())
    if not total:
        raise ValueError("the codebook usage of an empty set is not defined.")
    shares = counts[counts > 0].double() / total
    per_position = seen.sum(dim=1)
    return {
        "usage": float((counts > 0).double().mean()),
        "perplexity": float((-shares * shares.log()).sum().exp()),
        "position_usage_min": float(per_position.min()),
        "position_usage_max": float(per_position.max()),
    }


def codebook_statistics(codes: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """How much of the codebook a set of codes ``(B, N)`` uses; see `codebook_usage`."""
    return codebook_usage(*count_codes(codes, codebook_size))


def check_rows(values: torch.Tensor, name: str) -> torch.Tensor:
    """``(B, D)`` as float64 on the host.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    if values.ndim != 2:
        raise ValueError(f"{name} must have the shape (B, D), got {tuple(values.shape)}.")
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).any(dim=1).sum())
        raise ValueError(f"{name} of {bad} of {len(values)} images are not finite.")
    return values.detach().cpu().double()


def _check_same_shape(images: torch.Tensor, references: torch.Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} differ in shape.")
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(images.shape)}.")
