"""What accelerate's launcher says is taken over or refused, and never ignored."""

import pytest

from dar_hf.training import LoopArguments, launcher, make_accelerator
from dar_hf.training.launcher import check_launcher, pick_precision, precision_reason


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "GRADIENT_CLIPPING", "DYNAMO_BACKEND"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)


@pytest.mark.parametrize("requested", ["no", "bf16", "fp16"])
def test_precision_asked_for_is_taken(requested, monkeypatch):
    assert pick_precision(requested) == requested
    for launched in (requested, "no"):  # the launcher says "no" where it was told nothing
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert pick_precision(requested) == requested


def test_precision_picked_is_one_accelerate_knows():
    assert pick_precision("auto") in ("no", "bf16")


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])
def test_auto_follows_the_launcher(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert pick_precision("auto") == launched


@pytest.mark.parametrize("launched, advice", [("no", True), ("bf16", False), ("fp16", False)])
def test_auto_says_where_the_launcher_is_slower_than_it_need_be(launched, advice, monkeypatch):
    """The launcher's "no" may be its default."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(launcher, "has_fast_bf16", lambda device: True)
    assert ("--mixed_precision bf16" in precision_reason(launched)) == advice
    monkeypatch.setattr(launcher, "has_fast_bf16", lambda device: False)
    assert "--mixed_precision" not in precision_reason(launched)


@pytest.mark.parametrize("requested, launched", [("no", "bf16"), ("bf16", "fp16"), ("no", "fp8"), ("auto", "fp8")])
def test_a_precision_that_contradicts_the_launcher_is_refused(requested, launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=f"{launched}"):
        pick_precision(requested)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("GRADIENT_ACCUMULATION_STEPS", "2", "says 2, but gradient_accumulation_steps is 4"),
        ("GRADIENT_ACCUMULATION_STEPS", "many", "'many' is no number"),
        ("GRADIENT_CLIPPING", "0.5", "says 0.5, but max_grad_norm is 1"),
        ("DYNAMO_BACKEND", "EAGER", "eager is not supported"),
        ("USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("USE_PARALLELISM_CONFIG", "true", "a parallelism configuration"),
    ],
)
def test_settings_that_contradict_the_options_are_refused(variable, value, message, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(LoopArguments(gradient_accumulation_steps=4, mixed_precision="no"))


@pytest.mark.parametrize("value", ["1", "4", "auto"])
def test_the_options_accumulation_is_that_of_the_run(value, monkeypatch, tmp_path):
    """accelerate itself prefers the variable, which the launcher sets to 1 where nothing was said."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
    args = LoopArguments(gradient_accumulation_steps=4, mixed_precision="no", output_dir=str(tmp_path))
    assert make_accelerator(args).gradient_accumulation_steps == 4


def test_the_launchers_compiler_is_used(monkeypatch):
    args = LoopArguments()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    check_launcher(args)
    assert args.torch_compile


@pytest.mark.parametrize("written", [False, "False", "false", "No", "no", "off"])
def test_a_bare_no_of_yaml_is_no_precision(written):
    assert LoopArguments(mixed_precision=written).mixed_precision == "no"


@pytest.mark.parametrize("written", [True, None, "fp8", ""])
def test_other_precisions_are_refused(written):
    with pytest.raises(ValueError, match="mixed_precision must be"):
        LoopArguments(mixed_precision=written)
