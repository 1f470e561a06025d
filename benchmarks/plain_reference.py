"""What this package's speed is compared with: plain inference as the original code does it, and stock transformers.

The plain models compute what `DARForCausalLM` and `DARTokenizer` compute, one operator after another: a static cache
of full length under a full mask, one host sync per token, float32 decoding. `speed.py` times them; `tests/benchmarks`
checks that they agree with this package's models.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaForCausalLM

from dar_hf import DARForCausalLM, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.conversion import to_llama, to_original
from dar_hf.layers_dar import causal_mask, rotary_table


def stock_llama(model: DARForCausalLM) -> LlamaForCausalLM:
    """The same weights in an unmodified Llama, with transformers' default generation options."""
    llama = to_llama(model).to(model.device, model.dtype)
    llama.generation_config = GenerationConfig()
    return llama.eval()


class PlainLanguageModel:
    """LlamaGen's inference: stacked q, k and v, a static cache of full length, a full mask, interleaved pairs."""

    def __init__(self, model: DARForCausalLM, batch_size: int):
        config = model.config
        device = model.device
        self.config = config
        self.weights = to_original(model)
        codes = self.weights["tok_embeddings.weight"]
        classes = self.weights["cls_embedding.embedding_table.weight"]
        self.embedding = torch.cat([codes, classes])
        length = config.num_image_tokens + 1
        angles = torch.arange(length, device=device)[:, None] * model.model.rotary_emb.inv_freq
        self.rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
        self.mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        shape = (config.num_hidden_layers, 2, batch_size, config.num_attention_heads, length, config.head_dim)
        self.cache = torch.zeros(shape, device=device, dtype=model.dtype)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(x.dtype) * self.weights[f"{name}.weight"]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.rotary[positions][None, :, None].unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)

    def attention(self, x: torch.Tensor, layer: int, positions: torch.Tensor) -> torch.Tensor:
        qkv = self.linear(x, f"layers.{layer}.attention.wqkv").chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.config.head_dim)) for part in qkv)
        query = self.rotate(query, positions).transpose(1, 2)
        key = self.rotate(key, positions).transpose(1, 2)
        keys, values = self.cache[layer]
        keys[:, :, positions] = key
        values[:, :, positions] = value.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, keys, values, self.mask[positions][None, None])
        return self.linear(attended.transpose(1, 2).flatten(2), f"layers.{layer}.attention.wo")

    def feed_forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        name = f"layers.{layer}.feed_forward"
        return self.linear(F.silu(self.linear(x, f"{name}.w1")) * self.linear(x, f"{name}.w3"), f"{name}.w2")

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the last position; ``tokens (B, L)`` stand at ``positions (L,)``."""
        x = F.embedding(tokens, self.embedding)
        for layer in range(self.config.num_hidden_layers):
            x = x + self.attention(self.norm(x, f"layers.{layer}.attention_norm"), layer, positions)
            x = x + self.feed_forward(self.norm(x, f"layers.{layer}.ffn_norm"), layer)
        return self.linear(self.norm(x, "norm"), "output")[:, -1]

    @torch.no_grad()
    def generate(self, labels: list[int], start: int, stop: int, guidance: float | None) -> torch.Tensor:
        """Codes at positions ``start`` to ``stop``, after whatever the cache holds; one host sync per code."""
        config = self.config
        device = self.cache.device
        classes = torch.tensor(labels, device=device) + config.codebook_size
        if guidance is not None:
            classes = torch.cat([classes, torch.full_like(classes, config.null_token_id)])
        tokens = classes[:, None]
        if start > 0:
            tokens = torch.zeros_like(tokens)
        codes = []
        for position in range(start, stop):
            logits = self(tokens, torch.tensor([position], device=device)).float()
            if guidance is not None:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            code = torch.multinomial(logits.softmax(-1), 1)
            code.tolist()  # the sync
            codes.append(code)
            tokens = code
            if guidance is not None:
                tokens = torch.cat([code, code])
        return torch.cat(codes, dim=1)


class PlainTokenizer:
    """The original's encoder and decoder, without this package's kernels."""

    def __init__(self, tokenizer: DARTokenizer):
        config = tokenizer.config
        device = tokenizer.device
        self.config = config
        self.weights = {name: tensor.detach() for name, tensor in tokenizer.state_dict().items()}
        self.windows = tokenizer.step_windows(config.num_inference_steps)
        height, width = tokenizer.image_size
        patch = config.encoder_patch_size
        table = rotary_table(height // patch, width // patch, config.attention_head_dim, config.rope_theta)
        # the queries have no position: they are not rotated
        unrotated = torch.ones_like(table[:1]).expand(config.num_tokens, -1, -1)
        self.encoder_table = torch.cat([table, unrotated]).to(device)
        self.encoder_mask = causal_mask(config.num_tokens, num_prefix=len(table)).to(device)
        self.causal_mask = causal_mask(config.num_tokens).to(device)
        patch = config.diffusion_patch_size
        self.rows = height // patch
        table = rotary_table(self.rows, width // patch, config.attention_head_dim, config.diffusion_rope_theta)
        self.decoder_table = table.to(device)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str = "") -> torch.Tensor:
        """Layer normalization; without a name also without weights."""
        weight = self.weights.get(f"{name}.weight")
        bias = self.weights.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def rotate(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([even * table.real - odd * table.imag, even * table.imag + odd * table.real], dim=-1)
        return rotated.flatten(-2).to(x.dtype)

    def attention(self, name, x, context, table=None, rotate_keys=True, mask=None) -> torch.Tensor:
        heads = (-1, self.config.attention_head_dim)
        query = self.norm(self.linear(x, f"{name}.to_q").unflatten(-1, heads), f"{name}.norm_q")
        key = self.norm(self.linear(context, f"{name}.to_k").unflatten(-1, heads), f"{name}.norm_k")
        value = self.linear(context, f"{name}.to_v").unflatten(-1, heads).transpose(1, 2)
        if table is not None:
            query = self.rotate(query, table)
            if rotate_keys:
                key = self.rotate(key, table)
        query = query.to(value.dtype).transpose(1, 2)
        key = key.to(value.dtype).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        return self.linear(attended.transpose(1, 2).flatten(2), f"{name}.to_out")

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.silu(self.linear(x, f"{name}.0")), f"{name}.2")

    def blocks(self, name: str, count: int, x: torch.Tensor, mask: torch.Tensor, table=None) -> torch.Tensor:
        for index in range(count):
            block = f"{name}.{index}"
            normed = self.norm(x, f"{block}.norm1")
            x = x + self.weights[f"{block}.gate1"] * self.attention(f"{block}.attn", normed, normed, table, mask=mask)
            x = x + self.weights[f"{block}.gate2"] * self.mlp(f"{block}.mlp", self.norm(x, f"{block}.norm2"))
        return x

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        config = self.config
        w = self.weights
        patches = F.conv2d(images, w["patch_embed.weight"], w["patch_embed.bias"], stride=config.encoder_patch_size)
        queries = self.linear(w["query_embed.weight"][: config.num_tokens], "query_proj").expand(len(images), -1, -1)
        x = torch.cat([self.norm(patches.flatten(2).transpose(1, 2)), queries], dim=1)
        x = self.blocks("encoder_blocks", config.num_encoder_layers, x, self.encoder_mask, self.encoder_table)
        latents = F.normalize(self.linear(self.norm(x[:, -config.num_tokens :]), "quant_proj"), dim=-1)
        return (latents @ F.normalize(w["quantizer.codebook.weight"], dim=-1).T).argmax(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        config = self.config
        vectors = F.normalize(F.embedding(codes, self.weights["quantizer.codebook.weight"]), dim=-1)
        x = self.linear(vectors, "post_quant_proj") + self.weights["token_embed.weight"][: config.num_tokens]
        conditions = self.norm(self.blocks("causal_blocks", config.num_decoder_layers, x, self.causal_mask))
        scheduler = FlowMatchAdamsBashforthScheduler(shift=config.time_shift)
        scheduler.set_timesteps(config.num_inference_steps)
        sample = noise
        for timestep, (start, stop) in zip(scheduler.timesteps, self.windows, strict=True):
            times = timestep.to(noise.device).expand(len(noise))
            if config.condition_scope == "prefix":
                start = 0
            velocity = self.velocity(sample, times, conditions[:, start:stop])
            sample = scheduler.step(velocity.float(), timestep, sample)[0]
        return sample / config.data_std

    def velocity(self, sample: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        config = self.config
        x = F.pixel_unshuffle(sample, config.diffusion_patch_size).flatten(2).transpose(1, 2)
        x = self.linear(x, "denoiser.proj_in")
        condition = self.norm(self.linear(condition, "denoiser.condition_proj"))
        half = torch.arange(config.diffusion_dim // 2, device=sample.device)
        angles = 1000 * times[:, None] * torch.exp(-(half / len(half)) * torch.log(torch.tensor(10000.0)))
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        table = self.decoder_table
        for index in range(config.diffusion_depth):
            block = f"denoiser.blocks.{index}"
            time_embedding = self.mlp(f"{block}.time_embed.mlp", features)[:, None]
            context = self.norm(self.mlp(f"{block}.condition_embed", condition))
            attended = self.attention(
                f"{block}.cross_attn", self.norm(x), context, self.decoder_table, rotate_keys=False
            )
            modulation = self.linear(F.silu(time_embedding + attended), f"{block}.modulation")
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
            normed = self.norm(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attention(f"{block}.attn", normed, normed, table)
            x = x + gate2 * self.mlp(f"{block}.mlp", self.norm(x) * (1 + scale2) + shift2)
        x = self.linear(self.norm(x), "denoiser.proj_out")
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (self.rows, -1)), config.diffusion_patch_size)
