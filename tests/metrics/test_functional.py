"""Pure figures against independent implementations, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import structural_similarity

from dar_hf.metrics import (
    frechet_distance,
    functional,
    label_agreement,
    mean_squared_error,
    precision_recall,
    psnr,
    ssim,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(dim, seed):
    """A mean and a full-rank covariance."""
    mean = torch.randn(dim, generator=generator(seed), dtype=torch.float64)
    root = torch.randn(dim, 2 * dim, generator=generator(seed + 1), dtype=torch.float64)
    return mean, root @ root.T / (2 * dim)


# PSNR


def test_psnr_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    images, references = torch.rand(2, 3, 3, 4, 5, generator=generator) * 2 - 1
    expected = []
    for image, reference in zip(images, references, strict=True):
        shown, wanted = (image + 1) / 2, (reference + 1) / 2  # in [0, 1], peak 1
        error = (
            sum((a - b) ** 2 for a, b in zip(shown.flatten().tolist(), wanted.flatten().tolist(), strict=True)) / 60
        )
        expected.append(10 * math.log10(1 / error))
    result = psnr(images, references)
    assert result.shape == (3,)
    torch.testing.assert_close(result, torch.tensor(expected))


def test_psnr_of_a_constant_error():
    references = torch.zeros(1, 1, 2, 2)
    torch.testing.assert_close(psnr(references + 0.2, references), torch.tensor([20.0]))  # 0.1 of the range


def test_images_are_clamped_first():
    references = torch.ones(2, 1, 2, 2)
    images = torch.stack([torch.full((1, 2, 2), 5.0), torch.full((1, 2, 2), -7.0)])
    result = psnr(images, references)
    assert result[0] >= 90  # shown as 1.0: no error
    torch.testing.assert_close(result[1], torch.tensor(0.0))  # shown as -1.0: the whole range


def test_equal_images_are_finite():
    assert psnr(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == pytest.approx(100)


def test_half_precision_images():
    references = torch.zeros(1, 1, 2, 2)
    result = psnr((references + 0.5).bfloat16(), references)
    assert result.dtype == torch.float32 and result.item() == pytest.approx(10 * math.log10(16))
    assert psnr(references.double() + 0.5, references).dtype == torch.float64


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))
    for measure in (psnr, ssim):  # the mean over channels would be taken for that over images
        with pytest.raises(ValueError, match=r"shape \(B, C, H, W\)"):
            measure(torch.zeros(3, 9, 9), torch.zeros(3, 9, 9))


def test_mean_squared_error_is_in_units_of_the_range():
    references = torch.zeros(2, 1, 2, 2)
    images = references + torch.tensor([0.2, 1.0])[:, None, None, None]
    torch.testing.assert_close(mean_squared_error(images, references), torch.tensor([0.01, 0.25]))


# SSIM


@pytest.mark.parametrize(("size", "window", "channels"), [((8, 8), 7, 3), ((17, 23), 7, 1), ((16, 12), 11, 3)])
def test_ssim_is_scikit_images(size, window, channels):
    references = torch.rand(3, channels, *size, generator=generator()) * 2 - 1
    images = (references + 0.3 * torch.randn(references.shape, generator=generator(1))).clamp(-1, 1)
    expected = [
        structural_similarity(
            image.permute(1, 2, 0).double().numpy() + 1,
            reference.permute(1, 2, 0).double().numpy() + 1,
            data_range=2,
            channel_axis=-1,
            win_size=window,
        )
        for image, reference in zip(images, references, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, references, window), expected, atol=1e-9)


def test_ssim_of_8_bit_images_is_that_of_grey_levels():
    pixels = torch.randint(0, 256, (2, 1, 3, 9, 9), generator=generator())
    image, reference = (p[0].permute(1, 2, 0).numpy().astype(np.uint8) for p in pixels)
    expected = structural_similarity(image, reference, data_range=255, channel_axis=-1)
    result = ssim(*(p / 127.5 - 1 for p in pixels))
    assert result.item() == pytest.approx(expected, abs=1e-6)


def test_ssim_of_equal_images_is_one():
    images = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    assert ssim(images, images).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(("size", "window"), [(6, 7), (8, 6), (8, 1)])
def test_ssim_refuses_windows_that_do_not_fit(size, window):
    images = torch.zeros(1, 3, size, size)
    with pytest.raises(ValueError, match="window"):
        ssim(images, images, window)


# Frechet distance


def by_scipy(mean1, covariance1, mean2, covariance2):
    """The formula as usually computed: a matrix root of the product, its imaginary part dropped."""
    root = scipy.linalg.sqrtm((covariance1 @ covariance2).numpy()).real
    return float(((mean1 - mean2) ** 2).sum() + covariance1.trace() + covariance2.trace() - 2 * np.trace(root))


def by_eigenvalues(mean1, covariance1, mean2, covariance2):
    """The trace of the root from the eigenvalues of the product, without any root of a matrix."""
    values = np.linalg.eigvals((covariance1 @ covariance2).numpy())
    trace = np.sqrt(values.astype(complex)).real.sum()
    return float(((mean1 - mean2) ** 2).sum() + covariance1.trace() + covariance2.trace() - 2 * trace)


@pytest.mark.parametrize("dim", [1, 7, 64])
@pytest.mark.parametrize("formula", [by_scipy, by_eigenvalues])
def test_frechet_distance_agrees_with_other_formulas(dim, formula):
    first, second = gaussian(dim, 0), gaussian(dim, 5)
    assert frechet_distance(*first, *second) == pytest.approx(formula(*first, *second), abs=1e-6, rel=1e-9)


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    mean, covariance = gaussian(20, 3)
    shift = torch.full((20,), 0.5, dtype=torch.float64)
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(20 * 0.25, abs=1e-9)
    # covariances that commute: the squared difference of their roots
    variances1, variances2 = torch.arange(1.0, 6), torch.arange(5.0, 0, -1)
    expected = float((variances1.sqrt() - variances2.sqrt()).square().sum())
    zero = torch.zeros(5)
    assert frechet_distance(zero, variances1.diag(), zero, variances2.diag()) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_equal_sets_is_zero_even_if_singular():
    root = torch.randn(50, 10, generator=generator(), dtype=torch.float64)
    mean, covariance = torch.zeros(50, dtype=torch.float64), root @ root.T
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-6


def test_frechet_distance_of_singular_sets_without_common_directions():
    covariance1, covariance2 = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 4.0]))
    assert frechet_distance(torch.zeros(2), covariance1, torch.zeros(2), covariance2) == pytest.approx(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean2": torch.zeros(3), "covariance2": torch.eye(3)}, "different size"),
        ({"covariance2": torch.eye(3)}, "second set needs"),
        ({"mean1": torch.tensor([0.0, math.nan])}, "first set's .* not finite"),
        ({"covariance2": torch.tensor([[1.0, math.inf], [0, 1]])}, "second set's .* not finite"),
    ],
)
def test_frechet_distance_refuses(change, message):
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=message):
        frechet_distance(**{"mean1": eye[0], "covariance1": eye, "mean2": eye[0], "covariance2": eye} | change)


# Precision and recall


def by_brute_force(references, samples, k):
    def radius(points, index):
        distances = sorted(float((points[index] - p).norm()) for j, p in enumerate(points) if j != index)
        return distances[k - 1]

    def inside(point, points, radii):
        return any(float((point - p).norm()) <= radius for p, radius in zip(points, radii, strict=True))

    reference_radii = [radius(references, i) for i in range(len(references))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    return {
        "precision": np.mean([inside(s, references, reference_radii) for s in samples]),
        "recall": np.mean([inside(r, samples, sample_radii) for r in references]),
    }


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [4096, 7])
def test_precision_and_recall_by_brute_force(k, block, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK_ROWS", block)  # a set cut into blocks gives the same
    references = torch.randn(40, 3, generator=generator(), dtype=torch.float64)
    samples = torch.randn(30, 3, generator=generator(1), dtype=torch.float64) * 0.6 + 0.8
    result = precision_recall(references, samples, k)
    assert result == pytest.approx(by_brute_force(references, samples, k))
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1
    assert result["precision"] != result["recall"]


def test_features_on_the_surface_are_inside():
    """Ties, as equal features and whole numbers make them: a product of matrices rounds them either way."""
    references = torch.randint(0, 4, (200, 3), generator=generator()).double()
    samples = torch.randint(0, 5, (150, 3), generator=generator(1)).double()
    assert precision_recall(references, samples) == pytest.approx(by_brute_force(references, samples, 3))
    repeated = torch.randn(10, 64, generator=generator(), dtype=torch.float64).repeat_interleave(6, 0)
    assert precision_recall(repeated, repeated.flip(0)) == {"precision": 1.0, "recall": 1.0}


def test_equal_and_distant_sets():
    points = torch.randn(20, 4, generator=generator())
    assert precision_recall(points, points) == {"precision": 1.0, "recall": 1.0}
    assert precision_recall(points, points + 100) == {"precision": 0.0, "recall": 0.0}


def test_samples_of_one_mode_are_precise_and_recall_little():
    modes = torch.tensor([[0.0, 0], [50, 0], [0, 50], [50, 50]]).repeat_interleave(25, 0)
    references = modes + torch.randn(100, 2, generator=generator())
    samples = 0.5 * torch.randn(100, 2, generator=generator(1))
    result = precision_recall(references, samples)
    assert result["precision"] > 0.95 and result["recall"] <= 0.25


def test_distances_survive_a_mean_far_from_zero():
    references = torch.randn(30, 3, generator=generator(), dtype=torch.float64)
    samples = torch.randn(30, 3, generator=generator(1), dtype=torch.float64)
    assert precision_recall(references + 1e6, samples + 1e6) == precision_recall(references, samples)


@pytest.mark.parametrize(
    ("references", "samples", "message"),
    [
        (torch.zeros(9, 2), torch.zeros(9, 3), r"\(N, D\) and \(M, D\)"),
        (torch.zeros(3, 2), torch.zeros(9, 2), "3 references are too few"),
        (torch.zeros(9, 2), torch.zeros(0, 2), "0 samples are too few"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), "samples are not finite"),
    ],
)
def test_precision_and_recall_refuse(references, samples, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(references, samples)


# Label agreement


def test_label_agreement():
    logits = torch.tensor([[2.0, 1, 0], [0, 0, 1], [0, 3, 1], [9, 0, 0]])
    assert label_agreement(logits, torch.tensor([0, 2, 0, 0])) == 0.75


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([])])
def test_label_agreement_refuses(labels):
    with pytest.raises(ValueError, match="labels"):
        label_agreement(torch.zeros(2, 3), labels)


def test_label_agreement_refuses_nan():
    with pytest.raises(ValueError, match="logits are NaN"):
        label_agreement(torch.full((2, 3), torch.nan), torch.tensor([0, 0]))


def test_precision_and_recall_need_a_neighbour():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 2), k=0)
