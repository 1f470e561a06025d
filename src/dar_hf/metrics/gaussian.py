"""Gaussians fitted to sets of features: their statistics, and the Frechet distance between two of them."""

import torch

from .functional import check_rows


class GaussianStatistics:
    """Mean and covariance of feature vectors, in float64: 50,000 images need no 50,000 vectors in memory.

    Holds count, mean and scatter (sum of squared deviations from the mean) and combines them by the formula of Chan et
    al. 1979, which loses no precision where the mean is far from zero. How the set was split changes only rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, 0, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> "GaussianStatistics":
        """Add features ``(B, D)``; returns the statistics.

        Raises:
            ValueError: for features of another shape or size than before, or that are not finite.
        """
        features = check_rows(features, "features")
        batch = GaussianStatistics()
        if len(features):
            batch.count = len(features)
            batch.mean = features.mean(dim=0)
            deviations = features - batch.mean
            batch.scatter = deviations.T @ deviations
        return self.merge(batch)

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Add another set's statistics; returns the statistics.

        Raises:
            ValueError: for features of another size.
        """
        if other.count == 0:
            return self
        if self.count == 0:
            self.count = other.count
            self.mean = other.mean.clone()
            self.scatter = other.scatter.clone()
            return self
        if len(other.mean) != len(self.mean):
            raise ValueError(f"features of different size: {len(self.mean)} and {len(other.mean)}.")
        count = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        self.mean = self.mean + shift * (other.count / count)
        self.count = count
        return self

    @property
    def covariance(self) -> torch.Tensor:
        """``(D, D)``, divided by count - 1.

        Raises:
            ValueError: for fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}.")
        return self.scatter / (self.count - 1)


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
    covariance1 = covariance1.double()
    covariance2 = covariance2.double()
    cross = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2)).sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return float(shift + covariance1.trace() + covariance2.trace() - 2 * cross)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
