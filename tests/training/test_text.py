"""Stage 2 on captions: what it learns, its text tokenizer, cached and stored codes, and what it refuses."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from dar_hf import DARPipeline
from dar_hf.data import SeedFor, bernoulli_mask
from dar_hf.training import ARStage, make_accelerator, train
from dar_hf.training.distillation import divergence_sum
from dar_hf.training.extraction import ExtractArguments, extract_codes
from dar_hf.training.loop import TrainingLoop
from dar_hf.training.text import learn_text_tokenizer

from .helpers import ar_args, ar_stage, batch_of, fresh_process

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEXT = {"caption_column": "caption", "text_vocab_size": 300, "max_train_samples": None}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Folder of 24 digits with captions of their own, and 6 more to validate on."""
    from dar_hf.data.sources import load_digits

    folder = tmp_path_factory.mktemp("captioned")
    digits = load_digits("train")
    for name, rows in (("train", range(24)), ("test", range(24, 30))):
        part = digits.select(rows)
        captions = [f"a {WORDS[label]} number {row}" for label, row in zip(part["label"], rows, strict=True)]
        part.remove_columns("label").add_column("caption", captions).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def text_stage(folder, tokenizer, data, **changes):
    return ar_stage(folder, tokenizer, **{"dataset_name": data} | TEXT | changes)


def prompts_of(stage):
    """The captions of the training images as the model sees them."""
    config = stage.model.config
    return [config.text_token_ids(stage.text_tokenizer(f"a {WORDS[i % 10]} number {i}").input_ids) for i in range(24)]


def test_captions_become_tokens(tmp_path, tokenizer, captioned):
    stage, _ = text_stage(tmp_path, tokenizer, captioned)
    config = stage.model.config
    assert config.text_vocab_size == len(stage.text_tokenizer) <= 300 and config.num_classes == 0
    longest = max(len(stage.text_tokenizer(f"a {WORDS[i % 10]} number {i}").input_ids) for i in range(24))
    assert config.max_text_tokens == longest
    batch = batch_of(stage, [(3, 0), (17, 1)])
    expected = torch.tensor(prompts_of(stage))
    assert torch.equal(batch["label"], expected[[3, 17]])
    assert stage.id2label is None and stage.validation.labels.shape == (4, longest)


def test_it_learns_what_the_captions_say(tmp_path, tokenizer, captioned):
    """Codes by heart: greedy decoding of a caption gives its own, and without the text they are others."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    none = dict.fromkeys(["resid_dropout", "ffn_dropout", "token_dropout"], 0)
    options = {"max_train_steps": 250, "train_batch_size": 24, "learning_rate": 3e-3, "ema_decay": None}
    stage, args = text_stage(tmp_path, tokenizer, captioned, model=sizes | none, **options)
    codes = torch.randint(0, 16, (24, 16), generator=torch.Generator().manual_seed(0))
    stage.samples.codes = codes[:, None]  # the tiny tokenizer's are nearly the same for all images
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = iter(loop.batches)
    stage.model.train()
    for step in range(args.max_train_steps):
        loop._step(step, [next(batches)])
    pipeline = stage._pipeline(stage.model)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"a {WORDS[i % 10]} number {i}" for i in range(24)]
    options = {"temperature": 0, "guidance_scale": 1.0, "output_type": "codes"}
    assert (pipeline(prompt=prompts, **options).images == codes).float().mean() > 0.9
    assert (pipeline(prompt=[""] * 24, **options).images == codes).float().mean() < 0.3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_are_encoded_as_they_come(tmp_path, tokenizer, captioned, num_workers):
    losses = []
    for cached in (True, False):
        options = {"cache_codes": cached, "dataloader_num_workers": num_workers}
        stage, args = text_stage(tmp_path, tokenizer, captioned, model={"class_dropout": 0.5}, **options)
        loop = TrainingLoop(stage, args, make_accelerator(args))
        torch.manual_seed(0)
        batches = iter(loop.batches)
        losses.append([loop._step(step, [next(batches)]) for step in range(3)])
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_caption_dropout(tmp_path, tokenizer, captioned):
    """Rows that lose their text are those of the class model, and see null tokens only."""
    stage, _ = text_stage(tmp_path, tokenizer, captioned, model={"class_dropout": 0.5})
    seen = []
    stage.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = batch_of(stage, [(i, 100 + i) for i in range(24)])
    stage.forward(stage.model.train(), batch, 0)
    dropped = bernoulli_mask(batch["seed"], 0.5, SeedFor.CLASS_DROPOUT)
    assert 0 < dropped.sum() < 24
    length = stage.model.config.max_text_tokens
    null = torch.full_like(batch["label"], stage.model.config.null_token_id)
    assert torch.equal(seen[0][:, :length], torch.where(dropped[:, None], null, batch["label"]))
    assert torch.equal(seen[0][:, length:], batch["codes"][:, :-1])


def test_a_run_leaves_a_pipeline(tmp_path, tokenizer, captioned, caplog):
    with caplog.at_level("INFO"):
        stage, args = text_stage(tmp_path / "run", tokenizer, captioned)
    assert "samples are drawn of: a four number 24; a six number 26" in caplog.text
    metrics, pictures = stage.validate(0)
    assert metrics["cross_entropy"] == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-4)  # the head is zero
    assert pictures["samples"].height > pictures["samples"].width * 4 / 9
    train(stage, args, make_accelerator(args))
    pipeline = DARPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_tokenizer("a two number 5").input_ids == stage.text_tokenizer("a two number 5").input_ids
    assert len(pipeline(prompt=["a two", "猫"]).images) == 2
    assert "pipe(prompt=" in (tmp_path / "run" / "README.md").read_text()


def test_a_stream_of_captions(tmp_path, tokenizer, captioned):
    options = {"streaming": True, "cache_codes": False, "dataloader_num_workers": 1}
    stage, args = text_stage(tmp_path / "run", tokenizer, captioned, **options)
    whole, _ = text_stage(tmp_path / "whole", tokenizer, captioned)
    assert stage.text_tokenizer.get_vocab() == whole.text_tokenizer.get_vocab()
    assert stage.model.config.to_dict() == whole.model.config.to_dict()
    batch = next(iter(TrainingLoop(stage, args, make_accelerator(args)).batches))
    prompts = [tuple(row) for row in prompts_of(stage)]
    assert batch["label"].shape == (4, stage.model.config.max_text_tokens)
    assert {tuple(row) for row in batch["label"].tolist()} <= set(prompts)
    train(stage, args, make_accelerator(args))
    assert DARPipeline.from_pretrained(tmp_path / "run").text_tokenizer is not None


# Codes


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer, captioned):
    folder = tmp_path_factory.mktemp("stored") / "codes"
    with fresh_process():
        args = ExtractArguments(tokenizer, captioned, str(folder), crop="center", caption_column="caption")
        extract_codes(args, Accelerator(cpu=True))
    return str(folder)


def test_stored_codes_carry_captions(tmp_path, tokenizer, captioned, stored):
    dataset = datasets.load_dataset(stored, split="train")
    assert set(dataset.column_names) == {"codes", "caption"} and dataset["caption"][7] == "a seven number 7"
    online, _ = text_stage(tmp_path / "a", tokenizer, captioned)
    from_disk, _ = text_stage(tmp_path / "b", tokenizer, captioned, codes=stored, cache_codes=False)
    alone, _ = text_stage(tmp_path / "c", tokenizer, "", codes=stored, cache_codes=False)
    keys = [(index, 7 * index) for index in range(24)]
    for stage in (from_disk, alone):
        for name, value in batch_of(online, keys).items():
            assert torch.equal(batch_of(stage, keys)[name], value), name
    assert len(from_disk.validation) == 4 and alone.validation is None
    assert len(alone.sample_conditions["text_ids"]) == 8 * 8  # 24 captions, every third one


def test_codes_of_the_other_kind(tmp_path, tokenizer, stored, captioned):
    with pytest.raises(ValueError, match="have no labels but captions: give --caption_column"):
        ar_stage(tmp_path, tokenizer, codes=stored, cache_codes=False, dataset_name="")
    folder = str(tmp_path / "labels")
    extract_codes(ExtractArguments(tokenizer, "digits", folder, "train[:8]", crop="center"), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="have no captions but labels: leave out --caption_column"):
        text_stage(tmp_path, tokenizer, captioned, codes=folder, cache_codes=False)


# Text tokenizers


def test_a_given_text_tokenizer(tmp_path, tokenizer, captioned):
    learn_text_tokenizer(["nine eight seven"] * 3, 270).save_pretrained(tmp_path / "given")
    stage, _ = text_stage(tmp_path / "run", tokenizer, captioned, text_tokenizer=str(tmp_path / "given"))
    assert stage.text_tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "given").get_vocab()
    other, _ = text_stage(tmp_path / "run", tokenizer, captioned)
    assert stage.describe()["text_tokenizer"] != other.describe()["text_tokenizer"]
    with pytest.raises(ValueError, match="no text tokenizer at"):
        text_stage(tmp_path / "run", tokenizer, captioned, text_tokenizer=str(tmp_path / "missing"))


def test_longer_captions_are_cut(tmp_path, tokenizer, captioned, caplog):
    stage, _ = text_stage(tmp_path, tokenizer, captioned, max_text_tokens=2)
    assert stage.model.config.max_text_tokens == 2 and stage.samples.labels.shape == (24, 2)
    assert "24 of 24 texts have more than the model's 2 tokens" in caplog.text


def test_fine_tuning(tmp_path, tokenizer, captioned):
    """A saved model brings its text tokenizer, whatever the captions are now."""
    stage, _ = text_stage(tmp_path / "first", tokenizer, captioned)
    stage.save(tmp_path / "saved")
    options = {"init_from": str(tmp_path / "saved"), "model_overrides": None}
    again, _ = text_stage(tmp_path / "second", tokenizer, "digits", **options | {"caption_column": "label"})
    assert again.text_tokenizer.get_vocab() == stage.text_tokenizer.get_vocab()
    assert again.model.config.max_text_tokens == stage.model.config.max_text_tokens
    with pytest.raises(ValueError, match=r"draws from text: give --caption_column\."):
        ar_stage(tmp_path / "third", tokenizer, **options)
    with pytest.raises(ValueError, match="brings its own text tokenizer: leave out --text_tokenizer"):
        text_stage(tmp_path / "third", tokenizer, captioned, **options, text_tokenizer=str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="there is no text tokenizer next to"):
        stage.model.save_pretrained(tmp_path / "alone" / "transformer")
        text_stage(tmp_path / "third", tokenizer, captioned, **options | {"init_from": str(tmp_path / "alone")})
    classes, _ = ar_stage(tmp_path / "classes", tokenizer)
    classes.save(tmp_path / "of_classes")
    options |= {"init_from": str(tmp_path / "of_classes"), "text_tokenizer": str(tmp_path / "saved")}
    with pytest.raises(ValueError, match=r"draws from class labels: leave out --caption_column\."):
        text_stage(tmp_path / "third", tokenizer, captioned, **options)


def test_adapters(tmp_path, tokenizer, captioned):
    pytest.importorskip("peft")
    stage, _ = text_stage(tmp_path / "first", tokenizer, captioned)
    stage.save(tmp_path / "saved")
    options = {"init_from": str(tmp_path / "saved"), "model_overrides": None, "lora_rank": 2}
    stage, args = text_stage(tmp_path / "second", tokenizer, captioned, **options)
    train(stage, args, make_accelerator(args))
    assert DARPipeline.from_pretrained(tmp_path / "second").text_tokenizer is not None


def test_guidance_of_texts_is_distilled(tmp_path, tokenizer, captioned):
    with fresh_process():
        stage, _ = text_stage(tmp_path / "first", tokenizer, captioned)
    torch.manual_seed(0)
    for parameter in (stage.model.lm_head.weight, stage.model.model.embed_tokens.weight):
        torch.nn.init.normal_(parameter, std=0.5)  # so that texts make a difference
    stage.save(tmp_path / "saved")
    options = {"init_from": str(tmp_path / "saved"), "model_overrides": None, "distill_guidance": [3.0]}
    recipe = {"max_train_steps": 60, "train_batch_size": 24, "learning_rate": 3e-3, "ema_decay": None}
    stage, args = text_stage(tmp_path / "second", tokenizer, captioned, **options | recipe)
    prompts = torch.tensor(prompts_of(stage))
    codes = stage.samples.codes[:, 0]
    kept = torch.zeros(24, dtype=torch.bool)

    def divergence():
        with torch.no_grad():
            logits = stage._logits(stage.model.eval(), codes, prompts, kept)
            return divergence_sum(logits, stage.teacher.logits(stage._tokens(codes, prompts), kept)).item()

    before = divergence()
    train(stage, args, make_accelerator(args))
    assert divergence() < 0.3 * before
    saved = DARPipeline.from_pretrained(tmp_path / "second")
    assert saved.transformer.generation_config.guidance_scale == 1.0 and saved.text_tokenizer is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_vocab_size": 255}, "text_vocab_size must be at least 256"),
        ({"max_text_tokens": 0}, "max_text_tokens must be at least 1"),
        ({"caption_column": None, "text_tokenizer": "t5"}, "give --caption_column with --text_tokenizer"),
        ({"init_from": "x", "new_classes": "null"}, "--new_classes cannot be combined with"),
        ({"init_from": "x", "max_text_tokens": 3}, "max_text_tokens is that of the saved model"),
        ({"model_overrides": ["max_text_tokens=3"]}, "DARConfig has no options max_text_tokens"),
        ({"caption_column": "missing"}, "has no column 'missing' for the captions"),
    ],
)
def test_options_that_do_not_fit(tmp_path, tokenizer, captioned, changes, message):
    with pytest.raises(ValueError, match=message):
        ARStage.build(ar_args(tmp_path, tokenizer, **{"dataset_name": captioned} | TEXT | changes))
