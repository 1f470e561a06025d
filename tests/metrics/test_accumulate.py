"""Statistics that accumulate: how a set is cut changes nothing, and the figures are their definitions."""

import math

import numpy as np
import pytest
import torch

from dar_hf.metrics import (
    CodeStatistics,
    GaussianStatistics,
    InceptionScoreStatistics,
    MeanStatistics,
    codebook_statistics,
)

CUTS = [[100], [1] * 100, [33, 0, 60, 7]]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Gaussian statistics


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


# Inception score


def by_definition(logits, split_size):
    scores = []
    for start in range(0, len(logits), split_size):
        p = np.exp(logits[start : start + split_size].numpy())
        p /= p.sum(axis=1, keepdims=True)
        kl = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return np.mean(scores)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("split_size", [40, 100, 5000])
def test_inception_score_by_definition(cut, split_size):
    logits = 3 * normal(100, 7)
    statistics = InceptionScoreStatistics(split_size)
    for part in logits.split(cut):
        statistics.update(part)
    assert statistics.score() == pytest.approx(by_definition(logits, split_size), abs=1e-9)


def test_splits_are_consecutive_across_processes():
    logits = 3 * normal(100, 7)
    first, second = InceptionScoreStatistics(40), InceptionScoreStatistics(40)
    for start in range(0, 100, 10):
        (first if start % 20 else second).update(logits[start : start + 10], first_index=start)
    assert first.merge(second).score() == pytest.approx(by_definition(logits, 40), abs=1e-9)
    assert first.count == 100


def test_inception_score_of_certain_classes_is_their_number_and_of_one_class_is_one():
    certain = torch.eye(10).repeat(5, 1) * 1000  # probabilities of zero, whose logarithm is infinite
    assert InceptionScoreStatistics().update(certain).score() == pytest.approx(10)
    assert InceptionScoreStatistics().update(certain[:1].repeat(9, 1)).score() == pytest.approx(1)


def test_inception_score_refuses():
    with pytest.raises(ValueError, match="empty set"):
        InceptionScoreStatistics().score()
    with pytest.raises(ValueError, match="not finite"):
        InceptionScoreStatistics().update(torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="3 and 4 classes"):
        InceptionScoreStatistics().update(torch.zeros(2, 3)).update(torch.zeros(2, 4))


# Means


def test_means_merge():
    first, second = MeanStatistics().update(torch.tensor([1.0, 2])), MeanStatistics().update(torch.tensor([6.0]))
    assert first.merge(second).mean() == 3 and first.count == 3


def test_means_refuse():
    with pytest.raises(ValueError, match="empty set"):
        MeanStatistics().mean()
    with pytest.raises(ValueError, match="not finite"):
        MeanStatistics().update(torch.tensor([1.0, math.inf]))


# Codes


def test_one_code_everywhere():
    figures = codebook_statistics(torch.full((5, 4), 3), 8)
    assert figures == pytest.approx(
        {"usage": 1 / 8, "perplexity": 1.0, "position_usage_min": 1.0, "position_usage_max": 1.0}
    )


def test_all_codes_equally():
    figures = codebook_statistics(torch.arange(8).reshape(4, 2), 8)
    assert figures == pytest.approx(
        {"usage": 1.0, "perplexity": 8.0, "position_usage_min": 4.0, "position_usage_max": 4.0}
    )


def test_unequal_shares():
    # code 0 six times, codes 1 and 2 once each; first position always 0, second 0, 0, 1, 2
    codes = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 2]])
    figures = codebook_statistics(codes, 5)
    entropy = -(6 / 8 * math.log(6 / 8) + 2 * 1 / 8 * math.log(1 / 8))
    assert figures == pytest.approx(
        {"usage": 3 / 5, "perplexity": math.exp(entropy), "position_usage_min": 1.0, "position_usage_max": 3.0}
    )


def test_code_statistics_do_not_depend_on_the_cut():
    codes = torch.randint(0, 20, (60, 4), generator=torch.Generator().manual_seed(0))
    codes[:, 1] %= 3
    whole = codebook_statistics(codes, 24)
    streamed = CodeStatistics(24)
    for part in codes.split([1, 40, 19]):
        streamed.update(part)
    merged = CodeStatistics(24).merge(CodeStatistics(24).update(codes[:30])).merge(CodeStatistics(24))
    assert streamed.figures() == whole == merged.update(codes[30:].int()).figures()
    assert whole["position_usage_min"] == 3


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4), r"shape \(B, N\)"),
        (torch.tensor([[0, 8]]), r"lie in \[0, 8\)"),
        (torch.tensor([[-1, 0]]), r"lie in \[0, 8\)"),
        (torch.zeros(1, 3, dtype=torch.long), "different kinds"),
        (torch.zeros(1, 2), "must be integers"),
    ],
)
def test_unfitting_codes_are_refused(codes, message):
    statistics = CodeStatistics(8).update(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        statistics.update(codes)


def test_codebook_figures_of_no_codes():
    with pytest.raises(ValueError, match="empty set"):
        CodeStatistics(8).figures()


def test_statistics_of_different_kinds_do_not_merge():
    with pytest.raises(ValueError, match="different kinds"):
        CodeStatistics(8).merge(CodeStatistics(4).update(torch.zeros(1, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="splits of different size: 10 and 20"):
        InceptionScoreStatistics(10).merge(InceptionScoreStatistics(20).update(torch.zeros(3, 5)))
    with pytest.raises(ValueError, match="split_size must be at least 1"):
        InceptionScoreStatistics(0)
