"""Loss terms against written-out formulas, and where their gradients go."""

import math

import pytest
import torch
import torch.nn.functional as F

from dar_hf import DARTokenizerOutput
from dar_hf.training.losses import codebook_sum, commitment_sum, cross_entropy_sum, flow_matching_sum
from dar_hf.training.tokenizer_stage import ENCODER_PARTS

from .helpers import tiny_tokenizer


@pytest.fixture
def output():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return DARTokenizerOutput(
        velocity=draw(3, 2, 4, 4),
        target=draw(3, 2, 4, 4),
        latents=F.normalize(draw(3, 6, 5), dim=-1),
        quantized=F.normalize(draw(3, 6, 5), dim=-1),
        token_mask=torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]).float(),
    )


def masked_sum(output):
    """Mean over channels, sum over the tokens up to the end of each image's group."""
    total = 0.0
    for image, prefix in enumerate((2, 4, 6)):
        for token in range(prefix):
            z, e = output.latents[image, token].tolist(), output.quantized[image, token].tolist()
            total += sum((a - b) ** 2 for a, b in zip(z, e, strict=True)) / 5
    return total


def test_flow_matching_is_the_formula(output):
    total = 0.0
    for velocity, target in zip(output.velocity, output.target, strict=True):
        pairs = zip(velocity.flatten().tolist(), target.flatten().tolist(), strict=True)
        total += sum((a - b) ** 2 for a, b in pairs) / (2 * 4 * 4) / 0.6**2
    assert flow_matching_sum(output, 0.6).item() == pytest.approx(total, rel=1e-5)


def test_codebook_term_is_the_formula_with_the_prefix_mask(output):
    assert codebook_sum(output).item() == pytest.approx(masked_sum(output), rel=1e-5)


def test_commitment_is_a_quarter_of_it(output):
    assert commitment_sum(output).item() == pytest.approx(0.25 * masked_sum(output), rel=1e-5)


def test_cross_entropy_is_the_formula():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([[0, 6, 2], [5, 5, 1]])
    total = 0.0
    for row, targets in zip(logits.tolist(), codes.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            total += math.log(sum(math.exp(score) for score in scores)) - scores[target]
    assert cross_entropy_sum(logits, codes).item() == pytest.approx(total, rel=1e-5)


def test_sums_are_computed_in_float32(output):
    half = DARTokenizerOutput(**{name: value.bfloat16() for name, value in output.items()})
    logits, codes = torch.randn(2, 3, 7).bfloat16(), torch.zeros(2, 3, dtype=torch.long)
    for value in (flow_matching_sum(half, 0.6), commitment_sum(half), cross_entropy_sum(logits, codes)):
        assert value.dtype == torch.float32


def test_sums_add_up_over_a_split_batch(output):
    for term in (lambda out: flow_matching_sum(out, 0.6), codebook_sum, commitment_sum):
        parts = [DARTokenizerOutput(**{k: v[rows] for k, v in output.items()}) for rows in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(sum(term(part) for part in parts), term(output))


def test_masks_stop_at_their_groups_last_token():
    model = tiny_tokenizer()
    times = torch.tensor([0.0, 0.3, 0.99])  # groups 0, 1 and 3 of 4 tokens each
    mask = model(torch.zeros(3, 3, 8, 8), timesteps=times).token_mask
    assert mask.sum(dim=1).tolist() == [4, 8, 16]
    assert all(row == sorted(row, reverse=True) for row in mask.tolist())


# Gradients


def gradients(term, quantize=True):
    """Names of parameters with a gradient other than zero."""
    model = tiny_tokenizer()
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    times = torch.tensor([0.05, 0.3, 0.6, 0.9])
    term(model(images, timesteps=times, generator=generator, quantize=quantize)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    return moved, {name for name, _ in model.named_parameters()}


def encoder(names):
    return {name for name in names if name.split(".")[0] in ENCODER_PARTS}


CODEBOOK = "quantizer.codebook.weight"
# keys that are not rotated: the same shift of all keys changes no attention
FREE = {"causal_blocks.0.attn.norm_k.bias", "denoiser.blocks.0.cross_attn.norm_k.bias"}


def test_codebook_term_moves_only_the_codebook():
    moved, _ = gradients(codebook_sum)
    assert moved == {CODEBOOK}


def test_commitment_moves_only_the_encoder():
    moved, names = gradients(commitment_sum)
    assert moved == encoder(names)


@pytest.mark.parametrize("quantize", [True, False])
def test_flow_moves_the_decoder_and_through_it_the_encoder(quantize):
    moved, names = gradients(lambda output: flow_matching_sum(output, 0.6), quantize)
    assert moved | FREE == names - {CODEBOOK}


def test_only_rows_in_use_move():
    model = tiny_tokenizer()
    output = model(torch.rand(2, 3, 8, 8) * 2 - 1, timesteps=torch.zeros(2))  # only the first group counts
    codebook_sum(output).backward()
    moved = model.quantizer.codebook.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == set(output.codes[:, :4].flatten().tolist())


def test_cross_entropy_reaches_every_logit():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    cross_entropy_sum(logits, torch.zeros(2, 3, dtype=torch.long)).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - F.one_hot(torch.zeros(2, 3).long(), 7))
