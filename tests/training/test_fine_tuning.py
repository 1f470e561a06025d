"""Runs that start from a saved model, adapters, and runs that are asked to stop."""

import os
import signal
import threading

import pytest
import torch

from dar_hf import DARPipeline, DARTokenizer
from dar_hf.training import ARStage, TokenizerStage, make_accelerator, train
from dar_hf.training.checkpoints import list_checkpoints
from dar_hf.training.stopping import StoppedError
from dar_hf.utils.pictures import read_history

from .helpers import ar_args, ar_stage, fresh_process, tiny_tokenizer, tokenizer_args, tokenizer_stage


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pipeline")
    with fresh_process():
        stage, args = ar_stage(folder, tokenizer, ema_decay=None)
        train(stage, args, make_accelerator(args))
    return str(folder)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# Stage 1


def fine_tuned(folder, source, overrides=(), **options):
    args = tokenizer_args(folder, init_from=source, **options)
    args.model_overrides = list(overrides)
    return TokenizerStage.build(args), args


def test_a_tokenizer_starts_from_a_saved_one(tmp_path, tokenizer, pipeline):
    saved = DARTokenizer.from_pretrained(tokenizer).state_dict()
    for source in (tokenizer, pipeline):
        stage, args = fine_tuned(tmp_path / "run", source)
        assert same(stage.model.state_dict(), saved) and stage.model.training
    train(stage, args, make_accelerator(args))
    trained = DARTokenizer.from_pretrained(tmp_path / "run").state_dict()
    assert trained.keys() == saved.keys() and not same(trained, saved)


def test_half_precision_is_fine_tuned_in_float32(tmp_path, tokenizer):
    model = DARTokenizer.from_pretrained(tokenizer).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    stage, _ = fine_tuned(tmp_path / "run", str(tmp_path / "half"))
    assert {p.dtype for p in stage.model.parameters()} == {torch.float32}
    assert torch.equal(stage.model.denoiser.proj_in.weight, model.denoiser.proj_in.weight.float())


def test_a_repa_head_can_be_added(tmp_path, tokenizer):
    stage, _ = fine_tuned(tmp_path, tokenizer, ["repa_layer=0", "repa_dim=8", "time_shift=3.0"])
    assert stage.model.config.repa_dim == 8 and stage.model.config.time_shift == 3.0
    saved = DARTokenizer.from_pretrained(tokenizer).state_dict()
    assert all(torch.equal(stage.model.state_dict()[name], saved[name]) for name in saved)


def test_codes_can_be_grouped_anew(tmp_path, tokenizer):
    stage, _ = fine_tuned(tmp_path, tokenizer, ["num_groups=2"])
    config = stage.model.config
    assert (config.num_groups, config.tokens_per_group, config.num_inference_steps) == (2, config.num_tokens // 2, 2)
    stage, _ = fine_tuned(tmp_path, tokenizer, ["num_groups=2", "num_inference_steps=5"])
    assert stage.model.config.num_inference_steps == 5


@pytest.mark.parametrize("item", ["encoder_dim=64", "num_encoder_layers=2", "num_encoder_layers=0"])
def test_overrides_that_the_weights_do_not_fit(tmp_path, tokenizer, item):
    with pytest.raises(ValueError, match="does not fit --model_overrides|num_encoder_layers"):
        fine_tuned(tmp_path, tokenizer, [item])


def test_sources_that_are_none(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="init_from: no tokenizer at './nothing'"):
        fine_tuned(tmp_path, "./nothing")
    with pytest.raises(ValueError, match="pass --unquantized_steps 0"):
        fine_tuned(tmp_path, tokenizer, unquantized_steps=2)
    with pytest.raises(ValueError, match="init_from: no language model at './nothing'"):
        ARStage.build(ar_args(tmp_path, tokenizer, init_from="./nothing", model_overrides=None))


# Stage 2


def adapted(folder, tokenizer, pipeline, **options):
    args = ar_args(folder, tokenizer, init_from=pipeline, model_overrides=None, **options)
    return ARStage.build(args), args


def test_a_language_model_starts_from_a_saved_one(tmp_path, tokenizer, pipeline):
    saved = DARPipeline.from_pretrained(pipeline).transformer.state_dict()
    for source in (pipeline, f"{pipeline}/transformer"):
        stage, _ = adapted(tmp_path, tokenizer, source)
        assert same(stage.model.state_dict(), saved) and stage.model.training


def test_what_a_saved_language_model_must_be(tmp_path, tokenizer, pipeline):
    args = ar_args(tmp_path, tokenizer, init_from=pipeline)
    args.model_overrides = ["hidden_size=64"]
    with pytest.raises(ValueError, match="only dropouts can change, not hidden_size"):
        ARStage.build(args)
    args.model_overrides = ["token_dropout=0.4"]
    assert ARStage.build(args).model.config.token_dropout == 0.4
    tiny_tokenizer(codebook_size=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has codebook_size=16, the tokenizer and data have 8"):
        adapted(tmp_path, str(tmp_path / "other"), pipeline)


def test_only_adapters_train_and_they_are_merged(tmp_path, tokenizer, pipeline):
    stage, args = adapted(tmp_path, tokenizer, pipeline, lora_rank=2, learning_rate=1e-2, ema_decay=None)
    before = state(stage.model)
    names = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    train(stage, args, make_accelerator(args))
    after = state(stage.model)
    assert {name for name in after if not torch.equal(before[name], after[name])} == names
    merged = DARPipeline.from_pretrained(tmp_path).transformer
    original = DARPipeline.from_pretrained(pipeline).transformer
    assert type(merged) is type(original) and merged.state_dict().keys() == original.state_dict().keys()
    ids = torch.tensor([[16, 1, 2, 3], [20, 5, 6, 7]])
    with torch.no_grad():
        stage.model.eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, stage.model(input_ids=ids).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(merged(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-3)


def test_adapters_resume_exactly(tmp_path, tokenizer, pipeline):
    found = []
    for resume in (None, "checkpoint-3"):
        with fresh_process():
            options = {"lora_rank": 2, "checkpointing_steps": 3, "resume_from_checkpoint": resume}
            stage, args = adapted(tmp_path, tokenizer, pipeline, **options)
            train(stage, args, make_accelerator(args))
            found.append(state(stage.model))
    assert same(*found)


def test_adapters_need_a_model(tmp_path, tokenizer):
    for options in ({"lora_rank": 2}, {"lora_rank": -1}, {"lora_alpha": 0}):
        with pytest.raises(ValueError, match="give --init_from with --lora_rank|lora_rank must not"):
            ar_args(tmp_path, tokenizer, **options)


# SIGTERM


@pytest.mark.parametrize("checkpointing", [0, 1, 4])
def test_sigterm_leaves_a_checkpoint_that_goes_on(tmp_path, checkpointing):
    options = {"max_train_steps": 6, "checkpointing_steps": checkpointing, "checkpoints_total_limit": None}
    with fresh_process():
        whole, args = tokenizer_stage(tmp_path / "whole", **options)
        train(whole, args, make_accelerator(args))
    with fresh_process():
        stage, args = tokenizer_stage(tmp_path / "run", **options)
        after_step = stage.after_step

        def interrupt(step, *rest):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            after_step(step, *rest)

        stage.after_step = interrupt
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(StoppedError, match="after step 2 of 6; checkpoint-2 is saved.*_checkpoint latest"):
            train(stage, args, make_accelerator(args))
        assert signal.getsignal(signal.SIGTERM) is handler
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "checkpoint-2"
    assert not (tmp_path / "run" / "config.json").exists()
    with fresh_process():
        again, args = tokenizer_stage(tmp_path / "run", **options, resume_from_checkpoint="latest")
        train(again, args, make_accelerator(args))
    assert same(whole.model.state_dict(), again.model.state_dict())
    assert [line["step"] for line in read_history(tmp_path / "run" / "history.jsonl")] == [1, 2, 3, 4, 5, 6, 6]


def test_sigterm_in_the_last_step_lets_the_run_end(tmp_path):
    stage, args = tokenizer_stage(tmp_path, max_train_steps=2)
    after_step = stage.after_step

    def interrupt(step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(step, *rest)

    stage.after_step = interrupt
    train(stage, args, make_accelerator(args))
    assert (tmp_path / "config.json").is_file()


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    stage, args = tokenizer_stage(tmp_path, max_train_steps=1)
    errors = []

    def run():
        try:
            train(stage, args, make_accelerator(args))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == [] and (tmp_path / "config.json").is_file()
