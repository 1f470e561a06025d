"""The training pass of the tokenizer, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from tokenizer_helpers import every_option, random_codes, random_images, seeded, shifted

from dar_hf import (
    DARTokenizerOutput,
    FlowMatchAdamsBashforthScheduler,
)
from dar_hf.layers_dar import DARAttnProcessor

# Training


@every_option
def test_every_option_trains(make_tokenizer, options):
    model = make_tokenizer(**options).train()
    images = random_images(model)
    u = torch.tensor([0.3, 1.0])  # the last group reaches every position
    output = model(images, timesteps=u, generator=seeded(), output_repa=model.config.repa_layer is not None)
    assert isinstance(output, DARTokenizerOutput)
    for picture in (output.velocity, output.target, output.pred_original_sample):
        assert picture.shape == images.shape and picture.dtype == torch.float32
    assert output.codes.shape == output.token_mask.shape == (2, 16)
    assert output.latents.shape == output.quantized.shape == (2, 16, 8)
    if model.config.repa_layer is None:
        assert output.repa_features is None
    else:
        assert output.repa_features.shape == (2, 16, 24)
    loss = F.mse_loss(output.velocity, output.target) + F.mse_loss(output.quantized, output.latents.detach())
    if output.repa_features is not None:
        loss = loss + output.repa_features.square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scope", ["group", "prefix"])
def test_forward_holds_what_the_losses_need(make_tokenizer, scope):
    tiny_tokenizer = make_tokenizer(condition_scope=scope)
    images, noise = random_images(tiny_tokenizer, 3), torch.randn(3, 3, 8, 8, generator=seeded())
    u = torch.tensor([0.05, 0.4, 0.9])
    output = tiny_tokenizer(images, timesteps=u, noise=noise)
    t = shifted(u)
    assert torch.allclose(output.timesteps, t)
    assert torch.allclose(output.target, 0.6 * images - noise)
    noisy = t[:, None, None, None] * 0.6 * images + (1 - t[:, None, None, None]) * noise
    encoded = tiny_tokenizer.encode(images)
    assert torch.equal(output.codes, encoded.codes)
    assert torch.allclose(output.latents, encoded.latents, atol=1e-5)
    conditions = tiny_tokenizer.condition(encoded.codes)
    starts = [0, 8, 12]  # floor(4u + .5) = 0, 2, 4; the last is clamped
    for i, start in enumerate(starts):
        first = start if scope == "group" else 0
        alone = tiny_tokenizer.velocity(noisy[i : i + 1], t[i], conditions[i : i + 1, first : start + 4])
        assert torch.allclose(output.velocity[i : i + 1], alone, atol=1e-4)
    jump = (noisy + (1 - t[:, None, None, None]) * output.velocity) / 0.6
    assert torch.allclose(output.pred_original_sample, jump, atol=1e-5)
    assert output.token_mask.tolist() == [[1.0] * (start + 4) + [0.0] * (12 - start) for start in starts]
    codebook = F.normalize(tiny_tokenizer.quantizer.codebook.weight, dim=-1)
    assert torch.allclose(output.quantized, codebook[output.codes], atol=1e-6)
    assert torch.allclose(output.latents.norm(dim=-1), torch.ones(3, 16), atol=1e-5)


@pytest.mark.parametrize("scope", ["group", "prefix"])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_several_times_of_an_image_give_what_it_gives_once_for_each(make_tokenizer, is_hidden, scope):
    tiny_tokenizer = make_tokenizer(condition_scope=scope)
    images, noise = random_images(tiny_tokenizer, 2), torch.randn(6, 3, 8, 8, generator=seeded())
    times = torch.tensor([[0.05, 0.4, 0.9], [0.9, 0.95, 0.1]])
    hide = torch.tensor([True, True, False, False, True, True]) if is_hidden else None
    together = tiny_tokenizer(images, timesteps=times, noise=noise, hide_group=hide)
    repeated = images.repeat_interleave(3, dim=0)
    apart = tiny_tokenizer(repeated, timesteps=times.flatten(), noise=noise, hide_group=hide)
    for name in ("velocity", "target", "pred_original_sample", "timesteps"):
        assert torch.allclose(together[name], apart[name], atol=1e-5), name
    assert torch.equal(together.codes, apart.codes[::3])
    assert torch.equal(together.token_mask, apart.token_mask.unflatten(0, (2, 3)).sum(dim=1))

    def gradients(output):
        tiny_tokenizer.zero_grad()
        (output.velocity - output.target).square().mean().backward()
        return {name: p.grad.clone() for name, p in tiny_tokenizer.named_parameters() if p.grad is not None}

    of_repeated = gradients(apart)
    for name, gradient in gradients(together).items():
        assert torch.allclose(gradient, of_repeated[name], atol=1e-5), name


def test_times_and_noise_of_other_shapes_are_refused(tiny_tokenizer):
    images = random_images(tiny_tokenizer, 2)
    for times in (torch.rand(3), torch.rand(3, 2), torch.rand(2, 0), torch.rand(2, 2, 2), torch.rand(())):
        with pytest.raises(ValueError, match="timesteps"):
            tiny_tokenizer(images, timesteps=times)
    with pytest.raises(ValueError, match="noise"):
        tiny_tokenizer(images, timesteps=torch.rand(2, 2), noise=torch.randn_like(images))


def test_a_hidden_group_is_seen_by_nobody(tiny_tokenizer):
    images, noise = random_images(tiny_tokenizer, 3), torch.randn(3, 3, 8, 8, generator=seeded())
    given = dict(timesteps=torch.tensor([0.05, 0.4, 0.4]), noise=noise)  # groups 0, 2, 2

    def forward(hidden, changed=None):
        nearest = tiny_tokenizer.quantizer.nearest
        if changed is not None:  # other codes at some positions
            codes = nearest(tiny_tokenizer.encode(images).latents)
            codes[:, changed] = (codes[:, changed] + 1) % tiny_tokenizer.config.codebook_size
            tiny_tokenizer.quantizer.nearest = lambda latents: codes
        try:
            return tiny_tokenizer(images, **given, hide_group=hidden).velocity.detach()
        finally:
            tiny_tokenizer.quantizer.nearest = nearest

    plain, hidden = tiny_tokenizer(images, **given).velocity, forward(torch.tensor([True, True, False]))
    assert torch.allclose(hidden[[0, 2]], plain[[0, 2]], atol=1e-5)  # the first group stays
    assert not torch.allclose(hidden[1], plain[1], atol=1e-3)
    everywhere = torch.ones(3, dtype=torch.bool)
    own, before = slice(8, 12), slice(0, 8)
    assert torch.equal(forward(everywhere, own)[1:], forward(everywhere)[1:])
    assert not torch.allclose(forward(everywhere, before)[1:], forward(everywhere)[1:], atol=1e-3)
    assert not torch.allclose(forward(~everywhere, own)[1:], plain[1:], atol=1e-3)
    for wrong in (torch.ones(2, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(ValueError, match="hide_group must be bool of shape"):
            tiny_tokenizer(images, **given, hide_group=wrong)


def test_forward_as_a_tuple(tiny_tokenizer):
    images, generator = random_images(tiny_tokenizer), seeded()
    output = tiny_tokenizer(images, generator=seeded())
    values = tiny_tokenizer(images, generator=generator, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(output) == 8  # no REPA features
    assert all(torch.equal(one, two) for one, two in zip(values, output.values(), strict=True))


def test_attention_processors_can_be_read_and_set(tiny_tokenizer):
    processors = tiny_tokenizer.attn_processors
    assert len(processors) == 2 + 2 + 2 * 2  # encoder, causal blocks, two in each block of the denoiser
    new = {name: DARAttnProcessor() for name in processors}
    tiny_tokenizer.set_attn_processor(dict(new))
    assert tiny_tokenizer.attn_processors == new
    with pytest.raises(ValueError, match="number of processors"):
        tiny_tokenizer.set_attn_processor({"encoder_blocks.0.attn.processor": DARAttnProcessor()})
    before = tiny_tokenizer.decode(random_codes(), generator=seeded()).sample
    tiny_tokenizer.fuse_qkv_projections()  # nothing to fuse, and nothing changes
    assert torch.equal(tiny_tokenizer.decode(random_codes(), generator=seeded()).sample, before)


def test_latents_of_a_preview_can_be_replaced(tiny_tokenizer):
    codes, new = random_codes(), torch.randn(2, 3, 8, 8, generator=seeded(5))
    euler = FlowMatchAdamsBashforthScheduler(solver_order=1)  # knows no earlier velocity, as one that starts later
    previews = []
    for preview in tiny_tokenizer.decode_stream([codes], generator=seeded(), scheduler=euler):
        previews.append(preview.sample)
        if preview.step == 2:
            preview.latents = new
    later = tiny_tokenizer.decode_stream([codes], noise=new, start_step=2, scheduler=euler)
    assert all(torch.equal(one, two.sample) for one, two in zip(previews[2:], later, strict=True))


def test_forward_is_deterministic_given_its_draws(tiny_tokenizer):
    images = random_images(tiny_tokenizer)
    one, two, other = (tiny_tokenizer(images, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.velocity, two.velocity) and torch.equal(one.timesteps, two.timesteps)
    assert not torch.equal(one.timesteps, other.timesteps)
    u, noise = torch.tensor([0.2, 0.7]), torch.zeros(2, 3, 8, 8)
    given = [tiny_tokenizer(images, timesteps=u, noise=noise).velocity for _ in range(2)]
    assert torch.equal(*given)
    drawn = [tiny_tokenizer(images).target for _ in range(2)]
    assert not torch.equal(*drawn)


def test_gradient_passes_straight_through_the_quantizer(tiny_tokenizer):
    images, u = random_images(tiny_tokenizer), torch.tensor([0.4, 0.9])
    tiny_tokenizer(images, timesteps=u, generator=seeded()).velocity.square().sum().backward()
    straight = tiny_tokenizer.quant_proj.weight.grad.clone()
    assert straight.abs().max() > 0
    assert tiny_tokenizer.quantizer.codebook.weight.grad is None  # the codebook learns from its own loss


def test_codes_are_passed_on_only_when_quantizing(tiny_tokenizer):
    images, u = random_images(tiny_tokenizer), torch.tensor([0.4, 0.9])

    def velocity(quantize):
        return tiny_tokenizer(images, timesteps=u, generator=seeded(), quantize=quantize).velocity

    before = {quantize: velocity(quantize) for quantize in (True, False)}
    assert (before[True] - before[False]).abs().max() > 1e-3
    with torch.no_grad():
        tiny_tokenizer.quantizer.codebook.weight.normal_(generator=seeded())
    assert torch.equal(velocity(False), before[False])
    assert (velocity(True) - before[True]).abs().max() > 1e-3


def test_quantizer_looks_at_directions_only(tiny_tokenizer):
    codes, images = random_codes(), random_images(tiny_tokenizer)
    before = tiny_tokenizer.encode(images).codes, tiny_tokenizer.condition(codes)
    with torch.no_grad():
        tiny_tokenizer.quantizer.codebook.weight *= torch.linspace(0.5, 40, 32)[:, None]
    assert torch.equal(tiny_tokenizer.encode(images).codes, before[0])
    assert torch.allclose(tiny_tokenizer.condition(codes), before[1], atol=1e-5)


def test_features_for_repa_come_from_the_input_of_its_block(make_tokenizer):
    # 32 rows of patches are pooled to 16
    model = make_tokenizer(sample_size=32, encoder_patch_size=8, diffusion_patch_size=1, repa_layer=1, repa_dim=24)
    images, seen = random_images(model), []
    model.denoiser.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    output = model(images, generator=seeded(), output_repa=True)
    cells = seen[0].reshape(2, 16, 2, 16, 2, 64).mean(dim=(2, 4)).reshape(2, 256, 64)
    layers = model.denoiser.repa_head
    expected = cells
    for i in (0, 2):
        expected = F.silu(F.linear(expected, layers[i].weight, layers[i].bias))
    expected = F.linear(expected, layers[4].weight, layers[4].bias)
    assert output.repa_features.shape == (2, 256, 24)
    assert torch.allclose(output.repa_features, expected, atol=1e-5)
    assert model(images, generator=seeded()).repa_features is None


def test_autocast_leaves_quantizer_and_losses_in_float32(tiny_tokenizer):
    images, u = random_images(tiny_tokenizer, 100), torch.linspace(0, 1, 100)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_tokenizer(images, timesteps=u, generator=seeded())
        encoded = tiny_tokenizer.encode(images)
    full = tiny_tokenizer(images, timesteps=u, generator=seeded())
    floats = ("velocity", "target", "pred_original_sample", "latents", "quantized", "timesteps")
    assert all(output[name].dtype == torch.float32 for name in floats)
    assert torch.equal(output.timesteps, full.timesteps) and torch.equal(output.target, full.target)
    codebook = F.normalize(tiny_tokenizer.quantizer.codebook.weight, dim=-1)
    for each in (output, encoded):
        assert torch.allclose(each.latents.norm(dim=-1), torch.ones(100, 16), atol=1e-5)
        assert torch.equal(each.codes, (each.latents @ codebook.T).argmax(-1))
    assert 0 < (output.velocity - full.velocity).abs().mean() < 0.1


def test_decoding_leaves_no_gradient_graph(tiny_tokenizer):
    encoded = tiny_tokenizer.encode(random_images(tiny_tokenizer))
    assert not encoded.latents.requires_grad
    for preview in tiny_tokenizer.decode_stream([encoded.codes]):
        assert not preview.sample.requires_grad and not preview.latents.requires_grad
        assert torch.is_grad_enabled()  # between the steps the caller's mode holds


@pytest.mark.parametrize("scope", ["group", "prefix"])
def test_gradient_checkpointing_changes_nothing(make_tokenizer, scope):
    gradients = []
    for checkpointing in (False, True):
        model = make_tokenizer(condition_scope=scope).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = []
        model.causal_blocks[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = model(random_images(model), timesteps=torch.tensor([0.2, 0.9]), generator=seeded())
        F.mse_loss(output.velocity, output.target).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([model.patch_embed.weight.grad, model.denoiser.proj_in.weight.grad])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
