"""PSNR and codebook figures against numbers worked out by hand."""

import math

import pytest
import torch

from dar_hf.metrics import codebook_statistics, psnr


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


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))


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
