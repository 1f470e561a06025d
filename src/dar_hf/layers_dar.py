"""Layers of the sequential diffusion tokenizer (D-AR, arXiv 2505.23660, section 3; original code: showlab/D-AR).

Reads downward: norm and rotary positions, attention and its cache, the blocks, the quantizer, the denoiser. Rotary
positions, times and the quantizer are float32 whatever the dtype of the model.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

NORM_EPS = 1e-6  # every LayerNorm of the tokenizer
NUM_REPA_ROWS = 16  # rows of the feature grid that REPA compares: DINOv2 at 224 pixels has 16


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def rotary_table(height: int, width: int, head_dim: int, theta: float) -> torch.Tensor:
    """Rotations of the two-axis rotary embedding of a ``height x width`` grid, as complex numbers.

    The first half of the head dimension rotates with the row, the second with the column; angles are computed in
    float64 and stored in float32, as the original code does.

    Returns:
        ``(height * width, 1, head_dim / 2)`` complex64.
    """
    per_axis = head_dim // 2
    frequencies = theta ** (-torch.arange(0, per_axis, 2, dtype=torch.float64) / per_axis)
    rows = torch.arange(height, dtype=torch.float64)[:, None, None] * frequencies
    columns = torch.arange(width, dtype=torch.float64)[None, :, None] * frequencies
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    angles = angles.reshape(height * width, 1, per_axis)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def apply_rotary(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs of ``x (B, L, heads, head_dim)`` by ``table (L, 1, head_dim / 2)`` in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def causal_mask(length: int, num_prefix: int = 0) -> torch.Tensor:
    """Mask ``(1, 1, L, L)``, L = num_prefix + length, True where a query may attend to a key: itself and earlier ones.

    All see the whole prefix, as in a prefix language model. Four axes, because diffusers' dispatcher reads a mask of
    two as one of padding.
    """
    size = num_prefix + length
    allowed = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    allowed[..., :num_prefix] = True
    return allowed


class Tables:
    """Rotary tables and masks of a tokenizer for images of some size in pixels, made once and kept on their device.

    They are no parameters, and not saved.
    """

    def __init__(self, config: Any):
        self.config = config
        self._made: dict[tuple, torch.Tensor] = {}

    def encoder(self, height: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Rotary table (identity for the queries) and mask of the encoder's sequence [patches, queries]."""
        config = self.config
        rows = height // config.encoder_patch_size
        columns = width // config.encoder_patch_size

        def rotary() -> torch.Tensor:
            table = rotary_table(rows, columns, config.attention_head_dim, config.rope_theta)
            return torch.cat([table, torch.ones_like(table[:1]).expand(config.num_tokens, -1, -1)])

        def mask() -> torch.Tensor:
            return causal_mask(config.num_tokens, num_prefix=rows * columns)

        return {
            "rotary": self._once(rotary, "encoder rotary", rows, columns, device),
            "attention_mask": self._once(mask, "encoder mask", rows, columns, device),
        }

    def causal(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Which codes before ``stop`` the codes ``[start, stop)`` see, ``(1, 1, stop - start, stop)`` bool."""
        mask = self._once(lambda: causal_mask(self.config.num_tokens), "causal mask", device)
        return mask[..., start:stop, :stop]

    def denoiser(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Rotary table of the denoiser's patches."""
        config = self.config
        rows = height // config.diffusion_patch_size
        columns = width // config.diffusion_patch_size

        def rotary() -> torch.Tensor:
            return rotary_table(rows, columns, config.attention_head_dim, config.diffusion_rope_theta)

        return self._once(rotary, "denoiser rotary", rows, columns, device)

    def _once(self, make: Callable[[], torch.Tensor], *key: Any) -> torch.Tensor:
        if key not in self._made:
            with torch.inference_mode(False):  # or training after a call in inference mode could not use it
                self._made[key] = make().to(key[-1])
        return self._made[key]


class CausalCache:
    """Keys and values of the causal blocks for the codes seen so far, one pair ``(B, L, heads, head_dim)`` a block."""

    def __init__(self, num_blocks: int):
        self.entries: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_blocks

    @property
    def length(self) -> int:
        """How many codes are held."""
        entry = self.entries[0] if self.entries else None
        return 0 if entry is None else entry[0].shape[1]

    def update(self, block: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values of a block and return all of them."""
        entry = self.entries[block]
        if entry is not None:
            key, value = torch.cat([entry[0], key], dim=1), torch.cat([entry[1], value], dim=1)
        self.entries[block] = (key, value)
        return key, value


class DARAttnProcessor:
    """Runs `DARAttention` through diffusers' dispatcher, so that ``set_attention_backend`` works."""

    _attention_backend = None
    _parallel_config = None
    # the private copies of acceleration_dar have fast_attention here
    attention: Callable[..., torch.Tensor] = staticmethod(dispatch_attention_fn)

    def __call__(
        self,
        attn: "DARAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        rotate_keys: bool = True,
        cache: tuple[CausalCache, int] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (-1, attn.head_dim)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads))
        key = attn.norm_k(attn.to_k(context).unflatten(-1, heads))
        value = attn.to_v(context).unflatten(-1, heads)
        # queries may be those of the last positions only
        num_queries = query.shape[1]
        if attention_mask is not None:
            attention_mask = attention_mask[..., -num_queries:, :]
        if rotary is not None:
            query = apply_rotary(query, rotary[-num_queries:])
        if rotary is not None and rotate_keys:
            key = apply_rotary(key, rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast norms in float32
        if cache is not None:
            past, block = cache
            key, value = past.update(block, key, value)
        output = self.attention(
            query,
            key,
            value,
            attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(output.flatten(2).to(query.dtype))


class DARAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with biases and an affine LayerNorm on every head's queries and keys."""

    _default_processor_cls = DARAttnProcessor
    _available_processors = [DARAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(DARAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


def feed_forward(dim: int) -> nn.Sequential:
    """Two linear layers around a SiLU, four times as wide inside."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x * (1 + scale) + shift`` as in adaLN, with one intermediate result less."""
    return torch.addcmul(x + shift, x, scale)


class GatedBlock(nn.Module):
    """Pre-norm transformer block whose two branches are scaled by learned per-channel gates (zero at the start)."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DARAttention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = feed_forward(dim)
        self.gate1 = nn.Parameter(torch.zeros(dim))
        self.gate2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor, attention_kwargs: dict, num_outputs: int | None = None) -> torch.Tensor:
        """All positions of ``x (B, L, dim)``, or the last ``num_outputs``, which still attend to all of them."""
        normed = self.norm1(x)
        queries = normed
        if num_outputs is not None:
            x = x[:, -num_outputs:]
            queries = normed[:, -num_outputs:]
        attended = self.attn(queries, encoder_hidden_states=normed, **attention_kwargs)
        x = torch.addcmul(x, self.gate1, attended)
        return torch.addcmul(x, self.gate2, self.mlp(self.norm2(x)))


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of ``1000 t`` (cosines first), then Linear-SiLU-Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        features = get_timestep_embedding(
            1000.0 * timestep.float(), self.dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class DiffusionBlock(nn.Module):
    """Decoder block: cross-attention to the conditions sets shift, scale and gate of each position (adaLN)."""

    def __init__(self, dim: int, head_dim: int, own_time_embedding: bool):
        super().__init__()
        self.time_embed = TimestepEmbedding(dim) if own_time_embedding else None
        self.condition_embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cross_attn = DARAttention(dim, head_dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = DARAttention(dim, head_dim)
        self.mlp = feed_forward(dim)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        timestep: torch.Tensor,
        shared_time: torch.Tensor | None,
        rotary: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        time: torch.Tensor = self.time_embed(timestep) if self.time_embed is not None else shared_time
        normed = layer_norm(x)
        attended = self.cross_attn(
            normed,
            encoder_hidden_states=layer_norm(self.condition_embed(condition)),
            attention_mask=condition_mask,
            rotary=rotary,
            rotate_keys=False,  # as in the original code: conditions have no position in the image
        )
        modulation = self.modulation(F.silu(time.unsqueeze(1) + attended))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(normed, shift1, scale1), rotary=rotary))
        normed = layer_norm(x)
        return torch.addcmul(x, gate2, self.mlp(modulate(normed, shift2, scale2)))


class AdaptiveHead(nn.Module):
    """DiT-style final layer: LayerNorm, shift and scale from the time embedding, Linear (``mlp_head`` originally)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(F.silu(time))[:, None].chunk(2, dim=-1)
        return self.linear(layer_norm(x) * (1 + scale) + shift)


def repa_head(dim: int, out_dim: int, hidden: int = 2048) -> nn.Sequential:
    """Projects decoder features to those of a frozen image encoder (training only).

    A plain Sequential, as diffusers' offloading by blocks cuts those into pieces of their own class.
    """
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_dim)
    )


class KeepsFloat32(nn.Module):
    """Keeps float32 parameters when the model around it is cast: codes must be identical however it was cast."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            cast = tensor.dtype == torch.float32 and moved.dtype != torch.float32
            return tensor.to(moved.device) if cast else moved

        return super()._apply(move_only, recurse)


class Float32Linear(KeepsFloat32, nn.Linear):
    """Linear layer that computes in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)


class VectorQuantizer(KeepsFloat32):
    """Nearest of the l2-normalised codebook rows. Stored rows have any length; their direction is the code."""

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.codebook.weight, -1.0, 1.0)
        # unit rows, as in the original code: a shorter row has a gradient that is larger by as much
        self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=-1)

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Codes ``(...)`` of l2-normalised latents ``(..., codebook_dim)``."""
        return self.similarities(latents).argmax(dim=-1)

    def similarities(self, latents: torch.Tensor) -> torch.Tensor:
        """Cosines ``(..., codebook_size)`` of latents ``(..., codebook_dim)`` and the codebook's rows."""
        # looked up like any codes, so that offloading brings the codebook in
        every_code = torch.arange(self.codebook.num_embeddings, device=latents.device)
        return latents @ self.embed(every_code).T

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """l2-normalised float32 code vectors ``(..., codebook_dim)``."""
        return F.normalize(self.codebook(codes).float(), dim=-1)


class Denoiser(nn.Module):
    """Pixel-space transformer that predicts the velocity of a noisy image under a step's conditions."""

    def __init__(self, config: Any):
        super().__init__()
        dim, head_dim = config.diffusion_dim, config.attention_head_dim
        self.patch_size = config.diffusion_patch_size
        self.repa_layer = config.repa_layer
        patch_dim = config.in_channels * self.patch_size**2
        self.proj_in = nn.Linear(patch_dim, dim)
        self.condition_proj = nn.Linear(config.condition_dim, dim)
        self.time_embed: Any = TimestepEmbedding(dim) if config.share_time_embedding else None
        self.blocks = nn.ModuleList(
            DiffusionBlock(dim, head_dim, not config.share_time_embedding) for _ in range(config.diffusion_depth)
        )
        self.adaptive_head: Any = AdaptiveHead(dim, patch_dim) if config.adaptive_head else None
        self.proj_out: Any = None if config.adaptive_head else nn.Linear(dim, patch_dim)
        self.repa_head: Any = None if config.repa_layer is None else repa_head(dim, config.repa_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        rotary: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
        output_repa: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A mask ``(B, 1, 1, conditions)`` is False at conditions that the step does not see."""
        rows = sample.shape[-2] // self.patch_size
        # pixel-unshuffle keeps (channel, row, column) order inside the patch, as the original code does
        x = self.proj_in(F.pixel_unshuffle(sample, self.patch_size).flatten(2).transpose(1, 2))
        condition = layer_norm(self.condition_proj(condition))
        time = self.time_embed(timestep) if self.time_embed is not None else None
        repa_features = None
        for index, block in enumerate(self.blocks):
            if output_repa and index == self.repa_layer:
                repa_features = self._repa_features(x, rows)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, timestep, time, rotary, condition_mask)
            else:
                x = block(x, condition, timestep, time, rotary, condition_mask)
        x = layer_norm(x)
        x = self.proj_out(x) if self.adaptive_head is None else self.adaptive_head(x, time)
        velocity = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, -1)), self.patch_size)
        return velocity, repa_features

    def _repa_features(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        grid = x.transpose(1, 2).unflatten(2, (rows, -1))
        pooled = F.avg_pool2d(grid, max(1, rows // NUM_REPA_ROWS))
        return self.repa_head(pooled.flatten(2).transpose(1, 2))
