"""What the tokenizer refuses."""

import pytest
import torch
from tokenizer_helpers import random_codes, seeded

from dar_hf.layers_dar import CausalCache

# Bad input

ZEROS = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder_dim": 48}, "encoder_dim=48 is not a multiple"),
        ({"diffusion_dim": 65}, "diffusion_dim=65 is not a multiple"),
        ({"attention_head_dim": 2}, "attention_head_dim must be a multiple of 4"),
        ({"num_groups": 3}, "must be a multiple of num_groups=3"),
        ({"num_groups": 0}, "num_groups"),
        ({"max_num_tokens": 8}, "at most max_num_tokens=8"),
        ({"tokens_per_group": 17}, "tokens_per_group=17 does not fit"),
        ({"tokens_per_group": -1}, "tokens_per_group=-1 does not fit"),
        ({"condition_dim": 128}, "condition_dim=128 must equal decoder_dim=64"),
        ({"adaptive_head": True}, "set share_time_embedding=True"),
        ({"repa_layer": 2}, "repa_layer=2 is not one of the 2"),
        ({"condition_scope": "all"}, "condition_scope must be 'group' or 'prefix', got 'all'"),
        ({"condition_scope": True}, "condition_scope must be text, got True"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of the patch size 2"),
        ({"sample_size": (8, 9)}, "is not a multiple of the patch size 2"),
        ({"sample_size": "x"}, "sample_size must be a positive integer or .*, got 'x'"),
        ({"sample_size": (8, 8, 8)}, "sample_size must be a positive integer or"),
    ],
)
def test_bad_configuration(make_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(**options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(ZEROS[0]), "pixel_values must be floating point of shape"),
        (lambda m: m.encode(torch.zeros(1, 1, 8, 8)), "pixel_values must be floating point of shape"),
        (lambda m: m.encode(ZEROS.to(torch.uint8)), "got torch.uint8"),
        (lambda m: m.encode(ZEROS + 2), r"pixel_values must lie in \[-1, 1\]"),
        (lambda m: m.encode(ZEROS - 1.1), r"pixel_values must lie in \[-1, 1\]"),
        (lambda m: m.encode(ZEROS * float("nan")), r"pixel_values must lie in \[-1, 1\]"),
        (lambda m: m.encode(torch.zeros(1, 3, 12, 12)), "image size 12x12 is not the 8x8"),
        (lambda m: m.encode(torch.zeros(1, 3, 9, 8)), "image size 9x8 is not a multiple of the patch size"),
        (lambda m: m.encode(torch.zeros(1, 3, 0, 8)), "image size 0x8 is not a multiple of the patch size"),
        (lambda m: m(torch.zeros(1, 3, 12, 12)), "image size 12x12 is not the 8x8"),
        (lambda m: m(ZEROS, output_repa=True), "has no REPA head"),
        (lambda m: m.velocity(torch.zeros(1, 3, 12, 12), 0.5, torch.zeros(1, 4, 64)), "image size 12x12"),
        (lambda m: m.condition(random_codes().float()), "codes must be integers of shape"),
        (lambda m: m.condition(random_codes()[0]), "codes must be integers of shape"),
        (lambda m: m.condition(random_codes() + 32), r"codes must lie in \[0, 32\)"),
        (lambda m: m.condition(random_codes() - 33), r"codes must lie in \[0, 32\)"),
        (lambda m: m.condition(random_codes(length=17)), "1 to 16 codes, got 17"),
        (lambda m: m.condition(random_codes(length=0)), "1 to 16 codes, got 0"),
        (lambda m: [m.condition(random_codes(length=9), c) for c in [CausalCache(2)] * 2], "9 \\+ 9 codes"),
        (lambda m: m.decode(random_codes().float()), "codes must be integers of shape"),
        (lambda m: m.decode(random_codes() + 32), r"codes must lie in \[0, 32\)"),
        (lambda m: m.decode(random_codes(length=17)), "1 to 16 codes, got 17"),
        (lambda m: m.decode(random_codes(length=3)), "3 codes complete no group of 4"),
        (lambda m: m.decode(random_codes(), num_inference_steps=0), "num_inference_steps must be a positive integer"),
        (lambda m: m.decode(random_codes(), num_inference_steps=2.0), "num_inference_steps must be a positive"),
        (lambda m: m.decode(random_codes(), height=12, width=12), "image size 12x12 is not the 8x8"),
        (lambda m: m.decode(random_codes(), noise=torch.zeros(3, 3, 8, 8)), "noise for 3 images"),
        (lambda m: m.decode(random_codes(), noise=ZEROS.expand(2, -1, -1, -1), height=4), "does not fit height=4"),
        (lambda m: m.decode(random_codes(), noise=torch.zeros(2, 3, 12, 12)), "image size 12x12"),
        (lambda m: m.decode(random_codes(), generator=[seeded()] * 3), "generators"),
        (lambda m: m.decode(random_codes(3), generator=[seeded()] * 2), "generators"),
        (lambda m: m.decode_stream([], num_inference_steps=-1), "num_inference_steps must be a positive integer"),
        (lambda m: m.decode_stream([], start_step=4), r"start_step must lie in \[0, 4\)"),
        (lambda m: list(m.decode_stream([random_codes(length=9)] * 2)), "16 codes, got 18"),
        (lambda m: list(m.decode_stream([random_codes(length=4), random_codes().float()])), "codes must be integers"),
        (lambda m: list(m.decode_stream([random_codes(2, 3), random_codes(1, 13)])), "batch"),
    ],
)
def test_bad_input(tiny_tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_tokenizer)
