"""The options of a run: the learning rates they give, and what is refused."""

import math

import pytest

from dar_hf.training import LoopArguments

from .helpers import ar_args, tokenizer_args

# The schedule


def factors(**options):
    args = LoopArguments(**options)
    return [args.learning_rate_factor(step) for step in range(args.max_train_steps)]


def test_constant_rate():
    assert factors(max_train_steps=5) == [1.0] * 5


def test_warm_up_is_linear_and_starts_above_zero():
    assert factors(max_train_steps=6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_tail_falls_linearly_to_the_final_ratio():
    found = factors(max_train_steps=100, decay_fraction=0.25, final_learning_rate_ratio=0.2)
    assert found[:76] == [1.0] * 76
    drops = [a - b for a, b in zip(found[75:], found[76:], strict=False)]
    assert drops == pytest.approx([0.8 / 25] * 24)
    assert found[-1] - 0.8 / 25 == pytest.approx(0.2)  # the ratio is reached where the run ends


def test_warm_up_and_tail_together():
    found = factors(max_train_steps=10, warmup_steps=3, decay_fraction=0.5)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_the_original_schedule_of_stage_two():
    """Linear from 4e-4 to 1e-5 over the last sixth."""
    args = LoopArguments(max_train_steps=600, decay_fraction=1 / 6, final_learning_rate_ratio=0.025)
    assert 4e-4 * args.learning_rate_factor(500) == pytest.approx(4e-4)
    assert 4e-4 * args.learning_rate_factor(550) == pytest.approx((4e-4 + 1e-5) / 2)
    assert 4e-4 * args.learning_rate_factor(600) == pytest.approx(1e-5)


# Values


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_train_steps", 0),
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("logging_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("max_grad_norm", -1.0),
        ("adam_epsilon", 0.0),
        ("decay_fraction", 1.5),
        ("final_learning_rate_ratio", -0.1),
        ("ema_decay", 1.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", 2.0),
        ("checkpoints_total_limit", -1),
        ("warmup_steps", -1),
        ("checkpointing_steps", -1),
        ("validation_steps", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("pixel_noise", -0.1),
        ("seed", -1),
        ("mixed_precision", "fp8"),
        ("max_train_samples", 0),
        ("max_validation_samples", 0),
    ],
)
def test_arguments_that_make_no_run_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        LoopArguments(**{name: value})


def test_whole_numbers_are_taken_where_fractions_are():
    assert LoopArguments(max_grad_norm=1, learning_rate=1).max_grad_norm == 1
    assert LoopArguments(max_grad_norm=math.inf).max_grad_norm == math.inf


@pytest.mark.parametrize(
    "name, value",
    [
        ("unquantized_steps", 6),
        ("unquantized_steps", -1),
        ("dead_code_interval", -1),
        ("revive_until", 1.5),
        ("vq_weight", -1.0),
        ("modulation_std", -1.0),
        ("gate_start", math.nan),
        ("encoder_learning_rate", 0.0),
    ],
)
def test_arguments_of_the_tokenizer(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        tokenizer_args(tmp_path, **{name: value})


def test_stage_two_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="label_column is missing: stage 2 needs the classes"):
        ar_args(tmp_path, "tokenizer", label_column="")
