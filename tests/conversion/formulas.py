"""The original's tokenizer as formulas over weights and options by the original's names; nothing of the package.

Written down from the description of the method, in float64: what a converted tokenizer has to compute.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROPE_BASE = 10000


def norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def rotations(rows, columns, base):
    """Angles of a grid's positions, (rows * columns, 32): 16 turn with the row, 16 with the column."""
    frequencies = torch.tensor([base ** (-2 * i / 32) for i in range(16)], dtype=torch.float64)
    return torch.stack(
        [torch.cat([row * frequencies, column * frequencies]) for row in range(rows) for column in range(columns)]
    )


def rotate(x, angles):
    """Turn neighbouring pairs of ``x (B, L, heads, 64)``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def to_patches(images, size):
    """(B, positions, C * size * size), with channel, row, column inside a patch."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


def to_images(patches, size, rows, columns):
    grid = patches.reshape(len(patches), rows, columns, -1, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, rows * size, columns * size)


@dataclass
class OriginalTokenizer:
    weights: dict
    config: dict

    def __post_init__(self):
        self.weights = {name: tensor.double() for name, tensor in self.weights.items()}
        self.decoder = self.config["diff_decoder"]

    def linear(self, name, x):
        weight = self.weights[f"{name}.weight"]
        y = x @ weight.reshape(weight.shape[0], -1).T  # 1x1 convolutions, too
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def affine_norm(self, name, x):
        return norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attention(self, name, x, context, allowed=None, turn_queries=None, turn_keys=None):
        query, key, value = (
            self.linear(f"{name}.{part}", source).unflatten(-1, (-1, 64))
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        query, key = self.affine_norm(f"{name}.q_norm", query), self.affine_norm(f"{name}.k_norm", key)
        query = query if turn_queries is None else rotate(query, turn_queries)
        key = key if turn_keys is None else rotate(key, turn_keys)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return self.linear(f"{name}.proj", mixed.flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.silu(self.linear(f"{name}.fc1", x)))

    def blocks(self, stem, count, x, **options):
        for name in (f"{stem}.{layer}" for layer in range(count)):
            y = self.affine_norm(f"{name}.norm1", x)
            x = x + self.weights[f"{name}.gate1"] * self.attention(f"{name}.attention", y, y, **options)
            y = self.affine_norm(f"{name}.norm2", x)
            x = x + self.weights[f"{name}.gate2"] * self.mlp(f"{name}.mlp", y)
        return x

    def codebook(self):
        return F.normalize(self.weights["quantize.embedding.weight"], dim=-1)

    def encode(self, images):
        config, patch = self.config, self.config["encoder_patch_size"]
        rows, columns, count = images.shape[2] // patch, images.shape[3] // patch, config["num_all_queries"]
        kernel = self.weights["patchify.weight"].flatten(1)
        patches = to_patches(images.double(), patch) @ kernel.T + self.weights["patchify.bias"]
        queries = self.weights["query_embedding.weight"][:count]
        if config["query_low_rank"]:
            queries = self.linear("query_linear", queries)
        x = torch.cat([norm(patches), queries.expand(len(images), -1, -1)], dim=1)
        angles = rotations(rows, columns, config.get("rope_base_len", ROPE_BASE))
        angles = torch.cat([angles, torch.zeros(count, 32, dtype=torch.float64)])  # queries do not turn
        allowed = torch.ones(len(angles), len(angles)).tril().bool()
        allowed[:, : rows * columns] = True
        x = self.blocks(
            "encoder_layers", config["num_encoder_layers"], x, allowed=allowed, turn_queries=angles, turn_keys=angles
        )
        latents = F.normalize(self.linear("quant_in_conv", norm(x[:, rows * columns :])), dim=-1)
        return (latents @ self.codebook().T).argmax(-1)

    def condition(self, codes):
        count = codes.shape[1]
        x = self.linear("quant_out_conv", self.codebook()[codes]) + self.weights["decoder_embedding.weight"][:count]
        allowed = torch.ones(count, count).tril().bool()
        return norm(self.blocks("decoder_layers", self.config["num_decoder_layers"], x, allowed=allowed))

    def time(self, name, t):
        half = self.decoder["dim"] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        angles = 1000 * t.double()[:, None] * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", x)))[:, None]

    def velocity(self, noisy, t, condition):
        """The velocity, and the features that REPA compares."""
        net, patch, decoder = "diff_decoder.net", self.decoder["patch_size"], self.decoder
        rows, columns = noisy.shape[2] // patch, noisy.shape[3] // patch
        angles = rotations(rows, columns, decoder.get("rope_base_len", ROPE_BASE))
        x = self.linear(f"{net}.conv_in", to_patches(noisy.double(), patch))
        condition = norm(self.linear(f"{net}.cond_mlp", condition.double()))
        features = None
        for layer in range(decoder["depth"]):
            if layer == decoder["repa_layer"] and f"{net}.repa_out.0.weight" in self.weights:
                features = self.repa(x, rows, columns)
            block = f"{net}.blocks.{layer}"
            time = self.time(f"{net if decoder['share_time_encoding'] else block}.time_embed", t)
            inner = F.silu(self.linear(f"{block}.cond_embed.0", condition))
            context = norm(self.linear(f"{block}.cond_embed.2", inner))
            attended = self.attention(f"{block}.cross_attn", norm(x), context, turn_queries=angles)
            modulation = self.linear(f"{block}.adaLN_modulation.1", F.silu(time + attended)).chunk(6, dim=-1)
            shift, scale, gate = modulation[:3]
            y = norm(x) * (1 + scale) + shift
            x = x + gate * self.attention(f"{block}.attention", y, y, turn_queries=angles, turn_keys=angles)
            shift, scale, gate = modulation[3:]
            x = x + gate * self.mlp(f"{block}.mlp", norm(x) * (1 + scale) + shift)
        x = norm(x)
        if decoder["mlp_head"]:
            time = F.silu(self.time(f"{net}.time_embed", t))
            shift, scale = self.linear(f"{net}.linear_out.adaLN_modulation.1", time).chunk(2, dim=-1)
            x = self.linear(f"{net}.linear_out.linear", norm(x) * (1 + scale) + shift)
        else:
            x = self.linear(f"{net}.conv_out", x)
        return to_images(x, patch, rows, columns), features

    def repa(self, x, rows, columns):
        grid = x.transpose(1, 2).unflatten(2, (rows, columns))
        x = F.avg_pool2d(grid, max(1, rows // 16)).flatten(2).transpose(1, 2)
        for layer in (0, 2):
            x = F.silu(self.linear(f"diff_decoder.net.repa_out.{layer}", x))
        return self.linear("diff_decoder.net.repa_out.4", x)

    def shifted(self, u):
        return u / (u + self.decoder["time_shift"] * (1 - u))

    def window(self, u):
        """Tokens that the step at the unshifted time u sees."""
        groups, count = self.config["num_query_groups"], self.config["num_all_queries"]
        length = self.config.get("queries_per_step") or count // groups
        start = min(math.floor(u * groups + 0.5) * count // groups, count - length)
        return start, start + length

    def decode(self, codes, noise):
        """The image of all codes: Adams-Bashforth with fixed weights, Euler for the first step."""
        steps, condition = self.config["num_denoising_steps"], self.condition(codes)
        x, before = noise.double(), None
        for step in range(steps):
            start, stop = self.window(step / steps)
            now, then = (self.shifted(u / steps) for u in (step, step + 1))
            v, _ = self.velocity(x, torch.full((len(x),), now, dtype=torch.float64), condition[:, start:stop])
            x = x + (then - now) * (v if before is None else 1.5 * v - 0.5 * before)
            before = v
        return x / self.decoder["data_std"]

    def training(self, images, u, noise):
        """The jump estimate of a training step, over data_std."""
        codes = self.encode(images)
        condition, estimates = self.condition(codes), []
        for row, value in enumerate(u.tolist()):
            start, stop = self.window(value)
            t = torch.tensor([self.shifted(value)], dtype=torch.float64)
            noisy = t * self.decoder["data_std"] * images[row : row + 1] + (1 - t) * noise[row : row + 1]
            v, _ = self.velocity(noisy, t, condition[row : row + 1, start:stop])
            estimates.append(noisy + (1 - t) * v)
        return torch.cat(estimates) / self.decoder["data_std"]
