"""The figures as `evaluate.Metric`s, used directly: ``FID().compute(predictions=features, references=features)``.

No Hub and no cache files: unlike the library's own modules, which write every input to disk and compute at the end,
these accumulate statistics batch by batch (``add_batch``), and ``merge`` those of other processes. ``compute`` gives a
dictionary and starts over.
"""

import copy
import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .accumulate import CodeStatistics, GaussianStatistics, InceptionScoreStatistics, MeanStatistics
from .functional import frechet_distance, label_agreement, precision_recall, psnr, ssim
from .lpips import LPIPSNetwork

if not hasattr(evaluate, "Metric"):
    raise ImportError(
        f"{evaluate.__file__} hides the library evaluate, which dar_hf.metrics needs: run from a folder without it."
    )

_VECTOR = datasets.Sequence(datasets.Value("float32"))
_CODES = datasets.Sequence(datasets.Value("int64"))
_IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


class StreamingMetric(evaluate.Metric):
    """A metric that keeps statistics instead of its inputs.

    Subclasses give the inputs (`_inputs`: name to feature; all are needed unless ``_optional``), fresh statistics
    (`_start`), what a batch adds (`_add`) and the result (`_result`).
    """

    _inputs: dict[str, Any] = {}
    _optional = False
    _citation = ""

    def __init__(self, **kwargs: Any):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(f"{type(self).__name__} writes no files to share: make one a process, and merge them.")
        super().__init__(**kwargs)
        self.statistics = self._start()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self._citation,
            inputs_description="See the class.",
            features=datasets.Features(self._inputs),
        )

    def _build_data_dir(self) -> str:
        return self._data_dir_root  # nothing is written, so no folder is made

    def _start(self) -> Any:
        raise NotImplementedError

    def _add(self, predictions: Any, references: Any) -> None:
        raise NotImplementedError

    def _result(self) -> dict[str, float]:
        raise NotImplementedError

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of arrays, tensors or lists.

        Raises:
            ValueError: for missing, unknown, empty or unfitting inputs.
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
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.merge(theirs)

    def _parts(self) -> tuple:
        return self.statistics if isinstance(self.statistics, tuple) else (self.statistics,)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """The figures of everything added, and of these inputs if there are any; then start over.

        Raises:
            ValueError: as `add_batch`, or where the set is empty or too small.
        """
        if any(value is not None for value in (predictions, references, *kwargs.values())):
            self.add_batch(predictions=predictions, references=references, **kwargs)
        try:
            return self._result()
        finally:
            self.statistics = self._start()

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        fresh = copy.copy(self)
        fresh.statistics = fresh._start()
        return StreamingMetric.compute(fresh, predictions=predictions, references=references, **kwargs)


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

    def _start(self) -> tuple[GaussianStatistics, GaussianStatistics]:
        return GaussianStatistics(), GaussianStatistics()

    def _add(self, predictions: Any, references: Any) -> None:
        if references is not None and self.reference is not None:
            raise ValueError("the references' statistics are given: add predictions only.")
        if predictions is not None:
            self.statistics[0].update(predictions)
        if references is not None:
            self.statistics[1].update(references)

    def _result(self) -> dict[str, float]:
        given = dict(zip(("predictions", "references"), self.statistics, strict=True))
        if self.reference is not None:
            del given["references"]
        for name, statistics in given.items():
            if statistics.count < 2:
                raise ValueError(f"{self._key} needs 2 {name} or more, got {statistics.count}.")
            if statistics.count <= (size := len(statistics.mean)):
                warnings.warn(
                    f"{statistics.count} {name} do not span {size} features: the distance is biased upwards.",
                    stacklevel=3,
                )
        moments = [(statistics.mean, statistics.covariance) for statistics in given.values()]
        first, second = moments if self.reference is None else (*moments, self.reference)
        return {self._key: frechet_distance(*first, *second)}


class SpatialFID(FID):
    """sFID (Nash et al. 2021): the Frechet distance between spatial features, mixed_6/conv's first 7 channels.

    Inputs and arguments as for `FID`.
    """

    _citation = "Nash et al. 2021, arXiv 2103.03841"
    _key = "sfid"


class InceptionScore(StreamingMetric):
    """Inception score (Salimans et al. 2016), the mean over consecutive splits of 5,000. Higher is better.

    Inputs: ``predictions``, logits ``(B, classes)``, in the order of the set; several processes give the place of a
    batch's first sample as ``first_index``.

    Args:
        split_size: samples of a split.
    """

    _inputs = {"predictions": _VECTOR}
    _citation = "Salimans et al. 2016, arXiv 1606.03498"

    def __init__(self, split_size: int = 5_000, **kwargs: Any):
        self.split_size = split_size
        super().__init__(**kwargs)

    def _start(self) -> InceptionScoreStatistics:
        return InceptionScoreStatistics(self.split_size)

    def add_batch(self, *, first_index: int | None = None, **inputs: Any) -> None:  # type: ignore[override]
        """Add a batch; ``first_index`` is the place of its first sample, by default after those added so far."""
        self._first_index = first_index
        super().add_batch(**inputs)

    def _add(self, predictions: Any, references: Any) -> None:
        self.statistics.update(predictions, self._first_index)

    def _result(self) -> dict[str, float]:
        return {"inception_score": self.statistics.score()}


class _Rows:
    """Features, kept: precision and recall need every pair."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def merge(self, other: "_Rows") -> None:
        self.parts += other.parts

    def all(self) -> torch.Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0)


class PrecisionRecall(StreamingMetric):
    """Improved precision and recall (Kynkaanniemi et al. 2019). Higher is better.

    Inputs: ``predictions`` and ``references``, features ``(B, D)``, which are kept (50,000 of Inception's: 400 MB).

    Args:
        k: a ball reaches to its centre's k-th neighbour.
    """

    _inputs = {"predictions": _VECTOR, "references": _VECTOR}
    _optional = True
    _citation = "Kynkaanniemi et al. 2019, arXiv 1904.06991"

    def __init__(self, k: int = 3, **kwargs: Any):
        super().__init__(**kwargs)
        self.k = k

    def _start(self) -> tuple[_Rows, _Rows]:
        return _Rows(), _Rows()

    def _add(self, predictions: Any, references: Any) -> None:
        for rows, features in zip(self.statistics, (predictions, references), strict=True):
            if features is not None:
                rows.parts.append(features)

    def _result(self) -> dict[str, float]:
        predictions, references = (rows.all() for rows in self.statistics)
        return precision_recall(references, predictions, self.k)


class _PairedMetric(StreamingMetric):
    """A number for each pair of images; the figure is their mean."""

    _inputs = {"predictions": _IMAGE, "references": _IMAGE}
    _key = ""

    def _start(self) -> MeanStatistics:
        return MeanStatistics()

    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _add(self, predictions: Any, references: Any) -> None:
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} images and {len(references)} references are no pairs.")
        if (predictions.dtype == torch.uint8) != (references.dtype == torch.uint8):
            raise ValueError(
                f"predictions are {predictions.dtype} and references {references.dtype}: both must be uint8, or both "
                "float in [-1, 1]."
            )
        images = [_in_range(name, x) for name, x in (("predictions", predictions), ("references", references))]
        if (images[0].min() < 0) != (images[1].min() < 0):
            warnings.warn(
                f"{self.name}: only one of the sets has values below 0. Images in [0, 1] must be scaled to [-1, 1].",
                stacklevel=4,
            )
        self.statistics.update(self._value(*images))

    def _result(self) -> dict[str, float]:
        return {self._key: self.statistics.mean()}


class PSNR(_PairedMetric):
    """Peak signal-to-noise ratio in dB, the mean over images (not the ratio of the mean error). Higher is better.

    Inputs: ``predictions`` and ``references``, images ``(B, C, H, W)``, both uint8 or both float in [-1, 1].
    """

    _key = "psnr"

    def _value(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return psnr(images, references)


class SSIM(_PairedMetric):
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


class LPIPS(_PairedMetric):
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
        return self.network(images.to(device, torch.float32), references.to(device, torch.float32))


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

    def _start(self) -> CodeStatistics:
        return CodeStatistics(self.codebook_size)

    def _add(self, predictions: Any, references: Any) -> None:
        self.statistics.update(predictions)

    def _result(self) -> dict[str, float]:
        return self.statistics.figures()


class LabelAgreement(StreamingMetric):
    """Share of images that a classifier reads as their label. Higher is better.

    Inputs: ``predictions``, the classifier's logits ``(B, classes)`` or the classes it reads ``(B,)``, and
    ``references``, labels ``(B,)``.
    """

    _inputs = {"predictions": _VECTOR, "references": datasets.Value("int64")}

    def _start(self) -> MeanStatistics:
        return MeanStatistics()

    def _add(self, predictions: Any, references: Any) -> None:
        if predictions.ndim == 1 and predictions.shape == references.shape and not predictions.is_floating_point():
            self.statistics.update(predictions == references)
            return
        batch = MeanStatistics()
        batch.count, batch.total = len(references), label_agreement(predictions, references) * len(references)
        self.statistics.merge(batch)

    def _result(self) -> dict[str, float]:
        return {"label_agreement": self.statistics.mean()}


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
