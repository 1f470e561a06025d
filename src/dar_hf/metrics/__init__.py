"""Metrics: pure functions on tensors, `evaluate.Metric`s that keep their own sums, and measuring networks."""

from typing import TYPE_CHECKING, Any

from .features import FeatureExtractor, load_feature_extractor
from .functional import codebook_statistics, label_agreement, mean_squared_error, precision_recall, psnr, ssim
from .gaussian import GaussianStatistics, frechet_distance
from .image_features import ImageFeatures
from .inception import InceptionNetwork, convert_inception, load_inception
from .lpips import LPIPSNetwork, convert_lpips, load_lpips
from .names import TASKS, metric_name

if TYPE_CHECKING:
    from .modules import (
        FID,
        LPIPS,
        PSNR,
        SSIM,
        CodebookUsage,
        InceptionScore,
        LabelAgreement,
        PrecisionRecall,
        SpatialFID,
    )

__all__ = [
    "FID",
    "LPIPS",
    "PSNR",
    "SSIM",
    "TASKS",
    "CodebookUsage",
    "FeatureExtractor",
    "GaussianStatistics",
    "ImageFeatures",
    "InceptionNetwork",
    "InceptionScore",
    "LPIPSNetwork",
    "LabelAgreement",
    "PrecisionRecall",
    "SpatialFID",
    "codebook_statistics",
    "convert_inception",
    "convert_lpips",
    "frechet_distance",
    "label_agreement",
    "load_feature_extractor",
    "load_inception",
    "load_lpips",
    "mean_squared_error",
    "metric_name",
    "precision_recall",
    "psnr",
    "ssim",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # The `evaluate.Metric`s are loaded when asked for. Training needs only the functions, and must start where a
    # user's own evaluate.py hides the library of that name
    if name in __all__:
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
