"""The tokenizer written down again, and random inputs for it."""

import math

import pytest
import torch
import torch.nn.functional as F

OPTIONS = {
    "default": {},
    "full-width queries": {"low_rank_queries": False},
    "shared time": {"share_time_embedding": True},
    "adaptive head": {"share_time_embedding": True, "adaptive_head": True},
    "unequal widths": {"encoder_dim": 128, "decoder_dim": 64, "diffusion_dim": 192, "attention_head_dim": 64},
    "unequal patches": {"encoder_patch_size": 4},
    "not square": {"sample_size": (8, 12)},
    "one channel": {"in_channels": 1},
    "other times": {"time_shift": 1.0, "data_std": 0.5, "rope_theta": 100.0},
    "two rotary bases": {"rope_theta": 100.0, "diffusion_rope_theta": 1000.0},
    "overlapping groups": {"tokens_per_group": 6},
    "short groups": {"tokens_per_group": 2},
    "repa": {"repa_layer": 1, "repa_dim": 24},
    "prefix": {"condition_scope": "prefix"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_codes(batch=2, length=16, seed=0):
    return torch.randint(0, 32, (batch, length), generator=seeded(seed))


def random_images(model, batch=2, seed=0):
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(batch, model.config.in_channels, height, width, generator=seeded(seed)) * 2 - 1


def input_of(module, run):
    """What ``module`` is given while ``run`` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run()
    handle.remove()
    return seen[0]


def patchify(images, patch):
    """(B, positions, values), the values of a patch in (channel, row, column) order."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // patch) * (width // patch), -1)


def unpatchify(patches, patch, channels, height, width):
    cells = patches.reshape(len(patches), height // patch, width // patch, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), channels, height, width)


def rotation(height, width, head_dim, theta):
    """Complex rotation of every position: first half of the pairs by the row, second half by the column."""
    frequencies = [theta ** (-2 * i / (head_dim // 2)) for i in range(head_dim // 4)]
    angles = [[p * f for p in (r, c) for f in frequencies] for r in range(height) for c in range(width)]
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, factors):
    """Rotate interleaved pairs of ``x (B, L, heads, head_dim)``."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * factors[:, None]).flatten(-2)


class Reference:
    """The method written down again, naively and in float64, from the weights of a model."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(self, name, x):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x, name=None):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x if name is None else x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def mlp(self, name, x):
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", x)))

    def attention(self, name, x, context, allowed=None, query_rotation=None, key_rotation=None):
        heads = (-1, self.config.attention_head_dim)
        query = self.norm(self.linear(f"{name}.to_q", x).unflatten(-1, heads), f"{name}.norm_q")
        key = self.norm(self.linear(f"{name}.to_k", context).unflatten(-1, heads), f"{name}.norm_k")
        value = self.linear(f"{name}.to_v", context).unflatten(-1, heads)
        query = query if query_rotation is None else rotate(query, query_rotation)
        key = key if key_rotation is None else rotate(key, key_rotation)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(heads[1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return self.linear(f"{name}.to_out", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2))

    def gated_blocks(self, name, count, x, **options):
        for block in (f"{name}.{i}" for i in range(count)):
            normed = self.norm(x, f"{block}.norm1")
            x = x + self.weights[f"{block}.gate1"] * self.attention(f"{block}.attn", normed, normed, **options)
            x = x + self.weights[f"{block}.gate2"] * self.mlp(f"{block}.mlp", self.norm(x, f"{block}.norm2"))
        return x

    def latents(self, images):
        config, patch = self.config, self.config.encoder_patch_size
        rows, columns, n = images.shape[2] // patch, images.shape[3] // patch, config.num_tokens
        kernel = self.weights["patch_embed.weight"].flatten(1)
        patches = self.norm(patchify(images.double(), patch) @ kernel.T + self.weights["patch_embed.bias"])
        queries = self.weights["query_embed.weight"][:n]
        queries = self.linear("query_proj", queries) if config.low_rank_queries else queries
        factors = rotation(rows, columns, config.attention_head_dim, config.rope_theta)
        factors = torch.cat([factors, torch.ones(n, factors.shape[1])])
        allowed = torch.zeros(rows * columns + n, rows * columns + n, dtype=torch.bool)
        allowed[:, : rows * columns] = True
        for i in range(n):
            allowed[rows * columns + i, rows * columns : rows * columns + i + 1] = True
        x = torch.cat([patches, queries.expand(len(images), -1, -1)], dim=1)
        options = {"allowed": allowed, "query_rotation": factors, "key_rotation": factors}
        x = self.gated_blocks("encoder_blocks", config.num_encoder_layers, x, **options)
        latents = self.linear("quant_proj", self.norm(x[:, rows * columns :]))
        return latents / latents.norm(dim=-1, keepdim=True)

    def codebook(self):
        rows = self.weights["quantizer.codebook.weight"]
        return rows / rows.norm(dim=-1, keepdim=True)

    def condition(self, codes):
        n = codes.shape[1]
        x = self.linear("post_quant_proj", self.codebook()[codes]) + self.weights["token_embed.weight"][:n]
        allowed = torch.tensor([[j <= i for j in range(n)] for i in range(n)])
        return self.norm(self.gated_blocks("causal_blocks", self.config.num_decoder_layers, x, allowed=allowed))

    def time(self, name, timestep):
        half = self.config.diffusion_dim // 2
        features = [[1000 * float(t) * math.exp(-math.log(10000) * i / half) for i in range(half)] for t in timestep]
        angles = torch.tensor(features, dtype=torch.float64)
        return self.mlp(f"{name}.mlp", torch.cat([angles.cos(), angles.sin()], dim=-1))[:, None]

    def velocity(self, sample, timestep, condition):
        config, patch = self.config, self.config.diffusion_patch_size
        channels, height, width = sample.shape[1:]
        theta = config.rope_theta if config.diffusion_rope_theta is None else config.diffusion_rope_theta
        factors = rotation(height // patch, width // patch, config.attention_head_dim, theta)
        x = self.linear("denoiser.proj_in", patchify(sample.double(), patch))
        condition = self.norm(self.linear("denoiser.condition_proj", condition))
        for block in (f"denoiser.blocks.{i}" for i in range(config.diffusion_depth)):
            shared = config.share_time_embedding
            time = self.time("denoiser.time_embed" if shared else f"{block}.time_embed", timestep)
            context = self.norm(self.mlp(f"{block}.condition_embed", condition))
            attended = self.attention(f"{block}.cross_attn", self.norm(x), context, query_rotation=factors)
            shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(
                f"{block}.modulation", F.silu(time + attended)
            ).chunk(6, dim=-1)
            y = self.norm(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attention(f"{block}.attn", y, y, query_rotation=factors, key_rotation=factors)
            x = x + gate2 * self.mlp(f"{block}.mlp", self.norm(x) * (1 + scale2) + shift2)
        x = self.norm(x)
        if config.adaptive_head:
            time = self.time("denoiser.time_embed", timestep)
            shift, scale = self.linear("denoiser.adaptive_head.modulation", F.silu(time)).chunk(2, dim=-1)
            x = self.linear("denoiser.adaptive_head.linear", self.norm(x) * (1 + scale) + shift)
        else:
            x = self.linear("denoiser.proj_out", x)
        return unpatchify(x, patch, channels, height, width)


def shifted(u, shift=2.0):
    return u / (u + shift * (1 - u))


def window_of(u, config):
    """The method's rule: floor(u K + 0.5) / K * N, clamped; from the unshifted time."""
    start = int(math.floor(u * config.num_groups + 0.5) / config.num_groups * config.num_tokens)
    start = min(start, config.num_tokens - config.tokens_per_group)
    return start, start + config.tokens_per_group


def seen_at(u, config):
    """Tokens [start, stop) whose conditions the step at the unshifted time sees."""
    start, stop = window_of(u, config)
    return (start if config.condition_scope == "group" else 0), stop
