"""Named sizes and recipes.

A preset holds up to five dictionaries: the options of `DARTokenizer` and `DARConfig`, the recipes (options of
`TokenizerArguments` and `ARArguments`) of the two stages, and how images are sampled. ``v1`` is the ImageNet 256x256
tokenizer of the paper; ``B`` to ``3B`` are the language models over its codes; ``digits`` and ``mnist`` are whole
small systems that train from scratch on two CPU cores, in minutes and in an hour or two; ``emoji`` takes three hours.
"""

import ast
import math
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One named preset; an empty dictionary means that it has no such part."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    tokenizer_recipe: dict[str, Any] = field(default_factory=dict)
    ar_recipe: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


# Paper, section 4: one learning rate, zero gates and no special treatment of the codebook: 1.28 M images fill it. The
# rate is for 1024 images per step (512 in the original code): 16 processes of 64.
_V1_RECIPE = dict(
    max_train_steps=210_000,
    train_batch_size=64,
    learning_rate=2e-4,
    warmup_steps=500,
    ema_decay=0.999,
    perceptual_weight=0.5,
    repa_weight=0.5,
    crop="random",
    flip=True,
    checkpointing_steps=5_000,
    validation_steps=5_000,
    dataloader_num_workers=8,
)

# Paper, section 4: 300 epochs at 1024 images per step (8 processes of 128), linear to 1e-5 over the last 50. The
# original code trains at 1e-4 with 256 images per step; the paper's results are from the schedule here.
_IMAGENET_AR_RECIPE = dict(
    max_train_steps=375_000,
    train_batch_size=128,
    learning_rate=4e-4,
    decay_fraction=1 / 6,
    final_learning_rate_ratio=0.025,
    weight_decay=0.05,
    crop="ten",
    checkpointing_steps=5_000,
    validation_steps=5_000,
    dataloader_num_workers=8,
)


def _llama(layers: int, heads: int, dim: int, guidance: list[float] | None = None) -> Preset:
    """A LlamaGen size; the mlp is 8/3 of the width, rounded up to a multiple of 256.

    ``guidance`` is the scale, linear over the image tokens, behind the FID that the paper reports (the script released
    with the weights takes 1.2 to 8 for L instead); it samples from the whole distribution.
    """
    scale = {}
    if guidance is not None:
        scale["guidance_scale"] = guidance
    transformer = dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=dim,
        intermediate_size=math.ceil((8 * dim // 3) / 256) * 256,
    )
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **scale)
    return Preset(transformer=transformer, ar_recipe=_IMAGENET_AR_RECIPE | scale, sampling=sampling)


# open gates, nonzero adaLN and conditions as large as positions: information flows from the first step
_OPEN_START = dict(gate_start=0.5, modulation_std=0.02, output_std=0.02, post_quant_std=0.35)
# attention tells places apart from the first step; else it takes hundreds, and luck (docs/experiments.md)
_PLACES_APART = dict(rotary_bias_std=0.5, token_embed_std=0.2)
NO_DROPOUT = dict(token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)  # of the language model

# what the tokenizers of small images have in common
_SMALL_TOKENIZER = dict(
    encoder_dim=128,
    num_encoder_layers=3,
    decoder_dim=128,
    num_decoder_layers=1,
    num_tokens=32,
    num_groups=8,
    condition_scope="prefix",  # every group adds to the ones before (docs/experiments.md)
    diffusion_dim=128,
    diffusion_patch_size=4,
    diffusion_depth=4,
    repa_layer=None,
    max_num_tokens=32,
)
_SMALL_TOKENIZER_RECIPE = dict(
    # each image at two times: as much for the denoiser as 64 at one, and half the cost for all else
    train_batch_size=32,
    times_per_image=2,
    learning_rate=1.5e-3,
    # the decoder has to learn to use the conditions before the encoder moves far: Adam turns the encoder's tiny early
    # gradients into full-size steps, and it collapses to one code. Half of this rate (3e-4) costs 1 dB, the decoder's
    # rate gains nothing (docs/experiments.md)
    encoder_learning_rate=6e-4,
    muon_learning_rate=0.01,  # +2.6 dB in the same time on digits (docs/experiments.md)
    adam_epsilon=1e-6,
    decay_fraction=0.4,
    **_OPEN_START,
    **_PLACES_APART,
    # after each preset's unquantized_steps a codebook is initialized from the latents, then dead codes are replaced
    dead_code_interval=20,
    revive_until=0.8,
)
_SMALL_AR_RECIPE = dict(
    learning_rate=1e-3,
    muon_learning_rate=0.01,  # 500 steps near 900 of AdamW in quality on digits (docs/experiments.md)
    decay_fraction=0.4,
    weight_decay=0.05,
    ema_decay=0.998,
    solver_order=1,  # closer to the input, and every preview closer than the one before (docs/experiments.md)
)

PAPER_SIZES = ("B", "L", "XL", "XXL", "3B")  # of the language model

PRESETS: dict[str, Preset] = {
    "v1": Preset(tokenizer={}, tokenizer_recipe=_V1_RECIPE),
    "B": _llama(12, 12, 768),
    "L": _llama(24, 16, 1024, guidance=[1.1, 8.0]),
    "XL": _llama(36, 20, 1280, guidance=[1.1, 10.0]),
    "XXL": _llama(48, 24, 1536),
    "3B": _llama(24, 32, 3200),
    "digits": Preset(
        tokenizer=_SMALL_TOKENIZER
        | dict(
            sample_size=8,
            in_channels=1,  # with three, one sample in fifty has coloured pixels
            encoder_patch_size=2,
            num_encoder_layers=2,
            codebook_size=256,
            num_tokens=16,
            diffusion_patch_size=2,
            diffusion_depth=3,
            max_num_tokens=16,
        ),
        transformer=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=2,
        ),
        tokenizer_recipe=_SMALL_TOKENIZER_RECIPE
        | dict(
            dataset_name="digits",
            max_train_steps=1_200,
            warmup_steps=60,
            ema_decay=0.995,
            unquantized_steps=150,
            dead_code_interval=10,
            max_validation_samples=360,
            validation_steps=600,
        ),
        ar_recipe=_SMALL_AR_RECIPE
        | dict(
            dataset_name="digits",
            max_train_steps=500,
            train_batch_size=64,
            warmup_steps=50,
            ema_decay=0.99,
            # without noise the model memorizes the 1,437 code sequences; noise of less than one gray level gives each
            # digit many sequences (docs/experiments.md)
            pixel_noise=0.1,
            max_validation_samples=360,
            validation_steps=250,
            guidance_scale=[2.0],
        ),
    ),
    # handwritten digits at 32x32 (60,000 of MNIST): an hour for stage 1 on one CPU core, and forty minutes for stage 2
    "mnist": Preset(
        tokenizer=_SMALL_TOKENIZER
        | dict(
            sample_size=32,
            in_channels=1,
            encoder_patch_size=4,
            num_decoder_layers=2,
            codebook_size=512,
            time_shift=10.0,  # images this simple are visible through much noise: most groups must work early
        ),
        transformer=dict(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=3,
        ),
        tokenizer_recipe=_SMALL_TOKENIZER_RECIPE
        | dict(
            max_train_steps=5_000,
            warmup_steps=250,
            ema_decay=0.999,
            unquantized_steps=500,
            crop="center",
            max_validation_samples=256,
            validation_steps=2_000,
            checkpointing_steps=1_000,
        ),
        ar_recipe=_SMALL_AR_RECIPE
        | dict(
            max_train_steps=3_000,
            train_batch_size=128,
            warmup_steps=150,
            crop="center",
            cache_codes=True,
            max_validation_samples=1_000,
            validation_steps=1_000,
            checkpointing_steps=1_000,
            guidance_scale=[1.5],  # more makes digits clearer and less varied (docs/experiments.md)
        ),
    ),
    # drawings in colour from their captions (6,207 emoji, examples/emoji_dataset.py): three hours on two CPU cores
    "emoji": Preset(
        tokenizer=_SMALL_TOKENIZER
        | dict(
            sample_size=48,
            encoder_patch_size=6,
            codebook_size=1024,
            time_shift=16.0,
        ),
        transformer=dict(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            **NO_DROPOUT,
        ),
        tokenizer_recipe=_SMALL_TOKENIZER_RECIPE
        | dict(
            max_train_steps=3_600,
            warmup_steps=180,
            ema_decay=0.998,
            unquantized_steps=360,
            crop="center",
            flip=False,  # letters and clocks
            max_validation_samples=256,
            validation_steps=1_200,
            checkpointing_steps=400,
        ),
        ar_recipe=_SMALL_AR_RECIPE
        | dict(
            caption_column="caption",
            max_train_steps=11_500,
            train_batch_size=64,
            learning_rate=2e-3,
            warmup_steps=100,
            crop="center",
            flip=False,
            pixel_noise=0.1,  # each drawing has many sequences of codes, from which it looks the same
            max_validation_samples=256,
            validation_steps=1_000,
            checkpointing_steps=500,
            guidance_scale=[1.5],
        ),
    ),
    # a tokenizer of photos in colour
    "photos32": Preset(
        tokenizer=_SMALL_TOKENIZER
        | dict(
            sample_size=32,
            encoder_patch_size=4,
            codebook_size=1024,
            time_shift=16.0,  # photos are visible through much noise (docs/experiments.md)
        ),
        tokenizer_recipe=_SMALL_TOKENIZER_RECIPE
        | dict(
            max_train_steps=12_000,
            warmup_steps=300,
            ema_decay=0.998,
            unquantized_steps=1_000,
            flip=True,
            max_validation_samples=256,
            validation_steps=2_000,
        ),
    ),
}

# guidance distilled into the language models of the small systems, for --init_from
_DISTILLATION_RECIPE = _SMALL_AR_RECIPE | dict(
    max_train_steps=800,
    train_batch_size=64,
    learning_rate=5e-4,
    muon_learning_rate=0.0,
    warmup_steps=40,
    checkpointing_steps=400,
)
PRESETS |= {
    "digits-distilled": Preset(
        transformer=PRESETS["digits"].transformer,
        ar_recipe=_DISTILLATION_RECIPE | dict(distill_guidance=[2.0], distill_samples=8_192),
    ),
    "mnist-distilled": Preset(
        transformer=PRESETS["mnist"].transformer,
        ar_recipe=_DISTILLATION_RECIPE | dict(distill_guidance=[1.5], distill_samples=10_240, train_batch_size=32),
    ),
}


def get_preset(name: str) -> Preset:
    """A copy of the preset ``name``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}.")
    return deepcopy(PRESETS[name])


def sampling_preset(name: str) -> dict[str, Any]:
    """Generation options with which the paper samples from the size ``name``: entries of a ``GenerationConfig``.

    Raises:
        ValueError: for a name that has none.
    """
    sampling = PRESETS.get(name, Preset()).sampling
    if not sampling:
        names = ", ".join(known for known, preset in PRESETS.items() if preset.sampling)
        raise ValueError(f"no sampling preset {name!r}; there are {names}.")
    return deepcopy(sampling)


def parse_options(options: list[str] | None) -> dict[str, Any]:
    """``["sample_size=64", "low_rank_queries=False"]`` as a dictionary of Python values.

    Raises:
        ValueError: for an item that is not ``name=value``.
    """
    result = {}
    for item in options or []:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ValueError(f"options are given as name=value, got {item!r}.")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[name] = value
    return result
