"""The pipeline that draws from text: prompts of all kinds, everything else of the call, and its folders."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pipeline_helpers import OUTPUT_TYPES, picture, same, seeded
from tiny_models import CAPTIONS, make_text_pipeline, make_text_transformer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.text_dar import encode_texts, prompt_ids
from dar_hf.training.text import learn_text_tokenizer

PROMPTS = ["noto red apple", "", "a green book"]


@pytest.fixture
def text_pipeline(tiny_tokenizer):
    return make_text_pipeline(tiny_tokenizer)


def codes_of(pipeline, prompt, **options):
    options = {"temperature": 0, "guidance_scale": 3.0} | options
    return pipeline(prompt=prompt, output_type="codes", **options).images


# Prompts


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
def test_one_prompt_and_a_list(text_pipeline, output_type):
    one = text_pipeline(prompt="noto red apple", generator=[seeded(0)], output_type=output_type).images
    several = text_pipeline(prompt=PROMPTS, generator=[seeded(i) for i in range(3)], output_type=output_type).images
    assert (len(one), len(several)) == (1, 3)
    if output_type == "codes":
        assert torch.equal(one, several[:1])


def test_prompts_of_mixed_lengths_give_what_each_gives_alone(text_pipeline):
    latents = torch.randn(3, 3, 8, 8, generator=seeded())
    options = {"temperature": 0, "guidance_scale": 2.0, "output_type": "pt"}
    batch = text_pipeline(prompt=PROMPTS, latents=latents, **options).images
    for index, prompt in enumerate(PROMPTS):
        alone = text_pipeline(prompt=prompt, latents=latents[index : index + 1], **options).images
        torch.testing.assert_close(batch[index : index + 1], alone, rtol=0, atol=1e-5)
    assert not torch.equal(batch[0], batch[2])


def test_codes_come_from_the_transformer(text_pipeline):
    ids = text_pipeline.text_tokenizer(PROMPTS).input_ids
    expected = list(text_pipeline.transformer.stream_codes(text_ids=ids, temperature=0, guidance_scale=3.0))
    assert torch.equal(codes_of(text_pipeline, PROMPTS), torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    "prompt", ["", "   ", "猫が好き", "🙂", "قطة", "\ud800", "\x00", "zqx" * 9, "<pad></s>", "word " * 30_000]
)
def test_any_text_draws(text_pipeline, prompt):
    codes = codes_of(text_pipeline, prompt)
    assert codes.shape == (1, 16)
    expected = codes_of(text_pipeline, "")
    assert torch.equal(codes, expected) == (not prompt.strip())


def test_long_prompts_are_cut_with_a_warning(text_pipeline, caplog):
    words = "red apple green book red apple green book"
    with caplog.at_level(logging.WARNING):
        codes = codes_of(text_pipeline, ["red", words])
    assert "1 of 2 texts have more than the model's 6 tokens, and are cut: red apple" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(codes, codes_of(text_pipeline, ["red", "red apple green book red apple"]))
    assert not caplog.records


def test_upper_case_and_spaces_do_not_matter(text_pipeline):
    assert torch.equal(codes_of(text_pipeline, " Noto RED apple "), codes_of(text_pipeline, "noto red apple"))


@pytest.mark.parametrize("prompt", [5, 1.5, ["a", 3], {"a": 1}, [["a"]], b"a"])
def test_what_is_no_text(text_pipeline, prompt):
    with pytest.raises(ValueError, match="prompt must be a text or a list of texts"):
        text_pipeline.stream(prompt=prompt)


def test_text_and_classes_do_not_mix(text_pipeline, tiny_pipeline):
    with pytest.raises(ValueError, match="prompt is empty"):
        text_pipeline.stream(prompt=[])
    for arguments in ({"class_labels": 0}, {"class_labels": "apple"}, {"class_labels": 0, "prompt": "apple"}, {}):
        with pytest.raises(ValueError, match='draws from text: give prompt="…", and no class labels'):
            text_pipeline.stream(**arguments)
    for arguments in (
        {"prompt": "ray"},
        {"class_labels": 0, "prompt": "ray"},
        {"class_labels": 0, "negative_prompt": ""},
    ):
        with pytest.raises(ValueError, match="draws from class labels, not from text: give class_labels"):
            tiny_pipeline.stream(**arguments)


def test_negative_prompt(text_pipeline):
    plain = codes_of(text_pipeline, PROMPTS)
    assert torch.equal(codes_of(text_pipeline, PROMPTS, negative_prompt=""), plain)
    away = codes_of(text_pipeline, PROMPTS, negative_prompt="book")
    assert not torch.equal(away, plain)
    assert torch.equal(codes_of(text_pipeline, PROMPTS, negative_prompt=["book"] * 3), away)
    unguided = {"guidance_scale": 1.0}
    assert torch.equal(
        codes_of(text_pipeline, PROMPTS, negative_prompt="book", **unguided),
        codes_of(text_pipeline, PROMPTS, **unguided),
    )
    with pytest.raises(ValueError, match="2 negative prompts for 3 prompts"):
        codes_of(text_pipeline, PROMPTS, negative_prompt=["a", "b"])


def test_a_blank_negative_prompt_has_no_tokens_whatever_the_text_tokenizer_adds(text_pipeline):
    tokenizer = text_pipeline.text_tokenizer
    mark = tokenizer.convert_tokens_to_ids("!")
    template = TemplateProcessing(single="! $A", special_tokens=[("!", mark)])
    tokenizer.backend_tokenizer.post_processor = template
    found = prompt_ids(tokenizer, 6, ["red", "book"], ["", "red"], repeats=2)
    assert [row[0] for row in found["text_ids"]] == [mark] * 4
    assert found["negative_text_ids"] == [[], [], *found["text_ids"][:2]]


def test_threads_share_a_text_tokenizer(text_pipeline):
    tokenizer = text_pipeline.text_tokenizer
    with ThreadPoolExecutor(4) as threads:
        calls = [["red"], ["red apple book noto green"]] * 100
        rows = list(threads.map(lambda texts: encode_texts(tokenizer, texts, 3, warn=False)[0], calls))
    assert [len(row) for row in rows] == [1, 3] * 100
    assert tokenizer.backend_tokenizer.truncation is None  # it would be saved


# Everything else of the call


def test_several_images_per_prompt(text_pipeline):
    options = {"num_images_per_prompt": 2, "negative_prompt": ["book", "apple", ""]}
    codes = codes_of(text_pipeline, PROMPTS, **options)
    expected = codes_of(text_pipeline, PROMPTS, negative_prompt=options["negative_prompt"])
    assert torch.equal(codes, expected.repeat_interleave(2, dim=0))
    different = codes_of(text_pipeline, "red", num_images_per_prompt=2, temperature=1.0, generator=seeded())
    assert not torch.equal(different[0], different[1])


def test_stream_and_call(text_pipeline):
    options = {"prompt": PROMPTS, "output_type": "pt", "guidance_scale": (1.1, 4.0)}
    previews = list(text_pipeline.stream(generator=seeded(), **options))
    assert [output.num_tokens for output in previews] == [4, 8, 12, 16]
    assert torch.equal(previews[-1].images, text_pipeline(generator=seeded(), **options).images)


def test_layout_and_image_to_image(text_pipeline):
    codes = codes_of(text_pipeline, PROMPTS)
    kept = codes_of(text_pipeline, PROMPTS[::-1], prefix_codes=codes[:, :8])
    assert torch.equal(kept[:, :8], codes[:, :8]) and not torch.equal(kept, codes)
    encoded = text_pipeline.tokenizer.encode(text_pipeline.prepare_images("image", picture(), 8, 8)).codes
    layout = codes_of(text_pipeline, "red apple", layout_image=picture(), layout_tokens=6)
    assert torch.equal(layout[:, :6], encoded[:, :6])
    changed = codes_of(text_pipeline, "red apple", image=picture(), strength=0.5, generator=seeded())
    assert torch.equal(changed[:, :8], encoded[:, :8])


# Components and folders


def test_components_that_do_not_fit(tiny_tokenizer, tiny_transformer, text_pipeline):
    scheduler = FlowMatchAdamsBashforthScheduler()
    text_tokenizer = text_pipeline.text_tokenizer
    with pytest.raises(ValueError, match="needs its text_tokenizer"):
        DARPipeline(tiny_tokenizer, text_pipeline.transformer, scheduler)
    with pytest.raises(ValueError, match="takes no text_tokenizer"):
        DARPipeline(tiny_tokenizer, tiny_transformer, scheduler, text_tokenizer=text_tokenizer)
    with pytest.raises(ValueError, match="must be a tokenizer of transformers, got 5"):
        DARPipeline(tiny_tokenizer, text_pipeline.transformer, scheduler, text_tokenizer=5)
    small = make_text_transformer()
    with pytest.raises(ValueError, match=f"text_tokenizer has {len(text_tokenizer)} tokens, the transformer knows 40"):
        DARPipeline(tiny_tokenizer, small, scheduler, text_tokenizer=text_tokenizer)


def test_save_and_load(text_pipeline, tmp_path):
    text_pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.text_tokenizer, PreTrainedTokenizerFast)
    options = {"prompt": [*PROMPTS, "猫"], "output_type": "pt"}
    expected = text_pipeline(generator=seeded(), **options).images
    assert same(loaded(generator=seeded(), **options).images, expected)
    half = DARPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16


def test_folders_of_class_pipelines_have_no_tokenizer_of_text(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "text_tokenizer").exists()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("text_tokenizer") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # as versions before text wrote it
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert loaded.text_tokenizer is None
    options = {"temperature": 0, "output_type": "codes"}
    assert torch.equal(loaded([0, 3], **options).images, tiny_pipeline([0, 3], **options).images)


def test_text_tokenizer_of_bytes():
    tokenizer = learn_text_tokenizer(CAPTIONS, 256)
    assert len(tokenizer) == 256
    assert tokenizer.decode(tokenizer("猫 apple 🙂").input_ids).strip() == "猫 apple 🙂"
    with pytest.raises(ValueError, match="at least 256 tokens, one per byte; got 255"):
        learn_text_tokenizer(CAPTIONS, 255)
