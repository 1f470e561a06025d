"""Guidance distilled into one pass: what is learned, from which codes, what is saved, and what is refused."""

import pytest
import torch

from dar_hf import DARPipeline
from dar_hf.hub.run_cards import run_card
from dar_hf.sampling_dar import guidance_schedule
from dar_hf.training import ARStage, make_accelerator, train
from dar_hf.training.distillation import GuidedTeacher, divergence_sum
from dar_hf.utils.pictures import read_history

from .helpers import TINY_TRANSFORMER, ar_args, ar_stage, batch_of, fresh_process

SCALE = [1.5, 3.0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tokenizer):
    """Folder of a pipeline whose classes differ, so that guidance means something."""
    with fresh_process():
        stage, _ = ar_stage(tmp_path_factory.mktemp("run"), tokenizer, guidance_scale=[2.0])
    torch.manual_seed(0)
    for parameter in (stage.model.lm_head.weight, stage.model.model.embed_tokens.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("pipeline")
    stage.save(folder)
    return str(folder)


def distilled(folder, tokenizer, pipeline, **changes):
    options = {"distill_guidance": SCALE, "distill_samples": 64, "model_overrides": None}
    args = ar_args(folder, tokenizer, init_from=pipeline, **options | changes)
    return ARStage.build(args), args


def tokens_of(model, codes, labels):
    return torch.cat([torch.as_tensor(labels)[:, None] + model.config.codebook_size, codes[:, :-1]], dim=1)


def divergence(stage):
    """Of the teacher's guided distribution to the model's own, in nats for each code."""
    codes = stage.samples.codes[:, 0]
    labels = torch.tensor(stage.samples.labels)
    kept = torch.zeros(len(codes), dtype=torch.bool)
    with torch.no_grad():
        logits = stage._logits(stage.model.eval(), codes, labels, kept)
        return float(divergence_sum(logits, stage.teacher.logits(stage._tokens(codes, labels), kept))) / codes.numel()


def test_the_teacher_says_what_guided_generation_says(pipeline):
    model = DARPipeline.from_pretrained(pipeline).transformer
    teacher = GuidedTeacher(model, SCALE)
    codes = torch.cat(list(model.stream_codes([3, 7], guidance_scale=tuple(SCALE), temperature=0.0)), dim=1)
    kept = torch.zeros(2, dtype=torch.bool)
    logits = teacher.logits(tokens_of(model, codes, [3, 7]), kept)
    assert torch.equal(logits.argmax(-1), codes)  # at every position, with the scale of that position
    with torch.no_grad():
        null = model.config.null_token_id - model.config.codebook_size
        with_class, without = (
            model(tokens_of(model, codes, labels), logits_to_keep=codes.shape[1]).logits
            for labels in ([3, 7], [null, null])
        )
    scales = torch.tensor(guidance_schedule(tuple(SCALE), codes.shape[1]))[:, None]
    assert torch.allclose(logits, without + scales * (with_class - without), atol=1e-5)
    dropped = teacher.logits(tokens_of(model, codes, [3, 7]), torch.tensor([True, False]))
    assert torch.allclose(dropped[0], without[0], atol=1e-5) and torch.allclose(dropped[1], logits[1], atol=1e-5)


def test_the_teacher_draws_each_class_alike_whatever_the_batches(pipeline, monkeypatch):
    model = DARPipeline.from_pretrained(pipeline).transformer
    teacher = GuidedTeacher(model, SCALE)
    drawn = teacher.draw(20, seed=1)
    assert drawn.codes.shape == (20, 1, model.config.num_image_tokens)
    assert drawn.labels == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2
    monkeypatch.setattr("dar_hf.training.distillation.ENCODE_BATCH", 7)
    assert torch.equal(teacher.draw(20, seed=1).codes, drawn.codes)
    assert not torch.equal(teacher.draw(20, seed=2).codes, drawn.codes)


def test_a_run_brings_the_model_near_its_own_guided_distribution(tmp_path, tokenizer, pipeline):
    recipe = {"max_train_steps": 60, "train_batch_size": 32, "learning_rate": 3e-3}
    stage, args = distilled(tmp_path / "run", tokenizer, pipeline, **recipe)
    config = stage.model.config
    assert (config.token_dropout, config.resid_dropout, config.ffn_dropout) == (0, 0, 0)
    before = divergence(stage)
    train(stage, args, make_accelerator(args))
    assert divergence(stage) < 0.3 * before
    history = read_history(tmp_path / "run" / "history.jsonl")
    assert any("loss/divergence" in line for line in history)
    assert not any("loss/cross_entropy" in line for line in history)
    saved = DARPipeline.from_pretrained(tmp_path / "run")
    assert saved.transformer.generation_config.guidance_scale == 1.0
    assert saved.config.id2label == DARPipeline.from_pretrained(pipeline).config.id2label
    card = str(run_card(tmp_path / "run", "me/digits"))
    assert (
        "64 sequences that the model drew itself" in card and "scikit-learn" not in card and str(tmp_path) not in card
    )
    teacher = DARPipeline.from_pretrained(pipeline).transformer.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in stage.teacher.model.state_dict().items())


def test_drawn_codes_are_of_no_crop(tmp_path, tokenizer, pipeline):
    stage, _ = distilled(tmp_path, tokenizer, pipeline, crop="ten", flip=True)
    for seed in range(20):
        assert torch.equal(stage.samples[3, seed]["codes"], stage.samples.codes[3, 0])


def test_codes_of_a_data_set_are_learned_from_too(tmp_path, tokenizer, pipeline):
    stage, _ = distilled(tmp_path, tokenizer, pipeline, distill_samples=0)
    batch = batch_of(stage, [(0, 0), (1, 1), (2, 2), (3, 3)])
    stage.prepare(make_accelerator(ar_args(tmp_path, tokenizer)))
    logits = stage.forward(stage.model.train(), batch, 0)
    assert stage.terms[0].name == "divergence"
    assert stage.terms[0].function(logits, batch, 0).item() > 0


def test_adapters_are_distilled_into(tmp_path, tokenizer, pipeline):
    pytest.importorskip("peft")
    stage, args = distilled(tmp_path / "run", tokenizer, pipeline, lora_rank=4, max_train_steps=2, ema_decay=None)
    train(stage, args, make_accelerator(args))
    saved = DARPipeline.from_pretrained(tmp_path / "run").transformer.state_dict()
    start = DARPipeline.from_pretrained(pipeline).transformer.state_dict()
    moved = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert moved and all("_proj" in name for name in moved)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_from": None, "distill_guidance": [2.0]}, "distill_guidance is that of a saved model"),
        ({"new_classes": "null", "distill_guidance": [2.0]}, "distill_guidance is that of a saved model"),
        ({"distill_guidance": [1.0, 2.0, 3.0]}, "distill_guidance takes one scale or two ends"),
        ({"distill_guidance": [-1.0]}, "distill_guidance must be finite and not negative"),
        ({"distill_samples": 8}, "give --distill_guidance with it"),
        ({"distill_guidance": [2.0], "distill_samples": -1}, "distill_samples must not be negative"),
        ({"distill_guidance": [2.0], "distill_samples": 8, "caption_column": "text"}, "give a data set instead"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, tokenizer, pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        ar_args(tmp_path, tokenizer, **{"init_from": pipeline, "model_overrides": None} | options)


def test_a_scale_of_one_is_nothing_to_distill(tmp_path, tokenizer, pipeline):
    with pytest.raises(ValueError, match="nothing to distill"):
        distilled(tmp_path, tokenizer, pipeline, distill_guidance=[1.0])


def test_another_scale_is_another_run(tmp_path, tokenizer, pipeline):
    first, _ = distilled(tmp_path / "a", tokenizer, pipeline)
    again, _ = distilled(tmp_path / "a", tokenizer, pipeline)
    assert again.describe() == first.describe()
    with torch.no_grad():
        again.teacher.model.lm_head.weight += 1
    assert again.describe() != first.describe()  # of another teacher
    second, _ = distilled(tmp_path / "b", tokenizer, pipeline, distill_guidance=[2.0])
    assert first.describe() != second.describe()
    assert "distill_guidance" not in ar_stage(tmp_path / "c", tokenizer, TINY_TRANSFORMER)[0].describe()
