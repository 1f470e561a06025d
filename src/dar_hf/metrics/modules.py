"""Metrics as `evaluate.Metric`s, used directly: ``FID().compute(predictions=features, references=features)``.

No Hub and no cache files: unlike the library's own modules, which write every input to disk and compute at the end,
these keep sums batch by batch (``add_batch``), and ``merge`` those of other processes. ``compute`` returns a
dictionary and starts over.
"""

import math
import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .functional import (
    check_rows,
    codebook_usage,
    count_codes,
    label_agreement,
    precision_recall,
    psnr,
    ssim,
)
from .gaussian import GaussianStatistics, frechet_distance
from .lpips import LPIPSNetwork

if not hasattr(evaluate, "Metric"):
    raise ImportError(
        f"{evaluate.__file__} hides the library evaluate, which dar_hf.metrics needs: run from a folder without it."
    )

LPIPS_BATCH = 50  # pairs of images that the network takes at once
_VECTOR = datasets.Sequence(datasets.Value("float32"))
_CODES = datasets.Sequence(datasets.Value("int64"))
_IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


class StreamingMetric(evaluate.Metric):
    """A metric that keeps sums instead of its inputs.

    Subclasses name their inputs (`_inputs`: name to feature; all are needed unless ``_optional``) and say how sums
    start (`reset`), grow (`_add`), are joined (`_merge`) and give the result (`_result`).
    """

    _inputs: dict[str, Any] = {}
    _optional = False
    _citation = ""

    def __init__(self, **kwargs: Any):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(f"{type(self).__name__} writes no files to share: make one a process, and merge them.")
        super().__init__(**kwargs)
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self._citation,
            inputs_description="See the class.",
            features=datasets.Features(self._inputs),
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # nothing is written, so no folder is made

    def reset(self) -> None:
        """Forget everything added."""
        raise NotImplementedError

    def _add(self, predictions: Any, references: Any) -> None:
        raise NotImplementedError

    def _merge(self, other: Any) -> None:
        raise NotImplementedError

    def _result(self) -> dict[str, float]:
        raise NotImplementedError

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of arrays, tensors or lists.

        Raises:
            ValueError: for missing, unknown, empty or unsuitable inputs.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        inputs = {name: _as_tensor(value) for name, value in given.items() if value is not None}
        unknown = sorted(inputs.keys() - self._inputs.keys())
        missing = [] if self._optional else sorted(self._inputs.keys() - inputs.keys())
        if unknown or missing:
            raise ValueError(f"{self.name} takes {', '.join(self._inputs)}: missing {missing}, unknown {unknown}.")
        for name, tensor in inputs.items():
            if tensor.ndim == 0 or len(tensor) == 0:
                raise ValueError(f"{self.name}: {name} are empty.")
        self._add(inputs.get("predictions"), inputs.get("references"))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one example."""
        example = {"predictions": prediction, "references": reference}
        batch = {name: _as_tensor(value)[None] for name, value in example.items() if value is not None}
        self.add_batch(**batch, **kwargs)

    def merge(self, other: "StreamingMetric") -> None:
        """Add what another metric of this class has accumulated, in another process, say."""
        if type(other) is not type(self):
            raise ValueError(f"cannot merge {type(other).__name__} into {type(self).__name__}.")
        self._merge(other)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """The metric of everything added, and of these inputs if there are any; then start over.

        Raises:
            ValueError: as `add_batch`, or where the set is empty or too small.
        """
        if any(value is not None for value in (predictions, references, *kwargs.values())):
            self.add_batch(predictions=predictions, references=references, **kwargs)
        try:
            return self._result()
        finally:
            self.reset()


class FID(StreamingMetric):
    """Frechet distance between the features of two sets (Heusel et al. 2017). Lower is better; 0 for equal sets.

    Inputs: ``predictions`` and ``references``, features ``(B, D)``. The sets may have different sizes and come in
    different batches (either may be left out of one). With Inception's pooled features this is FID, with its spatial
    ones sFID; anything else needs another name in a report.

    Args:
        reference: ``(mean (D,), covariance (D, D))`` of the references, where they are known; then only predictions
            are added.
    """

    _inputs = {"predictions": _VECTOR, "references": _VECTOR}
    _citation = "Heusel et al. 2017, arXiv 1706.08500"
    _optional = True
    _key = "fid"

    def __init__(self, reference: tuple[torch.Tensor, torch.Tensor] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.reference = None if reference is None else tuple(_as_tensor(moment) for moment in reference)

    def reset(self) -> None:
        self.predictions = GaussianStatistics()
        self.references = GaussianStatistics()

    def _add(self, predictions: Any, references: Any) -> None:
        if references is not None and self.reference is not None:
            raise ValueError("the references' statistics are given: add predictions only.")
        if predictions is not None:
            self.predictions.update(predictions)
        if references is not None:
            self.references.update(references)

    def _merge(self, other: "FID") -> None:
        self.predictions.merge(other.predictions)
        self.references.merge(other.references)

    def _result(self) -> dict[str, float]:
        given = {"predictions": self.predictions}
        if self.reference is None:
            given["references"] = self.references
        for name, statistics in given.items():
            if statistics.count < 2:
                raise ValueError(f"{self._key} needs 2 {name} or more, got {statistics.count}.")
            if statistics.count <= (size := len(statistics.mean)):
                warnings.warn(
                    f"{statistics.count} {name} do not span {size} features: the distance is biased upwards.",
                    stacklevel=3,
                )
        reference = self.reference or (self.references.mean, self.references.covariance)
        return {self._key: frechet_distance(self.predictions.mean, self.predictions.covariance, *reference)}


class SpatialFID(FID):
    """sFID (Nash et al. 2021): the Frechet distance between spatial features, mixed_6/conv's first 7 channels.

    Inputs and arguments as for `FID`.
    """

    _citation = "Nash et al. 2021, arXiv 2103.03841"
    _key = "sfid"


class InceptionScore(StreamingMetric):
    """Inception score (Salimans et al. 2016), the mean over consecutive splits. Higher is better, from 1 to classes.

    exp(mean KL(p(y|x) || p(y))) of every split; a split needs only the sum of its probabilities and of their negative
    entropies.

    Inputs: ``predictions``, logits ``(B, classes)``, in the order of the set; several processes give the place of a
    batch's first sample as ``first_index``.

    Args:
        split_size: samples of a split; 5,000 as in the ADM suite.
    """

    _inputs = {"predictions": _VECTOR}
    _citation = "Salimans et al. 2016, arXiv 1606.03498"

    def __init__(self, split_size: int = 5_000, **kwargs: Any):
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}.")
        self.split_size = split_size
        super().__init__(**kwargs)

    def reset(self) -> None:
        self.count = 0
        self._splits: dict[int, tuple[int, torch.Tensor, float]] = {}  # samples, sum of p, sum of p log p

    def add_batch(self, *, first_index: int | None = None, **inputs: Any) -> None:  # type: ignore[override]
        """Add a batch; ``first_index`` is the place of its first sample, by default after those added so far."""
        self._start = self.count if first_index is None else first_index
        super().add_batch(**inputs)

    def _add(self, predictions: Any, references: Any) -> None:
        logits = check_rows(predictions, "logits")
        start = self._start
        self.count += len(logits)
        while len(logits):
            split = start // self.split_size
            size = (split + 1) * self.split_size - start
            part = logits[:size].log_softmax(dim=1)
            self._add_to_split(split, len(part), part.exp().sum(dim=0), float((part.exp() * part).sum()))
            logits = logits[size:]
            start += size

    def _merge(self, other: "InceptionScore") -> None:
        if other.split_size != self.split_size:
            raise ValueError(f"splits of different size: {self.split_size} and {other.split_size}.")
        self.count += other.count
        for split, sums in other._splits.items():
            self._add_to_split(split, *sums)

    def _add_to_split(self, split: int, count: int, probabilities: torch.Tensor, entropy: float) -> None:
        if split in self._splits:
            old_count, old_probabilities, old_entropy = self._splits[split]
            if len(old_probabilities) != len(probabilities):
                raise ValueError(f"{len(old_probabilities)} and {len(probabilities)} classes in one set.")
            count += old_count
            probabilities = old_probabilities + probabilities
            entropy += old_entropy
        if count > self.split_size:
            raise ValueError(
                f"{count} samples in a split of {self.split_size}: parts of one set need the first_index of their own."
            )
        self._splits[split] = (count, probabilities, entropy)

    def _result(self) -> dict[str, float]:
        if not self._splits:
            raise ValueError("the Inception score of an empty set is not defined.")
        scores = []
        for count, probabilities, entropy in self._splits.values():
            mean = probabilities / count
            marginal = float(torch.special.xlogy(mean, mean).sum())
            scores.append(math.exp(entropy / count - marginal))
        return {"inception_score": math.fsum(scores) / len(scores)}


class PrecisionRecall(StreamingMetric):
    """Improved precision and recall (Kynkaanniemi et al. 2019). Higher is better.

    Inputs: ``predictions`` and ``references``, features ``(B, D)``, which are kept, since every pair is compared
    (50,000 of Inception's: 400 MB).

    Args:
        k: a ball reaches to its centre's k-th neighbour.
        device: where the distances are computed.
    """

    _inputs = {"predictions": _VECTOR, "references": _VECTOR}
    _optional = True
    _citation = "Kynkaanniemi et al. 2019, arXiv 1904.06991"

    def __init__(self, k: int = 3, device: torch.device | str = "cpu", **kwargs: Any):
        super().__init__(**kwargs)
        self.k = k
        self.device = device

    def reset(self) -> None:
        self.predictions: list[torch.Tensor] = []
        self.references: list[torch.Tensor] = []

    def _add(self, predictions: Any, references: Any) -> None:
        if predictions is not None:
            self.predictions.append(predictions)
        if references is not None:
            self.references.append(references)

    def _merge(self, other: "PrecisionRecall") -> None:
        self.predictions += other.predictions
        self.references += other.references

    def _result(self) -> dict[str, float]:
        if not (self.predictions and self.references):
            raise ValueError("precision and recall of an empty set are not defined.")
        predictions = torch.cat(self.predictions).to(self.device)
        references = torch.cat(self.references).to(self.device)
        return precision_recall(references, predictions, self.k)


class _MeanMetric(StreamingMetric):
    """The mean of one number per image."""

    _key = ""

    def reset(self) -> None:
        self.count = 0
        self.total = 0.0

    def add_values(self, values: torch.Tensor) -> None:
        """Add numbers ``(B,)`` that are computed already.

        Raises:
            ValueError: for values that are not finite.
        """
        if not torch.isfinite(values).all():
            raise ValueError(f"a value of {self.name} is not finite.")
        self.count += values.numel()
        self.total += float(values.double().sum())

    def _merge(self, other: "_MeanMetric") -> None:
        self.count += other.count
        self.total += other.total

    def _result(self) -> dict[str, float]:
        if not self.count:
            raise ValueError(f"the mean {self.name} of an empty set is not defined.")
        return {self._key: self.total / self.count}


class PairedMetric(_MeanMetric):
    """A number for each pair of images; the metric is their mean."""

    _inputs = {"predictions": _IMAGE, "references": _IMAGE}

    def values(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """The number of each pair of images, ``(B,)``, which `add_values` takes in any process.

        Raises:
            ValueError: for sets of different length, type or shape, or images outside their range.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} images and {len(references)} references are no pairs.")
        if (predictions.dtype == torch.uint8) != (references.dtype == torch.uint8):
            raise ValueError(
                f"predictions are {predictions.dtype} and references {references.dtype}: both must be uint8, or both "
                "float in [-1, 1]."
            )
        images = _in_range("predictions", predictions)
        wanted = _in_range("references", references)
        if predictions.dtype != torch.uint8 and (images.min() < 0) != (wanted.min() < 0):
            warnings.warn(
                f"{self.name}: only one of the sets has values below 0. Images in [0, 1] must be scaled to [-1, 1].",
                stacklevel=5,
            )
        return self._value(images, wanted)

    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _add(self, predictions: Any, references: Any) -> None:
        self.add_values(self.values(predictions, references))


class PSNR(PairedMetric):
    """Peak signal-to-noise ratio in dB, the mean over images (not the ratio of the mean error). Higher is better.

    Inputs: ``predictions`` and ``references``, images ``(B, C, H, W)``, both uint8 or both float in [-1, 1].
    """

    _key = "psnr"

    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return psnr(images, references)


class SSIM(PairedMetric):
    """Structural similarity (Wang et al. 2004) with a uniform window, as scikit-image's default. Higher is better.

    Inputs: ``predictions`` and ``references``, images ``(B, C, H, W)``, both uint8 or both float in [-1, 1].

    Args:
        window: side of the window in pixels.
    """

    _citation = "Wang et al. 2004, Image quality assessment: from error visibility to structural similarity"
    _key = "ssim"

    def __init__(self, window: int = 7, **kwargs: Any):
        super().__init__(**kwargs)
        self.window = window

    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return ssim(images, references, self.window)


class LPIPS(PairedMetric):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018), the mean over images. Lower is better.

    Inputs: ``predictions`` and ``references``, images ``(B, 3, H, W)``, both uint8 or both float in [-1, 1].

    Args:
        network: from `dar_hf.metrics.lpips.load_lpips`.
    """

    _citation = "Zhang et al. 2018, arXiv 1801.03924"
    _key = "lpips"

    def __init__(self, network: LPIPSNetwork, **kwargs: Any):
        super().__init__(**kwargs)
        self.network = network

    @torch.no_grad()
    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        device = next(self.network.parameters()).device
        pairs = zip(images.float().split(LPIPS_BATCH), references.float().split(LPIPS_BATCH), strict=True)
        return torch.cat([self.network(x.to(device), y.to(device)).cpu() for x, y in pairs])


class CodebookUsage(StreamingMetric):
    """How much of the codebook is used: ``usage``, ``perplexity``, ``position_usage_min``, ``position_usage_max``.

    Inputs: ``predictions``, codes ``(B, N)``.

    Args:
        codebook_size: number of codes.
    """

    _inputs = {"predictions": _CODES}

    def __init__(self, codebook_size: int, **kwargs: Any):
        self.codebook_size = codebook_size
        super().__init__(**kwargs)

    def reset(self) -> None:
        self.counts = torch.zeros(self.codebook_size, dtype=torch.long)
        self.seen: torch.Tensor | None = None  # by position

    def _add(self, predictions: Any, references: Any) -> None:
        self._add_counts(*count_codes(predictions, self.codebook_size))

    def _merge(self, other: "CodebookUsage") -> None:
        if other.seen is not None:
            self._add_counts(other.counts, other.seen)

    def _add_counts(self, counts: torch.Tensor, seen: torch.Tensor) -> None:
        if self.seen is None:
            self.seen = torch.zeros(len(seen), self.codebook_size, dtype=torch.bool)
        if seen.shape != self.seen.shape:
            raise ValueError(
                f"codes of different kinds: {tuple(self.seen.shape)} and {tuple(seen.shape)} (positions, codes)."
            )
        self.counts = self.counts + counts
        self.seen = self.seen | seen

    def _result(self) -> dict[str, float]:
        seen = torch.zeros(0, self.codebook_size) if self.seen is None else self.seen
        return codebook_usage(self.counts, seen)


class LabelAgreement(_MeanMetric):
    """Share of images that a classifier reads as their label. Higher is better.

    Inputs: ``predictions``, the classifier's logits ``(B, classes)`` or the classes it reads ``(B,)``, and
    ``references``, labels ``(B,)``.
    """

    _inputs = {"predictions": _VECTOR, "references": datasets.Value("int64")}
    _key = "label_agreement"

    def _add(self, predictions: Any, references: Any) -> None:
        if predictions.ndim == 1 and predictions.shape == references.shape and not predictions.is_floating_point():
            self.add_values(predictions == references)
            return
        self.total += label_agreement(predictions, references) * len(references)
        self.count += len(references)


def _as_tensor(value: Any) -> torch.Tensor:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))


def _in_range(name: str, images: torch.Tensor) -> torch.Tensor:
    """Images as float64 in [-1, 1]; uint8 are scaled, other values outside are refused."""
    if images.dtype == torch.uint8:
        return images.double() / 127.5 - 1
    if not images.is_floating_point() or not torch.isfinite(images).all() or float(images.abs().max()) > 1:
        raise ValueError(
            f"{name} must be uint8, or float in [-1, 1] (clamp them), got {images.dtype} from "
            f"{float(images.min()):.3g} to {float(images.max()):.3g}."
        )
    return images.double()
