"""Figures of merit: pure functions on tensors, statistics that merge, `evaluate.Metric`s, and measuring networks."""

from .accumulate import (
    CodeStatistics,
    GaussianStatistics,
    InceptionScoreStatistics,
    MeanStatistics,
    codebook_statistics,
)
from .features import FeatureExtractor, ImageFeatures, load_feature_extractor
from .functional import frechet_distance, label_agreement, mean_squared_error, precision_recall, psnr, ssim
from .inception import InceptionNetwork, convert_inception, load_inception
from .lpips import LPIPSNetwork, convert_lpips, load_lpips
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
