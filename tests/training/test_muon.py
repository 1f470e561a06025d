"""Muon for matrices beside AdamW for all else."""

import copy

import pytest
import torch
from accelerate.utils import DistributedType

from dar_hf.training import TokenizerArguments, make_accelerator
from dar_hf.training.launcher import check_layout
from dar_hf.training.muon import MuonAdamW, orthogonalized

from .helpers import ar_args, ar_stage, tokenizer_args, tokenizer_stage
from .test_stages import grouped, run_steps

SHAPES = [(8, 8), (8, 16), (8, 24), (24, 8)]


def random_parameter(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(*shape, generator=generator))
    parameter.grad = torch.randn(*shape, generator=generator)
    return parameter


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalized(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.25
    nearest = left @ right
    cosine = (result * nearest).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2)))
    assert cosine.min() > 0.97
    assert torch.allclose(orthogonalized(1e3 * matrices), result, atol=1e-4)
    assert torch.equal(orthogonalized(torch.zeros(1, *shape)), torch.zeros(1, *shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_torch(shape):
    """torch's own computes in bfloat16."""
    ours, theirs = (random_parameter(*shape) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = MuonAdamW([{"params": [ours], "muon": True}], **options)
    reference = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(3):
        start = ours.detach().clone()
        gradient = random_parameter(*shape, seed=step).grad
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        change = (ours - start).norm()
        assert (ours - theirs).norm() < 0.05 * change * (step + 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_near_enough(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices[0, 1:] = 1e-3 * matrices[0, 1:]  # nearly of rank one
    expected = orthogonalized(matrices)
    result = orthogonalized(matrices.bfloat16())
    assert result.dtype == torch.bfloat16
    assert torch.linalg.svdvals(result.float()).max() < 1.25
    difference = (result.float() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert (difference[1:] < 0.05).all() and difference[0] < 0.5


@pytest.mark.parametrize("columns", [24, 40])
def test_the_short_way_for_wide_matrices_is_the_long_one(columns):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(4, 8, 8, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(4, columns, 8, generator=generator))
    values = torch.logspace(0, -6, 8)  # as a gradient's may fall
    wide = left @ (values[:, None] * right.mT)
    padded = torch.zeros(4, columns, columns)  # square, so that it goes the long way
    padded[:, :8] = wide
    assert torch.allclose(orthogonalized(wide), orthogonalized(padded)[:, :8], atol=2e-3)


def test_parameters_of_one_shape_do_not_mix():
    together = [random_parameter(8, 24, seed=seed) for seed in range(3)]
    apart = [random_parameter(8, 24, seed=seed) for seed in range(3)]
    MuonAdamW([{"params": together, "muon": True}], lr=0.1).step()
    for parameter in apart:
        MuonAdamW([{"params": [parameter], "muon": True}], lr=0.1).step()
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_other_groups_are_adams():
    ours, theirs = random_parameter(8, 8), random_parameter(8, 8)
    matrix, untouched = random_parameter(8, 8, seed=1), random_parameter(8, 8, seed=2)
    untouched.grad = None
    before = untouched.detach().clone()
    groups = [{"params": [ours], "lr": 0.01}, {"params": [matrix, untouched], "muon": True}]
    MuonAdamW(groups, lr=0.1, weight_decay=0.1, fused=True).step()
    torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, fused=True).step()
    assert torch.equal(ours, theirs)
    assert torch.equal(untouched, before)


def test_a_restored_optimizer_goes_on_as_before():
    def make():
        parameters = [random_parameter(8, 8), random_parameter(8, seed=1)]
        return parameters, MuonAdamW([{"params": parameters[:1], "muon": True}, {"params": parameters[1:]}], lr=0.1)

    def step(parameters, optimizer, seed):
        for parameter in parameters:
            parameter.grad = random_parameter(*parameter.shape, seed=seed).grad
        optimizer.step()

    parameters, optimizer = make()
    step(parameters, optimizer, 3)
    copies, restored = make()
    for other, parameter in zip(copies, parameters, strict=True):
        other.data.copy_(parameter.data)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(parameters, optimizer, 4)
    step(copies, restored, 4)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\(8,\)"):
        MuonAdamW([{"params": [random_parameter(8)], "muon": True}])


def test_the_tokenizers_blocks_are_trained_by_muon(tmp_path):
    rates = {"learning_rate": 1e-2, "encoder_learning_rate": 1e-3, "muon_learning_rate": 0.02}
    stage, args = tokenizer_stage(tmp_path, **rates)
    decoder, encoder, of_decoder, of_encoder = grouped(stage)
    assert [group["lr"] for _, group in (decoder, encoder, of_decoder, of_encoder)] == [1e-2, 1e-3, 0.02, 0.002]
    assert all(name.startswith(("causal_blocks.", "denoiser.blocks.")) for name in of_decoder[0])
    assert all(name.startswith("encoder_blocks.") for name in of_encoder[0])
    assert {"denoiser.blocks.0.mlp.0.weight", "encoder_blocks.0.attn.to_q.weight"} <= of_decoder[0] | of_encoder[0]
    assert {"quantizer.codebook.weight", "token_embed.weight", "denoiser.proj_in.weight"} <= decoder[0]
    names = [name for group in (decoder, encoder, of_decoder, of_encoder) for name in group[0]]
    assert sorted(names) == sorted(name for name, _ in stage.model.named_parameters())
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    run_steps(stage, args, 3)
    assert not [name for name, p in stage.model.named_parameters() if torch.equal(p, before[name])]


def test_the_language_models_blocks_are_trained_by_muon(tmp_path, tokenizer):
    stage, args = ar_stage(tmp_path, tokenizer, muon_learning_rate=0.01)
    *_, (names, group) = grouped(stage)
    assert group["muon"] and all(name.startswith("model.layers.") for name in names)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    run_steps(stage, args, 3)
    assert not [name for name, p in stage.model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("rate", [-1.0, float("nan")])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="muon_learning_rate"):
        TokenizerArguments(muon_learning_rate=rate)


def test_sharded_models_are_refused(tmp_path):
    args = ar_args(tmp_path, tmp_path, muon_learning_rate=0.01, ema_decay=None)
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with pytest.raises(ValueError, match="whole matrices"):
            check_layout(args, kind, is_fsdp2=True)
    args.muon_learning_rate = 0.0
    check_layout(args, DistributedType.FSDP, is_fsdp2=True)


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16"):
        make_accelerator(tokenizer_args(tmp_path, muon_learning_rate=0.01, mixed_precision="fp16"))
