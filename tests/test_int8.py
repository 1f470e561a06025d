"""Weight-only int8 of the language model, through transformers and torchao."""

import pytest
import torch
from pipeline_helpers import generated_codes, seeded
from transformers import TorchAoConfig

from dar_hf import DARForCausalLM

quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture
def quantised(tiny_pipeline, tmp_path):
    """The pipeline's transformer, saved and loaded with int8 weights."""
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
