"""Measure speed beside three yardsticks, taken in the same run.

They are transformers' stock eager `generate`; a plain loop that does what the original code does (static cache of full
length under a full mask, one host sync a token, float32 decoding); and the machine's own limit, from a bandwidth and a
matrix product probe.

    python examples/benchmark.py --preset B L
    python examples/benchmark.py --preset L --device cuda --batch_sizes 1 4 16 64 --json benchmark.json

Full-size models with random weights; medians after a warm-up.
"""

import argparse
import io
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.acceleration_dar import accelerated, has_fast_bf16
from dar_hf.conversion import to_original
from dar_hf.evaluation import versions
from dar_hf.presets import PAPER_SIZES, get_preset
from dar_hf.utils.commands import check_output, command, device_option, path_option, positive_option, writing
from dar_hf.utils.files import write_json

POSITION, STEPS = 128, 32  # codes measured: from the middle of the sequence, where a growing cache is half full
NOTES = ["difference", "share", "images/s", "language model", "decoding", "steps beyond", "agreement", "bytes"]
PARTS = ["memory", "tokenizer", "model", "image", "training"]
OPTIONAL_PARTS = ["int8"]  # needs torchao
GUIDANCE = 4.0


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# The machine


def probe(device: torch.device, repeats: int) -> dict[str, float]:
    """Bytes read and operations done a second: what no implementation can pass."""
    data = torch.ones(2**28 // 4, device=device)  # 256 MB: more than a cache holds
    result = {"bytes": data.numel() * 4 / seconds(data.sum, repeats, device)}
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(1024, 4096, bias=False).to(device, dtype).eval()
        x = torch.randn(4096, 1024, device=device, dtype=dtype)
        with torch.no_grad():
            layer = accelerated(layer)
            result[name(dtype)] = 2 * 4096 * 1024 * 4096 / seconds(lambda m=layer, x=x: m(x), repeats, device)
    return result


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The plain loop: what the original does, written down plainly


class PlainLanguageModel:
    """LlamaGen's inference: stacked q, k and v, a static cache of full length, a full mask, interleaved pairs."""

    def __init__(self, model: DARForCausalLM, batch_size: int):
        config, device, dtype = model.config, model.device, model.dtype
        self.weights, self.config = to_original(model), config
        self.length = config.num_image_tokens + 1
        angles = torch.arange(self.length, device=device)[:, None] * model.model.rotary_emb.inv_freq
        self.rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
        self.mask = torch.ones(self.length, self.length, dtype=torch.bool, device=device).tril()
        heads = config.num_attention_heads
        shape = (config.num_hidden_layers, 2, batch_size, heads, self.length, config.head_dim)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)).to(
            x.dtype
        ) * weight

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        pairs = x.float().unflatten(-1, (-1, 2))
        cos, sin = self.rotary[positions][None, :, None].unbind(-1)
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the last position; ``tokens (B, L)`` stand at ``positions (L,)``."""
        w, config = self.weights, self.config
        table = torch.cat([w["tok_embeddings.weight"], w["cls_embedding.embedding_table.weight"]])
        x = F.embedding(tokens, table)
        for layer in range(config.num_hidden_layers):
            name = f"layers.{layer}."
            qkv = F.linear(self.norm(x, w[name + "attention_norm.weight"]), w[name + "attention.wqkv.weight"])
            query, key, value = (part.unflatten(-1, (-1, config.head_dim)) for part in qkv.chunk(3, dim=-1))
            query, key = self.rotate(query, positions), self.rotate(key, positions)
            keys, values = self.cache[layer]
            keys[:, :, positions] = key.transpose(1, 2)
            values[:, :, positions] = value.transpose(1, 2)
            mask = self.mask[positions][None, None]
            attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, mask)
            x = x + F.linear(attended.transpose(1, 2).flatten(2), w[name + "attention.wo.weight"])
            hidden = self.norm(x, w[name + "ffn_norm.weight"])
            hidden = F.silu(F.linear(hidden, w[name + "feed_forward.w1.weight"])) * F.linear(
                hidden, w[name + "feed_forward.w3.weight"]
            )
            x = x + F.linear(hidden, w[name + "feed_forward.w2.weight"])
        return F.linear(self.norm(x, w["norm.weight"]), w["output.weight"])[:, -1]

    @torch.no_grad()
    def generate(self, labels: list[int], start: int, stop: int, guidance: float | None) -> torch.Tensor:
        """Codes at positions ``start`` to ``stop``, after whatever the cache holds; one host sync a code."""
        config, device = self.config, self.cache.device
        classes = torch.tensor(labels, device=device) + config.codebook_size
        if guidance is not None:
            classes = torch.cat([classes, torch.full_like(classes, config.null_token_id)])
        tokens = classes[:, None] if start == 0 else torch.zeros_like(classes)[:, None]
        codes = []
        for position in range(start, stop):
            logits = self(tokens, torch.tensor([position], device=device)).float()
            if guidance is not None:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            code = torch.multinomial(logits.softmax(-1), 1)
            code.tolist()  # the sync
            codes.append(code)
            tokens = code if guidance is None else torch.cat([code, code])
        return torch.cat(codes, dim=1)


class PlainTokenizer:
    """The original's encoder and decoder, without this package's kernels: one operator after another."""

    def __init__(self, tokenizer: DARTokenizer):
        self.tokenizer, self.weights = tokenizer, {k: v.detach() for k, v in tokenizer.state_dict().items()}

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        weight, bias = (self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]) if name else (None, None)
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def rotate(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([even * table.real - odd * table.imag, even * table.imag + odd * table.real], dim=-1)
        return rotated.flatten(-2).to(x.dtype)

    def attention(self, name, x, context, table=None, rotate_keys=True, mask=None) -> torch.Tensor:
        q, k, v = (
            self.linear(source, f"{name}.to_{part}").unflatten(-1, (-1, 64))
            for part, source in zip("qkv", (x, context, context), strict=True)
        )
        q, k = self.norm(q, f"{name}.norm_q"), self.norm(k, f"{name}.norm_k")
        if table is not None:
            q, k = self.rotate(q, table), self.rotate(k, table) if rotate_keys else k
        q, k = q.to(v.dtype), k.to(v.dtype)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.linear(attended.transpose(1, 2).flatten(2), f"{name}.to_out")

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.silu(self.linear(x, f"{name}.0")), f"{name}.2")

    def blocks(self, name: str, count: int, x: torch.Tensor, table=None, mask=None) -> torch.Tensor:
        for index in range(count):
            block = f"{name}.{index}"
            normed = self.norm(x, f"{block}.norm1")
            x = x + self.weights[f"{block}.gate1"] * self.attention(f"{block}.attn", normed, normed, table, mask=mask)
            x = x + self.weights[f"{block}.gate2"] * self.mlp(f"{block}.mlp", self.norm(x, f"{block}.norm2"))
        return x

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        tokenizer, w = self.tokenizer, self.weights
        config = tokenizer.config
        patches = F.conv2d(images, w["patch_embed.weight"], w["patch_embed.bias"], stride=config.encoder_patch_size)
        tables = tokenizer._encoder_tables(*patches.shape[2:], images.device)
        queries = self.linear(w["query_embed.weight"][: config.num_tokens], "query_proj")
        x = torch.cat([self.norm(patches.flatten(2).transpose(1, 2)), queries.expand(len(images), -1, -1)], dim=1)
        x = self.blocks("encoder_blocks", config.num_encoder_layers, x, tables["rotary"], tables["attention_mask"])
        latents = F.normalize(self.linear(self.norm(x[:, -config.num_tokens :]), "quant_proj"), dim=-1)
        return (latents @ F.normalize(w["quantizer.codebook.weight"], dim=-1).T).argmax(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        tokenizer, w = self.tokenizer, self.weights
        config = tokenizer.config
        vectors = F.normalize(F.embedding(codes, w["quantizer.codebook.weight"]), dim=-1)
        x = self.linear(vectors, "post_quant_proj") + w["token_embed.weight"][: config.num_tokens]
        mask = torch.ones(codes.shape[1], codes.shape[1], dtype=torch.bool, device=codes.device).tril()[None, None]
        conditions = self.norm(self.blocks("causal_blocks", config.num_decoder_layers, x, mask=mask))
        scheduler = FlowMatchAdamsBashforthScheduler(shift=config.time_shift)
        scheduler.set_timesteps(config.num_inference_steps)
        sample = noise
        windows = tokenizer.step_windows(config.num_inference_steps)
        for timestep, (start, stop) in zip(scheduler.timesteps, windows, strict=True):
            velocity = self.velocity(sample, timestep.to(noise.device).expand(len(noise)), conditions[:, start:stop])
            sample = scheduler.step(velocity.float(), timestep, sample)[0]
        return sample / config.data_std

    def velocity(self, sample: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        config, rows = self.tokenizer.config, sample.shape[2] // self.tokenizer.config.diffusion_patch_size
        table = self.tokenizer._rotary(rows, rows, sample.device)
        x = F.pixel_unshuffle(sample, config.diffusion_patch_size).flatten(2).transpose(1, 2)
        x = self.linear(x, "denoiser.proj_in")
        condition = self.norm(self.linear(condition, "denoiser.condition_proj"))
        half = torch.arange(config.diffusion_dim // 2, device=sample.device)
        angles = 1000 * times[:, None] * torch.exp(-(half / len(half)) * torch.log(torch.tensor(10000.0)))
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        for index in range(config.diffusion_depth):
            block = f"denoiser.blocks.{index}"
            time_embedding = self.mlp(f"{block}.time_embed.mlp", features)[:, None]
            context = self.norm(self.mlp(f"{block}.condition_embed", condition))
            attended = self.attention(f"{block}.cross_attn", self.norm(x), context, table, rotate_keys=False)
            modulation = self.linear(F.silu(time_embedding + attended), f"{block}.modulation").chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            normed = self.norm(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attention(f"{block}.attn", normed, normed, table)
            x = x + gate2 * self.mlp(f"{block}.mlp", self.norm(x) * (1 + scale2) + shift2)
        x = self.linear(self.norm(x), "denoiser.proj_out")
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, rows)), config.diffusion_patch_size)


# Stock transformers


def stock_llama(model: DARForCausalLM) -> LlamaForCausalLM:
    """The same weights in an unmodified Llama, as `examples/export_llama.py` makes it, sharing what memory it can."""
    config = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "dtype")})
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    state = dict(model.state_dict())
    others = config.vocab_size - model.config.codebook_size
    state["lm_head.weight"] = torch.cat([state["lm_head.weight"], state["lm_head.weight"][:others]])
    llama.load_state_dict(state, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=config).to(model.device)
    return llama.eval()


# What is measured


def tokenizer_rows(args: argparse.Namespace, limits: dict[str, float], tokenizer: DARTokenizer) -> list[dict]:
    """Encoding and decoding of one image, in each dtype."""
    device, config = args.device, tokenizer.config
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, *tokenizer.image_size, generator=generator).to(device) * 2 - 1
    noise = torch.randn(images.shape, generator=generator).to(device)
    plain = PlainTokenizer(tokenizer)
    codes = plain.encode(images)
    parts = {"encode": 65e9, "decode": 332e9 * config.num_inference_steps}  # operations, v1
    rows = [
        {
            "what": "encode, float32",
            "ours": seconds(lambda: tokenizer.encode(images), args.repeats, device),
            "plain": seconds(lambda: plain.encode(images), args.repeats, device),
            "limit": parts["encode"] / limits["float32"],
        }
    ]
    reference = {torch.float32: seconds(lambda: plain.decode(codes, noise), args.slow_repeats, device)}
    with torch.autocast(device.type, torch.bfloat16):
        reference[torch.bfloat16] = seconds(lambda: plain.decode(codes, noise), args.slow_repeats, device)
    exact = None
    for label, dtype, against in (
        ("float32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("default", None, torch.float32),
    ):
        tokenizer.decode_dtype = dtype
        sample = tokenizer.decode(codes, noise=noise).sample
        exact = sample if exact is None else exact
        with torch.no_grad():
            used = tokenizer._decoding_copy().proj_in.weight.dtype
        rows.append(
            {
                "what": f"decode, {label}",
                "ours": seconds(lambda: tokenizer.decode(codes, noise=noise), args.repeats, device),
                "plain": reference[against],
                "plain_dtype": name(against),
                "limit": parts["decode"] / limits[name(used)],
                "difference": float((sample - exact).norm() / exact.norm()),
            }
        )
    return rows


def language_model_rows(args: argparse.Namespace, limits: dict[str, float], size: str) -> list[dict]:
    """One code of the language model, in the middle of the sequence."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(size, args.device, dtype)
        weights = (
            sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
        )
        for batch_size in args.batch_sizes:
            for guidance in (GUIDANCE, None):
                labels = [0] * batch_size
                yardsticks = {
                    "plain": plain_per_code(model, labels, guidance, args),
                    "stock": stock_per_code(model, labels, guidance, args),
                    "limit": weights / limits["bytes"],
                }
                what = f"{size}, {name(dtype)}, batch {batch_size}, {'guidance' if guidance else 'none'}"
                for compiled in (False, True) if args.device.type == "cuda" else (False,):
                    model.compile_decoding = compiled
                    ours = ours_per_code(model, labels, guidance, args)
                    row = {"what": what + ", compiled" * compiled, "ours": ours, **yardsticks}
                    rows.append(row)
                    print(format_row(row, "ms", 1e3), flush=True)
        del model
    return rows


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> DARForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = DARForCausalLM(DARConfig(**get_preset(size).transformer)).to(dtype).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def ours_per_code(model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace):
    prefix = torch.zeros(1, POSITION - STEPS, dtype=torch.long)

    def run() -> float:
        stream = model.stream_codes(
            labels,
            guidance_scale=guidance or 1.0,
            prefix_codes=prefix,
            num_tokens=POSITION + STEPS,
            group_size=STEPS,
        )
        for _ in range(POSITION // STEPS):  # the prefix, and one group that includes its pass
            next(stream)
        synchronize(model.device)
        start = time.perf_counter()
        next(stream)
        synchronize(model.device)
        taken = time.perf_counter() - start
        stream.close()
        return taken / STEPS

    run()
    return statistics.median(run() for _ in range(args.repeats))


def plain_per_code(
    model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace
) -> float:
    plain = PlainLanguageModel(model, len(labels) * (2 if guidance else 1))
    run = lambda: plain.generate(labels, POSITION, POSITION + STEPS, guidance)  # noqa: E731
    return seconds(run, args.slow_repeats, model.device) / STEPS


def stock_per_code(
    model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace
) -> float:
    llama, config = stock_llama(model), model.config
    prompt = torch.zeros(len(labels), POSITION, dtype=torch.long, device=model.device)
    prompt[:, 0] = config.codebook_size
    options: dict = {"do_sample": True, "top_k": 0, "cache_implementation": "dynamic"}
    if guidance:
        negative = prompt.clone()
        negative[:, 0] = config.null_token_id
        options |= {"guidance_scale": guidance, "negative_prompt_ids": negative}
    short, long = (
        seconds(lambda n=n: llama.generate(prompt, max_new_tokens=n, **options), args.slow_repeats, model.device)
        for n in (1, 1 + STEPS)
    )
    return (long - short) / STEPS


def int8_row(args: argparse.Namespace, size: str) -> dict:
    """One code with weight-only int8 (torchao) beside the same model in bf16: "plain" is bf16 here.

    "agreement": how many of bf16's greedy codes int8 picks after the same codes. "bytes": of the weights, over bf16's.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = random_model(size, args.device, torch.bfloat16)
    row = {"what": f"{size}, int8 weights against bf16, batch 1, guidance"}
    row["plain"], bytes_before = ours_per_code(model, [0], GUIDANCE, args), weight_bytes(model)
    greedy = torch.cat(list(model.stream_codes([0], guidance_scale=1.0, temperature=0.0)), dim=1)
    ids = torch.cat([torch.full_like(greedy[:, :1], model.config.class_token_id(0)), greedy[:, :-1]], dim=1)
    quantize_(model, Int8WeightOnlyConfig())
    row["ours"] = ours_per_code(model, [0], GUIDANCE, args)
    with torch.no_grad():
        picked = model(input_ids=ids).logits.argmax(dim=-1)
    return row | {"agreement": float((picked == greedy).float().mean()), "bytes": weight_bytes(model) / bytes_before}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model as it is saved: quantised weights are several tensors each."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def end_to_end_rows(args: argparse.Namespace, size: str, tokenizer: DARTokenizer) -> list[dict]:
    """One image with guidance, language model in bf16: the pipeline as it comes, and the plain loop."""
    model = random_model(size, args.device, torch.bfloat16)
    tokenizer.decode_dtype = None
    scheduler = FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift)
    pipeline = DARPipeline(tokenizer, model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    times = []
    for _ in range(args.slow_repeats + 1):
        start, first = time.perf_counter(), None
        for _output in pipeline.stream(0, guidance_scale=GUIDANCE, output_type="pt"):
            synchronize(args.device)
            first = time.perf_counter() - start if first is None else first
        times.append((time.perf_counter() - start, first))
    whole, first = (statistics.median(column) for column in zip(*times[1:], strict=True))
    plain_model, plain_tokenizer = PlainLanguageModel(model, 2), PlainTokenizer(tokenizer)
    noise = torch.randn(1, 3, *tokenizer.image_size, device=args.device)

    def original() -> None:
        codes = plain_model.generate([0], 0, tokenizer.config.num_tokens, GUIDANCE)
        plain_tokenizer.decode(codes, noise)

    reference = seconds(original, 1, args.device)
    overlap = overlap_rows(args, size, pipeline) if args.device.type == "cuda" else []
    return [
        {"what": f"{size}: one image", "ours": whole, "plain": reference},
        {"what": f"{size}: first preview", "ours": first, "plain": reference, "share": first / whole},
        *overlap,
    ]


def overlap_rows(args: argparse.Namespace, size: str, pipeline: DARPipeline) -> list[dict]:
    """Whole calls, whose denoising runs beside a compiled language model, against one after the other.

    "steps beyond" is what a call takes longer than its language model, in denoising steps: 1 where all but the last
    is hidden.
    """
    model, tokenizer, rows = pipeline.transformer, pipeline.tokenizer, []
    model.compile_decoding = True
    for batch_size in args.batch_sizes:
        labels, shape = [0] * batch_size, (batch_size, 3, *tokenizer.image_size)
        noise = torch.randn(shape, device=args.device)
        codes = torch.cat(list(model.stream_codes(labels, guidance_scale=GUIDANCE)), dim=1)
        generating, decoding, whole = (
            seconds(run, args.repeats, args.device)
            for run in (
                lambda labels=labels: list(model.stream_codes(labels, guidance_scale=GUIDANCE)),
                lambda codes=codes, noise=noise: tokenizer.decode(codes, noise=noise),
                lambda labels=labels: pipeline(labels, guidance_scale=GUIDANCE, output_type="pt"),
            )
        )
        step = decoding / tokenizer.config.num_inference_steps
        row = {"what": f"{size}: call, batch {batch_size}, compiled", "ours": whole, "plain": generating + decoding}
        row |= {"language model": generating, "decoding": decoding, "images/s": batch_size / whole}
        rows.append(row | {"steps beyond": (whole - generating) / step})
    return rows


def training_rows(args: argparse.Namespace, size: str, batch_size: int) -> list[dict]:
    """Forward, backward and optimizer step of the size's models alone: bf16 where it is fast and fused AdamW, as the
    commands train, beside torch's AdamW in float32.

    Both take the same model and random data: no images are read, no weights averaged, no other networks judge.
    """
    preset, rows = get_preset(size), []
    builders: list[tuple[str, Callable[[], torch.nn.Module], Callable]] = []
    if preset.tokenizer_recipe:
        builders.append(("tokenizer", lambda: DARTokenizer(**preset.tokenizer), tokenizer_loss))
    if preset.ar_recipe:
        names = {"codebook_size": "codebook_size", "num_tokens": "num_image_tokens"}  # where codes are not the paper's
        sizes = {ours: preset.tokenizer[theirs] for theirs, ours in names.items() if theirs in preset.tokenizer}
        builders.append(
            ("model", lambda: DARForCausalLM(DARConfig(**preset.transformer | sizes)), language_model_loss)
        )
    for stage, build, loss in builders:
        times = {}
        for variant in ("plain", "ours", "compiled"):
            torch.manual_seed(0)
            model = build().to(args.device).train()
            if stage == "model" and model.config.num_image_tokens <= 128 and args.device.type == "cpu":
                model.set_attn_implementation("eager")  # as the command does
            times[variant] = seconds(training_step(model, loss, batch_size, variant), args.repeats, args.device)
        what = f"train {stage}, {size}, batch {batch_size}"
        rows.append({"what": what, "ours": times["ours"], "plain": times["plain"]})
        rows.append({"what": what + ", compiled", "ours": times["compiled"], "plain": times["plain"]})
        for row in rows[-2:]:
            row["images/s"] = batch_size / row["ours"]
            print(format_row(row, "ms", 1e3), flush=True)
    return rows


def training_step(model: torch.nn.Module, loss: Callable, batch_size: int, variant: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=None if variant == "plain" else True)
    device = next(model.parameters()).device
    if variant == "compiled":
        model.compile()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant != "plain" and has_fast_bf16(device)):
            value = loss(model, batch_size, device)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokenizer_loss(model: DARTokenizer, batch_size: int, device: torch.device) -> torch.Tensor:
    images = torch.rand(batch_size, model.config.in_channels, *model.image_size, device=device) * 2 - 1
    output = model(images)
    commitment = (output.latents - output.quantized.detach()).square() + (
        output.latents.detach() - output.quantized
    ).square()
    return F.mse_loss(output.velocity, output.target) + commitment.mean()


def language_model_loss(model: DARForCausalLM, batch_size: int, device: torch.device) -> torch.Tensor:
    config = model.config
    codes = torch.randint(config.codebook_size, (batch_size, config.num_image_tokens), device=device)
    classes = torch.full_like(codes[:, :1], config.class_token_id(0))
    ignored = torch.full_like(classes, -100)
    ids, targets = torch.cat([classes, codes], dim=1), torch.cat([ignored, codes], dim=1)
    return model(input_ids=ids, labels=targets, use_cache=False).loss


def memory_row(args: argparse.Namespace, size: str) -> dict:
    """Peak memory of generating one image's codes with guidance in bf16, in a process of its own: peaks never fall."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_memory, (str(args.device), size))


def measure_memory(device_name: str, size: str) -> dict:
    device = torch.device(device_name)
    before = used_memory(device)
    torch.set_default_dtype(torch.bfloat16)  # as saved weights load, without a float32 copy first
    model = random_model(size, device, torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    loaded = used_memory(device)
    list(model.stream_codes([0], guidance_scale=GUIDANCE))
    config = model.config
    width = 4 if device.type == "cpu" else 2  # bytes of a cached number
    cache = 2 * 2 * config.num_hidden_layers * config.num_image_tokens * config.hidden_size * width
    return {
        "what": f"{size}, bf16, batch 1",
        "weights": weights,
        "cache": cache,
        "peak while loading": loaded - before,
        "peak while generating": used_memory(device) - before,
    }


def used_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# The table


def format_row(row: dict, unit: str, scale: float) -> str:
    ratios = [f"{row['plain'] / row['ours']:.2f}×"]
    ratios.append(f"{row['stock'] / row['ours']:.2f}×" if "stock" in row else "")
    ratios.append(f"{row['ours'] / row['limit']:.2f}" if "limit" in row else "")
    ratios.append(f"{row['ours'] * scale:.1f} {unit}")
    notes = [f"{key} {row[key]:.3g}" for key in NOTES if key in row]
    return f"| {row['what']} | " + " | ".join(ratios) + f" | {', '.join(notes)} |"


HEAD = "| | plain / ours | stock / ours | ours / limit | ours | |\n|---|---|---|---|---|---|"


@command("benchmark.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["B", "L"], choices=PAPER_SIZES, help="language models")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", nargs="+", type=positive_option, default=[1, 4])
    parser.add_argument("--repeats", type=positive_option, default=5)
    parser.add_argument("--slow_repeats", type=positive_option, default=2, help="repeats of the yardsticks")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS + OPTIONAL_PARTS)
    parser.add_argument("--json", type=path_option, help="write every figure there")
    args = parser.parse_args(argv)
    if args.json:
        check_output(args.json, folder=False)

    figures: dict = {"versions": versions(), "machine": platform.processor() or platform.machine()}
    figures |= {"device": str(args.device), "threads": torch.get_num_threads()}
    if "memory" in args.parts:
        figures["memory"] = [memory_row(args, size) for size in args.preset]
        for row in figures["memory"]:
            parts = ", ".join(f"{key} {value / 2**20:.0f} MiB" for key, value in row.items() if key != "what")
            print(f"memory, {row['what']}: {parts}")
    limits = figures["limits"] = probe(args.device, args.repeats)
    print(", ".join(f"{key}: {value / 1e9:.0f} G/s" for key, value in limits.items()))
    print(HEAD)
    torch.manual_seed(0)
    tokenizer = DARTokenizer(repa_layer=None).eval().to(args.device)
    tokenizer.reset_parameters(gate=0.5, modulation_std=0.02, output_std=0.02, post_quant_std=0.35)
    if "tokenizer" in args.parts:
        figures["tokenizer"] = tokenizer_rows(args, limits, tokenizer)
        print("\n".join(format_row(row, "s", 1) for row in figures["tokenizer"]), flush=True)
    if "model" in args.parts:
        figures["model"] = [row for size in args.preset for row in language_model_rows(args, limits, size)]
    if "int8" in args.parts:
        figures["int8"] = [int8_row(args, size) for size in args.preset]
        print("\n".join(format_row(row, "ms", 1e3) for row in figures["int8"]), flush=True)
    if "image" in args.parts:
        figures["image"] = [row for size in args.preset for row in end_to_end_rows(args, size, tokenizer)]
        print("\n".join(format_row(row, "s", 1) for row in figures["image"]), flush=True)
    if "training" in args.parts:
        sizes = [("digits", 64)] + ([("v1", 16), ("L", 16)] if args.device.type == "cuda" else [])
        figures["training"] = [row for size, batch in sizes for row in training_rows(args, size, batch)]
    if args.json:
        with writing(args.json):
            write_json(args.json, figures)
        print(json.dumps(figures["versions"]))


if __name__ == "__main__":
    main()
