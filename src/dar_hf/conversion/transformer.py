"""The original's language model (LlamaGen's Llama) to `DARForCausalLM` and back."""

import logging
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..configuration_dar import DARConfig
from ..modeling_dar import DARForCausalLM
from ..presets import PAPER_SIZES, PRESETS, sampling_preset
from .reading import Checkpoint, CheckpointError, convert, layer_count, read_checkpoint, require

logger = logging.getLogger(__name__)

NUM_GROUPS = 8  # of the paper; a language model's file does not say
HEAD_DIM = 64  # of every size but 3B
SIZE_OPTIONS = ("num_hidden_layers", "hidden_size", "intermediate_size")
# the original's arguments for what the shapes say as well
SHAPE_ARGS = {
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "codebook_size",
    "num_classes": "num_classes",
}

ROPE_THETA, NORM_EPS = 10000, 1e-5  # the original's defaults
_ORIGINAL = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}  # without a choice there
_DERIVED = ("vocab_size", "max_position_embeddings")  # of DARConfig: not to be chosen

_LAYER = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert_transformer(path: str | Path, /, *, sampling: str | None = None, **overrides: Any) -> DARForCausalLM:
    """Convert a language model of the original code, in float32.

    Sizes come from the shapes, the number of heads from the file's arguments, else from the named size it says it is
    where the shapes agree, else from the size of those shapes, else it is ``hidden_size / 64``. The sequence length
    comes from the arguments; a bare file of a size of the paper is taken to have the paper's 256 codes.

    Args:
        path: the ``.pt`` file, in any of its forms.
        sampling: name of the preset whose sampling goes into the generation configuration ("L": guidance 1.1 to 8,
            "XL": 1.1 to 10); by default that of the size the shapes have, if it has any.
        overrides: options of `DARConfig` that the file does not say, such as ``num_attention_heads`` or
            ``tokens_per_group``; what contradicts its shapes or its sequence length is refused.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a file that cannot be read or does not fit; for what cannot be inferred, by name.
    """
    chosen = None
    if sampling is not None:
        chosen = sampling_preset(sampling)
    checkpoint = read_checkpoint(path)
    options = _options(checkpoint, overrides)
    model = convert(
        checkpoint,
        lambda: DARForCausalLM(DARConfig(**options)),
        transformer_to_original,
        lambda model: _from_original(checkpoint.weights, model.config),
    )
    size = _named_size(options)
    if chosen is None and size is not None:
        chosen = sampling_preset(size)
    model.generation_config.update(**(chosen or {}))
    return model


def transformer_to_original(model: DARForCausalLM) -> dict[str, torch.Tensor]:
    """Weights in the original's names: embeddings apart, q, k and v stacked, rotary pairs interleaved.

    Raises:
        ValueError: for a model with parts or sizes that the original code does not have.
    """
    config = model.config
    if config.text_vocab_size:
        raise ValueError("the original code draws from classes, not from text.")
    tensors = model.state_dict()
    for name, value in _ORIGINAL.items():
        if getattr(config, name) != value:
            raise ValueError(f"the original code has {name}={value}, not {getattr(config, name)}.")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"the original code's heads share hidden_size={config.hidden_size}: {config.num_attention_heads} heads "
            f"cannot have head_dim={config.head_dim}."
        )
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        raise ValueError(f"the original code has rope_type=default, not {kind}.")
    codes, classes = tensors["model.embed_tokens.weight"].split([config.codebook_size, config.num_classes + 1])
    result = {
        "tok_embeddings.weight": codes,
        "cls_embedding.embedding_table.weight": classes,
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        ours = f"model.layers.{layer}."
        theirs = f"layers.{layer}."
        query, key, value = (tensors[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv")
        query = _interleave_pairs(query, config.head_dim)
        key = _interleave_pairs(key, config.head_dim)
        result[theirs + "attention.wqkv.weight"] = torch.cat([query, key, value])
        for name, original in _LAYER.items():
            result[f"{theirs}{original}.weight"] = tensors[f"{ours}{name}.weight"]
    return result


def name_arguments(config: DARConfig) -> None:
    """Log which arguments the original code needs in addition to the weights, if they are not its defaults."""
    base = config.rope_parameters["rope_theta"]
    if base != ROPE_THETA:
        logger.warning("the original code has to be built with rope_base=%s.", base)
    if config.rms_norm_eps != NORM_EPS:
        logger.warning("the original code has to be built with norm_eps=%s.", config.rms_norm_eps)


def _from_original(weights: dict[str, torch.Tensor], config: DARConfig) -> Iterator[tuple[str, torch.Tensor]]:
    classes = weights["cls_embedding.embedding_table.weight"]
    yield "model.embed_tokens.weight", torch.cat([weights["tok_embeddings.weight"], classes])
    yield "model.norm.weight", weights["norm.weight"]
    yield "lm_head.weight", weights["output.weight"]
    keys = config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        ours = f"model.layers.{layer}."
        theirs = f"layers.{layer}."
        query, key, value = weights[theirs + "attention.wqkv.weight"].split([config.hidden_size, keys, keys])
        yield ours + "self_attn.q_proj.weight", _halve_pairs(query, config.head_dim)
        yield ours + "self_attn.k_proj.weight", _halve_pairs(key, config.head_dim)
        yield ours + "self_attn.v_proj.weight", value
        for name, original in _LAYER.items():
            yield f"{ours}{name}.weight", weights[f"{theirs}{original}.weight"]


def _halve_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from adjacent rotary pairs (the original) to first halves, then second (transformers)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _interleave_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `_halve_pairs`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _options(checkpoint: Checkpoint, overrides: dict[str, Any]) -> dict[str, Any]:
    """Options of `DARConfig` from everything that says something about them."""
    unknown = set(overrides) - {field.name for field in fields(DARConfig)} | set(overrides).intersection(_DERIVED)
    if unknown:
        raise CheckpointError(f"DARConfig has no option {', '.join(sorted(unknown))}.")
    options = _shapes(checkpoint)
    for argument, name in SHAPE_ARGS.items():
        if checkpoint.args.get(argument) not in (None, options[name]):
            raise CheckpointError(
                f"{checkpoint.path}: its arguments say {argument}={checkpoint.args[argument]}, its weights have "
                f"{name}={options[name]}."
            )
    if checkpoint.args.get("cls_token_num") not in (None, 1):
        raise CheckpointError(f"{checkpoint.path}: cls_token_num must be 1, got {checkpoint.args['cls_token_num']}.")
    heads = overrides.get("num_attention_heads")
    declared = checkpoint.args.get("n_head")
    if None not in (heads, declared) and heads != declared:
        raise CheckpointError(
            f"{checkpoint.path}: its arguments say n_head={declared}, num_attention_heads={heads!r} was asked for."
        )
    if heads is None:
        heads = _heads(checkpoint, options)
    tokens = _image_tokens(checkpoint, options, overrides.get("num_image_tokens"))
    options |= {
        "num_attention_heads": heads,
        "num_key_value_heads": _key_value_heads(checkpoint, options["hidden_size"], heads),
        "num_image_tokens": tokens,
        "tokens_per_group": max(1, tokens // NUM_GROUPS),
        **_numbers(checkpoint),
    }
    for name in {*SHAPE_ARGS.values(), "intermediate_size", "num_key_value_heads"}.intersection(overrides):
        if overrides[name] != options[name]:
            raise CheckpointError(
                f"{checkpoint.path}: {name}={overrides[name]!r} was asked for, its weights have {options[name]}."
            )
    return options | overrides


def _shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every option that the shapes of the weights give."""
    names = ("cls_embedding.embedding_table", "tok_embeddings", "output", "layers.0.feed_forward.w1")
    require(checkpoint, "D-AR language model", {f"{name}.weight": 2 for name in (*names, "layers.0.attention.wqkv")})
    classes, codes, output, mlp = (checkpoint.weights[f"{name}.weight"].shape for name in names)
    if codes != output:
        raise CheckpointError(
            f"{checkpoint.path}: tok_embeddings {tuple(codes)} and output {tuple(output)} differ in shape."
        )
    return {
        "codebook_size": codes[0],
        "num_classes": classes[0] - 1,
        "hidden_size": codes[1],
        "intermediate_size": mlp[0],
        "num_hidden_layers": layer_count(checkpoint.weights, "layers"),
    }


def _numbers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Options that no shape tells, from the arguments that change what is computed; the original has defaults."""
    options: dict[str, Any] = {}
    for argument in ("rope_base", "norm_eps"):
        value = checkpoint.args.get(argument)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{checkpoint.path}: {argument} must be a positive number, got {value!r}.")
        if argument == "rope_base":
            options["rope_parameters"] = {"rope_type": "default", "rope_theta": float(value)}
        else:
            options["rms_norm_eps"] = float(value)
    return options


def _named_size(options: dict[str, Any]) -> str | None:
    """The size of the paper that has these layers and widths."""
    for name in PAPER_SIZES:
        if all(options[option] == PRESETS[name].transformer[option] for option in SIZE_OPTIONS):
            return name
    return None


def _heads(checkpoint: Checkpoint, options: dict[str, Any]) -> int:
    if checkpoint.args.get("n_head") is not None:
        return checkpoint.args["n_head"]
    size = _named_size(options)
    if size is None:
        heads = options["hidden_size"] // HEAD_DIM
        reason = f"hidden_size / {HEAD_DIM}"
    else:
        heads = PRESETS[size].transformer["num_attention_heads"]
        reason = f"those of size {size}"
    named = str(checkpoint.args.get("gpt_model", "")).removeprefix("GPT-")
    if named != size:
        logger.warning("%s does not say how many heads it has: taking %d, %s.", checkpoint.path, heads, reason)
    return heads


def _key_value_heads(checkpoint: Checkpoint, hidden_size: int, heads: int) -> int:
    """Key and value heads, from the rows of the stacked projection: fewer than heads in LlamaGen's grouped form."""
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or hidden_size % (2 * heads):
        raise CheckpointError(
            f"{checkpoint.path}: num_attention_heads must divide hidden_size={hidden_size} into even parts, got "
            f"{heads!r}; pass num_attention_heads."
        )
    rows = checkpoint.weights["layers.0.attention.wqkv.weight"].shape[0]
    groups, rest = divmod(rows - hidden_size, 2 * (hidden_size // heads))
    if rest or groups < 1 or heads % groups:
        raise CheckpointError(
            f"{checkpoint.path}: layers.0.attention.wqkv.weight has {rows} rows, which {heads} heads of width "
            f"{hidden_size // heads} cannot have; pass the right num_attention_heads."
        )
    return groups


def _image_tokens(checkpoint: Checkpoint, options: dict[str, Any], asked: int | None) -> int:
    tokens = checkpoint.args.get("block_size")
    if None not in (asked, tokens) and asked != tokens:
        raise CheckpointError(
            f"{checkpoint.path} is for {tokens} codes an image, num_image_tokens={asked} was asked for."
        )
    if tokens is None:
        tokens = asked
    if tokens is None and _named_size(options) is not None:
        tokens = DARConfig.num_image_tokens
        logger.warning("%s does not say how many codes an image has: taking the paper's %d.", checkpoint.path, tokens)
    if tokens is None:
        raise CheckpointError(
            f"{checkpoint.path} does not say how many codes an image has: pass num_image_tokens (the tokenizer's "
            "num_tokens)."
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise CheckpointError(f"{checkpoint.path}: num_image_tokens must be a positive integer, got {tokens!r}.")
    return tokens
