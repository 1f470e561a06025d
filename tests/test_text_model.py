"""The language model that draws from text: a prompt of a fixed number of tokens in the place of the class token."""

import json

import pytest
import torch
from modeling_helpers import seeded, stream
from tiny_models import make_text_transformer

from dar_hf import DARConfig, DARForCausalLM
from dar_hf.conversion import codes_tokenizer, to_llama, transformer_to_original

CODES, NULL, LENGTH = 32, 72, 6  # codebook size, null token, tokens of a text
TEXTS = [[3, 7, 39], [5], [0, 1, 2, 3, 4, 5], []]


@pytest.fixture
def model():
    return make_text_transformer()


def prompt(*texts):
    rows = [[NULL] * (LENGTH - len(ids)) + [CODES + number for number in ids] for ids in texts]
    return torch.tensor(rows)


# Configuration


def test_vocabulary_is_codes_text_and_one_null_token():
    config = DARConfig(codebook_size=32, num_image_tokens=16, text_vocab_size=40, max_text_tokens=6)
    assert (config.vocab_size, config.null_token_id, config.num_classes) == (73, 72, 0)
    assert (config.prompt_length, config.max_position_embeddings) == (6, 22)
    assert config.text_token_ids([3, 39]) == [72, 72, 72, 72, 35, 71]
    assert config.text_token_ids(torch.tensor([0, 1, 2, 3, 4, 5])) == [32, 33, 34, 35, 36, 37]
    assert config.text_token_ids([]) == [72] * 6
    config.max_text_tokens = 8
    assert config.max_position_embeddings == 24


def test_files_of_class_models_know_nothing_of_text(tmp_path):
    config = DARConfig(codebook_size=32, num_classes=5)
    assert config.prompt_length == 1
    config.save_pretrained(tmp_path)
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if "text" in name]
    loaded = DARConfig.from_pretrained(tmp_path, text_vocab_size=40)
    assert (loaded.vocab_size, loaded.num_classes, loaded.max_text_tokens) == (73, 0, 32)


@pytest.mark.parametrize("options", [{"text_vocab_size": -1}, {"text_vocab_size": 40, "max_text_tokens": 0}])
def test_bad_configuration(options):
    with pytest.raises(ValueError, match="text_vocab_size must not be|max_text_tokens must be at least 1"):
        DARConfig(**options)


@pytest.mark.parametrize("ids", [[40], [-1], [1.5], ["a"], 5, None, [1, 2, 3, 4, 5, 6, 7]])
def test_bad_texts(model, ids):
    with pytest.raises(ValueError, match="ids of a text must|text of 7 tokens is longer than max_text_tokens=6"):
        model.stream_codes(text_ids=[ids])


def test_text_and_classes_do_not_mix(model, tiny_transformer):
    for arguments in ({"class_labels": [0]}, {"class_labels": [0], "text_ids": [[1]]}, {}):
        with pytest.raises(ValueError, match="draws from text: give text_ids"):
            model.stream_codes(**arguments)
    for arguments in ({"text_ids": [[1]]}, {"class_labels": [0], "text_ids": [[1]]}, {}):
        with pytest.raises(ValueError, match="draws from class labels: give class_labels"):
            tiny_transformer.stream_codes(**arguments)
    with pytest.raises(ValueError, match="knows no text"):
        tiny_transformer.stream_codes([0], negative_text_ids=[[1]])
    with pytest.raises(ValueError, match="text_ids is empty"):
        model.stream_codes(text_ids=[])
    with pytest.raises(ValueError, match="has no classes"):
        model.config.class_token_id(0)


# Decoding


@torch.no_grad()
def plain_loop(model, texts, scale, negative=()):
    """Greedy decoding of one text after the other: two unbatched passes over the whole sequence, no cache."""
    rows = []
    for ids in texts:
        tokens = prompt(ids)
        others = prompt(list(negative))
        for _ in range(16):
            conditional = model(tokens, use_cache=False).logits[:, -1]
            unconditional = model(others, use_cache=False).logits[:, -1]
            code = (unconditional + scale * (conditional - unconditional)).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, code], dim=1)
            others = torch.cat([others, code], dim=1)
        rows.append(tokens[0, LENGTH:])
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_batch_of_mixed_lengths_gives_what_each_text_gives_alone(model, scale):
    batch = stream(model, None, text_ids=TEXTS, temperature=0, guidance_scale=scale)
    alone = [stream(model, None, text_ids=[ids], temperature=0, guidance_scale=scale) for ids in TEXTS]
    assert torch.equal(batch, torch.cat(alone))
    assert torch.equal(batch, plain_loop(model, TEXTS, scale))
    assert len({tuple(row) for row in batch.tolist()}) == len(TEXTS)


def test_samples_of_a_batch_and_alone(model):
    options = {"guidance_scale": (1.1, 8.0), "top_k": 10}
    generators = [seeded(i) for i in range(4)]
    batch = stream(model, None, text_ids=TEXTS, generator=generators, **options)
    alone = [stream(model, None, text_ids=[ids], generator=[seeded(i)], **options) for i, ids in enumerate(TEXTS)]
    assert torch.equal(batch, torch.cat(alone))


def test_groups_and_prefix(model):
    options = {"text_ids": TEXTS, "guidance_scale": 3.0}
    groups = list(model.stream_codes(generator=seeded(), **options))
    whole = torch.cat(groups, dim=1)
    assert [group.shape for group in groups] == [(4, 4)] * 4
    assert torch.equal(stream(model, None, generator=seeded(), group_size=16, **options), whole)
    greedy = stream(model, None, temperature=0, **options)
    assert torch.equal(stream(model, None, temperature=0, prefix_codes=greedy[:, :5], **options), greedy)
    assert torch.equal(stream(model, None, temperature=0, num_tokens=6, **options), greedy[:, :6])


def test_no_text_is_the_unconditional_half(model):
    options = {"text_ids": [[]], "temperature": 0}
    unguided = stream(model, None, guidance_scale=1.0, **options)
    assert torch.equal(stream(model, None, guidance_scale=7.0, **options), unguided)
    assert torch.equal(stream(model, None, text_ids=[[3, 7]], temperature=0, guidance_scale=0.0), unguided)


def test_negative_text(model):
    options = {"text_ids": TEXTS[:2], "temperature": 0, "guidance_scale": 3.0}
    away = stream(model, None, negative_text_ids=[[9, 11]], **options)
    assert torch.equal(away, plain_loop(model, TEXTS[:2], 3.0, negative=[9, 11]))
    assert torch.equal(stream(model, None, negative_text_ids=[[9, 11]] * 2, **options), away)
    assert torch.equal(stream(model, None, negative_text_ids=[[]], **options), stream(model, None, **options))
    with pytest.raises(ValueError, match="3 negative texts for 2 images"):
        model.stream_codes(negative_text_ids=[[1]] * 3, **options)


@pytest.mark.parametrize("guidance", [1.0, (1.1, 8.0)])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_generate_is_the_stream(model, guidance, cache):
    ids = model.generate(prompt(*TEXTS), do_sample=False, guidance_scale=guidance, **cache)
    assert torch.equal(ids[:, :LENGTH], prompt(*TEXTS))
    expected = stream(model, None, text_ids=TEXTS, temperature=0, guidance_scale=guidance)
    assert torch.equal(ids[:, LENGTH:], expected)


@pytest.mark.slow
def test_compiled_decoding_is_the_stream(model):
    options = {"text_ids": TEXTS, "temperature": 0, "guidance_scale": 3.0}
    expected = stream(model, None, **options)
    model.compile_decoding = True
    assert torch.equal(stream(model, None, **options), expected)
    assert torch.equal(stream(model, None, prefix_codes=expected[:, :3], **options), expected)


# Training


def test_loss_is_over_the_codes_only(model):
    codes = torch.randint(0, CODES, (4, 16), generator=seeded())
    ids = torch.cat([prompt(*TEXTS), codes], dim=1)
    output = model(ids, labels=ids)
    logits = output.logits[:, LENGTH - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(output.loss, expected)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)


def test_dropped_text_is_the_empty_one(model):
    codes = torch.randint(0, CODES, (4, 16), generator=seeded())
    ids = torch.cat([prompt(*TEXTS), codes], dim=1)
    dropped = model(ids, drop_class=torch.tensor([True, False, True, False])).logits
    expected = torch.cat([prompt([], [5], [], []), codes], dim=1)
    assert torch.equal(dropped, model(expected).logits)


def test_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    options = {"text_ids": TEXTS, "temperature": 0, "guidance_scale": 2.0}
    codes = stream(adapted, None, **options)
    assert torch.equal(stream(adapted.merge_and_unload(), None, **options), codes)


# Files


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DARForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.text_vocab_size, loaded.config.max_text_tokens) == (40, 6)
    options = {"text_ids": TEXTS, "temperature": 0}
    assert torch.equal(stream(loaded, None, **options), stream(model, None, **options))


def test_as_a_plain_llama(model):
    llama = to_llama(model)
    assert (llama.config.text_vocab_size, llama.config.max_text_tokens) == (40, 6)
    expected = stream(model, None, text_ids=TEXTS, temperature=0)
    assert torch.equal(llama.generate(prompt(*TEXTS), do_sample=False)[:, LENGTH:], expected)
    tokenizer = codes_tokenizer(model.config)
    assert tokenizer("<text_null> " * 4 + "<text_3><text_39>").input_ids == model.config.text_token_ids([3, 39])
    assert len(tokenizer) == model.config.vocab_size


def test_the_original_knows_no_text(model):
    with pytest.raises(ValueError, match="draws from classes, not from text"):
        transformer_to_original(model)
