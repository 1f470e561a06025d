"""Measure speed against three yardsticks, all in the same run.

They are transformers' stock eager `generate`; plain inference as the original code does it (`plain_reference.py`); and
the machine's own limit, from a bandwidth probe and a matrix product probe.

    python benchmarks/speed.py --preset B L
    python benchmarks/speed.py --preset L --device cuda --batch_sizes 1 4 16 64 --json benchmark.json

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
from collections.abc import Sequence

import torch
from plain_reference import PlainLanguageModel, PlainTokenizer, stock_llama
from timing import HEAD, format_row, name, probe, seconds, synchronize
from training_speed import training_rows

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.acceleration_dar import fastest_dtype
from dar_hf.evaluation import versions
from dar_hf.presets import PAPER_SIZES, get_preset
from dar_hf.utils.commands import check_output, command, device_option, path_option, positive_option, writing
from dar_hf.utils.files import write_json
from dar_hf.utils.memory import keep_freed_memory

PARTS = ["memory", "tokenizer", "model", "image", "training"]
OPTIONAL_PARTS = ["int8"]  # needs torchao
GUIDANCE = 4.0
# floating-point operations of the v1 tokenizer
ENCODE_OPERATIONS, STEP_OPERATIONS = 65e9, 332e9


# The tokenizer


def make_tokenizer(device: torch.device) -> DARTokenizer:
    torch.manual_seed(0)
    tokenizer = DARTokenizer(**get_preset("v1").tokenizer | {"repa_layer": None}).eval().to(device)
    tokenizer.reset_parameters(gate=0.5, modulation_std=0.02, output_std=0.02, post_quant_std=0.35)
    return tokenizer


def tokenizer_rows(args: argparse.Namespace, limits: dict[str, float], tokenizer: DARTokenizer) -> list[dict]:
    """Encoding and decoding of one image, in each dtype."""
    device = args.device
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, *tokenizer.image_size, generator=generator).to(device) * 2 - 1
    noise = torch.randn(images.shape, generator=generator).to(device)
    plain = PlainTokenizer(tokenizer)
    codes = plain.encode(images)
    encode = {
        "what": "encode, float32",
        "ours": seconds(lambda: tokenizer.encode(images), args.repeats, device),
        "plain": seconds(lambda: plain.encode(images), args.repeats, device),
        "limit": ENCODE_OPERATIONS / limits["float32"],
    }
    reference = {torch.float32: seconds(lambda: plain.decode(codes, noise), args.slow_repeats, device)}
    with torch.autocast(device.type, torch.bfloat16):
        reference[torch.bfloat16] = seconds(lambda: plain.decode(codes, noise), args.slow_repeats, device)
    rows = [encode]
    exact = plain.decode(codes, noise)
    fastest = fastest_dtype(tokenizer.dtype, device, tokenizer.config.diffusion_dim)
    operations = STEP_OPERATIONS * tokenizer.config.num_inference_steps
    for label, option, used, against in (
        ("float32", torch.float32, torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("default", None, fastest, torch.float32),
    ):
        tokenizer.decode_dtype = option
        sample = tokenizer.decode(codes, noise=noise).sample
        row = {
            "what": f"decode, {label}",
            "ours": seconds(lambda: tokenizer.decode(codes, noise=noise), args.repeats, device),
            "plain": reference[against],
            "plain_dtype": name(against),
            "limit": operations / limits[name(used)],
            "difference": float((sample - exact).norm() / exact.norm()),
        }
        rows.append(row)
    return rows


# The language model


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> DARForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = DARForCausalLM(DARConfig(**get_preset(size).transformer)).to(dtype).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def measured_codes(model: DARForCausalLM) -> tuple[int, int]:
    """Where measuring starts, and how many codes: from the middle, where a growing cache is half full."""
    return model.config.num_image_tokens // 2, model.config.num_image_tokens // 8


def language_model_rows(args: argparse.Namespace, limits: dict[str, float], size: str) -> list[dict]:
    """One code of the language model, in the middle of the sequence.

    "two passes / one": the time with guidance over that without, which is what distilling the guidance gains.
    """
    rows = []
    compiling = [False, True] if args.device.type == "cuda" else [False]
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(size, args.device, dtype)
        read = sum(parameter.nbytes for parameter in model.parameters()) - model.model.embed_tokens.weight.nbytes
        for batch_size in args.batch_sizes:
            guided = {}
            for guidance in (GUIDANCE, None):
                labels = [0] * batch_size
                yardsticks = {
                    "plain": plain_per_code(model, labels, guidance, args),
                    "stock": stock_per_code(model, labels, guidance, args),
                    "limit": read / limits["bytes"],
                }
                what = f"{size}, {name(dtype)}, batch {batch_size}, {'guidance' if guidance else 'none'}"
                for compiled in compiling:
                    model.compile_decoding = compiled
                    ours = ours_per_code(model, labels, guidance, args)
                    rows.append({"what": what + ", compiled" * compiled, "ours": ours, **yardsticks})
                    if guidance:
                        guided[compiled] = ours
                    else:
                        rows[-1]["two passes / one"] = guided[compiled] / ours
                    print(format_row(rows[-1], "ms", 1e3), flush=True)
    return rows


def ours_per_code(model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace) -> float:
    position, count = measured_codes(model)
    prefix = torch.zeros(1, position - count, dtype=torch.long)

    def run() -> float:
        stream = model.stream_codes(
            labels,
            guidance_scale=guidance or 1.0,
            prefix_codes=prefix,
            num_tokens=position + count,
            group_size=count,
        )
        for _ in range(position // count):  # the prefix, and one group that includes its pass
            next(stream)
        synchronize(model.device)
        start = time.perf_counter()
        next(stream)
        synchronize(model.device)
        taken = time.perf_counter() - start
        stream.close()
        return taken / count

    run()
    return statistics.median(run() for _ in range(args.repeats))


def plain_per_code(
    model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace
) -> float:
    position, count = measured_codes(model)
    plain = PlainLanguageModel(model, len(labels) * (2 if guidance else 1))

    def run() -> torch.Tensor:
        return plain.generate(labels, position, position + count, guidance)

    return seconds(run, args.slow_repeats, model.device) / count


def stock_per_code(
    model: DARForCausalLM, labels: list[int], guidance: float | None, args: argparse.Namespace
) -> float:
    llama = stock_llama(model)
    position, count = measured_codes(model)
    prompt = torch.zeros(len(labels), position, dtype=torch.long, device=model.device)
    prompt[:, 0] = model.config.codebook_size
    options: dict = {"do_sample": True, "top_k": 0, "cache_implementation": "dynamic"}
    if guidance:
        negative = prompt.clone()
        negative[:, 0] = model.config.null_token_id
        options |= {"guidance_scale": guidance, "negative_prompt_ids": negative}

    def measure(codes: int) -> float:
        run = lambda: llama.generate(prompt, min_new_tokens=codes, max_new_tokens=codes, **options)  # noqa: E731
        return seconds(run, args.slow_repeats, model.device)

    return (measure(1 + count) - measure(1)) / count


def int8_row(args: argparse.Namespace, size: str) -> dict:
    """One code with weight-only int8 (torchao) against the same model in bf16: "plain" is bf16 here.

    "agreement": how many of bf16's greedy codes int8 picks after the same codes. "bytes": of the weights, over bf16's.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = random_model(size, args.device, torch.bfloat16)
    bf16 = ours_per_code(model, [0], GUIDANCE, args)
    bf16_bytes = weight_bytes(model)
    greedy = torch.cat(list(model.stream_codes([0], guidance_scale=1.0, temperature=0.0)), dim=1)
    ids = torch.cat([torch.full_like(greedy[:, :1], model.config.class_token_id(0)), greedy[:, :-1]], dim=1)
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        picked = model(input_ids=ids).logits.argmax(dim=-1)
    return {
        "what": f"{size}, int8 weights against bf16, batch 1, guidance",
        "plain": bf16,
        "ours": ours_per_code(model, [0], GUIDANCE, args),
        "agreement": float((picked == greedy).float().mean()),
        "bytes": weight_bytes(model) / bf16_bytes,
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model as it is saved: quantized weights are several tensors each."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def measure_memory(device_name: str, size: str) -> dict:
    """Peak memory of generating one image's codes with guidance in bf16. Peaks never fall: run it in a new process."""
    device = torch.device(device_name)
    before = used_memory(device)
    torch.set_default_dtype(torch.bfloat16)  # as saved weights load, without a float32 copy first
    model = random_model(size, device, torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    loaded = used_memory(device)
    list(model.stream_codes([0], guidance_scale=GUIDANCE))
    config = model.config
    number_bytes = 4 if device.type == "cpu" else 2  # of the cache
    return {
        "what": f"{size}, bf16, batch 1",
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "cache": 2 * 2 * config.num_hidden_layers * config.num_image_tokens * config.hidden_size * number_bytes,
        "peak while loading": loaded - before,
        "peak while generating": used_memory(device) - before,
    }


def used_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Whole images


def end_to_end_rows(args: argparse.Namespace, size: str, tokenizer: DARTokenizer) -> list[dict]:
    """One image with guidance, language model in bf16: the pipeline with its defaults, and plain inference."""
    model = random_model(size, args.device, torch.bfloat16)
    tokenizer.decode_dtype = None
    pipeline = DARPipeline(tokenizer, model, FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift))
    pipeline.set_progress_bar_config(disable=True)
    firsts = []
    wholes = []
    for _ in range(args.slow_repeats + 1):
        start = time.perf_counter()
        steps = []
        for _output in pipeline.stream(0, guidance_scale=GUIDANCE, output_type="pt"):
            synchronize(args.device)
            steps.append(time.perf_counter() - start)
        firsts.append(steps[0])
        wholes.append(steps[-1])
    first = statistics.median(firsts[1:])
    whole = statistics.median(wholes[1:])
    plain_model = PlainLanguageModel(model, 2)
    plain_tokenizer = PlainTokenizer(tokenizer)
    noise = torch.randn(1, 3, *tokenizer.image_size, device=args.device)

    def original() -> None:
        codes = plain_model.generate([0], 0, tokenizer.config.num_tokens, GUIDANCE)
        plain_tokenizer.decode(codes, noise)

    reference = seconds(original, 1, args.device)
    rows = [
        {"what": f"{size}: one image", "ours": whole, "plain": reference},
        {"what": f"{size}: first preview", "ours": first, "plain": reference, "share": first / whole},
    ]
    if args.device.type == "cuda":
        rows += [overlap_row(args, size, pipeline, batch_size) for batch_size in args.batch_sizes]
    return rows


def overlap_row(args: argparse.Namespace, size: str, pipeline: DARPipeline, batch_size: int) -> dict:
    """Whole calls, whose denoising runs at the same time as a compiled language model, against one after the other.

    "steps beyond" is what a call takes longer than its language model, in denoising steps: 1 where all but the last
    is hidden.
    """
    model, tokenizer = pipeline.transformer, pipeline.tokenizer
    model.compile_decoding = True
    labels = [0] * batch_size
    noise = torch.randn(batch_size, 3, *tokenizer.image_size, device=args.device)
    codes = torch.cat(list(model.stream_codes(labels, guidance_scale=GUIDANCE)), dim=1)
    generating = seconds(lambda: list(model.stream_codes(labels, guidance_scale=GUIDANCE)), args.repeats, args.device)
    decoding = seconds(lambda: tokenizer.decode(codes, noise=noise), args.repeats, args.device)
    whole = seconds(lambda: pipeline(labels, guidance_scale=GUIDANCE, output_type="pt"), args.repeats, args.device)
    return {
        "what": f"{size}: call, batch {batch_size}, compiled",
        "ours": whole,
        "plain": generating + decoding,
        "language model": generating,
        "decoding": decoding,
        "images/s": batch_size / whole,
        "steps beyond": (whole - generating) / (decoding / tokenizer.config.num_inference_steps),
    }


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["B", "L"], choices=PAPER_SIZES, help="language models")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", nargs="+", type=positive_option, default=[1, 4])
    parser.add_argument("--repeats", type=positive_option, default=5)
    parser.add_argument("--slow_repeats", type=positive_option, default=2, help="repeats of the yardsticks")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS + OPTIONAL_PARTS)
    parser.add_argument("--json", type=path_option, help="write all results there")
    return parser.parse_args(argv)


@command("speed.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.json:
        check_output(args.json, folder=False)
    results: dict = {"versions": versions(), "machine": platform.processor() or platform.machine()}
    results |= {"device": str(args.device), "threads": torch.get_num_threads()}
    if "memory" in args.parts:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            results["memory"] = [pool.apply(measure_memory, (str(args.device), size)) for size in args.preset]
        for row in results["memory"]:
            parts = ", ".join(f"{key} {value / 2**20:.0f} MiB" for key, value in row.items() if key != "what")
            print(f"memory, {row['what']}: {parts}")
    limits = results["limits"] = probe(args.device, args.repeats)
    print(", ".join(f"{key}: {value / 1e9:.0f} G/s" for key, value in limits.items()))
    print(HEAD)
    tokenizer = make_tokenizer(args.device)
    if "tokenizer" in args.parts:
        results["tokenizer"] = tokenizer_rows(args, limits, tokenizer)
        print("\n".join(format_row(row, "s", 1) for row in results["tokenizer"]), flush=True)
    if "model" in args.parts:
        results["model"] = [row for size in args.preset for row in language_model_rows(args, limits, size)]
    if "int8" in args.parts:
        results["int8"] = [int8_row(args, size) for size in args.preset]
        print("\n".join(format_row(row, "ms", 1e3) for row in results["int8"]), flush=True)
    if "image" in args.parts:
        results["image"] = [row for size in args.preset for row in end_to_end_rows(args, size, tokenizer)]
        print("\n".join(format_row(row, "s", 1) for row in results["image"]), flush=True)
    if "training" in args.parts:
        sizes = [("digits", 64), ("mnist", 64)]
        if args.device.type == "cuda":
            sizes += [("v1", 16), ("L", 16)]
        else:
            keep_freed_memory()  # as the training commands do
        results["training"] = [row for size, batch in sizes for row in training_rows(args, limits, size, batch)]
    if args.json:
        with writing(args.json):
            write_json(args.json, results)
        print(json.dumps(results["versions"]))


if __name__ == "__main__":
    main()
