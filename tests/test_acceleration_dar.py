"""Private copies that are faster: the same results, an untouched model, and only where nothing else computes."""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dar_hf import acceleration_dar
from dar_hf.acceleration_dar import FastLinear, accelerated, is_plain, release

pytestmark = pytest.mark.skipif(acceleration_dar._LINEAR is None, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def pack_small_models(monkeypatch):
    monkeypatch.setattr(acceleration_dar, "PACK_FROM", 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False))


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def is_packed(model):
    return [layer.weight.is_mkldnn for layer in layers(model)] == [True] * len(layers(model))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stream(model, labels, **options):
    return torch.cat(list(model.stream_codes(labels, **options)), dim=1)


def tolerance(dtype):
    return 0.02 if dtype == torch.bfloat16 else 1e-6


# Copies


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (3, 5, 24), (0, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_copy_computes_the_same(model, shape, dtype, pack):
    model.to(dtype)
    x = torch.randn(shape, dtype=dtype)
    faster = accelerated(model, pack=pack)
    assert faster is not model and all(type(layer) is FastLinear for layer in layers(faster))
    assert torch.allclose(faster(x), model(x), atol=tolerance(dtype))
    assert not is_packed(model)


@torch.no_grad()
def test_views_of_inputs(model):
    faster, x = accelerated(model, pack=True), torch.randn(4, 24, 6)
    assert torch.allclose(faster(x.transpose(1, 2)), model(x.transpose(1, 2)), atol=1e-6)
    assert torch.allclose(faster(x[:, :, 0]), model(x[:, :, 0]), atol=1e-6)


@torch.no_grad()
def test_the_model_stays_as_it_is(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, training = list(model.parameters()), model.training
    faster = accelerated(model, pack=True)
    assert is_packed(faster)
    faster.eval()
    assert model.training == training and not is_packed(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in layers(model)] == [nn.Linear] * 2


@torch.no_grad()
def test_without_packing_nothing_is_copied_and_every_change_is_seen(model):
    faster, x = accelerated(model), torch.randn(2, 24)
    assert all(a is b for a, b in zip(faster.parameters(), model.parameters(), strict=True))
    model[0].weight.data[0, 0] += 1
    assert torch.allclose(faster(x), model(x), atol=1e-6)
    model[2].weight = nn.Parameter(torch.randn(8, 40))
    assert torch.allclose(faster(x), model(x), atol=1e-6)


@torch.no_grad()
def test_inputs_of_another_dtype_and_autocast(model):
    x = torch.randn(3, 24)
    faster = accelerated(model, pack=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(faster(x), model(x)) and faster(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        faster(x.double())


@torch.no_grad()
def test_outputs_in_float32(model):
    model = nn.ModuleDict({"q_proj": model[0], "o_proj": model[2]}).to(torch.bfloat16)
    faster = accelerated(model, float32_outputs=["q_proj"])
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    hidden = faster["q_proj"](x)
    assert hidden.dtype == torch.float32 and torch.equal(hidden, model["q_proj"](x).float())
    assert torch.equal(faster["o_proj"](hidden), model["o_proj"](model["q_proj"](x)))


@torch.no_grad()
def test_a_cast_copy(model):
    both = nn.ModuleDict({"kept": model, "left": nn.Linear(2, 2)})
    faster = accelerated(both, dtype=torch.bfloat16, without=["left"])
    assert faster["left"] is None and {p.dtype for p in faster.parameters()} == {torch.bfloat16}
    x = torch.randn(3, 24).to(torch.bfloat16)
    assert torch.equal(faster["kept"](x), copy.deepcopy(model).to(torch.bfloat16)(x))


def test_gradients_and_compilation_keep_the_module(model, monkeypatch):
    assert accelerated(model, pack=True) is model
    with torch.no_grad():
        assert accelerated(model) is not model
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert accelerated(model) is model


class Halved(nn.Linear):
    """As adapters and quantised layers are: a linear layer that computes something else."""

    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "intervene",
    [
        lambda model: model[0].register_forward_hook(lambda *_: None),
        lambda model: model[1].register_forward_pre_hook(lambda *_: None),
        lambda model: model.__setitem__(0, Halved(24, 40)),
        lambda model: model[0].__setattr__("forward", lambda x: F.linear(x, model[0].weight)),
        lambda model: model[0].compile(),
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        lambda model: model.to("meta"),
    ],
    ids=["hook", "pre-hook", "adapter", "wrapped", "compiled", "parametrized", "meta"],
)
@torch.no_grad()
def test_where_something_intervenes_the_module_runs_itself(model, intervene):
    assert is_plain(model)
    intervene(model)
    assert not is_plain(model) and accelerated(model, pack=True, dtype=torch.bfloat16) is model


# Packed weights


@torch.no_grad()
def test_copies_at_one_time_share_packed_weights(model):
    one, two = accelerated(model, pack=True), accelerated(model, pack=True)
    assert all(a.weight is b.weight for a, b in zip(layers(one), layers(two), strict=True))
    packed = len(acceleration_dar._PACKED)
    del one, two
    gc.collect()
    assert len(acceleration_dar._PACKED) == packed - 2


def swap_columns_through_data(weight):
    weight.data = weight.data.flip(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data[0].mul_(2),
        lambda weight: weight.data[3, 5].add_(1e-3),
        lambda weight: weight.detach().numpy().__setitem__((1, 1), 3.0),
        swap_columns_through_data,
    ],
    ids=["counted", "row through .data", "element through .data", "numpy", "another tensor"],
)
@torch.no_grad()
def test_a_change_of_weights_is_seen_whoever_holds_them_packed(model, change):
    earlier, x = accelerated(model, pack=True), torch.randn(2, 24)
    before = model(x)
    change(model[0].weight)
    later = accelerated(model, pack=True)
    assert torch.allclose(later(x), model(x), atol=1e-6)
    assert torch.allclose(earlier(x), before, atol=1e-6)  # of the moment it was made
    assert later[2].weight is earlier[2].weight


@torch.no_grad()
def test_kept_copies_save_packing_until_they_are_released(model):
    accelerated(model, pack=True, keep=True)
    weight = layers(acceleration_dar._KEPT[model])[0].weight
    again = accelerated(model, pack=True, keep=True)
    assert layers(again)[0].weight is weight
    release(model)
    release(model)
    assert model not in acceleration_dar._KEPT
    accelerated(model, pack=True, keep=True)
    accelerated(model)  # another kind of copy is wanted now
    assert model not in acceleration_dar._KEPT


@torch.no_grad()
def test_a_kept_copy_goes_with_its_module(model):
    kept = len(acceleration_dar._KEPT)
    other = copy.deepcopy(model)
    accelerated(other, pack=True, keep=True)
    assert len(acceleration_dar._KEPT) == kept + 1
    del other
    gc.collect()
    assert len(acceleration_dar._KEPT) == kept


@torch.no_grad()
def test_what_is_not_packed(model, monkeypatch):
    assert not any(layer.weight.is_mkldnn for layer in layers(accelerated(model.double(), pack=True)))
    model.to(torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    faster = accelerated(model, pack=True)
    assert not any(layer.weight.is_mkldnn for layer in layers(faster))
    assert torch.isfinite(faster(torch.ones(2, 24, dtype=torch.bfloat16))).all()
    monkeypatch.setattr(acceleration_dar, "PACK_FROM", 10**6)
    assert not any(layer.weight.is_mkldnn for layer in layers(accelerated(model.float(), pack=True)))


# Both models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_packed_models(make_transformer, monkeypatch, dtype):
    model, options = make_transformer().to(dtype), {"guidance_scale": 4.0, "temperature": 0}
    packed = stream(model, [0, 3], **options)
    monkeypatch.setattr(acceleration_dar, "PACK_FROM", 10**9)
    assert torch.equal(stream(model, [0, 3], **options), packed)
    model.pack_weights = False
    monkeypatch.setattr(acceleration_dar, "PACK_FROM", 0)
    assert torch.equal(stream(model, [0, 3], **options), packed)
    if dtype == torch.float32:
        hook = model.register_forward_hook(lambda *_: None)  # as the model itself computes it
        assert torch.equal(stream(model, [0, 3], **options), packed)
        hook.remove()


def test_a_model_is_its_own_while_codes_stream(tiny_transformer):
    ids = torch.tensor([[32, 1, 2]])
    expected, codes = tiny_transformer(ids).logits, stream(tiny_transformer, [0, 3], temperature=0)
    groups = tiny_transformer.stream_codes([0, 3], temperature=0)
    first = next(groups)
    assert acceleration_dar._PACKED and not any(layer.weight.is_mkldnn for layer in layers(tiny_transformer))
    assert torch.equal(tiny_transformer(ids).logits, expected)
    tiny_transformer.train()  # somebody trains in the middle of it
    tiny_transformer(ids, labels=ids).loss.backward()
    clone = pickle.loads(pickle.dumps(copy.deepcopy(tiny_transformer))).eval()
    assert torch.equal(torch.cat([first, *groups], dim=1), codes)
    assert tiny_transformer.training and torch.equal(clone(ids).logits, expected)


def test_changed_weights_give_other_codes(tiny_transformer):
    waiting = tiny_transformer.stream_codes([0, 3], temperature=0)
    next(waiting)  # holds packed weights
    before = stream(tiny_transformer, [0, 3], temperature=0)
    tiny_transformer.model.layers[0].mlp.up_proj.weight.data.neg_()
    after = stream(tiny_transformer, [0, 3], temperature=0)
    expected = tiny_transformer.generate(torch.tensor([[32], [35]]), do_sample=False, use_cache=False)[:, 1:]
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_a_model_that_ran_in_inference_mode_trains(tiny_transformer):
    with torch.inference_mode():
        list(tiny_transformer.stream_codes([0]))
        waiting = tiny_transformer.stream_codes([0])
        next(waiting)
    stream(tiny_transformer, [0])
    assert not any(parameter.is_inference() for parameter in tiny_transformer.parameters())
    sequence = torch.tensor([[32, 1, 2]])
    optimizer = torch.optim.SGD(tiny_transformer.train().parameters(), lr=0.1)
    tiny_transformer(sequence, labels=sequence).loss.backward()
    optimizer.step()


def test_hooks_are_called_while_codes_stream(tiny_transformer):
    codes, calls = stream(tiny_transformer, [0, 3], temperature=0), []
    for part in (tiny_transformer.model.layers[1].mlp, tiny_transformer.lm_head):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    assert torch.equal(stream(tiny_transformer, [0, 3], temperature=0), codes)
    assert calls == [tiny_transformer.model.layers[1].mlp, tiny_transformer.lm_head] * 16


def test_hidden_states_asked_for_once_do_not_cost_the_speed(tiny_transformer):
    codes, ids = stream(tiny_transformer, [0, 3], temperature=0), torch.tensor([[32, 1, 2]])
    assert len(tiny_transformer(ids, output_hidden_states=True).hidden_states) == 3
    assert is_plain(tiny_transformer) and torch.equal(stream(tiny_transformer, [0, 3], temperature=0), codes)
    assert len(tiny_transformer(ids, output_hidden_states=True).hidden_states) == 3


def in_threads(work, count):
    """Results of ``work(index)`` for every index, all begun at one time on four threads."""
    start = threading.Barrier(4)

    def run(index):
        if index < 4:
            start.wait()
        return work(index)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("training", [False, True])
def test_four_threads_stream_from_one_model(make_transformer, training):
    model = make_transformer(hidden_size=128, intermediate_size=256).train(training)
    ids = torch.tensor([[32, 1, 2]])

    def work(index):
        if not training and index % 4 == 3:  # somebody else uses the model as it is
            with torch.no_grad():
                return torch.cat([model(ids).logits for _ in range(20)])
        return stream(model, [index % 5] * (1 + index % 2), guidance_scale=2.0, generator=seeded(index))

    expected = [work(index) for index in range(12)]
    for result, alone in zip(in_threads(work, 12), expected, strict=True):
        assert torch.equal(result, alone)
    assert all(part.training == training for part in model.modules())


def test_four_threads_stream_from_a_model_with_hooks_that_trains(make_transformer):
    """Such a model is not copied, and the first stream to end must not switch dropout on for the others."""
    model = make_transformer().train()
    model.model.layers[0].register_forward_hook(lambda *args: None)
    lengths = [2, 16, 8, 16]
    expected = [stream(model, [0, 3], temperature=0, num_tokens=count) for count in lengths]
    for _ in range(3):
        results = in_threads(lambda index: stream(model, [0, 3], temperature=0, num_tokens=lengths[index]), 4)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_four_threads_use_one_tokenizer(tiny_tokenizer, dtype):
    tiny_tokenizer.decode_dtype = dtype

    def work(index):
        images = torch.rand(2, 3, 8, 8, generator=seeded(index)) * 2 - 1
        codes = tiny_tokenizer.encode(images).codes
        return tiny_tokenizer.decode(codes, generator=seeded(index)).sample

    expected = [work(index) for index in range(12)]
    for result, alone in zip(in_threads(work, 12), expected, strict=True):
        assert torch.equal(result, alone)


def test_decoding_in_another_dtype_is_honest_to_hooks_and_changes(tiny_tokenizer):
    codes = torch.randint(0, 32, (2, 16), generator=seeded())

    def decode():
        return tiny_tokenizer.decode(codes, generator=seeded()).sample

    full = decode()
    tiny_tokenizer.decode_dtype = torch.bfloat16
    half, calls = decode(), []
    assert not torch.equal(half, full) and torch.equal(decode(), half)
    tiny_tokenizer.denoiser.blocks[0].mlp[0].weight.data[5, 3] += 0.5
    changed = decode()
    assert not torch.equal(changed, half)
    tiny_tokenizer.denoiser.blocks[0].mlp[0].weight.data[5, 3] -= 0.5
    tiny_tokenizer.denoiser.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(decode(), full, atol=1e-4, rtol=1e-4)
    assert len(calls) == 4


def test_training_frees_the_denoiser_for_decoding(tiny_tokenizer):
    tiny_tokenizer.decode_dtype = torch.bfloat16
    tiny_tokenizer.decode(torch.zeros(1, 16, dtype=torch.long))
    assert tiny_tokenizer.denoiser in acceleration_dar._KEPT
    tiny_tokenizer.train()
    assert tiny_tokenizer.denoiser not in acceleration_dar._KEPT
