"""The original's tokenizer to `DARTokenizer` and back."""

import inspect
import logging
import math
import re
import reprlib
from pathlib import Path
from typing import Any

import torch
import yaml

from ..tokenizer_dar import DARTokenizer
from .reading import Checkpoint, CheckpointError, convert, layer_count, read_checkpoint, require, text

logger = logging.getLogger(__name__)

HEAD_DIM = 64  # fixed in the original code

# our names to the original's, in this order
_RENAMES = [
    (r"^patch_embed\.", "patchify."),
    (r"^query_embed\.", "query_embedding."),
    (r"^query_proj\.", "query_linear."),
    (r"^encoder_blocks\.", "encoder_layers."),
    (r"^quant_proj\.", "quant_in_conv."),
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"^post_quant_proj\.", "quant_out_conv."),
    (r"^token_embed\.", "decoder_embedding."),
    (r"^causal_blocks\.", "decoder_layers."),
    (r"^denoiser\.condition_proj\.", "denoiser.cond_mlp."),
    (r"^denoiser\.proj_in\.", "denoiser.conv_in."),
    (r"^denoiser\.proj_out\.", "denoiser.conv_out."),
    (r"^denoiser\.repa_head\.", "denoiser.repa_out."),
    (r"^denoiser\.adaptive_head\.", "denoiser.linear_out."),
    (r"^denoiser\.", "diff_decoder.net."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.condition_embed\.", ".cond_embed."),
    (r"(layers\.\d+|blocks\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"(layers\.\d+|blocks\.\d+)\.mlp\.2\.", r"\1.mlp.fc2."),
    (r"\.attn\.", ".attention."),
    (r"\.to_out\.", ".proj."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm_([qk])\.", r".\1_norm."),
]
_CONVOLUTIONS = re.compile(r"(quant_in_conv|quant_out_conv|conv_in|conv_out)\.weight$")  # 1x1; linear layers here

# the original's configuration to ours, nested names joined by dots
_OPTIONS = {
    "encoder_patch_size": "encoder_patch_size",
    "encoder_dim": "encoder_dim",
    "decoder_dim": "decoder_dim",
    "num_encoder_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "query_low_rank": "low_rank_queries",
    "vq_dim": "codebook_dim",
    "vq_codebook_size": "codebook_size",
    "num_denoising_steps": "num_inference_steps",
    "num_query_groups": "num_groups",
    "num_all_queries": "num_tokens",
    "queries_per_step": "tokens_per_group",
    "sampling_resolution": "sample_size",
    "rope_base_len": "rope_theta",  # of the encoder alone
    "diff_decoder.rope_base_len": "diffusion_rope_theta",
    "diff_decoder.in_dim": "in_channels",
    "diff_decoder.dim": "diffusion_dim",
    "diff_decoder.cond_dim": "condition_dim",
    "diff_decoder.patch_size": "diffusion_patch_size",
    "diff_decoder.depth": "diffusion_depth",
    "diff_decoder.data_std": "data_std",
    "diff_decoder.time_shift": "time_shift",
    "diff_decoder.mlp_head": "adaptive_head",
    "diff_decoder.share_time_encoding": "share_time_embedding",
    "diff_decoder.repa_layer": "repa_layer",
}
_CHECKED = ("vq_enable", "output_resolution", "diff_decoder.out_dim")  # no counterpart, but they must fit
ROPE_BASE = 10000.0  # the original's default, for the encoder and for the diffusion decoder separately
_NAMES = {ours: original for original, ours in _OPTIONS.items()}
_PARAMETERS = inspect.signature(DARTokenizer).parameters
_DEFAULTS: dict[str, Any] = {name: parameter.default for name, parameter in _PARAMETERS.items()}
_FLOATS = {name for name, parameter in _PARAMETERS.items() if parameter.annotation in (float, float | None)}
# what no shape tells and what changes images; the rest has a default in the original code, too
_NEEDED: tuple[str, ...] = ("num_tokens", "num_groups", "sample_size", "data_std", "time_shift")


def convert_tokenizer(path: str | Path, /, config: str | Path | dict | None = None, **overrides: Any) -> DARTokenizer:
    """Convert a tokenizer of the original code, in float32.

    The configuration is the file's own; what it does not say comes from the shapes of the weights. A file without any
    configuration whose shapes are those of the released ImageNet tokenizer is taken to be that one. As in the original
    code, the converted tokenizer takes images of other sizes than its own (``strict_sample_size=False``).

    Args:
        path: the ``.pt`` file, in any of its forms.
        config: a YAML file or a dictionary with options in the original's names or ours, under ``model`` or bare; they
            win over the file's.
        overrides: options of `DARTokenizer`; they win over both. As in the original, ``rope_theta`` is the encoder's
            alone here; ``diffusion_rope_theta`` is 10000 where nothing says otherwise.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a file that cannot be read or does not fit; for what cannot be inferred, by name.
    """
    checkpoint = read_checkpoint(path)
    given = {}
    if config is not None:
        given = _given(config)
    options = _options(checkpoint, given, overrides)
    return convert(
        checkpoint,
        lambda: DARTokenizer(**options),
        tokenizer_to_original,
        lambda model: (
            (name, checkpoint.weights[original_name(name)].reshape(tensor.shape))
            for name, tensor in model.state_dict().items()
        ),
    )


def tokenizer_to_original(model: DARTokenizer) -> dict[str, torch.Tensor]:
    """Weights in the original's names and shapes.

    Raises:
        ValueError: for a head width or conditions that the original code does not have.
    """
    if model.config.condition_scope != "group":
        raise ValueError(
            "in the original code a denoising step sees the conditions of its own group, not of the whole prefix "
            f"(condition_scope={model.config.condition_scope!r})."
        )
    if model.config.attention_head_dim != HEAD_DIM:
        raise ValueError(f"the original code's heads are {HEAD_DIM} wide, not {model.config.attention_head_dim}.")
    result = {}
    for name, tensor in model.state_dict().items():
        name = original_name(name)
        if _CONVOLUTIONS.search(name):
            tensor = tensor[..., None, None]
        result[name] = tensor
    return result


def original_config(model: DARTokenizer) -> dict[str, Any]:
    """The configuration that the original code builds a tokenizer from, to go with `to_original`'s weights.

    Returns:
        options by the original's names, those of the diffusion decoder under ``diff_decoder``.

    Raises:
        ValueError: for what the original code cannot be told.
    """
    config = model.config
    height, width = model.image_size
    if height != width:
        raise ValueError(f"the original code's images are square, not {height}x{width}.")
    unnamed = set(_DEFAULTS) - set(_OPTIONS.values()) - {"strict_sample_size"}
    if config.repa_layer is None:
        unnamed.remove("repa_dim")
    if not config.low_rank_queries:
        unnamed.remove("query_rank")
    for name in sorted(unnamed):
        if config[name] != _DEFAULTS[name]:
            raise ValueError(f"the original code has {name}={_DEFAULTS[name]}, not {config[name]}.")
    decoder = {"out_dim": config.in_channels}
    result: dict[str, Any] = {"vq_enable": True, "output_resolution": 0, "diff_decoder": decoder}
    for original, ours in _OPTIONS.items():
        section, _, name = original.rpartition(".")
        options = decoder if section else result
        options[name] = config[ours]
    return result | {_NAMES["sample_size"]: height}


def original_name(name: str) -> str:
    """The original's name of one of our parameters."""
    for ours, original in _RENAMES:
        name = re.sub(ours, original, name)
    return name


def _given(config: str | Path | dict) -> dict[str, Any]:
    """Options from a YAML file or a dictionary, under ``model`` or bare."""
    content: Any = config
    if not isinstance(config, dict):
        try:
            content = yaml.safe_load(Path(config).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{config} is no YAML file: {error}") from error
    if isinstance(content, dict):
        content = content.get("model", content)
    if not isinstance(content, dict):
        raise CheckpointError(f"a configuration holds options by name, got a {type(content).__name__}.")
    return content


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Nested options under dotted names; None stands for an option that is not given."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = text(key)
        inner = {name: value}
        if isinstance(value, dict) and name not in {*_OPTIONS, *_CHECKED, *_DEFAULTS}:
            inner = {f"{name}.{text(key)}": item for key, item in value.items()}
        result |= {key: item for key, item in inner.items() if item is not None}
    return result


def _options(checkpoint: Checkpoint, given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Options of `DARTokenizer` from everything that says something about them."""
    path = checkpoint.path
    shapes = _shapes(checkpoint)
    declared = _flat(checkpoint.config) | _flat(given)
    _check_unsupported(path, declared, shapes["in_channels"])
    _name_ignored(path, _flat(checkpoint.config), logging.INFO)
    _name_ignored(path, _flat(given), logging.WARNING)
    said = {_OPTIONS[name]: value for name, value in declared.items() if name in _OPTIONS}
    said |= {name: value for name, value in declared.items() if name in _DEFAULTS} | overrides
    said = {name: _typed(name, value) for name, value in said.items()}
    if not said and all(_DEFAULTS[name] in (None, value) for name, value in shapes.items()):
        logger.warning("%s has no configuration, but the shapes of the released tokenizer: taking its options.", path)
        said = {name: _DEFAULTS[name] for name in (*_NEEDED, "repa_layer")}
    needed = _NEEDED
    if "repa_dim" in shapes:
        needed += ("repa_layer",)
    else:
        said["repa_layer"] = None
    for name, value in shapes.items():
        if said.setdefault(name, value) != value:
            raise CheckpointError(f"{path}: its weights have {name}={value}, but {said[name]} was asked for.")
    missing = [f"{name} ({_NAMES[name]} in the original)" for name in needed if said.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{path} does not say {', '.join(missing)}: pass them by name, or a YAML file with the original's options "
            "as config."
        )
    return {"strict_sample_size": False, "diffusion_rope_theta": ROPE_BASE} | said


def _check_unsupported(path: Path, declared: dict[str, Any], in_channels: int) -> None:
    """Reject options without a counterpart whose values would make another function than a `DARTokenizer`'s."""
    if declared.get("vq_enable", True) is not True:
        value = reprlib.repr(declared["vq_enable"])
        raise CheckpointError(f"{path}: vq_enable={value}: a tokenizer without codes is not supported.")
    if "diff_decoder" in declared:
        value = reprlib.repr(declared["diff_decoder"])
        raise CheckpointError(f"{path}: diff_decoder must hold options by name, got {value}.")
    declared_in = declared.get("diff_decoder.in_dim", in_channels)
    declared_out = declared.get("diff_decoder.out_dim", in_channels)
    if type(declared_out) is not int or (type(declared_in) is int and declared_out != declared_in):
        given = f"{reprlib.repr(declared_in)} and {reprlib.repr(declared_out)}"
        raise CheckpointError(f"{path}: diff_decoder.in_dim and out_dim must agree, got {given}.")
    resolution = declared.get("output_resolution", 0)
    if type(resolution) is not int or resolution < 0:
        raise CheckpointError(
            f"{path}: output_resolution must be a number of pixels, or 0 for none, got {reprlib.repr(resolution)}."
        )
    if resolution not in (0, declared.get("sampling_resolution")):
        logger.warning("%s: the original resizes its pictures to %d pixels; this package does not.", path, resolution)


def _name_ignored(path: Path, declared: dict[str, Any], level: int) -> None:
    ignored = [name for name in declared if name not in {*_OPTIONS, *_CHECKED, *_DEFAULTS}]
    if ignored:
        logger.log(level, "%s: options without a counterpart: %s", path, ", ".join(ignored))


def _typed(name: str, value: Any) -> Any:
    """The value, of the option's type, or a CheckpointError."""
    if name not in _DEFAULTS:
        raise CheckpointError(f"DARTokenizer has no option {name}.")
    default = _DEFAULTS[name]
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif name == "sample_size" and isinstance(value, (list, tuple)):
        fits = len(value) == 2 and all(type(side) is int for side in value)
    else:
        kinds = (int, float) if name in _FLOATS else (int,)
        fits = type(value) in kinds and abs(value) < 2**63  # which no NaN is
    if not fits and not (value is None and default is None):
        original = f" ({_NAMES[name]} in the original)" if name in _NAMES else ""
        raise CheckpointError(f"{name}{original} cannot be {reprlib.repr(value)}.")
    if name in _FLOATS and value is not None:
        return float(value)
    return value


def _shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every option that the shapes of the weights give."""
    axes = {
        "patchify.weight": 4,
        "query_embedding.weight": 2,
        "encoder_layers.0.attention.q_norm.weight": 1,
        "quantize.embedding.weight": 2,
        "quant_out_conv.weight": 4,
        "diff_decoder.net.cond_mlp.weight": 2,
        "diff_decoder.net.conv_in.weight": 4,
    }
    require(checkpoint, "D-AR tokenizer", axes)
    weights = checkpoint.weights
    patch, queries, norm, codebook, post_quant, condition, conv_in = (weights[name].shape for name in axes)
    shapes = {
        "encoder_dim": patch[0],
        "in_channels": patch[1],
        "encoder_patch_size": patch[2],
        "num_encoder_layers": layer_count(weights, "encoder_layers"),
        "max_num_tokens": queries[0],
        "low_rank_queries": "query_linear.weight" in weights,
        "attention_head_dim": norm[0],
        "codebook_size": codebook[0],
        "codebook_dim": codebook[1],
        "decoder_dim": post_quant[0],
        "num_decoder_layers": layer_count(weights, "decoder_layers"),
        "condition_dim": condition[1],
        "diffusion_dim": conv_in[0],
        "diffusion_patch_size": math.isqrt(conv_in[1] // max(patch[1], 1)),
        "diffusion_depth": layer_count(weights, "diff_decoder.net.blocks"),
        "share_time_embedding": "diff_decoder.net.time_embed.mlp.0.weight" in weights,
        "adaptive_head": "diff_decoder.net.linear_out.linear.weight" in weights,
    }
    if shapes["low_rank_queries"]:
        shapes["query_rank"] = queries[1]
    if "diff_decoder.net.repa_out.4.bias" in weights:
        shapes["repa_dim"] = weights["diff_decoder.net.repa_out.4.bias"].numel()
    return shapes
