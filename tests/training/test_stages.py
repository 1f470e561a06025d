"""What each stage brings: every parameter learns, batches and layouts agree, codebook care, validation, folders."""

import io
import json
import math
import shutil

import datasets
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from dar_hf import DARConfig, DARPipeline, DARTokenizer
from dar_hf.training import ARStage, TokenizerStage, make_accelerator, train
from dar_hf.training.checkpoints import find_checkpoint
from dar_hf.training.loop import TrainingLoop
from dar_hf.training.losses import cross_entropy_sum
from dar_hf.training.run_folder import claim_output_dir
from dar_hf.utils.pictures import read_history

from .helpers import ar_args, ar_stage, batch_of, fresh_process, tiny_tokenizer, tokenizer_args, tokenizer_stage

NO_DROPOUT = {"resid_dropout": 0, "ffn_dropout": 0, "token_dropout": 0}


def stage_of(name, folder, tokenizer, model=None, **changes):
    if name == "tokenizer":
        return tokenizer_stage(folder, model, **changes)
    return ar_stage(folder, tokenizer, model, **changes)


def run_steps(stage, args, count):
    """The loop after ``count`` steps, and the lines it would log."""
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = iter(loop.batches)
    stage.model.train()
    lines = []
    for step in range(count):
        lines.append(loop._step(step, [next(batches) for _ in range(args.gradient_accumulation_steps)]))
    return loop, lines


# Compiled


@pytest.mark.parametrize("name, scope", [("tokenizer", "group"), ("tokenizer", "prefix"), ("ar", "group")])
def test_a_model_is_compiled_once_and_whole(tmp_path, tokenizer, name, scope):
    stage, args = stage_of(name, tmp_path / "run", tokenizer)
    if name == "tokenizer":
        stage.model.register_to_config(condition_scope=scope)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    torch._dynamo.reset()  # other tests may have compiled the same code
    counter, batches = CompileCounter(), iter(loop.batches)
    loop.model = torch.compile(loop.model, backend=counter)
    stage.model.train()
    for step in range(3):
        loop._step(step, [next(batches)])
    assert counter.frame_count == 1


# Every parameter learns


def unmoved(stage, args, steps):
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    run_steps(stage, args, steps)
    return {name for name, p in stage.model.named_parameters() if torch.equal(p, before[name])}


PAPER = {"gate_start": 0.0, "modulation_std": 0.0, "output_std": 0.0, "post_quant_std": 0.0, "adam_epsilon": 1e-8}


@pytest.mark.parametrize("recipe, steps", [({}, 3), ({"unquantized_steps": 4}, 3), (PAPER, 8)])
def test_every_parameter_of_the_tokenizer_moves(tmp_path, recipe, steps):
    stage, args = tokenizer_stage(tmp_path, max_train_steps=8, weight_decay=0.0, **recipe)
    assert unmoved(stage, args, steps) == set()


def test_options_of_the_tokenizer_move_too(tmp_path):
    model = {"share_time_embedding": True, "adaptive_head": True, "low_rank_queries": False}
    stage, args = tokenizer_stage(tmp_path, model, weight_decay=0.0)
    assert unmoved(stage, args, 3) == set()


def test_only_the_repa_head_stands_still(tmp_path):
    stage, args = tokenizer_stage(tmp_path, {"repa_layer": 0, "repa_dim": 4})
    names = {name for name, _ in stage.model.named_parameters() if "repa_head" in name}
    assert unmoved(stage, args, 3) == names != set()


def test_every_parameter_of_the_transformer_moves(tmp_path, tokenizer):
    stage, args = ar_stage(tmp_path, tokenizer, weight_decay=0.0)
    assert unmoved(stage, args, 3) == set()


def test_the_tokenizer_of_stage_two_stands_still(tmp_path, tokenizer):
    stage, args = ar_stage(tmp_path, tokenizer, cache_codes=False)
    before = {name: tensor.clone() for name, tensor in stage.tokenizer.state_dict().items()}
    run_steps(stage, args, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.tokenizer.state_dict().items())
    assert not stage.tokenizer.training and not any(p.requires_grad for p in stage.tokenizer.parameters())


# Parameter groups


def grouped(stage):
    names = {id(p): name for name, p in stage.model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in stage.parameter_groups()]


def test_the_encoder_has_its_own_rate(tmp_path):
    stage, _ = tokenizer_stage(tmp_path, learning_rate=1e-2, encoder_learning_rate=1e-3)
    (decoder, first), (encoder, second) = grouped(stage)
    assert (first["lr"], second["lr"]) == (1e-2, 1e-3)
    assert encoder | decoder == {name for name, _ in stage.model.named_parameters()} and not encoder & decoder
    assert {name.split(".")[0] for name in encoder} == {
        "patch_embed",
        "query_embed",
        "query_proj",
        "encoder_blocks",
        "quant_proj",
    }
    assert {"quantizer.codebook.weight", "post_quant_proj.weight", "token_embed.weight"} <= decoder


def test_one_rate_without_another_for_the_encoder(tmp_path):
    stage, _ = tokenizer_stage(tmp_path, learning_rate=1e-2, encoder_learning_rate=None)
    assert [group["lr"] for _, group in grouped(stage)] == [1e-2, 1e-2]


def test_decay_is_for_matrices_only(tmp_path, tokenizer):
    stage, args = ar_stage(tmp_path, tokenizer, weight_decay=0.05)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    decayed, free = (group for group in loop.optimizer.param_groups)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(stage.model.parameters()))


# Batches


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
@pytest.mark.parametrize("batch, accumulation", [(1, 8), (2, 4)])
def test_accumulation_changes_nothing(tmp_path, tokenizer, name, batch, accumulation):
    def run(batch, accumulation):
        model = NO_DROPOUT | {"class_dropout": 0.5} if name == "ar" else None
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-6}
        stage, args = stage_of(name, tmp_path, tokenizer, model, **options)
        _, lines = run_steps(stage, args, 3)
        return lines

    for whole, split in zip(run(8, 1), run(batch, accumulation), strict=True):
        assert whole.keys() == split.keys()
        for key in whole:
            assert split[key] == pytest.approx(whole[key], abs=1e-4, rel=1e-4), key


@pytest.mark.parametrize("times", [1, 3])
def test_tokens_are_counted_up_to_each_images_group(tmp_path, times):
    stage, _ = tokenizer_stage(tmp_path, times_per_image=times)
    batch = batch_of(stage, [(index, 1000 + index) for index in range(8)])
    output = stage.forward(stage.model, batch, 0)
    assert stage.loss_denominators(batch) == {"images": 8.0 * times, "tokens": float(output.token_mask.sum())}


def test_several_times_for_each_image_do_not_depend_on_the_layout_of_the_batch(tmp_path):
    def losses(batch, accumulation):
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-6}
        stage, args = tokenizer_stage(tmp_path, times_per_image=2, group_dropout=0.5, **options)
        _, lines = run_steps(stage, args, 3)
        return [line["loss/total"] for line in lines]

    assert losses(2, 4) == pytest.approx(losses(8, 1), rel=1e-4)


def test_codes_are_counted(tmp_path, tokenizer):
    for cache in (True, False):
        stage, _ = ar_stage(tmp_path, tokenizer, cache_codes=cache)
        assert stage.loss_denominators(batch_of(stage, [(0, 1), (3, 2)])) == {"images": 2.0, "tokens": 32.0}


@pytest.mark.parametrize("size", [15, 16, 31, 32, 33])
def test_codes_of_an_image_do_not_depend_on_its_batch(size):
    """The encoder's sequence has 32 places, that of the causal blocks 16: a batch as large must change nothing."""
    model = tiny_tokenizer().eval()
    images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together, alone = model.encode(images), [model.encode(image[None]) for image in images]
    torch.testing.assert_close(together.latents, torch.cat([one.latents for one in alone]), atol=1e-5, rtol=0)
    with torch.no_grad():
        conditions = torch.cat([model.condition(one.codes) for one in alone])
        torch.testing.assert_close(model.condition(torch.cat([one.codes for one in alone])), conditions)


@pytest.mark.parametrize("crop, flip", [("center", False), ("center", True), ("ten", False)])
def test_cached_codes_are_those_computed_online(tmp_path, tokenizer, crop, flip):
    keys = [(index % 32, 77 * index) for index in range(40)]
    results = []
    for cache in (True, False):
        stage, _ = ar_stage(tmp_path, tokenizer, NO_DROPOUT, cache_codes=cache, crop=crop, flip=flip)
        torch.nn.init.normal_(stage.model.lm_head.weight, generator=torch.Generator().manual_seed(0))
        batch = batch_of(stage, keys)
        assert ("codes" in batch) == cache
        logits = stage.forward(stage.model, batch, 0)
        results.append((batch["codes"], batch["label"], logits, cross_entropy_sum(logits, batch["codes"])))
    for cached, online in zip(*results, strict=True):
        assert torch.equal(cached, online)
    codes = results[0][0]
    if flip or crop == "ten":  # images 0 to 7 come twice, under other seeds
        assert any(not torch.equal(codes[i], codes[i + 32]) for i in range(8))


def test_what_cannot_be_counted_cannot_be_cached(tmp_path, tokenizer):
    for options in ({"crop": "random"}, {"pixel_noise": 0.1}):
        with pytest.raises(ValueError, match="variants that can be counted"):
            ar_stage(tmp_path, tokenizer, cache_codes=True, **options)


def test_the_class_is_dropped_for_the_samples_their_seeds_say(tmp_path, tokenizer):
    stage, _ = ar_stage(tmp_path, tokenizer, NO_DROPOUT | {"class_dropout": 0.5})
    torch.nn.init.normal_(stage.model.lm_head.weight)
    batch = batch_of(stage, [(0, seed) for seed in range(60)])
    one, other = dict(batch), dict(batch, label=batch["label"] + 1)
    same = (stage.forward(stage.model, one, 0) == stage.forward(stage.model, other, 0)).flatten(1).all(dim=1)
    assert 15 < same.sum() < 45
    reversed_batch = {name: value.flip(0) for name, value in other.items()}
    assert torch.equal(
        (stage.forward(stage.model, reversed_batch, 0).flip(0) == stage.forward(stage.model, one, 0))
        .flatten(1)
        .all(dim=1),
        same,
    )


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, name):
    found = []
    for checkpointing in (False, True):
        stage, args = stage_of(name, tmp_path, tokenizer, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        found.append(run_steps(stage, args, 2)[1])
    for plain, saving in zip(*found, strict=True):
        assert saving == pytest.approx(plain, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_half_precision_keeps_float32_weights(tmp_path, tokenizer, name):
    found = []
    for precision in ("no", "bf16"):
        with fresh_process():
            stage, args = stage_of(name, tmp_path, tokenizer, mixed_precision=precision)
            found.append(run_steps(stage, args, 3)[1][-1]["loss/total"])
            assert all(p.dtype == torch.float32 for p in stage.model.parameters())
    assert found[1] == pytest.approx(found[0], rel=0.03) and found[1] != found[0]


# The codebook


def test_the_codebook_starts_from_the_latents_everywhere(tmp_path):
    """After the continuous steps: weights, averages and the optimizer's memory."""
    stage, args = tokenizer_stage(tmp_path, unquantized_steps=3, ema_decay=0.9)
    loop, lines = run_steps(stage, args, 3)
    codebook = stage.model.quantizer.codebook.weight
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(len(codebook)))
    index = [p is codebook for p in stage.model.parameters()].index(True)
    assert torch.equal(loop.ema.shadow_params[index], codebook)
    assert not loop.optimizer.state[codebook]["exp_avg"].any()
    assert not loop.optimizer.state[codebook]["exp_avg_sq"].any()
    assert all(line["loss/commitment"] == 0 for line in lines)


def test_moved_codes_are_the_main_processs_in_weights_and_average(tmp_path, monkeypatch):
    """Here another process than this one had other vectors."""
    stage, args = tokenizer_stage(tmp_path, ema_decay=0.9)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    monkeypatch.setattr("dar_hf.training.tokenizer_stage.broadcast", lambda tensor: torch.ones_like(tensor))
    codebook = stage.model.quantizer.codebook.weight
    with torch.no_grad():
        stage._move_codes(torch.tensor([2, 5]), torch.zeros(2, codebook.shape[1]), loop.optimizer, loop.ema)
    index = [p is codebook for p in stage.model.parameters()].index(True)
    for table in (codebook, loop.ema.shadow_params[index]):
        assert (table[[2, 5]] == 1).all() and not (table[3] == 1).any()


def test_groups_are_hidden_at_their_rate(tmp_path, monkeypatch):
    stage, args = tokenizer_stage(tmp_path, group_dropout=0.5)
    hidden, forward = [], type(stage.model).forward

    def noted(self, *given, hide_group, **options):
        hidden.extend(hide_group.tolist())
        return forward(self, *given, hide_group=hide_group, **options)

    monkeypatch.setattr(type(stage.model), "forward", noted)
    run_steps(stage, args, 6)
    assert 0.2 < sum(hidden) / len(hidden) < 0.8
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="group_dropout must lie in"):
            tokenizer_stage(tmp_path / "other", group_dropout=wrong)


def test_quantizing_begins_after_the_unquantized_steps(tmp_path, monkeypatch):
    stage, args = tokenizer_stage(tmp_path, unquantized_steps=2)
    seen, forward = [], stage.model.forward
    monkeypatch.setattr(stage.model, "forward", lambda *a, **k: seen.append(k["quantize"]) or forward(*a, **k))
    _, lines = run_steps(stage, args, 4)
    assert seen == [False, False, True, True]
    assert [line["loss/commitment"] > 0 for line in lines] == seen


def test_dead_codes_move_to_latents(tmp_path):
    stage, args = tokenizer_stage(tmp_path, dead_code_interval=2, revive_until=1.0)
    loop, _ = run_steps(stage, args, 1)
    codebook = stage.model.quantizer.codebook.weight
    with torch.no_grad():
        codebook.copy_(torch.nn.functional.normalize(torch.tensor([[-1.0] * 8]), dim=-1))  # equal rows: code 0 wins
        before = codebook.clone()
    stage.keeper.counts.zero_()
    batches = iter(loop.batches)
    next(batches)
    loop._step(1, [next(batches)])
    moved = (codebook - before).norm(dim=1)
    assert moved[0] < 0.1 and (moved[1:] > 0.1).all()
    torch.testing.assert_close(codebook[1:].norm(dim=1), torch.ones(15))


# Validation, saving, resuming


def test_validation_of_the_tokenizer(tmp_path):
    stage, _ = tokenizer_stage(tmp_path, max_validation_samples=6)
    figures, pictures = stage.validate(0)
    assert set(figures) == {"psnr", "codebook_usage"} and 0 < figures["codebook_usage"] <= 1
    assert set(pictures) == {"reconstructions"}
    assert stage.validate(0)[0] == figures  # its noise is fixed


def test_validation_of_the_transformer(tmp_path, tokenizer):
    stage, _ = ar_stage(tmp_path, tokenizer, max_validation_samples=6)
    stage.model.eval()
    figures, pictures = stage.validate(0)
    assert figures["cross_entropy"] == pytest.approx(
        torch.log(torch.tensor(16.0)).item(), rel=1e-4
    )  # uniform at first
    samples = pictures["samples"]
    assert samples.width * 10 == pytest.approx(samples.height * 8, rel=0.02)  # ten rows of eight
    again = stage.validate(0)[1]["samples"]
    assert samples.tobytes() == again.tobytes()


def test_samples_are_drawn_by_the_solver_that_is_saved(tmp_path, tokenizer, monkeypatch):
    stage, _ = ar_stage(tmp_path, tokenizer, solver_order=1)
    decode = stage.tokenizer.decode
    orders = []

    def watched(codes, **options):
        orders.append(options["scheduler"].config.solver_order)
        return decode(codes, **options)

    monkeypatch.setattr(stage.tokenizer, "decode", watched)
    stage.model.eval()
    stage.validate(0)
    assert orders == [1]


def test_validation_leaves_the_random_generator_alone(tmp_path, tokenizer):
    for name in ("tokenizer", "ar"):
        stage, _ = stage_of(name, tmp_path, tokenizer)
        state = torch.get_rng_state()
        stage.model.eval()
        stage.validate(0)
        assert torch.equal(torch.get_rng_state(), state)


def test_no_validation_data(tmp_path, tokenizer):
    stage, args = tokenizer_stage(tmp_path)
    assert TokenizerStage(stage.model, stage.samples, args, None).validate(0) == ({}, {})
    stage, _ = ar_stage(tmp_path, tokenizer)
    stage.validation = None
    stage.model.eval()
    figures, pictures = stage.validate(0)
    assert figures == {} and set(pictures) == {"samples"}


def test_the_saved_tokenizer_is_the_trained_one(tmp_path):
    stage, args = tokenizer_stage(tmp_path, ema_decay=None)
    train(stage, args, make_accelerator(args))
    loaded = DARTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), stage.model.parameters(), strict=True))


def test_the_saved_pipeline_is_complete(tmp_path, tokenizer):
    stage, args = ar_stage(tmp_path, tokenizer, ema_decay=None, guidance_scale=[1.1, 4.0])
    train(stage, args, make_accelerator(args))
    pipe = DARPipeline.from_pretrained(tmp_path)
    for loaded, made in ((pipe.transformer, stage.model), (pipe.tokenizer, stage.tokenizer)):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made.parameters(), strict=True))
    assert list(pipe.transformer.generation_config.guidance_scale) == [1.1, 4.0]
    assert pipe.scheduler.config.shift == stage.tokenizer.config.time_shift
    assert pipe.get_label_ids(["7", "0"]) == [7, 0]
    (image,) = pipe("7", generator=torch.Generator().manual_seed(0)).images
    assert image.size == (8, 8)


@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_is_saved(tmp_path, tokenizer, order):
    stage, _ = ar_stage(tmp_path, tokenizer, solver_order=order)
    stage.save(tmp_path / "out")
    scheduler = DARPipeline.from_pretrained(tmp_path / "out").scheduler
    assert scheduler.config.solver_order == order
    with pytest.raises(ValueError, match="solver_order must be 1 or 2, got 3"):
        ar_args(tmp_path, tokenizer, solver_order=3)


def test_one_guidance_scale(tmp_path, tokenizer):
    stage, _ = ar_stage(tmp_path, tokenizer, guidance_scale=[1.5])
    assert stage.model.generation_config.guidance_scale == 1.5
    with pytest.raises(ValueError, match="one scale or two ends"):
        ar_args(tmp_path, tokenizer, guidance_scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        ar_args(tmp_path, tokenizer, guidance_scale=[1.0, math.nan])


CARE = {"max_train_steps": 16, "unquantized_steps": 7, "dead_code_interval": 2, "revive_until": 0.8, "ema_decay": 0.9}


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
@pytest.mark.parametrize("step", [4, 12])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, tokenizer, name, step):
    """Dropout included; for the tokenizer out of the warm-up and out of the revival of codes."""
    options = CARE if name == "tokenizer" else {"max_train_steps": 16, "ema_decay": 0.9}
    options = options | {"checkpointing_steps": 4, "checkpoints_total_limit": None, "validation_steps": 4}
    model = {"codebook_size": 4} if name == "tokenizer" else {"token_dropout": 0.3}
    with fresh_process():
        stage, args = stage_of(name, tmp_path / "whole", tokenizer, model, **options)
        claim_output_dir(args, stage.saved_class)
        train(stage, args, make_accelerator(args))
    checkpoint = find_checkpoint(tmp_path / "whole" / "checkpoints", f"checkpoint-{step}")
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoints" / checkpoint.name)
    with fresh_process():
        torch.manual_seed(1234)
        options["resume_from_checkpoint"] = "latest"
        again, args = stage_of(name, tmp_path / "resumed", tokenizer, model, **options)
        train(again, args, make_accelerator(args))
    whole, resumed = (
        [line for line in read_history(tmp_path / run / "history.jsonl") if line["step"] > step]
        for run in ("whole", "resumed")
    )
    for first, second in zip(whole, resumed, strict=True):
        first.pop("images_per_second", None), second.pop("images_per_second", None)
        assert second == pytest.approx(first, rel=1e-6, abs=1e-6), f"step {first['step']}"
    assert all(torch.equal(a, b) for a, b in zip(stage.model.parameters(), again.model.parameters(), strict=True))


# From arguments to stages


@pytest.mark.parametrize("item", ["encoder_dmi=32", "encoder_dim=33", "num_tokens=15", "codebook_size=0"])
def test_overrides_that_make_no_tokenizer(tmp_path, item):
    args = tokenizer_args(tmp_path)
    args.model_overrides.append(item)
    with pytest.raises(ValueError, match=item.split("=")[0]):
        TokenizerStage.build(args)


@pytest.mark.parametrize("item", ["hidden_szie=32", "hidden_size=33", "num_classes=0", "resid_dropout=2.0"])
def test_overrides_that_make_no_transformer(tmp_path, tokenizer, item):
    args = ar_args(tmp_path, tokenizer)
    args.model_overrides.append(item)
    with pytest.raises(ValueError, match=item.split("=")[0].replace("_", "[_ ]")):
        ARStage.build(args)


def test_presets_without_the_part(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="'L' has no tokenizer; there are v1, digits, mnist"):
        tokenizer_stage(tmp_path, preset="L")
    with pytest.raises(ValueError, match="'v1' has no language model; there are B, L, XL, XXL, 3B, digits, mnist"):
        ar_stage(tmp_path, tokenizer, preset="v1")
    with pytest.raises(ValueError, match="unknown preset 'M'; there are v1, B, L, XL, XXL, 3B, digits"):
        tokenizer_stage(tmp_path, preset="M")


def test_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(ValueError, match="stage 2 needs --tokenizer"):
        ar_stage(tmp_path, "")
    with pytest.raises(ValueError, match="no tokenizer at './nothing-here'"):
        ar_stage(tmp_path, "./nothing-here")


def test_the_transformer_takes_its_sizes_from_the_tokenizer(tmp_path, tokenizer):
    stage, _ = ar_stage(tmp_path, tokenizer)
    config = stage.model.config
    assert isinstance(config, DARConfig)
    assert (config.codebook_size, config.num_image_tokens, config.tokens_per_group) == (16, 16, 4)
    assert config.num_classes == 10 and stage.id2label == {i: str(i) for i in range(10)}


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_sizes_and_splits(tmp_path, tokenizer, name):
    stage, _ = stage_of(name, tmp_path, tokenizer, max_train_samples=None, max_validation_samples=5)
    assert len(stage.samples) == 1437 and len(stage.validation) == 5
    stage, _ = stage_of(name, tmp_path, tokenizer, max_train_samples=20, validation_split="train")
    assert len(stage.samples) == 20 and len(stage.validation) == 4


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_the_same_seed_makes_the_same_model(tmp_path, tokenizer, name):
    models = [stage_of(name, tmp_path, tokenizer, seed=seed)[0].model for seed in (3, 3, 4)]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_descriptions_survive_json(tmp_path, tokenizer, name):
    description = stage_of(name, tmp_path, tokenizer)[0].describe()
    assert json.loads(json.dumps(description)).keys() == description.keys()
    assert "transformers_version" not in description


def image_bytes(value):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_split(folder, split, labels):
    columns = {"image": [image_bytes(i) for i in range(len(labels))]}
    if labels[0] is not None:
        columns["label"] = labels
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_both_splits_number_their_classes_alike(tmp_path, tokenizer):
    write_split(tmp_path / "set", "train", ["cat", "dog", "owl", "cat"])
    write_split(tmp_path / "set", "test", ["dog", "owl"])
    stage, _ = ar_stage(tmp_path / "run", tokenizer, dataset_name=str(tmp_path / "set"))
    assert stage.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert stage.validation.labels == [1, 2]


def test_stage_two_needs_labels_and_stage_one_does_not(tmp_path, tokenizer):
    write_split(tmp_path / "set", "train", [None, None])
    stage, _ = tokenizer_stage(tmp_path / "run", dataset_name=str(tmp_path / "set"))
    assert len(stage.samples) == 2 and stage.validation is None
    with pytest.raises(ValueError, match="no column 'label' for the labels; it has image"):
        ar_stage(tmp_path / "run", tokenizer, dataset_name=str(tmp_path / "set"))
