import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizer_helpers import (
    OPTIONS,
    Reference,
    every_option,
    input_of,
    patchify,
    random_codes,
    random_images,
    rotate,
    rotation,
    seeded,
    seen_at,
    shifted,
    window_of,
)
from torch import nn

from dar_hf import (
    DARPreview,
    DARTokenizer,
    DARTokenizerEncoderOutput,
    FlowMatchAdamsBashforthScheduler,
    acceleration_dar,
)
from dar_hf.layers_dar import CausalCache, apply_rotary, rotary_table

# The contract


def test_config_names():
    names = """sample_size in_channels encoder_patch_size encoder_dim num_encoder_layers decoder_dim num_decoder_layers
        codebook_size codebook_dim num_tokens num_groups tokens_per_group num_inference_steps diffusion_dim
        diffusion_patch_size diffusion_depth condition_dim attention_head_dim rope_theta low_rank_queries
        share_time_embedding adaptive_head data_std time_shift repa_layer repa_dim"""
    assert set(names.split()) <= set(inspect.signature(DARTokenizer).parameters)


def test_defaults_follow_the_other_options(make_tokenizer):
    config = make_tokenizer().config
    assert (config.tokens_per_group, config.num_inference_steps, config.condition_dim) == (4, 4, 64)
    config = make_tokenizer(tokens_per_group=2, num_inference_steps=7, condition_dim=64).config
    assert (config.tokens_per_group, config.num_inference_steps, config.condition_dim) == (2, 7, 64)
    assert make_tokenizer(rope_theta=100.0).config.diffusion_rope_theta == 100.0


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("encode", {"pixel_values"}),
        ("condition", {"codes"}),
        ("velocity", {"sample", "timestep", "condition"}),
        ("decode", {"codes", "generator", "noise", "num_inference_steps", "height", "width", "scheduler"}),
        ("decode_stream", {"groups", "generator", "noise", "num_inference_steps", "height", "width", "scheduler"}),
        ("forward", {"pixel_values", "timesteps", "noise", "generator"}),
    ],
)
def test_signatures(method, parameters):
    assert parameters <= set(inspect.signature(getattr(DARTokenizer, method)).parameters)


# Start values


def test_blocks_of_a_fresh_model_are_the_identity(make_tokenizer):
    model = make_tokenizer()
    model.reset_parameters()
    for block in (*model.encoder_blocks, *model.causal_blocks):
        x = torch.randn(2, 5, 64, generator=seeded())
        assert not block.gate1.any() and not block.gate2.any()
        assert torch.equal(block(x, {}), x)


@pytest.mark.parametrize("options", [{}, OPTIONS["adaptive head"]])
def test_output_of_a_fresh_model_is_zero(make_tokenizer, options):
    model = make_tokenizer(**options)
    model.reset_parameters()
    noise = torch.randn(2, 3, 8, 8, generator=seeded())
    assert not model.velocity(noise, 0.3, model.condition(random_codes(length=4))).any()
    assert torch.allclose(model.decode(random_codes(), noise=noise).sample, noise / 0.6)


def test_codes_start_as_unit_vectors_and_queries_small(make_tokenizer):
    """Of a short row the gradient through its normalization is large, and clipped with it would be all the others."""
    model = make_tokenizer(low_rank_queries=False)
    assert torch.allclose(model.quantizer.codebook.weight.norm(dim=-1), torch.ones(32))
    assert 0.015 < model.query_embed.weight.std() < 0.025


def test_reset_parameters_sets_the_start_values_it_names(make_tokenizer):
    model = make_tokenizer()
    before = model.encoder_blocks[0].attn.to_q.bias.clone()
    model.reset_parameters(gate=0.25, modulation_std=0.03, output_std=0.04, post_quant_std=0.35)
    assert torch.equal(model.encoder_blocks[0].attn.to_q.bias, before)
    assert torch.all(model.encoder_blocks[0].gate1 == 0.25) and torch.all(model.causal_blocks[1].gate2 == 0.25)
    assert model.denoiser.blocks[0].modulation.weight.std().item() == pytest.approx(0.03, rel=0.1)
    assert model.denoiser.proj_out.weight.std().item() == pytest.approx(0.04, rel=0.1)
    assert model.post_quant_proj.weight.std().item() == pytest.approx(0.35, rel=0.15)
    assert model.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.reset_parameters(rotary_bias_std=0.5, token_embed_std=0.2)
    assert model.token_embed.weight.std().item() == pytest.approx(0.2, rel=0.1)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 1 and name.endswith(".bias")}
    wide = {name for name, std in stds.items() if std == pytest.approx(0.5, rel=0.3)}
    rotated = [f"encoder_blocks.{i}.attn.to_{part}.bias" for i in range(2) for part in "qk"]
    rotated += [f"denoiser.blocks.{i}.{part}.bias" for i in range(2) for part in ("cross_attn.to_q", "attn.to_q")]
    rotated += [f"denoiser.blocks.{i}.attn.to_k.bias" for i in range(2)]
    assert wide == set(rotated)


# Against the method, written down again


@pytest.mark.parametrize(
    "height, width, head_dim, theta", [(3, 5, 32, 10000.0), (4, 4, 64, 10000.0), (2, 7, 8, 100.0)]
)
def test_rotary_embedding_is_a_complex_rotation(height, width, head_dim, theta):
    table = rotary_table(height, width, head_dim, theta)
    factors = rotation(height, width, head_dim, theta)
    assert table.shape == (height * width, 1, head_dim // 2) and table.dtype == torch.complex64
    assert torch.allclose(table[:, 0].to(torch.complex128), factors, atol=1e-6)
    x = torch.randn(2, height * width, 3, head_dim, generator=seeded())
    assert torch.allclose(apply_rotary(x, table).double(), rotate(x, factors), atol=1e-5)
    assert torch.equal(apply_rotary(x[:, :1], table[:1]), x[:, :1])  # the corner stays
    assert apply_rotary(x.bfloat16(), table).dtype == torch.bfloat16


@every_option
def test_encoder_is_the_method(make_tokenizer, options):
    model = make_tokenizer(**options)
    images = random_images(model, batch=3)
    output = model.encode(images)
    expected = Reference(model).latents(images)
    assert isinstance(output, DARTokenizerEncoderOutput)
    assert output.codes.shape == (3, 16) and output.codes.dtype == torch.long
    assert output.latents.dtype == torch.float32
    assert torch.allclose(output.latents.double(), expected, atol=1e-5)
    distances = torch.cdist(output.latents.double(), Reference(model).codebook().expand(3, -1, -1))
    assert torch.equal(output.codes, distances.argmin(-1))
    assert len(output.codes.unique(dim=0)) > 1


@every_option
def test_conditions_are_the_method(make_tokenizer, options):
    model = make_tokenizer(**options)
    for length in (1, 5, 16):
        codes = random_codes(length=length)
        condition = model.condition(codes)
        assert condition.shape == (2, length, model.config.decoder_dim)
        assert torch.allclose(condition.double(), Reference(model).condition(codes), atol=1e-5)


@every_option
def test_velocity_is_the_method(make_tokenizer, options):
    model = make_tokenizer(**options)
    sample = random_images(model)
    times, width = torch.tensor([0.2, 0.9]), model.config.tokens_per_group
    condition = model.condition(random_codes(length=width))
    velocity = model.velocity(sample, times, condition)
    assert velocity.shape == sample.shape and velocity.dtype == sample.dtype
    assert torch.allclose(velocity.double(), Reference(model).velocity(sample, times, condition.double()), atol=1e-5)
    assert (velocity - model.velocity(sample, times, condition.flip(0))).abs().max() > 1e-2
    assert (velocity - model.velocity(sample, 0.9, condition)).abs()[1].max() < 1e-5  # a scalar is a time for all
    assert (velocity - model.velocity(sample, 0.9, condition)).abs()[0].max() > 1e-2


@every_option
def test_decoding_is_the_method(make_tokenizer, options):
    model = make_tokenizer(**options)
    config, reference = model.config, Reference(model)
    codes, noise = random_codes(), random_images(model, seed=5) * 2
    conditions, sample, previous = reference.condition(codes), noise.double(), None
    for step in range(4):
        start, stop = seen_at(step / 4, config)
        time, next_time = shifted(step / 4, config.time_shift), shifted((step + 1) / 4, config.time_shift)
        velocity = reference.velocity(sample, [time] * 2, conditions[:, start:stop])
        direction = velocity if previous is None else 1.5 * velocity - 0.5 * previous
        sample, previous = sample + (next_time - time) * direction, velocity
    decoded = model.decode(codes, noise=noise).sample
    assert decoded.dtype == torch.float32 and decoded.shape == noise.shape
    assert torch.allclose(decoded.double(), sample / config.data_std, atol=1e-4)


def test_time_features_are_cosines_first_of_a_thousand_times_t(tiny_tokenizer):
    times = torch.tensor([0.0, 0.137])
    condition = tiny_tokenizer.condition(random_codes(length=4))
    features = input_of(
        tiny_tokenizer.denoiser.blocks[1].time_embed.mlp,
        lambda: tiny_tokenizer.velocity(random_images(tiny_tokenizer), times, condition),
    )
    expected = [[f(1000 * 0.137 * 10000 ** (-i / 32)) for i in range(32)] for f in (math.cos, math.sin)]
    assert torch.equal(features[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    assert torch.allclose(features[1], torch.tensor(expected).flatten(), atol=1e-4)


def test_pixels_of_a_patch_are_in_channel_row_column_order(tiny_tokenizer):
    sample = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8) / 384
    condition = tiny_tokenizer.condition(random_codes(length=4))
    seen = input_of(tiny_tokenizer.denoiser.proj_in, lambda: tiny_tokenizer.velocity(sample, 0.5, condition))
    assert torch.equal(seen, patchify(sample, 2))
    assert torch.equal(seen, F.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2))
    tiny_tokenizer.denoiser.proj_out.register_forward_hook(lambda *_: patchify(sample, 2))
    assert torch.equal(tiny_tokenizer.velocity(torch.zeros(2, 3, 8, 8), 0.5, condition), sample)


def test_queries_see_patches_and_earlier_queries_only(tiny_tokenizer):
    images = random_images(tiny_tokenizer)
    block = tiny_tokenizer.encoder_blocks[0]  # of the last one only the queries are computed

    def run():
        outputs = []
        handle = block.register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
        latents = tiny_tokenizer.encode(images).latents
        handle.remove()
        return latents, outputs[0][:, :16]

    latents, patches = run()
    changed = 6
    with torch.no_grad():
        tiny_tokenizer.query_embed.weight[changed] += 3.0
    new_latents, new_patches = run()
    assert torch.allclose(new_patches, patches, atol=1e-6)  # patches do not see the queries
    difference = (new_latents - latents).abs().amax(dim=(0, 2))
    assert difference[:changed].max() < 1e-6
    assert difference[changed:].min() > 1e-6
    # and every query sees every patch
    images[:, :, :2, :2] *= -1
    assert (run()[0] - new_latents).abs().amax(dim=(0, 2)).min() > 1e-6


# Groups and steps


def test_group_of_a_time(make_tokenizer):
    for options in (
        {"num_tokens": 256, "num_groups": 8},
        {"num_tokens": 256, "num_groups": 8, "tokens_per_group": 64},
    ):
        model = make_tokenizer(max_num_tokens=256, **options)
        times = torch.cat([torch.linspace(0, 1, 1001), torch.arange(16) / 16])
        expected = [window_of(u, model.config)[0] for u in times.tolist()]
        assert model.group_start(times).tolist() == expected
    model = make_tokenizer(max_num_tokens=256, num_tokens=256, num_groups=8)
    edges = torch.tensor([0.0, 0.0624, 0.0625, 0.1874, 0.1875, 0.8124, 0.8125, 0.9374, 0.9375, 1.0])
    assert model.group_start(edges).tolist() == [0, 0, 32, 32, 64, 192, 224, 224, 224, 224]


def test_token_windows_of_the_steps(make_tokenizer):
    model = make_tokenizer(max_num_tokens=256, num_tokens=256, num_groups=8)

    def groups(steps):
        assert all(stop - start == 32 for start, stop in model.step_windows(steps))
        return [start // 32 for start, _ in model.step_windows(steps)]

    assert groups(8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert groups(4) == [0, 2, 4, 6]
    assert groups(16) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7]


# Conditions are causal


@pytest.mark.parametrize("pieces", [[1] * 16, [16], [3, 5, 8], [15, 1]])
def test_conditions_of_a_prefix_never_change(tiny_tokenizer, pieces):
    codes = random_codes()
    whole, cache, parts = tiny_tokenizer.condition(codes), CausalCache(2), []
    for piece in codes.split(pieces, dim=1):
        parts.append(tiny_tokenizer.condition(piece, cache))
        length = sum(part.shape[1] for part in parts)
        assert cache.length == length
        assert torch.allclose(tiny_tokenizer.condition(codes[:, :length]), whole[:, :length], atol=1e-5)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    other = codes.clone()
    other[:, 7] = (other[:, 7] + 1) % 32
    difference = (tiny_tokenizer.condition(other) - whole).abs().amax(dim=(0, 2))
    assert difference[:7].max() < 1e-6 and difference[7:].min() > 1e-6


# The stream is the whole


PREFIX = {"condition_scope": "prefix"}


@pytest.mark.parametrize("options", [{}, {"tokens_per_group": 6}, {"tokens_per_group": 2}, PREFIX])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("pieces", [[4] * 4, [1] * 16, [3, 5, 8], [16], [15, 1]])
def test_streamed_and_whole_decoding_are_equal(make_tokenizer, options, num_steps, pieces):
    model, codes, noise = make_tokenizer(**options), random_codes(), torch.randn(2, 3, 8, 8, generator=seeded())
    previews = list(model.decode_stream(codes.split(pieces, dim=1), noise=noise, num_inference_steps=num_steps))
    assert torch.equal(previews[-1].sample, model.decode(codes, noise=noise, num_inference_steps=num_steps).sample)
    windows = model.step_windows(num_steps)
    times = FlowMatchAdamsBashforthScheduler()
    times.set_timesteps(num_steps)
    for i, preview in enumerate(previews):
        assert isinstance(preview, DARPreview)
        assert (preview.step, preview.num_steps, preview.num_tokens) == (i + 1, num_steps, windows[i][1])
        assert preview.timestep == pytest.approx(times.timesteps[i].item(), abs=1e-6)
        if i + 1 == num_steps or windows[i + 1][1] > preview.num_tokens:  # the last step of this prefix
            prefix = codes[:, : preview.num_tokens]
            alone = model.decode(prefix, noise=noise, num_inference_steps=num_steps).sample
            assert torch.equal(preview.sample, alone)
    assert len(previews) == num_steps
    assert torch.equal(previews[-1].latents / 0.6, previews[-1].sample)


@pytest.mark.parametrize("options", [{}, PREFIX])
def test_preview_after_k_groups_is_the_decoded_prefix(make_tokenizer, options):
    tiny_tokenizer = make_tokenizer(**options)
    codes = random_codes()
    previews = list(tiny_tokenizer.decode_stream([codes], generator=seeded()))
    for k in (1, 2, 3, 4):
        assert previews[k - 1].num_tokens == 4 * k
        assert torch.equal(previews[k - 1].sample, tiny_tokenizer.decode(codes[:, : 4 * k], generator=seeded()).sample)
        # an unfinished group waits
        if k < 4:
            unfinished = tiny_tokenizer.decode(codes[:, : 4 * k + 3], generator=seeded()).sample
            assert torch.equal(previews[k - 1].sample, unfinished)
    assert (previews[2].sample - previews[3].sample).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, PREFIX])
def test_every_group_matters_and_only_later_previews_change(make_tokenizer, options):
    tiny_tokenizer = make_tokenizer(**options)
    codes = random_codes()
    before = [p.sample for p in tiny_tokenizer.decode_stream([codes], generator=seeded())]
    codes[:, 9] = (codes[:, 9] + 1) % 32
    after = [p.sample for p in tiny_tokenizer.decode_stream([codes], generator=seeded())]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert (before[2] - after[2]).abs().max() > 1e-3 and (before[3] - after[3]).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["group", "prefix"])
def test_scope_decides_whether_a_step_sees_the_conditions_of_earlier_groups(make_tokenizer, scope):
    model = make_tokenizer(condition_scope=scope)
    for block in model.causal_blocks:  # as the identity, so that conditions carry nothing of earlier codes
        nn.init.zeros_(block.gate1)
        nn.init.zeros_(block.gate2)
    codes, noise = random_codes(), torch.randn(2, 3, 8, 8, generator=seeded())
    other = codes.clone()
    other[:, 1] = (other[:, 1] + 1) % 32  # of the first group

    def last_step(codes):
        (preview,) = model.decode_stream([codes], noise=noise, start_step=3)
        return preview.sample

    assert torch.equal(last_step(codes), last_step(other)) == (scope == "group")
    times = torch.full((2,), 0.9)
    images = random_images(model)
    output = model(images, timesteps=times, noise=noise)
    conditions = model.condition(output.codes)
    if scope == "group":
        conditions = conditions[:, 12:]
    noisy = output.timesteps[:, None, None, None] * 0.6 * images + (1 - output.timesteps[:, None, None, None]) * noise
    assert torch.allclose(output.velocity, model.velocity(noisy, output.timesteps, conditions), atol=1e-4)


def test_stream_is_lazy(tiny_tokenizer):
    pulled = []

    def groups():
        for group in random_codes().split(4, dim=1):
            pulled.append(group)
            yield group

    for k, _ in enumerate(tiny_tokenizer.decode_stream(groups()), start=1):
        assert len(pulled) == k
    pulled.clear()
    # two steps use groups 0 and 2: the codes after them are not waited for
    assert len(list(tiny_tokenizer.decode_stream(groups(), num_inference_steps=2))) == 2
    assert len(pulled) == 3


def test_stream_starts_where_asked(tiny_tokenizer):
    codes, noise = random_codes(), torch.randn(2, 3, 8, 8, generator=seeded())
    conditions, sample, previous = tiny_tokenizer.condition(codes), noise, None
    for step in (2, 3):
        time, end = shifted(step / 4), shifted((step + 1) / 4)
        velocity = tiny_tokenizer.velocity(sample, time, conditions[:, 4 * step : 4 * step + 4])
        sample = sample + (end - time) * (velocity if previous is None else 1.5 * velocity - 0.5 * previous)
        previous = velocity
    previews = list(tiny_tokenizer.decode_stream([codes], noise=noise, start_step=2))
    assert [p.step for p in previews] == [3, 4]
    assert torch.allclose(previews[-1].sample, sample / 0.6, atol=1e-4)


def test_scheduler_of_the_caller_is_used_and_left_alone(tiny_tokenizer):
    euler = FlowMatchAdamsBashforthScheduler(solver_order=1)
    codes = random_codes()
    one = tiny_tokenizer.decode(codes, generator=seeded()).sample
    two = tiny_tokenizer.decode(codes, generator=seeded(), scheduler=euler).sample
    same = tiny_tokenizer.decode(codes, generator=seeded(), scheduler=FlowMatchAdamsBashforthScheduler(2.0)).sample
    assert (one - two).abs().max() > 1e-2
    assert torch.equal(one, same)
    assert euler.num_inference_steps is None and len(euler.timesteps) == 0


def test_alone_the_tokenizer_uses_its_own_time_shift(make_tokenizer):
    model, codes = make_tokenizer(time_shift=1.0), random_codes()
    times = [p.timestep for p in model.decode_stream([codes])]
    assert times == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert [p.timestep for p in make_tokenizer().decode_stream([codes])] == pytest.approx([0, 1 / 7, 1 / 3, 0.6])


def test_num_inference_steps_of_the_configuration(make_tokenizer):
    codes = random_codes()
    model = make_tokenizer(num_inference_steps=6)
    assert len(list(model.decode_stream([codes]))) == 6
    six = make_tokenizer().decode(codes, generator=seeded(), num_inference_steps=6).sample
    assert torch.equal(model.decode(codes, generator=seeded()).sample, six)


# Randomness


def test_same_generator_gives_the_same_image(tiny_tokenizer):
    codes = random_codes()
    state = torch.get_rng_state()
    one, two, other = (tiny_tokenizer.decode(codes, generator=seeded(s)).sample for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other)
    noise = torch.randn(2, 3, 8, 8, generator=seeded(3))
    assert torch.equal(one, tiny_tokenizer.decode(codes, noise=noise).sample)
    tiny_tokenizer(random_images(tiny_tokenizer), generator=seeded())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{}, PREFIX])
@pytest.mark.parametrize("batch", [3, 4, 16, 32])  # also as many as codes in a group, codes, and codes and patches
def test_size_of_the_batch_changes_nothing(make_tokenizer, batch, options):
    tiny_tokenizer = make_tokenizer(**options)
    codes, images = random_codes(batch), random_images(tiny_tokenizer, batch)
    noise = torch.randn(images.shape, generator=seeded())

    def alone(call):
        return torch.cat([call(slice(i, i + 1)) for i in range(batch)])

    latents = alone(lambda i: tiny_tokenizer.encode(images[i]).latents)
    assert torch.allclose(tiny_tokenizer.encode(images).latents, latents, atol=1e-5)
    conditions = alone(lambda i: tiny_tokenizer.condition(codes[i]))
    with torch.no_grad():
        assert torch.allclose(tiny_tokenizer.condition(codes), conditions, atol=1e-5)
    assert torch.allclose(tiny_tokenizer.condition(codes), conditions, atol=1e-5)
    decoded = alone(lambda i: tiny_tokenizer.decode(codes[i], noise=noise[i]).sample)
    assert torch.allclose(tiny_tokenizer.decode(codes, noise=noise).sample, decoded, atol=1e-5)
    u = torch.linspace(0, 1, batch)
    velocity = alone(lambda i: tiny_tokenizer(images[i], timesteps=u[i], noise=noise[i]).velocity)
    output = tiny_tokenizer(images, timesteps=u, noise=noise)
    assert torch.allclose(output.latents, latents, atol=1e-5)
    assert torch.allclose(output.velocity, velocity, atol=1e-4)


@pytest.mark.parametrize("options", [{}, PREFIX])
def test_image_of_a_batch_equals_the_image_alone(make_tokenizer, options):
    tiny_tokenizer = make_tokenizer(**options)
    codes = random_codes(batch=3)
    batch = tiny_tokenizer.decode(codes, generator=[seeded(s) for s in range(3)]).sample
    for i in range(3):
        alone = tiny_tokenizer.decode(codes[i : i + 1], generator=seeded(i)).sample
        assert torch.allclose(batch[i : i + 1], alone, atol=1e-5)
    images = random_images(tiny_tokenizer, batch=3)
    together = tiny_tokenizer.encode(images).codes
    assert torch.equal(together, torch.cat([tiny_tokenizer.encode(image[None]).codes for image in images]))


# Sizes, dtypes, files


def test_other_sizes_where_allowed(make_tokenizer):
    model = make_tokenizer(strict_sample_size=False)
    images = torch.rand(2, 3, 12, 4, generator=seeded()) * 2 - 1
    output = model.encode(images)
    assert output.codes.shape == (2, 16)
    assert torch.allclose(output.latents.double(), Reference(model).latents(images), atol=1e-4)
    decoded = model.decode(output.codes, height=12, width=4, generator=seeded()).sample
    assert decoded.shape == (2, 3, 12, 4)
    noise = torch.randn(2, 3, 12, 4, generator=seeded())
    assert torch.equal(decoded, model.decode(output.codes, noise=noise).sample)
    assert model(images, generator=seeded()).velocity.shape == images.shape


def test_height_and_width_are_not_mixed_up(make_tokenizer):
    model = make_tokenizer(sample_size=(8, 12))
    assert model.decode(random_codes(), generator=seeded()).sample.shape == (2, 3, 8, 12)
    with pytest.raises(ValueError, match="image size 12x8"):
        model.encode(torch.zeros(1, 3, 12, 8))


def test_bfloat16(make_tokenizer):
    model = make_tokenizer().to(torch.bfloat16)
    full, codes, images = make_tokenizer(), random_codes(), random_images(make_tokenizer())
    output = model.encode(images)
    assert output.latents.dtype == torch.float32
    assert torch.allclose(output.latents.norm(dim=-1), torch.ones(2, 16), atol=1e-5)
    previews = list(model.decode_stream(codes.split([3, 13], dim=1), generator=seeded()))
    assert previews[-1].sample.dtype == previews[-1].latents.dtype == torch.float32
    assert torch.equal(previews[-1].sample, model.decode(codes, generator=seeded()).sample)
    error = (previews[-1].sample - full.decode(codes, generator=seeded()).sample).abs()
    assert 0 < error.mean() < 0.1


def test_decoding_in_another_dtype_follows_the_weights(tiny_tokenizer):
    codes = torch.randint(0, 32, (2, 16), generator=seeded())

    def decode():
        return tiny_tokenizer.decode(codes, generator=seeded()).sample

    full, weight = decode(), tiny_tokenizer.denoiser.blocks[0].mlp[0].weight
    tiny_tokenizer.decode_dtype = torch.bfloat16
    half = decode()
    assert 0 < (half - full).norm() / full.norm() < 0.03 and torch.equal(decode(), half)
    with torch.no_grad():
        weight.mul_(3)
    changed = decode()
    assert not torch.equal(changed, half)
    weight.data.div_(3)  # as averaged weights are put in place and taken out: torch counts no change
    assert torch.equal(decode(), half)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_models_decode_in_what_the_processor_is_fast_in(make_tokenizer, monkeypatch, dtype, fast):
    monkeypatch.setattr(acceleration_dar, "has_fast_bf16", lambda device: fast)
    model, codes = make_tokenizer().to(dtype), random_codes()
    assert model._denoiser_for_decoding().proj_in.weight.dtype == dtype  # narrow
    own = model.decode(codes, generator=seeded()).sample
    monkeypatch.setattr(acceleration_dar, "HALF_FROM", model.config.diffusion_dim)
    with torch.no_grad():
        used = model._denoiser_for_decoding().proj_in.weight.dtype
    assert used == {torch.float32: torch.bfloat16}.get(dtype, dtype) if fast else used == torch.float32
    difference = (model.decode(codes, generator=seeded()).sample - own).norm() / own.norm()
    assert (0 < difference < 0.03) if used != dtype else difference == 0
    model.decode_dtype = dtype
    assert torch.equal(model.decode(codes, generator=seeded()).sample, own)


def test_offloaded_models_are_not_copied(make_tokenizer, monkeypatch):
    monkeypatch.setattr(acceleration_dar, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(acceleration_dar, "HALF_FROM", 1)
    model = make_tokenizer()
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert model._denoiser_for_decoding() is model.denoiser
    assert model.decode(random_codes(), generator=seeded()).sample.isfinite().all()


def test_loading_in_half_precision_keeps_the_quantizer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    model = DARTokenizer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.quantizer.codebook.weight.dtype == torch.float32
    assert model.denoiser.proj_in.weight.dtype == torch.bfloat16
    assert torch.equal(model.quantizer.codebook.weight, tiny_tokenizer.quantizer.codebook.weight)
    assert model.decode(random_codes()).sample.isfinite().all()


@pytest.mark.parametrize("cast", ["to", "to_both", "bfloat16", "half"])
def test_casting_keeps_the_quantizer(tiny_tokenizer, make_tokenizer, cast):
    model = make_tokenizer()
    {
        "to": lambda: model.to(torch.bfloat16),
        "to_both": lambda: model.to("cpu", torch.bfloat16),
        "bfloat16": model.bfloat16,
        "half": model.half,
    }[cast]()
    for name in ("quant_proj.weight", "quantizer.codebook.weight"):
        assert torch.equal(model.get_parameter(name), tiny_tokenizer.get_parameter(name))
        assert model.get_parameter(name).dtype == torch.float32
    assert model.dtype == model.post_quant_proj.weight.dtype == (torch.float16 if cast == "half" else torch.bfloat16)
    model.float()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_casting_a_quantizer_that_is_half_already(tiny_tokenizer):
    for parameter in tiny_tokenizer.quantizer.parameters():
        parameter.data = parameter.data.half()
    assert tiny_tokenizer.float().quantizer.codebook.weight.dtype == torch.float32


def test_memory_can_be_given_later():
    with torch.device("meta"):
        model = DARTokenizer(sample_size=8, encoder_patch_size=2, diffusion_patch_size=2)
    assert {parameter.device.type for parameter in model.to_empty(device="cpu").parameters()} == {"cpu"}


@every_option
def test_save_and_load(make_tokenizer, options, tmp_path):
    model = make_tokenizer(**options)
    model.save_pretrained(tmp_path)
    loaded = DARTokenizer.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} | {"sample_size": 0} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    } | {"sample_size": 0}
    codes = model.encode(random_images(model)).codes
    assert torch.equal(codes, loaded.encode(random_images(model)).codes)
    assert torch.equal(model.decode(codes, generator=seeded()).sample, loaded.decode(codes, generator=seeded()).sample)
