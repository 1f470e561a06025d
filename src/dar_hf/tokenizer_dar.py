"""The sequential diffusion tokenizer of D-AR (arXiv 2505.23660, section 3; original code: showlab/D-AR).

An encoder turns an image into N discrete codes in K groups; group k conditions the k-th denoising step of a
pixel-space flow-matching decoder. So decoding codes *is* sampling a diffusion model, and every finished group gives a
preview. `DARTokenizer` reads in the order of the data: image to codes, codes to conditions, conditions to image, and
the training pass that does all three. Its layers are in ``layers_dar.py``.

What departs from the original code: attention keeps no map, the causal blocks keep a cache while codes stream in,
and the quantizer, time, rotary positions and solver state are float32 whatever the dtype of the model. Values are the
same, except where the denoiser decodes in bfloat16 (`DARTokenizer.decode_dtype`).
"""

import copy
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .acceleration_dar import accelerated, fastest_dtype, is_plain, release
from .checks_dar import (
    check_generators,
    check_integer,
    check_option_types,
    check_sizes,
    check_tensor,
    check_times,
    described,
)
from .layers_dar import (
    CausalCache,
    Denoiser,
    Float32Linear,
    GatedBlock,
    Tables,
    VectorQuantizer,
    layer_norm,
    repa_head,
)
from .scheduling_dar import FlowMatchAdamsBashforthScheduler, check_num_steps, shift_time, to_adams_bashforth
from .weights_dar import (
    check_finite_weights,
    check_weights,
    not_finite,
    replacing_earlier_save,
    saved_weights,
    some_of,
)

REPA_HEAD = "denoiser.repa_head."  # begins the names of the weights of the REPA head
CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass
class DARTokenizerEncoderOutput(BaseOutput):
    """Attributes:
    codes: ``(B, num_tokens)`` long, in [0, codebook_size).
    latents: ``(B, num_tokens, codebook_dim)`` float32, l2-normalised, before quantization.
    """

    codes: torch.Tensor
    latents: torch.Tensor


@dataclass
class DARPreview(BaseOutput):
    """One denoising step of `DARTokenizer.decode_stream`.

    Attributes:
        step, num_steps: this step, counted from 1, and how many there are.
        num_tokens: how many codes the image depends on so far.
        sample: ``(B, C, H, W)`` float32, in the range of images, not clamped: this step taken straight to t = 1.
        timestep: the shifted time at which the step began, in [0, 1).
        latents: ``(B, C, H, W)`` float32, the solver's noisy state after the step; a tensor put in its place before
            the stream goes on replaces it.
        codes: ``(B, n)``, all codes that have arrived.
    """

    step: int
    num_steps: int
    num_tokens: int
    sample: torch.Tensor
    timestep: float
    latents: torch.Tensor
    codes: torch.Tensor


@dataclass
class DARTokenizerOutput(BaseOutput):
    """Everything the losses of stage 1 need, float32.

    Attributes:
        velocity, target: predicted and true velocity, ``(B * R, C, H, W)`` with R times for each image, in units of
            ``data_std`` times the image.
        pred_original_sample: jump estimate of the clean image, ``(B * R, C, H, W)``, in the range of images.
        codes: ``(B, N)``; latents, quantized: ``(B, N, codebook_dim)``, both l2-normalised.
        token_mask: ``(B, N)``, at how many of the image's times the token takes part: the tokens up to the end of that
            time's group do, so with one time this is 1.0 up to there and 0.0 after it.
        timesteps: ``(B * R,)`` shifted times.
        repa_features: ``(B * R, tokens, repa_dim)``, where asked for.
    """

    # every field but the first has a default, so that accelerate can rebuild the output from a dictionary
    velocity: torch.Tensor
    target: torch.Tensor = None  # type: ignore[assignment]
    pred_original_sample: torch.Tensor = None  # type: ignore[assignment]
    codes: torch.Tensor = None  # type: ignore[assignment]
    latents: torch.Tensor = None  # type: ignore[assignment]
    quantized: torch.Tensor = None  # type: ignore[assignment]
    token_mask: torch.Tensor = None  # type: ignore[assignment]
    timesteps: torch.Tensor = None  # type: ignore[assignment]
    repa_features: torch.Tensor | None = None


class DARTokenizer(ModelMixin, AttentionMixin, ConfigMixin):
    """Image to codes and back: encoder, quantizer, causal condition blocks and diffusion decoder.

    The defaults are the ImageNet 256x256 tokenizer "v1".

    Args:
        sample_size: image size in pixels, an int or (height, width).
        strict_sample_size: refuse other sizes than ``sample_size``. A model trained at one size gives wrong images
            at others without any sign of it; False allows every multiple of both patch sizes, as the original code.
        in_channels: image channels.
        encoder_patch_size, encoder_dim, num_encoder_layers: the encoder.
        decoder_dim, num_decoder_layers: the causal blocks that turn codes into conditions.
        codebook_size, codebook_dim: the quantizer.
        num_tokens, num_groups, tokens_per_group: N codes in K groups; the last defaults to N / K.
        num_inference_steps: denoising steps of `decode` unless the call says otherwise; defaults to ``num_groups``.
        condition_scope: which codes a denoising step sees the conditions of: "group", those of its own group, as in
            the paper; or "prefix", those of all groups up to its own, with which groups share the image out among
            them instead of repeating each other (docs/experiments.md).
        diffusion_dim, diffusion_patch_size, diffusion_depth: the denoiser.
        condition_dim: width of the conditions that enter the denoiser; must be ``decoder_dim`` (its default).
        attention_head_dim: width of one head; every width must be a multiple of it.
        rope_theta: base of the encoder's rotary frequencies.
        diffusion_rope_theta: base of the denoiser's; defaults to ``rope_theta``.
        low_rank_queries: learned queries through a bottleneck of ``query_rank`` instead of full width.
        share_time_embedding: one time embedding for all denoiser blocks instead of one each.
        adaptive_head: DiT-style final layer; needs ``share_time_embedding``.
        data_std: images are multiplied by this before diffusion (0.6), so that their variance is near that of noise.
        time_shift: beta of the time shift.
        repa_layer: index of the denoiser block whose input the REPA head reads; None for no head. Training only.
        repa_dim: width of the features REPA compares with.
        max_num_tokens: rows of the query and token tables (1024 in released weights; the first N are used).

    Raises:
        ValueError: for sizes that do not fit together; the message names them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GatedBlock", "DiffusionBlock"]
    _repeated_blocks = ["GatedBlock", "DiffusionBlock"]
    _keep_in_fp32_modules = ["quant_proj", "quantizer"]  # when loading; `KeepsFloat32` sees to casting
    _keys_to_ignore_on_load_unexpected = ["^" + re.escape(REPA_HEAD)]  # of training
    # what offloading by blocks must bring in by itself, since encoding and decoding do not go through `forward`
    _group_offload_block_modules = [
        *("patch_embed", "query_embed", "query_proj", "quant_proj", "quantizer", "codebook"),
        *("post_quant_proj", "token_embed", "denoiser"),
    ]
    _skip_layerwise_casting_patterns = ["norm", "quant", "time_embed"]  # they read the dtype of their weights

    decode_dtype: torch.dtype | None = None
    """dtype in which `decode` runs the denoiser. None: the model's dtype, with two exceptions for denoisers of width
    512 or more: a float32 model decodes in bf16 where the hardware computes that natively, and a half-precision model
    decodes in float32 on CPUs that only emulate bf16. Codes, conditions, time, rotary positions and the solver stay as
    they are. A denoiser that something else intervenes in (hooks, offloading, quantised or compiled parts) runs as it
    is."""

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 256,
        in_channels: int = 3,
        encoder_patch_size: int = 16,
        encoder_dim: int = 768,
        num_encoder_layers: int = 8,
        decoder_dim: int = 768,
        num_decoder_layers: int = 8,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        num_tokens: int = 256,
        num_groups: int = 8,
        tokens_per_group: int | None = None,
        num_inference_steps: int | None = None,
        diffusion_dim: int = 768,
        diffusion_patch_size: int = 8,
        diffusion_depth: int = 12,
        condition_dim: int | None = None,
        attention_head_dim: int = 64,
        rope_theta: float = 10000.0,
        low_rank_queries: bool = True,
        share_time_embedding: bool = False,
        adaptive_head: bool = False,
        data_std: float = 0.6,
        time_shift: float = 2.0,
        repa_layer: int | None = 8,
        repa_dim: int = 768,
        max_num_tokens: int = 1024,
        query_rank: int = 8,
        strict_sample_size: bool = True,
        diffusion_rope_theta: float | None = None,
        condition_scope: str = "group",
    ):
        super().__init__()
        check_option_types(self.config)
        self.register_to_config(
            tokens_per_group=num_tokens // num_groups if tokens_per_group is None else tokens_per_group,
            num_inference_steps=num_groups if num_inference_steps is None else num_inference_steps,
            condition_dim=decoder_dim if condition_dim is None else condition_dim,
            diffusion_rope_theta=rope_theta if diffusion_rope_theta is None else diffusion_rope_theta,
        )
        config = self.config
        check_sizes(config)
        head_dim = attention_head_dim

        self.patch_embed = nn.Conv2d(in_channels, encoder_dim, encoder_patch_size, stride=encoder_patch_size)
        self.query_embed = nn.Embedding(max_num_tokens, query_rank if low_rank_queries else encoder_dim)
        self.query_proj = nn.Linear(query_rank, encoder_dim) if low_rank_queries else None
        self.encoder_blocks = nn.ModuleList(GatedBlock(encoder_dim, head_dim) for _ in range(num_encoder_layers))
        self.quant_proj = Float32Linear(encoder_dim, codebook_dim, bias=False)
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim)
        self.post_quant_proj = nn.Linear(codebook_dim, decoder_dim, bias=False)
        self.token_embed = nn.Embedding(max_num_tokens, decoder_dim)
        self.causal_blocks = nn.ModuleList(GatedBlock(decoder_dim, head_dim) for _ in range(num_decoder_layers))
        self.denoiser = Denoiser(config)
        self.gradient_checkpointing = False
        self.tables = Tables(config)
        self.reset_parameters()

    def reset_parameters(
        self,
        gate: float = 0.0,
        modulation_std: float = 0.0,
        output_std: float = 0.0,
        post_quant_std: float = 0.0,
        rotary_bias_std: float = 0.0,
        token_embed_std: float = 0.02,
    ) -> None:
        """Set the start values that decide whether codes come into use.

        Args:
            gate: gates of the encoder and causal blocks (0 in the paper: every block starts as the identity).
            modulation_std, output_std: adaLN and output layers of the denoiser, N(0, std) (0 in the paper).
            post_quant_std: the projection after the quantizer, N(0, std); 0 leaves torch's default.
            rotary_bias_std: biases of the queries and keys that rotary positions rotate, N(0, std); 0 leaves torch's
                default. A rotated bias is all that lets attention choose a place whatever is there: patches have no
                other position.
            token_embed_std: what tells the codes' places in the sequence apart, N(0, std). It is added to the codes,
                and must not drown them.
        """
        for block in (*self.encoder_blocks, *self.causal_blocks):
            nn.init.constant_(block.gate1, gate)
            nn.init.constant_(block.gate2, gate)
        outputs = [(block.modulation, modulation_std) for block in self.denoiser.blocks]
        if self.denoiser.adaptive_head is not None:
            outputs.append((self.denoiser.adaptive_head.modulation, modulation_std))
            outputs.append((self.denoiser.adaptive_head.linear, output_std))
        else:
            outputs.append((self.denoiser.proj_out, output_std))
        for layer, std in outputs:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        if post_quant_std:
            nn.init.normal_(self.post_quant_proj.weight, std=post_quant_std)
        if rotary_bias_std:
            rotated = [layer for block in self.encoder_blocks for layer in (block.attn.to_q, block.attn.to_k)]
            for block in self.denoiser.blocks:
                rotated += [block.cross_attn.to_q, block.attn.to_q, block.attn.to_k]
            for layer in rotated:
                nn.init.normal_(layer.bias, std=rotary_bias_std)
        if self.query_proj is None:
            nn.init.trunc_normal_(self.query_embed.weight, std=0.02)  # as in the original code
        nn.init.normal_(self.token_embed.weight, std=token_embed_std)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.config.sample_size
        if isinstance(size, int):
            return size, size
        height, width = size
        return height, width

    # Groups and steps

    def group_start(self, u: torch.Tensor) -> torch.Tensor:
        """First token of the group that a step at *unshifted* time ``u`` in [0, 1] sees.

        Rounds as the original code does (the paper says ceil): in training group 0 gets 1 / 2K of the times and the
        last group 3 / 2K.
        """
        config = self.config
        group = torch.floor(u.double() * config.num_groups + 0.5).long()
        start = group * (config.num_tokens // config.num_groups)
        return start.clamp(max=config.num_tokens - config.tokens_per_group)

    def step_windows(self, num_inference_steps: int) -> list[tuple[int, int]]:
        """Tokens [start, stop) of the group that each of ``num_inference_steps`` steps belongs to.

        With fewer steps than groups some have no step of their own. A step sees these tokens' conditions, and with
        ``condition_scope="prefix"`` also those of all tokens before them.
        """
        starts = self.group_start(torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps)
        return [(start, start + self.config.tokens_per_group) for start in starts.tolist()]

    def window_ends(self) -> list[int]:
        """Where windows end, for any number of steps: at each group's, and at that of u = 1."""
        times = torch.arange(self.config.num_groups + 1, dtype=torch.float64) / self.config.num_groups
        return sorted({start + self.config.tokens_per_group for start in self.group_start(times).tolist()})

    # Image to codes

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> DARTokenizerEncoderOutput | tuple:
        """Tokenize images.

        Args:
            pixel_values: ``(B, C, H, W)`` floating point in [-1, 1], of the model's size.

        Raises:
            ValueError: for another shape, size or range, or where latents are not finite.
        """
        self._check_images(pixel_values)
        latents = self._encode(pixel_values)
        with torch.autocast(latents.device.type, enabled=False):
            similarities = self.quantizer.similarities(latents)
            codes = similarities.argmax(dim=-1)
        if codes.numel():
            self._check_encoded(pixel_values, similarities.gather(-1, codes[..., None]))
        if not return_dict:
            return codes, latents
        return DARTokenizerEncoderOutput(codes, latents)

    def _check_encoded(self, pixel_values: torch.Tensor, similarities: torch.Tensor) -> None:
        """Raises ValueError for pixels out of range, or where latents, and so their similarities, are not finite.

        Checked after the model has run, so that the device is waited for once, and at the end. The largest similarity
        is NaN wherever there is one.
        """
        values = (*pixel_values.aminmax(), similarities.sum())
        low, high, total = torch.stack([value.to(similarities) for value in values]).tolist()
        if not (low >= -1.001 and high <= 1.001):  # also catches NaN
            raise ValueError(f"pixel_values must lie in [-1, 1], got values from {low:.4g} to {high:.4g}.")
        if not math.isfinite(total):
            raise not_finite("the latents of these images", self)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """l2-normalised float32 latents ``(B, N, codebook_dim)``."""
        num_tokens = self.config.num_tokens
        patches = self.patch_embed(pixel_values.to(self.dtype))
        patches = layer_norm(patches.flatten(2).transpose(1, 2))
        queries = self.query_embed(torch.arange(num_tokens, device=patches.device))
        if self.query_proj is not None:
            queries = self.query_proj(queries)
        queries = queries.to(patches.dtype).expand(len(patches), -1, -1)
        x = torch.cat([patches, queries], dim=1)
        attention_kwargs = self.tables.encoder(pixel_values.shape[2], pixel_values.shape[3], x.device)
        # a faster copy where no gradients are asked for; in training the blocks themselves
        x = self._run_blocks(accelerated(self.encoder_blocks), x, attention_kwargs, num_outputs=num_tokens)
        latents = self.quant_proj(layer_norm(x[:, -num_tokens:].float()))
        return F.normalize(latents, dim=-1)

    def _run_blocks(
        self, blocks: nn.ModuleList, x: torch.Tensor, attention_kwargs: dict, num_outputs: int | None = None
    ) -> torch.Tensor:
        """The blocks one after the other; of the last one the last ``num_outputs`` positions, where they are given."""
        for index, block in enumerate(blocks):
            outputs = num_outputs if index == len(blocks) - 1 else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, attention_kwargs, outputs)
            else:
                x = block(x, attention_kwargs, outputs)
        return x

    # Codes to conditions

    def condition(self, codes: torch.Tensor, cache: CausalCache | None = None) -> torch.Tensor:
        """Conditions ``(B, n, decoder_dim)`` of a sequence of codes ``(B, n)``, for any n up to N.

        Causal: the conditions of a prefix never change when more codes follow. With a `CausalCache` the codes follow
        those the cache has seen.

        Raises:
            ValueError: for codes of the wrong type, shape or range.
        """
        self._check_codes(codes)
        if cache is not None and cache.length + codes.shape[1] > self.config.num_tokens:
            raise ValueError(f"{cache.length} + {codes.shape[1]} codes are more than {self.config.num_tokens}.")
        return self._condition(self.quantizer.embed(codes.long()), cache)

    def _condition(
        self,
        quantized: torch.Tensor,
        cache: CausalCache | None = None,
        blocks: nn.ModuleList | None = None,
    ) -> torch.Tensor:
        """Conditions of code vectors ``(B, n, codebook_dim)`` that follow those in the cache.

        By a copy of the causal blocks where one is given.
        """
        start = 0 if cache is None else cache.length
        stop = start + quantized.shape[1]
        x = self.post_quant_proj(quantized.to(self.post_quant_proj.weight.dtype))
        x = x + self.token_embed(torch.arange(start, stop, device=x.device))
        mask = self.tables.causal(start, stop, quantized.device)
        if cache is None:
            x = self._run_blocks(self.causal_blocks, x, {"attention_mask": mask})
        else:
            if blocks is None:
                blocks = self.causal_blocks
            for index, block in enumerate(blocks):
                x = block(x, {"attention_mask": mask, "cache": (cache, index)})
        return layer_norm(x)

    def _condition_stream(
        self, pieces: Iterable[torch.Tensor], check_codes: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Codes and conditions so far, each time a group is complete, however the codes arrive.

        Pieces are cut where groups end, so that the same arithmetic runs for one long sequence and for a slow stream.
        """
        config = self.config
        cache = CausalCache(len(self.causal_blocks))
        ends = self.window_ends()
        codes: torch.Tensor | None = None
        conditions: torch.Tensor | None = None
        blocks: nn.ModuleList | None = None
        for piece in pieces:
            self._check_codes(piece, values=check_codes)
            if codes is not None and len(piece) != len(codes):
                raise ValueError(f"pieces of one sequence differ in batch size: {len(codes)} and {len(piece)}.")
            self._bring_in()
            device = self.device  # looked up once per piece: diffusers searches all modules for it
            if device.type != "meta":  # models offloaded layer by layer are there: their hooks move the inputs
                piece = piece.to(device)
            codes = piece if codes is None else torch.cat([codes, piece], dim=1)
            if codes.shape[1] > config.num_tokens:
                raise ValueError(f"a sequence has at most {config.num_tokens} codes, got {codes.shape[1]}.")
            if blocks is None:
                blocks = accelerated(self.causal_blocks)
            while ends and codes.shape[1] >= ends[0]:
                complete = codes[:, cache.length : ends.pop(0)]
                new = self._condition(self.quantizer.embed(complete.long()), cache, blocks)
                conditions = new if conditions is None else torch.cat([conditions, new], dim=1)
                yield codes, conditions

    # Conditions to image

    def velocity(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        """The denoiser: velocity ``x_1 - x_0`` at a noisy sample.

        Args:
            sample: ``(B, C, H, W)``, ``t * data_std * image + (1 - t) * noise``.
            timestep: *shifted* time in [0, 1], a scalar or ``(B,)``.
            condition: ``(B, tokens, condition_dim)``, the conditions of one group, or of all groups up to it
                (``condition_scope``).

        Returns:
            A tensor like ``sample``.

        Raises:
            ValueError: for a sample or a condition of another shape, or for times of another number or range (which
                on GPUs are not read).
        """
        self._check_images(sample, "sample")
        check_tensor("condition", condition, (len(sample), "tokens", self.config.condition_dim))
        try:
            times = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"timestep must be a time in [0, 1], got {described(timestep)}.") from error
        if times.ndim > 1 or times.numel() not in (1, len(sample)):
            raise ValueError(
                f"timestep must be one time or one for each of {len(sample)} images, got {tuple(times.shape)}."
            )
        check_times("timestep", timestep)
        return self._velocity(sample, times.expand(len(sample)), condition)[0].to(sample.dtype)

    def _velocity(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        *,
        condition_mask: torch.Tensor | None = None,
        output_repa: bool = False,
        denoiser: Denoiser | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity, and features of the REPA head where asked for; by a copy of the denoiser where one is given."""
        if denoiser is None or denoiser is self.denoiser:
            denoiser = self.denoiser
            dtype = self.dtype  # not that of its weights: they may be stored in fewer bits
        else:
            dtype = denoiser.condition_proj.weight.dtype
        rotary = self.tables.denoiser(sample.shape[2], sample.shape[3], sample.device)
        return denoiser(sample.to(dtype), timestep, condition.to(dtype), rotary, condition_mask, output_repa)

    @apply_forward_hook
    def decode(
        self,
        codes: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: FlowMatchAdamsBashforthScheduler | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple:
        """Images of codes ``(B, n)``; with n < N the preview of that prefix. See `decode_stream` for the arguments.

        Returns:
            ``sample (B, C, H, W)`` float32, not clamped.

        Raises:
            ValueError: for wrong sizes, steps, codes or schedulers, or where the images are not finite.
        """
        sample = None
        for preview in self.decode_stream(
            [codes],
            generator=generator,
            noise=noise,
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            scheduler=scheduler,
        ):
            sample = preview.sample
        if sample is None:
            raise ValueError(
                f"{codes.shape[1]} codes complete no group of {self.config.tokens_per_group}: nothing to decode."
            )
        self.check_finite(sample)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_stream(
        self,
        groups: Iterable[torch.Tensor],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: FlowMatchAdamsBashforthScheduler | None = None,
        start_step: int = 0,
        check_codes: bool = True,
    ) -> Iterator[DARPreview]:
        """Denoise while codes arrive: one `DARPreview` per step, each as soon as the codes it depends on have arrived.

        The last one is the image; the one after k groups equals ``decode`` of those k groups, value for value.

        Args:
            groups: pieces ``(B, any length)`` of one sequence of codes, at most N in all.
            generator: source of the start noise, one or one per image.
            noise: start noise ``(B, C, H, W)`` instead; with ``start_step`` the noisy sample of that step.
            num_inference_steps: number of steps, any; neighbouring steps share a group where there are more than
                groups. Defaults to the configuration's.
            height, width: size in pixels; default the configuration's, or that of ``noise``.
            scheduler: solver, copied and so left untouched; default one with the configuration's ``time_shift``.
                diffusers' flow-matching Euler scheduler is taken for ours with its shift and ``solver_order=1``.
            start_step: steps to skip (image-to-image).
            check_codes: False for codes known to be in range: on GPUs the check waits for them.

        Raises:
            ValueError: for wrong sizes, steps, codes, noise, generators or schedulers, or where images are not finite.
                On GPUs, which this would keep waiting, only the last step's are looked at, and noise is not.
        """
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        num_steps = check_num_steps(num_inference_steps)
        start_step = check_integer("start_step", start_step, least=None)
        if not 0 <= start_step < num_steps:
            raise ValueError(f"start_step must lie in [0, {num_steps}), got {start_step}.")
        if not isinstance(groups, Iterable):
            raise ValueError(f"groups must be an iterable of codes, got {described(groups)}.")
        size = self._decoding_size(noise, height, width)
        if scheduler is None:
            scheduler = FlowMatchAdamsBashforthScheduler(shift=self.config.time_shift)
        # a copy, so that two streams can run at once on one pipeline
        scheduler = copy.deepcopy(to_adams_bashforth(scheduler))
        scheduler.set_timesteps(num_steps)
        conditions = self._condition_stream(groups, check_codes)
        return self._denoise(conditions, generator, noise, size, scheduler, start_step)

    @torch.no_grad()
    def _denoise(
        self,
        condition_stream: Iterable[tuple[torch.Tensor, torch.Tensor]],
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | None,
        size: tuple[int, int],
        scheduler: FlowMatchAdamsBashforthScheduler,
        start_step: int,
    ) -> Iterator[DARPreview]:
        num_steps = len(scheduler.timesteps)
        windows = self.step_windows(num_steps)
        step = start_step
        denoiser = None
        for codes, conditions in condition_stream:
            if denoiser is None:  # the first codes: only now are batch size and device known
                denoiser = self._denoiser_for_decoding()
                sample = self._start_noise(noise, generator, (len(conditions), *size), conditions.device)
            while step < num_steps and windows[step][1] <= conditions.shape[1]:
                start, stop = windows[step]
                if self.config.condition_scope == "prefix":
                    start = 0
                timestep = scheduler.timesteps[step]
                # one for all images; filled where it is needed, since copying it there would wait for the device
                time = torch.full((1,), float(timestep), dtype=torch.float32, device=sample.device)
                velocity, _ = self._velocity(sample, time, conditions[:, start:stop], denoiser=denoiser)
                clean = scheduler.preview(velocity, timestep, sample)  # before step, which moves the history on
                noisy = scheduler.step(velocity, timestep, sample)[0]
                step += 1
                if step == num_steps or clean.device.type == "cpu":
                    self.check_finite(clean)
                preview = DARPreview(
                    step=step,
                    num_steps=num_steps,
                    num_tokens=stop,
                    sample=clean / self.config.data_std,
                    timestep=float(timestep),
                    latents=noisy,
                    codes=codes,
                )
                yield preview
                sample = preview.latents  # which the caller may have replaced
            if step == num_steps:
                return  # with fewer steps than groups the last codes change nothing: do not wait for them

    def _start_noise(
        self,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        size: tuple[int, int, int],
        device: torch.device,
    ) -> torch.Tensor:
        """The caller's noise, or noise drawn for ``size``: images, rows and columns."""
        batch_size, height, width = size
        check_generators(generator, batch_size, device)
        if noise is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            shape = (batch_size, self.config.in_channels, height, width)
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if len(noise) != batch_size:
            raise ValueError(f"noise for {len(noise)} images does not fit codes of {batch_size}.")
        return noise.to(device)

    def _denoiser_for_decoding(self) -> Denoiser:
        """The denoiser, or a faster copy of it in `decode_dtype`; without the REPA head where weights are cast."""
        if not is_plain(self.denoiser):
            return self.denoiser
        dtype = self.decode_dtype
        if dtype is None:
            dtype = fastest_dtype(self.dtype, self.device, self.config.diffusion_dim)
        if dtype == self.dtype:  # not packed: products of this many rows gain nothing from it
            return accelerated(self.denoiser)
        on_cpu = self.device.type == "cpu"  # only there weights are packed, and worth keeping
        return accelerated(self.denoiser, dtype=dtype, pack=True, keep=on_cpu, without=["repa_head"])

    @apply_forward_hook
    def _bring_in(self) -> None:
        """Does nothing; its hook does: under model offloading it moves this model in, and the other one out."""

    def check_finite(self, images: torch.Tensor) -> None:
        """Raises ValueError, which names the cause, for decoded images with NaN or infinity; waits for the device."""
        if not images.isfinite().all():
            raise not_finite("the decoded images", self)

    # Training: image to codes to conditions to velocity

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        quantize: bool = True,
        hide_group: torch.Tensor | None = None,
        output_repa: bool = False,
        return_dict: bool = True,
    ) -> DARTokenizerOutput | tuple:
        """One training pass: encode, quantize, and denoise each image at random times under those times' groups.

        What is predicted has a row for each time, ``B * R`` with R times for each image, one image after the other.
        The paper has one; with more, an image is encoded and its conditions are computed once for all of them.

        Args:
            pixel_values: ``(B, C, H, W)`` in [-1, 1].
            timesteps: *unshifted* uniform times ``(B,)`` or ``(B, R)`` in [0, 1], which pick the shifted time and the
                group; one for each image is drawn where they are missing.
            noise: ``(B * R, C, H, W)``; drawn where missing.
            generator: source of both draws.
            quantize: False feeds the normalised latents on without quantizing (continuous warm-up); ``quantized``
                still holds the nearest codes.
            hide_group: ``(B * R,)`` bool, times at which the own group's codes are replaced by zeros, so that the step
                must use earlier groups; never the first group. Not in the paper: it makes groups share the work.
            output_repa: also return the features of the REPA head.
            return_dict: False gives a tuple, without the fields that are None.

        Raises:
            ValueError: for wrong types, shapes, sizes or times (which on GPUs are not read), or REPA features of a
                model without that head.
        """
        timesteps, noise = self._training_inputs(pixel_values, timesteps, noise, generator)
        times_per_image = len(timesteps) // len(pixel_values)
        device = pixel_values.device
        if output_repa and self.config.repa_layer is None:
            raise ValueError("this tokenizer has no REPA head: repa_layer is None in its configuration.")

        latents = self._encode(pixel_values)
        with torch.autocast(device.type, enabled=False):
            with torch.no_grad():
                codes = self.quantizer.nearest(latents)
            quantized = self.quantizer.embed(codes)
        quantized_st = latents
        if quantize:  # straight through: the value of the code, the gradient of the latent
            quantized_st = latents + (quantized - latents).detach()

        first_token = self.group_start(timesteps)
        window = first_token[:, None] + torch.arange(self.config.tokens_per_group, device=device)
        arrived = torch.arange(self.config.num_tokens, device=device) <= window[:, -1:]
        if hide_group is not None:
            hidden = self._hidden(hide_group, window)[..., None]
            quantized_st = quantized_st.repeat_interleave(times_per_image, dim=0).masked_fill(hidden, 0.0)
        conditions = self._condition(quantized_st)
        # one row for each image, or with hidden groups one for each time
        row = torch.arange(len(window), device=device) // (len(window) // len(conditions))
        condition_mask = None
        if self.config.condition_scope == "prefix":
            conditions = conditions[row]
            condition_mask = arrived[:, None, None]
        else:
            conditions = conditions[row[:, None], window]

        times = shift_time(timesteps.float(), self.config.time_shift)
        t = times[:, None, None, None]
        clean = pixel_values.float().repeat_interleave(times_per_image, dim=0) * self.config.data_std
        noise = noise.float()
        noisy = t * clean + (1 - t) * noise
        velocity, repa_features = self._velocity(
            noisy, times, conditions, condition_mask=condition_mask, output_repa=output_repa
        )
        velocity = velocity.float()

        output = DARTokenizerOutput(
            velocity=velocity,
            target=clean - noise,
            pred_original_sample=(noisy + (1 - t) * velocity) / self.config.data_std,
            codes=codes,
            latents=latents,
            quantized=quantized,
            # later codes take no part in a time's step: no loss
            token_mask=arrived.float().unflatten(0, (-1, times_per_image)).sum(dim=1),
            timesteps=times,
            repa_features=repa_features,
        )
        return output if return_dict else output.to_tuple()

    def _training_inputs(
        self,
        pixel_values: torch.Tensor,
        timesteps: torch.Tensor | None,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Times ``(B * R,)`` and noise of `forward`, checked; drawn where they are missing."""
        self._check_images(pixel_values)
        check_generators(generator, None)
        if timesteps is None:
            timesteps = rand_tensor(len(pixel_values), generator, pixel_values.device)
        if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 2 and timesteps.shape[1] > 0:
            check_tensor("timesteps", timesteps, (len(pixel_values), "times"))
        else:
            check_tensor("timesteps", timesteps, (len(pixel_values),))
        check_times("timesteps", timesteps)
        timesteps = timesteps.flatten()
        size = (len(timesteps), *pixel_values.shape[1:])
        if noise is None:
            noise = randn_tensor(size, generator=generator, device=pixel_values.device, dtype=torch.float32)
        check_tensor("noise", noise, size)
        return timesteps, noise

    def _hidden(self, hide_group: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """``(B * R, N)`` bool, True at the codes of a time's own group where that is hidden; the first never is."""
        batch_size = len(window)
        is_bool = isinstance(hide_group, torch.Tensor) and hide_group.dtype == torch.bool
        if not is_bool or hide_group.shape != (batch_size,):
            raise ValueError(f"hide_group must be bool of shape ({batch_size},), got {described(hide_group)}.")
        hide = hide_group.to(window.device) & (window[:, 0] > 0)
        none = torch.zeros(batch_size, self.config.num_tokens, dtype=torch.bool, device=window.device)
        return none.scatter(1, window, hide[:, None].expand(window.shape))

    def make_tables(self) -> None:
        """Make the rotary tables and masks for images of `image_size` on the model's device.

        Otherwise the first forward pass makes them: ``torch.compile`` would trace that, find them made in the second
        pass, and compile again.
        """
        height, width = self.image_size
        self.tables.encoder(height, width, self.device)
        self.tables.causal(0, self.config.num_tokens, self.device)
        self.tables.denoiser(height, width, self.device)

    def train(self, mode: bool = True) -> "DARTokenizer":
        if mode:
            release(self.denoiser)
        return super().train(mode)

    # Checks

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for an image size in pixels that this tokenizer does not take."""
        expected = self.image_size
        for patch in (self.config.encoder_patch_size, self.config.diffusion_patch_size):
            if height < patch or width < patch or height % patch or width % patch:
                raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch}.")
        if self.config.strict_sample_size and (height, width) != expected:
            raise ValueError(
                f"image size {height}x{width} is not the {expected[0]}x{expected[1]} this tokenizer was made for; "
                "resize the image, or set strict_sample_size=False in the configuration."
            )

    def _check_images(self, images: torch.Tensor, name: str = "pixel_values") -> None:
        check_tensor(name, images, ("batch", self.config.in_channels, "height", "width"))
        self.check_size(*images.shape[2:])

    def _check_codes(self, codes: torch.Tensor, values: bool = True) -> None:
        """Raises ValueError for what are not codes.

        ``values=False`` checks type and number of axes only: reading the values would wait for the device.
        """
        if not isinstance(codes, torch.Tensor) or codes.ndim != 2 or codes.dtype not in CODE_DTYPES:
            raise ValueError(f"codes must be integers of shape (batch, tokens), got {described(codes)}.")
        if not values:
            return
        if not 0 < codes.shape[1] <= self.config.num_tokens:
            raise ValueError(f"a sequence has 1 to {self.config.num_tokens} codes, got {codes.shape[1]}.")
        if codes.numel() == 0:
            return
        low, high = torch.stack(codes.aminmax()).tolist()  # both at once: the device is waited for once
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(f"codes must lie in [0, {self.config.codebook_size}), got {low} to {high}.")

    def _decoding_size(self, noise: torch.Tensor | None, height: int | None, width: int | None) -> tuple[int, int]:
        """Size in pixels of the images to decode."""
        size = self.image_size
        if noise is not None:
            self._check_images(noise, "noise")
            if noise.device.type == "cpu" and not noise.isfinite().all():  # a GPU would be waited for
                raise ValueError("noise must be finite, got NaN or infinity.")
            size = (noise.shape[2], noise.shape[3])
        asked = (
            size[0] if height is None else check_integer("height", height),
            size[1] if width is None else check_integer("width", width),
        )
        if noise is not None and asked != size:
            raise ValueError(f"noise of size {size} does not fit height={height}, width={width}.")
        self.check_size(*asked)
        return asked

    # Saving and loading

    save_pretrained = replacing_earlier_save(ModelMixin.save_pretrained)

    @classmethod
    def _load_pretrained_model(
        cls,
        model: "DARTokenizer",
        state_dict: dict[str, torch.Tensor] | None,
        resolved_model_file: list[str],
        pretrained_model_name_or_path: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        """diffusers' step of every way of loading that fills the model; by itself it only logs what does not fit.

        The REPA head may be missing, since only training uses it; a new one takes its place then.

        Raises:
            OSError: for a file of weights that cannot be read.
            ValueError: for weights that are not those of the model.
        """
        quantizer = kwargs.get("hf_quantizer")
        source = pretrained_model_name_or_path
        if os.path.isdir(source):
            source = os.path.dirname(resolved_model_file[0])  # with the subfolder, if any
        if quantizer is None:  # else tensors have other names, types and shapes
            saved = saved_weights(state_dict, resolved_model_file)
            expected = model.state_dict()
            if model.denoiser.repa_head is None or not any(name.startswith(REPA_HEAD) for name in saved):
                saved = {name: shape for name, shape in saved.items() if not name.startswith(REPA_HEAD)}
                expected = {name: tensor for name, tensor in expected.items() if not name.startswith(REPA_HEAD)}
                if model.denoiser.repa_head is not None:
                    model.denoiser.repa_head = _new_repa_head(model.config, kwargs.get("dtype"))
            check_weights(source, expected, saved, sizes=not kwargs.get("ignore_mismatched_sizes"))
        loaded = super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, *args, **kwargs
        )
        if quantizer is not None and loaded[1]:
            raise ValueError(f"the quantised weights in {source} lack {some_of(sorted(loaded[1]))}.")
        if quantizer is None:
            check_finite_weights(source, model)
        return loaded


def _new_repa_head(config: Any, dtype: torch.dtype | None) -> nn.Sequential:
    """A fresh REPA head; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return repa_head(config.diffusion_dim, config.repa_dim).to(dtype or torch.float32)


def rand_tensor(size: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Uniform draws on the generator's device, moved to ``device``."""
    source = device if generator is None else generator.device
    return torch.rand(size, generator=generator, device=source).to(device)
