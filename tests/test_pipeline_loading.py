"""Folders, dtypes, devices and attention of the pipeline: what users of diffusers expect to work."""

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from pipeline_helpers import generated_codes, picture, seeded, tensor_of

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline):
    return pipeline([0, 3], generator=seeded(), guidance_scale=2.0, output_type="pt").images


# Folders


def test_save_and_load(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    expected = tiny_pipeline([0, 3], generator=seeded(), output_type="pt").images
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert list(loaded.transformer.generation_config.guidance_scale) == [1.1, 8.0]
    assert torch.equal(loaded(["tench", "ray"], generator=seeded(), output_type="pt").images, expected)
    assert loaded.get_label_ids(["Tinca tinca", "cock"]) == [0, 4]
    assert type(loaded.scheduler) is FlowMatchAdamsBashforthScheduler


def test_scheduler_is_saved_with_the_pipeline(tiny_tokenizer, tiny_transformer, tmp_path):
    scheduler = FlowMatchAdamsBashforthScheduler(shift=3.0, variable_step=True)
    DARPipeline(tiny_tokenizer, tiny_transformer, scheduler).save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path).scheduler.config
    assert (loaded.shift, loaded.variable_step) == (3.0, True)


def test_labels_are_optional(tiny_tokenizer, tiny_transformer, tmp_path):
    pipeline = DARPipeline(tiny_tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert len(loaded(1).images) == 1
    with pytest.raises(ValueError, match="the pipeline has no id2label"):
        loaded("cat")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_pipeline, dtype):
    pipeline = tiny_pipeline.to(dtype)
    images = pipeline([0, 3], generator=seeded(), output_type="pt", guidance_scale=2.0).images
    assert images.dtype == torch.float32 and images.isfinite().all()
    array = pipeline([0, 3], generator=seeded(), output_type="np", guidance_scale=2.0).images
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())
    codes = generated_codes(pipeline, 0, layout_image=picture(), layout_tokens=16)
    assert codes.shape == (1, 16)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_variants_and_shards(tiny_pipeline, tmp_path, shards, variant):
    tiny_pipeline.save_pretrained(tmp_path, variant=variant, **shards)
    for name, stem in (("tokenizer", "diffusion_pytorch_model"), ("transformer", "model")):
        files = [path.name for path in (tmp_path / name).glob("*.safetensors")]
        assert all(file.startswith(f"{stem}.fp16" if variant else stem) for file in files)
        assert (len(files) > 1) == bool(shards)
    loaded = quiet(DARPipeline.from_pretrained(tmp_path, variant=variant))
    assert torch.equal(images_of(loaded), images_of(tiny_pipeline))
    if variant:
        with pytest.raises(OSError, match="no file named"):
            DARPipeline.from_pretrained(tmp_path)


def dtypes(pipeline):
    return [module.dtype for module in (pipeline.tokenizer, pipeline.transformer)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folders(make_tokenizer, tiny_pipeline, tmp_path, dtype):
    full, codebook = images_of(tiny_pipeline), tiny_pipeline.tokenizer.quantizer.codebook.weight.clone()
    tiny_pipeline.to(dtype).save_pretrained(tmp_path)
    expected = images_of(tiny_pipeline)
    # as diffusers has it: float32 unless asked for something else, both models alike
    plain = quiet(DARPipeline.from_pretrained(tmp_path))
    assert dtypes(plain) == [torch.float32] * 2 and plain.dtype == torch.float32
    half = quiet(DARPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert dtypes(half) == [dtype] * 2 and torch.equal(images_of(half), expected)
    mixed = quiet(DARPipeline.from_pretrained(tmp_path, dtype={"transformer": dtype, "default": torch.float32}))
    assert dtypes(mixed) == [torch.float32, dtype] and images_of(mixed).shape == full.shape
    for pipeline in (plain, half, mixed):
        assert torch.equal(pipeline.tokenizer.quantizer.codebook.weight, codebook)  # saved in float32, not rounded


# Dtypes and devices


def test_codes_do_not_depend_on_the_way_to_half_precision(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    images = torch.cat([tensor_of(picture(i)) for i in range(16)])
    loaded = DARPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ways = [
        loaded,
        DARPipeline.from_pretrained(tmp_path).to(torch.bfloat16),
        DARPipeline.from_pretrained(tmp_path).to("cpu", torch.bfloat16),
    ]
    by_method = DARPipeline.from_pretrained(tmp_path)
    by_method.tokenizer.bfloat16()
    by_method.transformer.bfloat16()
    for pipeline in (*ways, by_method):
        encoded = pipeline.tokenizer.encode(images)
        assert torch.equal(encoded.latents, loaded.tokenizer.encode(images).latents)
        assert pipeline.transformer.model.rotary_emb.inv_freq.dtype == torch.float32
        assert dtypes(pipeline) == [torch.bfloat16] * 2
        assert torch.equal(images_of(quiet(pipeline)), images_of(quiet(loaded)))


def test_bfloat16_decodes_within_three_percent(tiny_tokenizer, make_tokenizer):
    codes = torch.randint(0, 32, (8, 16), generator=seeded())
    full = tiny_tokenizer.decode(codes, generator=seeded()).sample
    for dtype in (torch.bfloat16, torch.float16):
        half = make_tokenizer().to(dtype).decode(codes, generator=seeded()).sample
        assert 0 < (half - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(tiny_pipeline, tmp_path, device_map):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = quiet(DARPipeline.from_pretrained(tmp_path, device_map=device_map))
    if not torch.cuda.is_available():
        assert torch.equal(images_of(loaded), images_of(tiny_pipeline))


def test_model_offloading_hooks(tiny_pipeline):
    """accelerate's hooks, with the CPU as the device that models are brought to."""
    expected = images_of(tiny_pipeline)
    brought, device = [], torch.device("cpu")
    first, hook = accelerate.cpu_offload_with_hook(tiny_pipeline.transformer, device)
    second, _ = accelerate.cpu_offload_with_hook(tiny_pipeline.tokenizer, device, prev_module_hook=hook)
    for module in (first, second):
        before = module._hf_hook.pre_forward
        module._hf_hook.pre_forward = lambda m, *a, _before=before, **k: (
            brought.append(type(m).__name__) or _before(m, *a, **k)
        )
    assert torch.equal(images_of(tiny_pipeline), expected)
    assert set(brought) == {"DARForCausalLM", "DARTokenizer"} and brought[0] == "DARForCausalLM"


def assert_same_but_for_rounding(images, expected):
    """Offloaded models run as they are, without oneDNN; and MKL rounds by where in memory weights lie."""
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_offloading_layer_by_layer(tiny_pipeline):
    """Every weight is on no device until its layer is called."""
    layout = {"layout_image": picture(), "layout_tokens": 5, "output_type": "pt"}
    expected = images_of(tiny_pipeline), tiny_pipeline(1, generator=seeded(), **layout).images
    for module in (tiny_pipeline.transformer, tiny_pipeline.tokenizer):
        accelerate.cpu_offload(module, torch.device("cpu"))
        assert module.device.type == "meta"
    assert_same_but_for_rounding(images_of(tiny_pipeline), expected[0])
    assert_same_but_for_rounding(tiny_pipeline(1, generator=seeded(), **layout).images, expected[1])
    assert tiny_pipeline.tokenizer(torch.zeros(1, 3, 8, 8)).velocity.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offloading_of_the_tokenizer(tiny_pipeline, tmp_path, options):
    """With the disk as the place that weights are offloaded to, they are nowhere until they are brought in."""
    expected = tiny_pipeline(1, layout_image=picture(), layout_tokens=5, generator=seeded(), output_type="pt").images
    if options["offload_type"] == "block_level":
        options = options | {"num_blocks_per_group": 1}
    cpu = torch.device("cpu")
    tiny_pipeline.tokenizer.enable_group_offload(cpu, cpu, offload_to_disk_path=str(tmp_path), **options)
    for _ in range(2):
        call = {"generator": seeded(), "output_type": "pt"}
        images = tiny_pipeline(1, layout_image=picture(), layout_tokens=5, **call).images
        assert_same_but_for_rounding(images, expected)


def test_group_offloading_of_a_tokenizer_with_a_repa_head(make_tokenizer):
    options = {"repa_layer": 1, "repa_dim": 24}
    call = {"timesteps": torch.tensor([0.5]), "noise": torch.ones(1, 3, 8, 8), "output_repa": True}
    expected, model = make_tokenizer(**options)(torch.zeros(1, 3, 8, 8), **call), make_tokenizer(**options)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(model(torch.zeros(1, 3, 8, 8), **call).repa_features, expected.repa_features)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(tiny_pipeline, method):
    expected = images_of(tiny_pipeline.to("cuda")).cpu()
    tiny_pipeline.to("cpu")
    for _ in range(2):
        getattr(tiny_pipeline, method)(device="cuda")
        assert torch.allclose(images_of(tiny_pipeline).cpu(), expected, atol=1e-4)
        kind = "cpu" if method == "enable_model_cpu_offload" else "meta"
        assert tiny_pipeline.tokenizer.device.type == tiny_pipeline.transformer.device.type == kind
    images = [tiny_pipeline.reconstruct(picture(), generator=seeded(), output_type="pt").images for _ in range(2)]
    assert torch.equal(*images)
    stream = tiny_pipeline.stream(0, layout_image=picture(), layout_tokens=5)
    assert [output.step for output in stream] == [1, 2, 3, 4]
    generator = torch.Generator("cuda").manual_seed(0)
    assert tiny_pipeline(0, generator=generator, output_type="pt").images.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_an_accelerator(tiny_pipeline, tmp_path, dtype):
    expected = images_of(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path)
    for device_map in ("cuda", "balanced"):
        loaded = quiet(DARPipeline.from_pretrained(tmp_path, dtype=dtype, device_map=device_map))
        assert loaded.device.type == "cuda"
        images = images_of(loaded)
        assert images.device.type == "cuda" and images.isfinite().all()
        if dtype == torch.float32:
            assert torch.allclose(images.cpu(), expected, atol=1e-3)
    with pytest.raises(ValueError, match="a generator on cuda"):
        tiny_pipeline(0, generator=torch.Generator("cuda"))


# Attention, casting and checkpointing


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation(tiny_pipeline, tmp_path, implementation):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    loaded.transformer.set_attn_implementation(implementation)
    again = type(loaded.transformer).from_pretrained(tmp_path / "transformer", attn_implementation=implementation)
    for model in (loaded.transformer, again):
        assert model.config._attn_implementation == implementation
        codes = torch.cat(list(model.stream_codes([0, 3], guidance_scale=2.0, generator=seeded())), dim=1)
        options = {"guidance_scale": 2.0, "latents": torch.zeros(2, 3, 8, 8)}
        assert torch.equal(codes, generated_codes(tiny_pipeline, [0, 3], generator=seeded(), **options))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_set_attention_backend(tiny_pipeline, backend, monkeypatch):
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # diffusers sets it for all models
    expected = images_of(tiny_pipeline)
    tiny_pipeline.tokenizer.set_attention_backend(backend)
    used = {processor._attention_backend for processor in tiny_pipeline.tokenizer.attn_processors.values()}
    assert used == {diffusers.models.attention_dispatch.AttentionBackendName(backend)}
    assert torch.allclose(images_of(tiny_pipeline), expected, atol=1e-5)
    tiny_pipeline.tokenizer.reset_attention_backend()
    assert {processor._attention_backend for processor in tiny_pipeline.tokenizer.attn_processors.values()} == {None}


def test_layerwise_casting(tiny_pipeline):
    expected = images_of(tiny_pipeline)
    tiny_pipeline.tokenizer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    weights = tiny_pipeline.tokenizer.denoiser.blocks[0].mlp[0].weight
    assert weights.dtype == torch.float8_e4m3fn
    assert tiny_pipeline.tokenizer.quantizer.codebook.weight.dtype == torch.float32
    assert 0 < (images_of(tiny_pipeline) - expected).abs().mean() < 0.1


def test_gradient_checkpointing_is_switched_in_both_models(tiny_pipeline):
    expected = images_of(tiny_pipeline)
    tiny_pipeline.tokenizer.enable_gradient_checkpointing()
    tiny_pipeline.transformer.gradient_checkpointing_enable()
    assert tiny_pipeline.tokenizer.is_gradient_checkpointing and tiny_pipeline.transformer.is_gradient_checkpointing
    assert torch.equal(images_of(tiny_pipeline), expected)  # no part in generating


def test_from_pipe(tiny_pipeline):
    expected = images_of(tiny_pipeline)
    pipeline = quiet(DARPipeline.from_pipe(tiny_pipeline))
    assert pipeline.tokenizer is tiny_pipeline.tokenizer and pipeline.labels == tiny_pipeline.labels
    assert torch.allclose(images_of(pipeline), expected, atol=1e-5)
