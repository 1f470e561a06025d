"""Quantised weights of the language model: int8 through transformers and torchao, and bitsandbytes' kinds."""

import importlib.util

import pytest
import torch
from pipeline_helpers import generated_codes, seeded
from transformers import BitsAndBytesConfig, TorchAoConfig

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer


@pytest.fixture
def quantised(tiny_pipeline, tmp_path):
    """The pipeline's transformer, saved and loaded with int8 weights."""
    quantization = pytest.importorskip("torchao.quantization")
    tiny_pipeline.transformer.save_pretrained(tmp_path)
    options = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return DARForCausalLM.from_pretrained(tmp_path, quantization_config=options)


def test_weights_are_int8_and_logits_stay_near(tiny_pipeline, quantised):
    layer = quantised.model.layers[0].mlp.up_proj
    assert layer.weight.qdata.dtype == torch.int8
    ids = torch.tensor([[32, 1, 2, 3]])
    with torch.no_grad():
        expected, logits = (model.eval()(input_ids=ids).logits for model in (tiny_pipeline.transformer, quantised))
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


def test_a_pipeline_generates_with_it(tiny_pipeline, quantised):
    tiny_pipeline.transformer = quantised
    codes = generated_codes(tiny_pipeline, [1, 2], generator=seeded(), guidance_scale=2.0)
    assert codes.shape == (2, 16) and int(codes.max()) < 32


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_options_that_would_quantise_nothing_are_refused(tiny_pipeline, tmp_path, name):
    tiny_pipeline.save_pretrained(tmp_path)
    for model_class, folder in ((DARPipeline, ""), (DARTokenizer, "tokenizer"), (DARForCausalLM, "transformer")):
        with pytest.raises(ValueError, match=name):
            model_class.from_pretrained(tmp_path / folder, **{name: True})
    assert DARTokenizer.from_pretrained(tmp_path / "tokenizer", **{name: False}).dtype == torch.float32


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=str)
def test_bitsandbytes_quantises_or_is_missed(make_transformer, tmp_path, options):
    make_transformer(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)  # in whole blocks of 64
    options = {"quantization_config": BitsAndBytesConfig(**options)}
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
            DARForCausalLM.from_pretrained(tmp_path, **options)
        return
    model = DARForCausalLM.from_pretrained(tmp_path, **options)
    assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    streamed = torch.cat(list(model.stream_codes([0, 3], temperature=0, guidance_scale=2.0)), dim=1)
    generated = model.generate(torch.tensor([[32], [35]]), do_sample=False, guidance_scale=2.0)
    assert torch.equal(streamed, generated[:, 1:])
