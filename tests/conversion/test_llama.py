"""The plain Llama gives the codes that the D-AR model gives, through stock generate and nothing of ours."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from dar_hf import DARForCausalLM
from dar_hf.conversion import codes_tokenizer, save_llama, to_llama
from dar_hf.hub import export_remote_code

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.arange(model.config.num_classes)[:, None] + model.config.codebook_size
assert type(model).__module__.startswith("transformers.") and "dar_hf" not in sys.modules
torch.save(model.generate(prompt, do_sample=False)[:, 1:], sys.argv[2])
"""


def greedy(model):
    return torch.cat(list(model.stream_codes(range(model.config.num_classes), temperature=0)), dim=1)


def prompts(model):
    return torch.arange(model.config.num_classes)[:, None] + model.config.codebook_size


@pytest.mark.parametrize("options", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"rope_theta": 100.0}])
def test_greedy_codes(make_transformer, options):
    model = make_transformer(**options)
    llama = to_llama(model)
    assert type(llama) is LlamaForCausalLM and not llama.training
    assert torch.equal(llama.generate(prompts(model), do_sample=False)[:, 1:], greedy(model))


@pytest.mark.slow
def test_in_a_process_without_this_package(tiny_transformer, tmp_path):
    to_llama(tiny_transformer).save_pretrained(tmp_path / "llama")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "llama"), str(tmp_path / "codes.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "codes.pt"), greedy(tiny_transformer))


def test_classes_are_never_sampled(tiny_transformer, tmp_path):
    llama = to_llama(tiny_transformer)
    with torch.no_grad():
        llama.lm_head.weight[32:] = 50 * llama.lm_head.weight[:1]  # a class that scores best half the time
    torch.manual_seed(0)
    sampled = llama.generate(prompts(tiny_transformer), do_sample=True, temperature=5.0, top_k=0)[:, 1:]
    assert sampled.shape == (5, 16) and sampled.max() < 32
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(prompts(tiny_transformer), do_sample=True, temperature=5.0, top_k=0)[:, 1:].max() < 32


def test_greedy_codes_where_the_generation_configuration_is_ignored(tiny_transformer):
    llama, tokens = to_llama(tiny_transformer), prompts(tiny_transformer)
    for _ in range(16):
        with torch.no_grad():
            tokens = torch.cat([tokens, llama(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens[:, 1:], greedy(tiny_transformer))


def test_logits_and_rows_of_the_classes(make_transformer):
    model = make_transformer(rms_norm_eps=0.3).eval()
    llama, tokens = to_llama(model), torch.tensor([[33, 5, 9]])
    with torch.no_grad():
        found, expected = llama(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found[..., :32], expected)
    torch.testing.assert_close(found[..., 32:], expected.mean(-1, keepdim=True).expand(-1, -1, 6))


def test_unset_limits_stay_no_limits(make_transformer, tmp_path):
    model = make_transformer()
    model.generation_config.update(do_sample=True)
    to_llama(model).save_pretrained(tmp_path)
    sampling = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (sampling.top_k, sampling.top_p) == (0, 1.0)  # stock generate takes 50 codes where nothing is said


def test_sampling_comes_along(make_transformer):
    model = make_transformer()
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=0, top_p=0.9, guidance_scale=[1.1, 8.0])
    sampling = to_llama(model).generation_config
    assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 0.7, 0, 0.9)
    assert sampling.guidance_scale is None and sampling.max_new_tokens == 16 and sampling.eos_token_id is None
    assert sampling.suppress_tokens == [32, 33, 34, 35, 36, 37]


def test_code_that_a_folder_carries_stays_there(tiny_transformer, tmp_path):
    tiny_transformer.save_pretrained(tmp_path / "dar")
    export_remote_code(tmp_path / "dar")
    model = DARForCausalLM.from_pretrained(tmp_path / "dar")
    assert model.config.auto_map  # or this test tests nothing
    to_llama(model).save_pretrained(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["LlamaForCausalLM"]


def test_it_is_a_copy(tiny_transformer):
    llama = to_llama(tiny_transformer.to(torch.bfloat16))
    assert llama.dtype == torch.float32
    with torch.no_grad():
        llama.model.norm.weight.zero_()
    assert tiny_transformer.model.norm.weight.abs().min() > 0
    assert llama.config.codebook_size == 32 and llama.config.num_image_tokens == 16


# The tokenizer: what starts with AutoTokenizer opens the folder


@pytest.fixture(scope="module")
def names():
    return {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "<c7>"}


@pytest.fixture
def llama_folder(tiny_transformer, names, tmp_path):
    save_llama(tiny_transformer, tmp_path / "llama", names)
    return tmp_path / "llama"


def test_every_token_is_its_id(tiny_transformer, llama_folder):
    tokenizer, config = AutoTokenizer.from_pretrained(llama_folder), tiny_transformer.config
    assert len(tokenizer) == tokenizer.vocab_size == config.vocab_size
    text = "<class_4>" + "".join(f"<c{code}>" for code in range(32))
    assert tokenizer(text).input_ids == [config.class_token_id(4), *range(32)]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<class_null>").input_ids == [config.null_token_id]
    assert tokenizer(" <c3>\n<c4> ").input_ids == [3, 4]
    assert tokenizer.all_special_tokens == [] and tokenizer("").input_ids == []
    everything = list(range(config.vocab_size))
    assert tokenizer(tokenizer.decode(everything, skip_special_tokens=True)).input_ids == everything


def test_prompts_that_are_class_names(tiny_pipeline, llama_folder, names):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    for text, label in {
        "tench, Tinca tinca": 0,
        "tench": 0,
        "Tinca tinca": 0,
        " goldfish\n": 1,
        "<class_3>": 3,
    }.items():
        assert tokenizer(text).input_ids == [32 + label], text
    assert tokenizer("<c7>").input_ids == [7]  # a token stays one, whatever classes are called


@pytest.mark.parametrize(
    "text", ["goldfinch", "gold goldfish", "crane", "<c32>", "<class_5>", "</s>", "<c1> and", "5"]
)
def test_text_that_is_no_token_is_an_error(llama_folder, text):
    with pytest.raises(Exception, match="Missing .* token from the vocabulary"):
        AutoTokenizer.from_pretrained(llama_folder)(text)


def test_names_of_classes_that_are_not_there(tiny_transformer, tmp_path):
    with pytest.raises(ValueError, match=r"id2label must name classes in \[0, 5\), got the id 5"):
        save_llama(tiny_transformer, tmp_path / "llama", {5: "ray"})
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize("names", [{"a": "cat"}, {1.5: "cat"}, {True: "cat"}, {0: None}, {0: 7}, ["cat"], 5])
def test_what_is_no_names_of_classes(tiny_transformer, names):
    with pytest.raises(ValueError, match="id2label must"):
        codes_tokenizer(tiny_transformer.config, names)


def test_names_with_signs(tiny_transformer):
    tokenizer = codes_tokenizer(tiny_transformer.config, {0: "jack-o'-lantern", 1: "a.b*c (d) [e] \\ ^$|?", 2: "é 猫"})
    assert [tokenizer(name).input_ids for name in ("jack-o'-lantern", "a.b*c (d) [e] \\ ^$|?", "é 猫")] == [
        [32],
        [33],
        [34],
    ]
    with pytest.raises(Exception, match="Missing"):
        tokenizer("axb*c (d) [e] \\ ^$|?")


def test_the_text_generation_pipeline(tiny_transformer, llama_folder):
    """Stock transformers on the folder alone: the codes are those of the model's own greedy stream."""
    generate = pipeline("text-generation", model=str(llama_folder))
    expected = greedy(tiny_transformer)
    for prompt, label in (("goldfish", 1), ("<class_4>", 4)):
        (answer,) = generate(prompt, do_sample=False, return_full_text=False)
        assert generate.tokenizer(answer["generated_text"]).input_ids == expected[label].tolist()
        (whole,) = generate(prompt, do_sample=False)
        assert whole["generated_text"] == prompt + answer["generated_text"]
    with torch.no_grad():
        generate.model.lm_head.weight[32:] = 50 * generate.model.lm_head.weight[:1]
    (answer,) = generate("<class_4>", do_sample=True, temperature=5.0, top_k=0, return_full_text=False)
    assert max(generate.tokenizer(answer["generated_text"]).input_ids) < 32


def test_the_folder_is_for_older_libraries_too(llama_folder):
    config = json.loads((llama_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 17
