"""Statistics of feature sets: how a set is split changes nothing, and they are numpy's."""

import math

import numpy as np
import pytest
import torch

from dar_hf.metrics import GaussianStatistics

CUTS = [[100], [1] * 100, [33, 0, 60, 7]]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("offset", [0.0, 1e6])  # sums of squares would lose ten digits at 1e6
def test_mean_and_covariance_are_numpys(cut, offset):
    features = normal(100, 6) @ normal(6, 6, seed=1) + offset
    statistics = GaussianStatistics()
    for part in features.split(cut):
        statistics.update(part)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, features.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-8)


def test_statistics_of_processes_merge():
    features = normal(50, 4)
    whole = GaussianStatistics().update(features)
    parts = [GaussianStatistics().update(part) for part in features.split([20, 30])]
    merged = GaussianStatistics().merge(parts[0]).merge(GaussianStatistics()).merge(parts[1])
    assert merged.count == 50
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.covariance, whole.covariance)
    assert parts[0].count == 20 and not torch.equal(parts[0].mean, merged.mean)  # what was merged is left alone


def test_half_precision_features_accumulate_in_float64():
    statistics = GaussianStatistics().update(normal(10, 3).half())
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3), r"shape \(B, D\)"),
        (torch.zeros(2, 5), "different size: 4 and 5"),
        (torch.tensor([[0, 0, math.nan, 0], [0, 0, 0, 0]]), "1 of 2 images are not finite"),
    ],
)
def test_unfitting_features_are_refused(features, message):
    statistics = GaussianStatistics().update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=message):
        statistics.update(features)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_samples(count):
    with pytest.raises(ValueError, match=f"at least 2 samples, got {count}"):
        _ = GaussianStatistics().update(torch.zeros(count, 3)).covariance
