"""Figures of merit: pure functions on tensors, statistics that merge, `evaluate.Metric`s, and measuring networks."""

from typing import TYPE_CHECKING, Any

from .accumulate import (
    CodeStatistics,
    GaussianStatistics,
    InceptionScoreStatistics,
    MeanStatistics,
    codebook_statistics,
)
from .features import FeatureExtractor, load_feature_extractor
from .functional import frechet_distance, label_agreement, mean_squared_error, precision_recall, psnr, ssim
from .image_features import ImageFeatures
from .inception import InceptionNetwork, convert_inception, load_inception
from .lpips import LPIPSNetwork, convert_lpips, load_lpips

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
    "CodeStatistics",
    "CodebookUsage",
    "FeatureExtractor",
    "GaussianStatistics",
    "ImageFeatures",
    "InceptionNetwork",
    "InceptionScore",
    "InceptionScoreStatistics",
    "LPIPSNetwork",
    "LabelAgreement",
    "MeanStatistics",
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
    "precision_recall",
    "psnr",
    "ssim",
]

_MODULES = {
    "FID",
    "LPIPS",
    "PSNR",
    "SSIM",
    "CodebookUsage",
    "InceptionScore",
    "LabelAgreement",
    "PrecisionRecall",
    "SpatialFID",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> Any:
    # training needs none of these, and next to a script called evaluate.py the library of that name cannot be imported
    if name in _MODULES:
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
