"""Checkpoints in the original code's format with random weights, written down from its names and shapes."""

import argparse
import sys
import types

import torch

TOKENIZER = {
    "encoder_patch_size": 4,
    "encoder_dim": 128,
    "decoder_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "query_low_rank": True,
    "vq_dim": 8,
    "vq_codebook_size": 32,
    "vq_enable": True,
    "num_denoising_steps": 4,
    "num_query_groups": 4,
    "num_all_queries": 16,
    "queries_per_step": 4,
    "sampling_resolution": 16,
    "output_resolution": 0,
    "diff_decoder": {
        "in_dim": 3,
        "out_dim": 3,
        "dim": 128,
        "cond_dim": 64,
        "patch_size": 2,
        "depth": 2,
        "data_std": 0.6,
        "time_shift": 2,
        "mlp_head": False,
        "share_time_encoding": False,
        "repa_layer": 1,
    },
}
TRANSFORMER = {"dim": 128, "n_layer": 2, "n_head": 2, "vocab_size": 32, "block_size": 16, "num_classes": 5}


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(name, rows, columns, bias=True):
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def attention(name, dim):
    shapes = {}
    for part in ("q", "k", "v", "proj"):
        shapes |= linear(f"{name}.{part}", dim, dim)
    for norm in ("q_norm", "k_norm"):
        shapes |= {f"{name}.{norm}.weight": (64,), f"{name}.{norm}.bias": (64,)}
    return shapes


def mlp(name, dim):
    return linear(f"{name}.fc1", 4 * dim, dim) | linear(f"{name}.fc2", dim, 4 * dim)


def gated_block(name, dim):
    shapes = attention(f"{name}.attention", dim) | mlp(f"{name}.mlp", dim)
    for part in ("gate1", "gate2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        shapes[f"{name}.{part}"] = (dim,)
    return shapes


def tokenizer_config(**changes):
    """The configuration with changes; those of the diffusion decoder are found by name."""
    config = {**TOKENIZER, "diff_decoder": dict(TOKENIZER["diff_decoder"])}
    for name, value in changes.items():
        (config["diff_decoder"] if name in config["diff_decoder"] else config)[name] = value
    return config


def tokenizer_weights(config, repa=True, seed=0):
    decoder, net = config["diff_decoder"], "diff_decoder.net."
    width, dim, code = config["encoder_dim"], decoder["dim"], config["vq_dim"]
    patch, pixels = config["encoder_patch_size"], decoder["in_dim"] * decoder["patch_size"] ** 2
    shapes = {
        "patchify.weight": (width, decoder["in_dim"], patch, patch),
        "patchify.bias": (width,),
        "query_embedding.weight": (1024, 8 if config["query_low_rank"] else width),
        "quant_in_conv.weight": (code, width, 1, 1),
        "quantize.embedding.weight": (config["vq_codebook_size"], code),
        "quant_out_conv.weight": (config["decoder_dim"], code, 1, 1),
        "decoder_embedding.weight": (1024, config["decoder_dim"]),
        f"{net}conv_in.weight": (dim, pixels, 1, 1),
        f"{net}conv_in.bias": (dim,),
    }
    if config["query_low_rank"]:
        shapes |= linear("query_linear", width, 8)
    for layer in range(config["num_encoder_layers"]):
        shapes |= gated_block(f"encoder_layers.{layer}", width)
    for layer in range(config["num_decoder_layers"]):
        shapes |= gated_block(f"decoder_layers.{layer}", config["decoder_dim"])
    shapes |= linear(f"{net}cond_mlp", dim, decoder["cond_dim"])
    for layer in range(decoder["depth"]):
        block = f"{net}blocks.{layer}"
        shapes |= (
            attention(f"{block}.attention", dim) | attention(f"{block}.cross_attn", dim) | mlp(f"{block}.mlp", dim)
        )
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * dim, dim)
        shapes |= linear(f"{block}.cond_embed.0", dim, dim) | linear(f"{block}.cond_embed.2", dim, dim)
    owners = [net] if decoder["share_time_encoding"] else [f"{net}blocks.{i}." for i in range(decoder["depth"])]
    for owner in owners:
        shapes |= linear(f"{owner}time_embed.mlp.0", dim, dim) | linear(f"{owner}time_embed.mlp.2", dim, dim)
    if decoder["mlp_head"]:
        shapes |= linear(f"{net}linear_out.linear", pixels, dim)
        shapes |= linear(f"{net}linear_out.adaLN_modulation.1", 2 * dim, dim)
    else:
        shapes |= {f"{net}conv_out.weight": (pixels, dim, 1, 1), f"{net}conv_out.bias": (pixels,)}
    if repa:
        for index, (rows, columns) in {0: (2048, dim), 2: (2048, 2048), 4: (768, 2048)}.items():
            shapes |= linear(f"{net}repa_out.{index}", rows, columns)
    return random_weights(shapes, seed)


def transformer_weights(dim=128, n_layer=2, vocab_size=32, num_classes=5, seed=0, **_):
    hidden = -(-(8 * dim // 3) // 256) * 256
    shapes = {
        "cls_embedding.embedding_table.weight": (num_classes + 1, dim),
        "tok_embeddings.weight": (vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (vocab_size, dim),
    }
    for layer in range(n_layer):
        name = f"layers.{layer}."
        shapes |= linear(f"{name}attention.wqkv", 3 * dim, dim, bias=False)
        shapes |= linear(f"{name}attention.wo", dim, dim, bias=False)
        shapes |= linear(f"{name}feed_forward.w1", hidden, dim, bias=False)
        shapes |= linear(f"{name}feed_forward.w3", hidden, dim, bias=False)
        shapes |= linear(f"{name}feed_forward.w2", dim, hidden, bias=False)
        shapes |= {f"{name}attention_norm.weight": (dim,), f"{name}ffn_norm.weight": (dim,)}
    return random_weights(shapes, seed)


def with_buffers(weights):
    """What the original registers beside its parameters."""
    buffers = {"quantize.codebook_used": torch.zeros(65536), "diff_decoder._arange": torch.arange(4)}
    return weights | buffers | {"diff_decoder.net.wavelets": torch.ones(4)}


def save(content, path, **options):
    """``torch.save`` of content whose configurations are pickled as instances of ``config_util.Config``."""
    module = types.ModuleType("config_util")
    module.Config = Config
    sys.modules["config_util"] = module
    try:
        torch.save(content, path, **options)
    finally:
        del sys.modules["config_util"]
    return path


class Config:
    def __init__(self, data):
        self._data = data


Config.__module__, Config.__qualname__ = "config_util", "Config"


def tokenizer_checkpoint(weights, config):
    """As the original's training writes it; ``model`` are other weights than those to use."""
    return {
        "model": {name: tensor.half() + 1 for name, tensor in weights.items() if "repa" not in name},
        "ema": with_buffers(weights),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "discriminator": {},
        "optimizer_disc": {},
        "steps": 210_000,
        "args": argparse.Namespace(image_size=16, lr=2e-4),
        "config": Config({"model": config, "data": {"name": "imagenet"}}),
    }


def transformer_checkpoint(weights, **args):
    return {"model": weights, "optimizer": {}, "steps": 360_000, "args": argparse.Namespace(cls_token_num=1, **args)}
