"""Figures of merit as pure functions on tensors. Distances between sets are computed in float64."""

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
    original paper gives other figures.

    Args:
        images, references: ``(B, C, H, W)`` in [-1, 1]; images are clamped to that range first.
        window: side of the window in pixels, odd.

    Raises:
        ValueError: for different shapes or others, or images smaller than the window.
    """
    _check_same_shape(images, references)
    if window < 3 or window % 2 == 0 or min(images.shape[2:]) < window:
        raise ValueError(f"window must be odd, at least 3 and fit images of {tuple(images.shape[2:])}, got {window}.")
    x, y = images.double().clamp(-1, 1), references.double()
    unbiased = window**2 / (window**2 - 1)

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, window, stride=1)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variances = unbiased * (local_mean(x * x) - mean_x**2 + local_mean(y * y) - mean_y**2)
    covariance = unbiased * (local_mean(x * y) - mean_x * mean_y)
    # the constants are for a range of 2; SSIM changes when grey levels shift, so the levels are counted from black
    mean_x, mean_y = mean_x + 1, mean_y + 1
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(dim=1)


def frechet_distance(
    mean1: torch.Tensor, covariance1: torch.Tensor, mean2: torch.Tensor, covariance2: torch.Tensor
) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982), which is FID on Inception features.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``. The last trace is the sum of the singular values of
    ``S1^(1/2) S2^(1/2)``: symmetric roots exist for singular covariances too, so nothing is added to the diagonal and
    no imaginary part is dropped.

    Args:
        mean1, mean2: ``(D,)``.
        covariance1, covariance2: ``(D, D)``, symmetric and positive semi-definite.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    for name, mean, covariance in (("first", mean1, covariance1), ("second", mean2, covariance2)):
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"the {name} set needs a mean (D,) and a covariance (D, D), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}."
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError(f"the {name} set's mean or covariance is not finite.")
    if len(mean1) != len(mean2):
        raise ValueError(f"features of different size: {len(mean1)} and {len(mean2)}. Are both from one network?")
    mean1, mean2 = mean1.double(), mean2.double()
    covariance1, covariance2 = covariance1.double(), covariance2.double()
    cross = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return float(distance)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


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
    references, samples = references.double() - centre, samples.double() - centre
    reference_radii, sample_radii = _radii(references, k), _radii(samples, k)
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


def _check_same_shape(images: torch.Tensor, references: torch.Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(f"images {tuple(images.shape)} and references {tuple(references.shape)} differ in shape.")
    if images.ndim != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(images.shape)}.")
