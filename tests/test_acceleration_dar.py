"""Packing changes where weights lie and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dar_hf import linear_dar
from dar_hf.linear_dar import Linear, pack, packed

onednn = pytest.mark.skipif(linear_dar._LINEAR is None, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def pack_small_models(monkeypatch):
    monkeypatch.setattr(linear_dar, "PACK_FROM", 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Linear(24, 40), nn.SiLU(), Linear(40, 8, bias=False)).eval()


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, Linear)]


def is_packed(model):
    return [layer.weight.is_mkldnn for layer in layers(model)] == [True] * len(layers(model))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (3, 5, 24), (0, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_forward_is_linear(shape, dtype):
    layer = Linear(24, 40).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    assert torch.allclose(
        layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6 if dtype != torch.bfloat16 else 0.02
    )


@torch.no_grad()
def test_forward_of_views():
    layer, x = Linear(24, 40), torch.randn(4, 24, 6)
    assert torch.allclose(layer(x.transpose(1, 2)), F.linear(x.transpose(1, 2), layer.weight, layer.bias), atol=1e-6)
    assert torch.allclose(layer(x[:, :, 0]), F.linear(x[:, :, 0], layer.weight, layer.bias), atol=1e-6)


def test_gradients_are_those_of_linear(model):
    plain = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 24)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_values(model, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no AVX-512")
    model.to(dtype)
    x = torch.randn(6, 24, dtype=dtype)
    expected = model(x)
    assert pack(model, rows=2) == layers(model) and is_packed(model)
    for rows in (1, 2, 6):  # any number of rows, whatever was expected
        assert torch.allclose(model(x[:rows]), expected[:rows], atol=1e-6 if dtype == torch.float32 else 0.02)
    assert pack(model, rows=2) == []  # it is


@torch.no_grad()
def test_weights_that_the_processor_cannot_lay_out_stay(model, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model.to(torch.bfloat16)
    assert pack(model, rows=2) == [] and not any(layer.weight.is_mkldnn for layer in layers(model))
    assert torch.isfinite(model(torch.ones(2, 24, dtype=torch.bfloat16))).all()


@onednn
def test_unpacking_brings_the_same_parameters_back(model):
    parameters, values = list(model.parameters()), copy.deepcopy(model.state_dict())
    model[0].weight.requires_grad_(False)
    with packed(model, rows=2):
        assert is_packed(model)
        assert sum(parameter.untyped_storage().size() for parameter in parameters) == 40 * 4  # the bias: no copies
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in values.items())
    with pytest.raises(RuntimeError), packed(model, rows=2):
        raise RuntimeError
    assert not any(layer.weight.is_mkldnn for layer in layers(model))


@onednn
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.double(),
        lambda model: model(torch.ones(2, 24)).square().sum().backward(),
        lambda model: model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}),
    ],
    ids=["train", "cast", "backward", "load"],
)
def test_whatever_is_no_inference_unpacks(model, change):
    plain = copy.deepcopy(model)
    pack(model, rows=2)
    change(model)
    change(plain)
    assert not any(layer.weight.is_mkldnn for layer in layers(model))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@onednn
def test_saving_gives_plain_weights(model):
    before = copy.deepcopy(model.state_dict())
    with packed(model, rows=2):
        after = model.state_dict()
        assert is_packed(model)
        clone = copy.deepcopy(model)
        assert not is_packed(model)
    assert all(torch.equal(after[name], before[name]) and not after[name].is_mkldnn for name in before)
    assert all(torch.equal(clone.state_dict()[name], before[name]) for name in before)


@onednn
@torch.no_grad()
def test_inputs_of_another_dtype_and_autocast(model):
    x = torch.randn(3, 24)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x)
    with packed(model, rows=2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), autocast) and autocast.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double())
        assert torch.allclose(model(x), expected, atol=1e-6)


@onednn
def test_what_is_not_packed(model, monkeypatch):
    assert pack(copy.deepcopy(model).train(), rows=2) == []
    assert pack(copy.deepcopy(model).double(), rows=2) == []
    assert pack(copy.deepcopy(model).to("meta"), rows=2) == []
    assert pack(nn.Sequential(nn.Linear(3, 3)), rows=2) == []
    monkeypatch.setattr(linear_dar, "PACK_FROM", 10**6)
    assert pack(model, rows=2) == []


@onednn
def test_codes_of_packed_models(tiny_transformer, tiny_tokenizer, monkeypatch):
    greedy = torch.cat(list(tiny_transformer.stream_codes([0, 3], guidance_scale=4.0, temperature=0)), dim=1)
    monkeypatch.setattr(linear_dar, "PACK_FROM", 10**9)
    stream = tiny_transformer.stream_codes([0, 3], guidance_scale=4.0, temperature=0)
    assert torch.equal(torch.cat(list(stream), dim=1), greedy)


@onednn
def test_weights_are_packed_while_codes_stream_and_not_after(tiny_transformer):
    stream = tiny_transformer.stream_codes([0])
    assert not is_packed(tiny_transformer)
    next(stream)
    assert is_packed(tiny_transformer)
    tiny_transformer.train()  # somebody trains in the middle of it
    assert not any(layer.weight.is_mkldnn for layer in layers(tiny_transformer))
    tiny_transformer.eval()
    next(stream)
    stream.close()
    stream = tiny_transformer.stream_codes([0])
    next(stream)
    del stream
    assert not any(layer.weight.is_mkldnn for layer in layers(tiny_transformer))


@onednn
def test_a_model_that_ran_in_inference_mode_trains(tiny_transformer):
    with torch.inference_mode():
        list(tiny_transformer.stream_codes([0]))
    assert not any(parameter.is_inference() for parameter in tiny_transformer.parameters())
    sequence = torch.tensor([[32, 1, 2]])
    optimizer = torch.optim.SGD(tiny_transformer.train().parameters(), lr=0.1)
    tiny_transformer(sequence, labels=sequence).loss.backward()
    optimizer.step()
