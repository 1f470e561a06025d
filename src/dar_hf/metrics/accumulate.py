"""Statistics that accumulate batch by batch in float64 and merge: 50,000 images need no 50,000 images in memory.

Every class has ``update`` (a batch) and ``merge`` (another process's statistics); both return the statistics. The
result does not depend on how the set was cut, but for the rounding of float64.
"""

import math

import torch

SPLIT_SIZE = 5_000  # samples of a split of the Inception score, as in the ADM suite


class GaussianStatistics:
    """Mean and covariance of feature vectors.

    Holds count, mean and scatter (sum of squared deviations from the mean) and combines them by the formula of Chan et
    al. 1979, which loses no precision where the mean is far from zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, 0, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> "GaussianStatistics":
        """Add features ``(B, D)``.

        Raises:
            ValueError: for features of another shape or size than before, or that are not finite.
        """
        features = _check_rows(features, "features")
        batch = GaussianStatistics()
        if len(features):
            batch.count, batch.mean = len(features), features.mean(dim=0)
            deviations = features - batch.mean
            batch.scatter = deviations.T @ deviations
        return self.merge(batch)

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Add another set's statistics.

        Raises:
            ValueError: for features of another size.
        """
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
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


class InceptionScoreStatistics:
    """The Inception score (Salimans et al. 2016) over consecutive splits.

    exp(mean KL(p(y|x) || p(y))) of every split, then the mean over splits. A split needs only the sum of its
    probabilities and of their negative entropies.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}.")
        self.split_size = split_size
        self.count = 0
        self._splits: dict[int, tuple[int, torch.Tensor, float]] = {}  # images, sum of p, sum of p log p

    def update(self, logits: torch.Tensor, first_index: int | None = None) -> "InceptionScoreStatistics":
        """Add logits ``(B, classes)`` of consecutive samples.

        Args:
            logits: unnormalised log-probabilities.
            first_index: place of the first in the whole set; default after those added so far.

        Raises:
            ValueError: for another shape or number of classes, values that are not finite, or places that are taken.
        """
        logits = _check_rows(logits, "logits")
        start = self.count if first_index is None else first_index
        self.count += len(logits)
        while len(logits):
            split = start // self.split_size
            size = (split + 1) * self.split_size - start
            part = logits[:size].log_softmax(dim=1)
            self._add(split, len(part), part.exp().sum(dim=0), float((part.exp() * part).sum()))
            logits, start = logits[size:], start + size
        return self

    def merge(self, other: "InceptionScoreStatistics") -> "InceptionScoreStatistics":
        """Add another part of the same set; its samples must have been added with their ``first_index``.

        Raises:
            ValueError: for splits of another size, another number of classes, or places that are taken.
        """
        if other.split_size != self.split_size:
            raise ValueError(f"splits of different size: {self.split_size} and {other.split_size}.")
        self.count += other.count
        for split, values in other._splits.items():
            self._add(split, *values)
        return self

    def _add(self, split: int, count: int, probabilities: torch.Tensor, entropy: float) -> None:
        if split in self._splits:
            old_count, old_probabilities, old_entropy = self._splits[split]
            if len(old_probabilities) != len(probabilities):
                raise ValueError(f"{len(old_probabilities)} and {len(probabilities)} classes in one set.")
            count, entropy = old_count + count, old_entropy + entropy
            probabilities = old_probabilities + probabilities
        if count > self.split_size:
            raise ValueError(
                f"{count} samples in a split of {self.split_size}: parts of one set need the first_index of their own."
            )
        self._splits[split] = (count, probabilities, entropy)

    def score(self) -> float:
        """The score, at least 1 and at most the number of classes.

        Raises:
            ValueError: for an empty set.
        """
        if not self._splits:
            raise ValueError("the Inception score of an empty set is not defined.")
        scores = []
        for count, probabilities, entropy in self._splits.values():
            mean = probabilities / count
            marginal = float(torch.special.xlogy(mean, mean).sum())
            scores.append(math.exp(entropy / count - marginal))
        return math.fsum(scores) / len(scores)


class MeanStatistics:
    """Mean of one number per image."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def update(self, values: torch.Tensor) -> "MeanStatistics":
        """Add values ``(B,)``.

        Raises:
            ValueError: for values that are not finite.
        """
        if not torch.isfinite(values).all():
            raise ValueError("a value is not finite.")
        self.count, self.total = self.count + values.numel(), self.total + float(values.double().sum())
        return self

    def merge(self, other: "MeanStatistics") -> "MeanStatistics":
        """Add another set's statistics."""
        self.count, self.total = self.count + other.count, self.total + other.total
        return self

    def mean(self) -> float:
        """The mean.

        Raises:
            ValueError: for an empty set.
        """
        if not self.count:
            raise ValueError("the mean of an empty set is not defined.")
        return self.total / self.count


class CodeStatistics:
    """How often each code occurs, and which codes occur at each position.

    Args:
        codebook_size: number of codes.
    """

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self.counts = torch.zeros(codebook_size, dtype=torch.long)
        self.seen = torch.zeros(0, codebook_size, dtype=torch.bool)  # by position

    def update(self, codes: torch.Tensor) -> "CodeStatistics":
        """Add codes ``(B, N)``.

        Raises:
            ValueError: for codes of another shape, or outside the codebook.
        """
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(f"codes must be integers of the shape (B, N), got {codes.dtype} {tuple(codes.shape)}.")
        codes = codes.detach().cpu().long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes must lie in [0, {self.codebook_size}).")
        batch = CodeStatistics(self.codebook_size)
        batch.counts = torch.bincount(codes.flatten(), minlength=self.codebook_size)
        batch.seen = torch.zeros(codes.shape[1], self.codebook_size, dtype=torch.bool).scatter_(1, codes.T, True)
        return self.merge(batch)

    def merge(self, other: "CodeStatistics") -> "CodeStatistics":
        """Add another set's statistics.

        Raises:
            ValueError: for another codebook or number of positions.
        """
        if len(self.seen) == 0 and other.codebook_size == self.codebook_size:
            self.seen = torch.zeros_like(other.seen)
        if other.seen.shape not in (self.seen.shape, (0, self.codebook_size)):
            raise ValueError(
                f"codes of different kinds: {tuple(self.seen.shape)} and {tuple(other.seen.shape)} (positions, codes)."
            )
        self.counts = self.counts + other.counts
        if len(other.seen):
            self.seen = self.seen | other.seen
        return self

    def figures(self) -> dict[str, float]:
        """``usage``: share of codes that occur at all, in [0, 1]. ``perplexity``: exponential of the entropy of all
        codes, from 1 to codebook_size. ``position_usage_min``, ``position_usage_max``: fewest and most different
        codes at one position; few at each with high usage overall are a codebook that knows places, not images.

        Raises:
            ValueError: for an empty set.
        """
        total = int(self.counts.sum())
        if not total:
            raise ValueError("codebook figures of an empty set are not defined.")
        shares = self.counts[self.counts > 0].double() / total
        per_position = self.seen.sum(dim=1)
        return {
            "usage": float((self.counts > 0).double().mean()),
            "perplexity": float((-shares * shares.log()).sum().exp()),
            "position_usage_min": float(per_position.min()),
            "position_usage_max": float(per_position.max()),
        }


def codebook_statistics(codes: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """How much of the codebook a set of codes ``(B, N)`` uses; see `CodeStatistics.figures`."""
    return CodeStatistics(codebook_size).update(codes).figures()


def _check_rows(values: torch.Tensor, name: str) -> torch.Tensor:
    """``(B, D)`` as float64 on the host."""
    if values.ndim != 2:
        raise ValueError(f"{name} must have the shape (B, D), got {tuple(values.shape)}.")
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).any(dim=1).sum())
        raise ValueError(f"{name} of {bad} of {len(values)} images are not finite.")
    return values.detach().cpu().double()
