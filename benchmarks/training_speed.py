"""Speed of training steps, as the training commands run them, against float32 with torch's default AdamW."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import format_row, seconds
from torch.utils.flop_counter import FlopCounterMode

from dar_hf import DARConfig, DARForCausalLM, DARTokenizer
from dar_hf.acceleration_dar import SHORT_SEQUENCE, has_fast_bf16
from dar_hf.presets import get_preset
from dar_hf.training.tokenizer_stage import use_unfused_attention

# how a step is run, and what its row is called after
VARIANTS = {"ours": "", "float32": ", float32", "compiled": ", compiled"}


def training_rows(args: argparse.Namespace, limits: dict[str, float], size: str, batch_size: int) -> list[dict]:
    """Forward, backward and optimizer step of the size's models: with bf16 (where it is fast) and fused AdamW, as the
    commands train, against float32 with torch's default AdamW.

    Both take the same model and random data: no images are read, no weights averaged, no perceptual losses computed.
    The float32 row is against the machine's limit: the operations of its matrix products, at the speed of a large one.
    """
    preset = get_preset(size)
    rows = []
    stages: list[tuple[str, Callable[[], torch.nn.Module], Callable]] = []
    if preset.tokenizer_recipe:
        stages.append(("tokenizer", lambda: DARTokenizer(**preset.tokenizer), tokenizer_loss))
    if preset.ar_recipe:
        options = dict(preset.transformer)
        if preset.tokenizer:  # whose codes are not the paper's
            options |= {
                "codebook_size": preset.tokenizer["codebook_size"],
                "num_image_tokens": preset.tokenizer["num_tokens"],
            }
        stages.append(("model", lambda: DARForCausalLM(DARConfig(**options)), language_model_loss))
    for stage, build, loss in stages:
        times = {}
        for variant in ("plain", *VARIANTS):
            torch.manual_seed(0)
            model = build().to(args.device).train()
            prepare(model)
            if variant == "float32":
                operations = count_operations(model, loss, batch_size)
            times[variant] = seconds(training_step(model, loss, batch_size, variant), args.repeats, args.device)
        for variant, suffix in VARIANTS.items():
            row = {"what": f"train {stage}, {size}, batch {batch_size}{suffix}", "ours": times[variant]}
            row |= {"plain": times["plain"], "images/s": batch_size / times[variant]}
            if variant == "float32":
                row["limit"] = operations / limits["float32"]
            rows.append(row)
            print(format_row(row, "ms", 1e3), flush=True)
    return rows


def prepare(model: torch.nn.Module) -> None:
    """What the commands do to a model on a CPU before they train it."""
    if model.device.type != "cpu":
        return
    if isinstance(model, DARTokenizer):
        use_unfused_attention(model)
        model.make_tables()
    elif model.config.num_image_tokens <= SHORT_SEQUENCE:
        model.set_attn_implementation("eager")


def count_operations(model: torch.nn.Module, loss: Callable, batch_size: int) -> int:
    """Floating-point operations of the matrix products of one pass forward and back."""
    with FlopCounterMode(display=False) as counter:
        loss(model, batch_size, model.device).backward()
    return counter.get_total_flops()


def training_step(model: torch.nn.Module, loss: Callable, batch_size: int, variant: str) -> Callable[[], None]:
    fused = None if variant == "plain" else True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    device = next(model.parameters()).device
    bf16 = variant in ("ours", "compiled") and has_fast_bf16(device)
    if variant == "compiled":
        model.compile()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss(model, batch_size, device)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokenizer_loss(model: DARTokenizer, batch_size: int, device: torch.device) -> torch.Tensor:
    images = torch.rand(batch_size, model.config.in_channels, *model.image_size, device=device) * 2 - 1
    output = model(images)
    commitment = F.mse_loss(output.latents, output.quantized.detach())
    codebook = F.mse_loss(output.quantized, output.latents.detach())
    return F.mse_loss(output.velocity, output.target) + commitment + codebook


def language_model_loss(model: DARForCausalLM, batch_size: int, device: torch.device) -> torch.Tensor:
    config = model.config
    codes = torch.randint(config.codebook_size, (batch_size, config.num_image_tokens), device=device)
    classes = torch.full_like(codes[:, :1], config.class_token_id(0))
    ids = torch.cat([classes, codes], dim=1)
    labels = torch.cat([torch.full_like(classes, -100), codes], dim=1)
    return model(input_ids=ids, labels=labels, use_cache=False).loss
