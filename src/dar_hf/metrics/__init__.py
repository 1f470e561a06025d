"""Figures of merit, as pure functions on tensors."""

from .functional import codebook_statistics, psnr

__all__ = ["codebook_statistics", "psnr"]
