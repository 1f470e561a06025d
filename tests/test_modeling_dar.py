import copy
import inspect
import pickle

import pytest
import torch
from modeling_helpers import CODES, NULL, classes, count_forwards, guided_logits, plain_loop, seeded, sequences, stream
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaModel

from dar_hf import DARConfig, DARForCausalLM, DARModel

# The model


def test_signatures():
    generate = inspect.signature(DARForCausalLM.generate).parameters
    assert "generator" in generate
    parameters = inspect.signature(DARForCausalLM.stream_codes).parameters
    assert list(parameters)[1] == "class_labels"
    names = [
        "guidance_scale",
        "temperature",
        "top_k",
        "top_p",
        "generator",
        "prefix_codes",
        "num_tokens",
        "group_size",
    ]
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == [*names, "text_ids", "negative_text_ids"]
    assert [parameters[name].default for name in names] == [None, 1.0, 0, 1.0, None, None, None, None]


def test_fresh_model_is_normal_with_a_zero_head():
    config = DARConfig(codebook_size=64, num_classes=8, hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
    model = DARForCausalLM(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and module is not model.lm_head:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.weight.mean().abs() < 2e-3
    assert not model.lm_head.weight.any()
    assert model.lm_head.weight.shape == (64, 128) and model.lm_head.bias is None
    assert model.model.embed_tokens.weight.shape == (73, 128)


def test_body_is_a_llama(tiny_transformer):
    options = {k: getattr(tiny_transformer.config, k) for k in LlamaConfig().to_dict() if k not in ("model_type",)}
    llama = LlamaModel(LlamaConfig(**options)).eval()
    llama.load_state_dict(tiny_transformer.model.state_dict())
    ids = sequences()
    hidden = llama(ids).last_hidden_state
    assert torch.equal(tiny_transformer.model(ids).last_hidden_state, hidden)
    assert torch.allclose(tiny_transformer(ids).logits, hidden @ tiny_transformer.lm_head.weight.T, atol=1e-5)


def test_logits_are_over_codes_and_causal(tiny_transformer):
    ids = sequences()
    logits = tiny_transformer(ids).logits
    assert logits.shape == (2, 17, CODES)
    assert torch.allclose(tiny_transformer(ids[:, :6]).logits, logits[:, :6], atol=1e-4)
    assert torch.allclose(tiny_transformer(ids, logits_to_keep=2).logits, logits[:, -2:], atol=1e-5)
    output = tiny_transformer(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert isinstance(tiny_transformer(ids, return_dict=False), tuple)


def test_loss_is_the_cross_entropy_of_the_next_code(tiny_transformer):
    ids = sequences()
    output = tiny_transformer(ids, labels=ids)
    log_probabilities = output.logits.double().log_softmax(-1)
    picked = [log_probabilities[b, i, ids[b, i + 1]] for b in range(2) for i in range(16)]
    assert output.loss.item() == pytest.approx(-sum(picked).item() / 32, abs=1e-5)
    labels = ids.clone()
    labels[0, 5:] = -100
    some = -(sum(picked[:4]) + sum(picked[16:])).item() / 20
    assert tiny_transformer(ids, labels=labels).loss.item() == pytest.approx(some, abs=1e-5)


def test_loss_of_a_fresh_model_is_uniform():
    config = DARConfig(
        codebook_size=32,
        num_classes=5,
        num_image_tokens=16,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    ids = sequences()
    assert DARForCausalLM(config)(ids, labels=ids).loss.item() == pytest.approx(3.4657, abs=1e-3)


def test_trains_on_a_few_sequences(make_transformer):
    model, ids = make_transformer().train(), sequences()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = []
        for _ in range(30):
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] / 3


def test_gradient_checkpointing_changes_nothing(make_transformer):
    gradients = []
    for checkpointing in (False, True):
        model = make_transformer(resid_dropout=0, ffn_dropout=0, token_dropout=0, class_dropout=0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(sequences(), labels=sequences()).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


# Dropouts


def test_class_dropout_gives_the_null_class(make_transformer):
    model = make_transformer(resid_dropout=0, ffn_dropout=0, token_dropout=0, class_dropout=1.0).train()
    ids, null = sequences(), sequences()
    null[:, 0] = NULL
    with torch.no_grad():
        dropped, expected = model(ids).logits, model.eval()(null).logits
        assert torch.equal(dropped, expected)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)  # nothing is dropped in evaluation


def test_class_dropout_is_as_frequent_as_configured(make_transformer):
    model = make_transformer(resid_dropout=0, ffn_dropout=0, token_dropout=0, class_dropout=0.3).train()
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model(classes(*[2] * 2000))
    assert set(seen[0].unique().tolist()) == {CODES + 2, NULL}
    assert (seen[0] == NULL).double().mean().item() == pytest.approx(0.3, abs=0.04)


def test_drop_class_says_which_rows_lose_their_class(tiny_transformer):
    ids, null = sequences(), sequences()
    null[:, 0] = NULL
    logits = tiny_transformer(ids, drop_class=torch.tensor([True, False])).logits
    assert torch.allclose(logits[0], tiny_transformer(null).logits[0], atol=1e-5)
    assert torch.allclose(logits[1], tiny_transformer(ids).logits[1], atol=1e-5)
    assert not torch.allclose(logits[0], tiny_transformer(ids).logits[0], atol=1e-2)


def test_drop_class_overrides_the_draw_in_training(make_transformer):
    model = make_transformer(resid_dropout=0, ffn_dropout=0, token_dropout=0, class_dropout=1.0).train()
    kept = model(sequences(), drop_class=torch.tensor([False, False])).logits
    assert torch.allclose(kept, model.eval()(sequences()).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["resid_dropout", "ffn_dropout", "token_dropout"])
def test_dropout_works_in_training_only(make_transformer, name):
    rates = {"resid_dropout": 0, "ffn_dropout": 0, "token_dropout": 0, "class_dropout": 0}
    plain, model = make_transformer(**rates), make_transformer(**rates | {name: 0.5})
    expected = plain(sequences()).logits
    assert torch.equal(model(sequences()).logits, expected)
    assert torch.allclose(plain.train()(sequences()).logits, expected, atol=1e-5)
    model.train()
    one, two = model(sequences()).logits, model(sequences()).logits
    assert not torch.allclose(one, expected, atol=1e-2)
    assert not torch.allclose(one, two, atol=1e-2)


def test_token_dropout_covers_the_class_token(make_transformer):
    model = make_transformer(resid_dropout=0, ffn_dropout=0, token_dropout=0.5, class_dropout=0).train()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(sequences(batch=8))
    full = model.model.embed_tokens(sequences(batch=8))
    zero = seen[0] == 0
    assert 0.3 < zero[:, 0].double().mean() < 0.7 and 0.3 < zero[:, 1:].double().mean() < 0.7
    assert torch.allclose(seen[0][~zero], 2 * full[~zero])


# Files


def test_save_and_load(tiny_transformer, tmp_path):
    tiny_transformer.generation_config.guidance_scale = (1.1, 8.0)
    tiny_transformer.save_pretrained(tmp_path)
    ids = sequences()
    expected = tiny_transformer(ids).logits
    for auto in (DARForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is DARForCausalLM and not loaded.training
        assert torch.equal(loaded(ids).logits, expected)
        assert list(loaded.generation_config.guidance_scale) == [1.1, 8.0]
        codes = loaded.generate(classes(1), do_sample=False)[:, 1:]
        assert torch.equal(codes, plain_loop(tiny_transformer, [1], (1.1, 8.0)))
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is DARModel
    assert torch.equal(body(ids).last_hidden_state, tiny_transformer.model(ids).last_hidden_state)


def test_made_from_a_configuration(tiny_transformer):
    assert type(AutoModelForCausalLM.from_config(tiny_transformer.config)) is DARForCausalLM


# stream_codes


@pytest.mark.parametrize("guidance", [None, 4.0, (1.1, 8.0)])
def test_greedy_stream_is_greedy_generate(tiny_transformer, guidance):
    expected = plain_loop(tiny_transformer, [0, 3], 1.0 if guidance is None else guidance)
    groups = list(tiny_transformer.stream_codes([0, 3], guidance_scale=guidance, temperature=0))
    assert [group.shape for group in groups] == [(2, 4)] * 4
    assert all(group.dtype == torch.long for group in groups)
    assert torch.equal(torch.cat(groups, dim=1), expected)
    generated = tiny_transformer.generate(classes(0, 3), do_sample=False, guidance_scale=guidance)
    assert torch.equal(torch.cat(groups, dim=1), generated[:, 1:])


@pytest.mark.parametrize("labels", [3, [3], torch.tensor([3]), (3,)])
def test_class_labels_in_every_form(tiny_transformer, labels):
    assert torch.equal(stream(tiny_transformer, labels, temperature=0), plain_loop(tiny_transformer, [3], 1.0))


def test_stream_never_computes_the_prefix_again(tiny_transformer):
    shapes = count_forwards(tiny_transformer)
    stream(tiny_transformer, [0, 3], generator=seeded())
    assert shapes == [(2, 1)] * 16
    shapes.clear()
    prefix = torch.arange(10).reshape(2, 5)
    stream(tiny_transformer, [0, 3], generator=seeded(), prefix_codes=prefix, guidance_scale=2.0)
    assert shapes == [(4, 6)] + [(4, 1)] * 10


def test_stream_is_lazy(tiny_transformer):
    shapes = count_forwards(tiny_transformer)
    groups = tiny_transformer.stream_codes([0, 3], temperature=0)
    assert len(shapes) == 0
    for k in (1, 2, 3, 4):
        next(groups)
        assert len(shapes) == 4 * k  # the codes of this group and no more
    with pytest.raises(StopIteration):
        next(groups)


def test_prefix_comes_back_first(tiny_transformer):
    prefix = torch.randint(0, CODES, (2, 9), generator=seeded())
    shapes = count_forwards(tiny_transformer)
    groups = tiny_transformer.stream_codes([0, 3], prefix_codes=prefix, temperature=0)
    first = [next(groups), next(groups)]
    assert torch.equal(torch.cat(first, dim=1), prefix[:, :8]) and not shapes
    codes = torch.cat(first + list(groups), dim=1)
    assert codes.shape == (2, 16) and torch.equal(codes[:, :9], prefix)
    for row, label in zip(codes.tolist(), [0, 3], strict=True):
        for i in range(9, 16):
            assert row[i] == guided_logits(tiny_transformer, label, row[:i], 1.0).argmax()
    one = stream(tiny_transformer, [0, 3], prefix_codes=prefix[:1], temperature=0)  # one prefix for all
    assert torch.equal(one[:, :9], prefix[:1].expand(2, -1)) and torch.equal(one[0], codes[0])
    shapes.clear()
    whole = torch.randint(0, CODES, (2, 16), generator=seeded())
    assert torch.equal(stream(tiny_transformer, [0, 3], prefix_codes=whole), whole) and not shapes


def test_prefix_continues_the_schedule(tiny_transformer):
    whole = plain_loop(tiny_transformer, [0, 3], (0.0, 9.0))
    options = {"guidance_scale": (0.0, 9.0), "temperature": 0}
    assert torch.equal(stream(tiny_transformer, [0, 3], prefix_codes=whole[:, :7], **options), whole)
    assert torch.equal(stream(tiny_transformer, [0, 3], prefix_codes=whole[:, :0], **options), whole)


def test_group_size_and_num_tokens(tiny_transformer):
    whole = plain_loop(tiny_transformer, [0], 1.0)
    for size, tokens, lengths in [(4, 10, [4, 4, 2]), (5, 16, [5, 5, 5, 1]), (None, 8, [4, 4]), (32, None, [16])]:
        groups = list(tiny_transformer.stream_codes(0, temperature=0, group_size=size, num_tokens=tokens))
        assert [group.shape[1] for group in groups] == lengths
        assert torch.equal(torch.cat(groups, dim=1), whole[:, : sum(lengths)])


def test_the_smallest_temperatures_are_greedy(tiny_transformer):
    greedy = stream(tiny_transformer, [0, 3], temperature=0)
    assert torch.equal(stream(tiny_transformer, [0, 3], temperature=1e-40), greedy)
    assert torch.equal(stream(tiny_transformer, [0, 3], temperature=1e-20), greedy)


def test_a_model_in_training_streams_as_in_evaluation(tiny_transformer):
    options = {"guidance_scale": 2.0, "generator": seeded()}
    expected = stream(tiny_transformer, [0, 3], **options)
    tiny_transformer.train().gradient_checkpointing_enable()
    tiny_transformer.training = False  # as adapters are, put as new parts into a model that is not in training
    modes, state = [module.training for module in tiny_transformer.modules()], torch.get_rng_state()
    groups = []
    for group in tiny_transformer.stream_codes([0, 3], **options | {"generator": seeded()}):
        groups.append(group)
        assert [module.training for module in tiny_transformer.modules()] == modes
    assert torch.equal(torch.cat(groups, dim=1), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_stream_begun_in_inference_mode_goes_on_outside_it(tiny_transformer):
    expected = stream(tiny_transformer, [0, 3], temperature=0)
    groups = tiny_transformer.stream_codes([0, 3], temperature=0)
    with torch.inference_mode():
        first = next(groups)
    assert torch.equal(torch.cat([first, *groups], dim=1), expected)


def test_stream_leaves_the_global_generator_alone(tiny_transformer):
    state = torch.get_rng_state()
    one = stream(tiny_transformer, [0, 3], generator=seeded(1))
    stream(tiny_transformer, [0, 3], temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, stream(tiny_transformer, [0, 3], generator=seeded(1)))
    assert not torch.equal(one, stream(tiny_transformer, [0, 3], generator=seeded(2)))


def test_two_streams_do_not_disturb_each_other(tiny_transformer):
    def streams():
        return [tiny_transformer.stream_codes(label, generator=seeded(label), guidance_scale=2.0) for label in (1, 2)]

    alone = [list(groups) for groups in streams()]
    for groups in zip(zip(*streams(), strict=True), zip(*alone, strict=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*groups, strict=True))


def test_stream_runs_without_gradients_and_leaves_the_mode_alone(tiny_transformer):
    modes = []
    tiny_transformer.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for _ in tiny_transformer.stream_codes(0):
        assert torch.is_grad_enabled()
    assert modes == [False] * 16


# Bad input

PREFIX = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (5, {}, r"class label must be an integer in \[0, 5\)"),
        (-1, {}, "class label must be an integer"),
        ([0, 1.0], {}, "class label must be an integer"),
        (["cat"], {}, "class label must be an integer"),
        ([True], {}, "class label must be an integer"),
        (torch.tensor([0.0]), {}, "class label must be an integer"),
        ([], {}, "class_labels is empty"),
        (0, {"guidance_scale": (1.0, 2.0, 3.0)}, "a number or a pair"),
        (0, {"guidance_scale": [4.0]}, "a number or a pair"),
        (0, {"guidance_scale": float("nan")}, "finite numbers >= 0"),
        (0, {"guidance_scale": (1.0, float("inf"))}, "finite numbers >= 0"),
        (0, {"guidance_scale": -1.0}, "finite numbers >= 0"),
        (0, {"guidance_scale": ("1", "2")}, "finite numbers >= 0"),
        (0, {"temperature": -0.1}, "temperature must be a finite number >= 0"),
        (0, {"temperature": float("nan")}, "temperature must be a finite number >= 0"),
        (0, {"temperature": "hot"}, "temperature must be a finite number >= 0"),
        (0, {"top_k": -1}, "top_k must be an integer >= 0"),
        (0, {"top_k": 2.5}, "top_k must be an integer >= 0"),
        (0, {"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        (0, {"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        (0, {"num_tokens": 0}, r"num_tokens must lie in \[1, 16\]"),
        (0, {"num_tokens": 17}, r"num_tokens must lie in \[1, 16\]"),
        (0, {"group_size": 0}, "group_size must be at least 1"),
        (0, {"prefix_codes": PREFIX.float()}, "prefix_codes must be integers of shape"),
        (0, {"prefix_codes": PREFIX[0]}, "prefix_codes must be integers of shape"),
        ([0, 1, 2], {"prefix_codes": PREFIX.expand(2, -1)}, "prefix_codes must be integers of shape"),
        (0, {"prefix_codes": PREFIX + 32}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": PREFIX - 1}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": PREFIX, "num_tokens": 3}, "a prefix of 4 codes is longer than the 3"),
        ([0, 1], {"generator": [seeded()]}, "got 1 generators for a batch of 2"),
    ],
)
def test_bad_stream(tiny_transformer, labels, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer.stream_codes(labels, **options)  # refused at once, not at the first group


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 4.0, "num_beams": 2}, "num_beams > 1 is not supported"),
        ({"guidance_scale": (1.1, 8.0), "generation_config": GenerationConfig(num_beams=2)}, "num_beams > 1 is not"),
        ({"guidance_scale": (1.0, 2.0, 3.0)}, "a number or a pair"),
        ({"guidance_scale": float("nan")}, "finite numbers >= 0"),
        ({"do_sample": True, "generator": [seeded()] * 3}, "got 3 generators for a batch of 2"),
        ({"do_sample": True, "generator": 3}, "generator must be a torch.Generator"),
        ({"guidance_scale": 4.0, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens is not supported"),
        ({"guidance_scale": 4.0, "assistant_model": object()}, "assistant_model is not supported"),
        ({"guidance_scale": 4.0, "inputs_embeds": torch.zeros(2, 1, 64)}, "inputs_embeds is not supported"),
    ],
)
def test_bad_generate(tiny_transformer, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer.generate(classes(0, 1), **options)


def test_beams_work_without_guidance(tiny_transformer):
    beams = tiny_transformer.generate(classes(0, 3), num_beams=3, do_sample=False)
    assert beams.shape == (2, 17)

    def score(ids):
        log_probabilities = tiny_transformer(ids).logits[:, :-1].log_softmax(-1)
        return log_probabilities.gather(2, ids[:, 1:, None]).sum(dim=(1, 2))

    assert (score(beams) >= score(tiny_transformer.generate(classes(0, 3), do_sample=False)) - 1e-4).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_transition_scores_are_those_of_the_codes(tiny_transformer, num_beams):
    options = {"num_beams": num_beams, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    output = tiny_transformer.generate(classes(0, 3, 4), **options)
    beams = output.beam_indices if num_beams > 1 else None
    scores = tiny_transformer.compute_transition_scores(
        output.sequences, output.scores, beams, normalize_logits=num_beams == 1
    )
    expected = tiny_transformer(output.sequences).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(2, output.sequences[:, 1:, None])[..., 0]
    assert torch.allclose(scores, expected, atol=1e-4)


def test_vocabulary_cannot_be_resized(tiny_transformer):
    for model in (tiny_transformer, tiny_transformer.model):
        with pytest.raises(ValueError, match="cannot be resized"):
            model.resize_token_embeddings(100)


def test_copies_of_a_compiled_model_run_their_own_weights(tiny_transformer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args, **kwargs: function(*args, **kwargs))
    tiny_transformer.compile_decoding = True
    codes = stream(tiny_transformer, [0, 3], temperature=0)
    copied = copy.deepcopy(tiny_transformer)
    with torch.no_grad():
        tiny_transformer.lm_head.weight.neg_()
    assert torch.equal(stream(copied, [0, 3], temperature=0), codes)
    assert torch.equal(stream(pickle.loads(pickle.dumps(copied)), [0, 3], temperature=0), codes)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_decoding(make_transformer, device):
    model = make_transformer().to(device)
    options = {"guidance_scale": (1.1, 8.0), "temperature": 0}
    prefix = torch.tensor([[3, 1, 4]])
    eager = [
        torch.cat(list(model.stream_codes(labels, prefix_codes=codes, **options)), dim=1)
        for labels, codes in (([0, 3], None), ([1, 2], prefix))
    ]
    model.compile_decoding = True
    with torch._dynamo.config.patch(error_on_recompile=False):
        torch._dynamo.utils.counters.clear()
        compiled = torch.cat(list(model.stream_codes([0, 3], **options)), dim=1)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        again = torch.cat(list(model.stream_codes([0, 3], group_size=5, **options)), dim=1)
        other = torch.cat(list(model.stream_codes([1, 2], prefix_codes=prefix, **options)), dim=1)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1
    assert torch.equal(compiled, eager[0]) and torch.equal(again, eager[0]) and torch.equal(other, eager[1])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight.neg_()
    assert not torch.equal(torch.cat(list(changed.stream_codes([0, 3], **options)), dim=1), compiled)
