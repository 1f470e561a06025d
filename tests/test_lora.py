"""Low-rank adaptation of the language model with peft: the adapted model trains, generates, saves and merges."""

import pytest
import torch
from pipeline_helpers import generated_codes, seeded

from dar_hf import DARPipeline

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(tiny_pipeline):
    """The pipeline's transformer with adapters, trained until it knows one sequence by heart."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_pipeline.transformer, config)
        codes = torch.randint(0, 32, (2, 16))
        ids = torch.cat([torch.tensor([[32], [35]]), codes], dim=1)
        labels = ids.masked_fill(ids >= 32, -100)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        losses = []
        for _ in range(60):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    return model, codes


def test_only_the_adapters_train(make_transformer, adapted):
    model, _ = adapted
    before = make_transformer().state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_the_pipeline_generates_what_the_adapters_learned(tiny_pipeline, adapted, guidance_scale):
    model, codes = adapted
    options = {"temperature": 0, "guidance_scale": guidance_scale}
    tiny_pipeline.transformer = model
    result = generated_codes(tiny_pipeline, [0, 3], **options)
    assert (result == codes).float().mean() > 0.9
    with model.disable_adapter():
        assert (generated_codes(tiny_pipeline, [0, 3], **options) == codes).float().mean() < 0.5
    ids = model.generate(input_ids=torch.tensor([[32], [35]]), do_sample=False, guidance_scale=guidance_scale)
    assert torch.equal(ids[:, 1:], result)
    assert len(list(tiny_pipeline.stream([0, 3], **options))) == 4


def test_adapters_are_saved_loaded_and_merged(make_transformer, tiny_pipeline, adapted, tmp_path):
    model, _ = adapted
    latents = torch.zeros(2, 3, 8, 8)
    expected = generated_codes(tiny_pipeline, [0, 3], temperature=0, latents=latents)
    model.save_pretrained(tmp_path / "adapters")
    loaded = peft.PeftModel.from_pretrained(make_transformer(), tmp_path / "adapters")
    codes = torch.cat(list(loaded.stream_codes([0, 3], temperature=0)), dim=1)
    assert torch.equal(codes, expected)
    tiny_pipeline.transformer = model.merge_and_unload()
    tiny_pipeline.save_pretrained(tmp_path / "merged")
    merged = DARPipeline.from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    assert torch.equal(generated_codes(merged, [0, 3], temperature=0, generator=seeded()), expected)
