"""Stage 1: the sequential diffusion tokenizer on images (D-AR, section 3.2).

The terms here are flow matching, codebook and commitment losses. A further term (perceptual, say) is one more
`LossTerm` in ``terms``: it gets the model's whole output and the batch.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from ..data import ImageSamples, normal_noise, sample_times
from ..metrics import codebook_statistics, psnr
from ..pictures import image_grid, interleave_rows
from ..tokenizer_dar import DARTokenizer, DARTokenizerOutput
from .codebook import CodebookKeeper
from .loop import LoopArguments, _option
from .losses import LossTerm, codebook_sum, commitment_sum, flow_matching_sum
from .stage import Stage

ENCODER_PARTS = ("patch_embed", "query_embed", "query_proj", "encoder_blocks", "quant_proj")
VALIDATION_BATCH = 64
STATISTICS_BATCHES = 100  # codebook figures look back this many micro-batches at most, on the main process
NUM_PICTURES = 16


@dataclass
class TokenizerArguments(LoopArguments):
    """Options of stage 1. The defaults are the plain recipe of the paper; small presets switch the cures on."""

    encoder_learning_rate: float | None = _option(None, "peak rate of the encoder, if another than the decoder's")
    vq_weight: float = _option(1.0, "weight of the codebook loss")
    commit_weight: float = _option(1.0, "weight of the commitment loss (its own 0.25 comes on top)")
    gate_start: float = _option(0.0, "start value of the block gates")
    modulation_std: float = _option(0.0, "start deviation of the denoiser's adaLN layers")
    output_std: float = _option(0.0, "start deviation of the denoiser's output layer")
    post_quant_std: float = _option(0.0, "start deviation of the projection after the quantizer; 0 for torch's own")
    continuous_steps: int = _option(0, "steps without quantizing at the start, then a k-means start of the codebook")
    revive_every: int = _option(0, "move codes unused for this many steps; 0 for never")
    revive_until: float = _option(0.8, "share of the run after which codes are left alone")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.continuous_steps < self.max_train_steps:
            raise ValueError(
                f"continuous_steps={self.continuous_steps} must be less than max_train_steps={self.max_train_steps}."
            )
        if self.revive_every < 0 or not 0 <= self.revive_until <= 1:
            raise ValueError("revive_every must not be negative, and revive_until must lie in [0, 1].")
        for name in ("vq_weight", "commit_weight", "modulation_std", "output_std", "post_quant_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


class TokenizerStage(Stage):
    """Trains a `DARTokenizer`.

    Args:
        model: the tokenizer; a fresh one gets the recipe's start values by `start_fresh`.
        samples: training images.
        args: the recipe.
        validation: images for validation, or None.
    """

    name = "tokenizer"
    saved_class = "DARTokenizer"

    def __init__(
        self, model: DARTokenizer, samples: ImageSamples, args: TokenizerArguments, validation: ImageSamples | None
    ):
        self.model, self.samples, self.args, self.validation = model, samples, args, validation
        if model.config.repa_layer is not None:
            model.denoiser.repa_head.requires_grad_(False)  # no term uses it: DDP must not wait for its gradients
        data_std = model.config.data_std
        self.terms = [
            LossTerm("flow", 1.0, "images", lambda output, batch: flow_matching_sum(output, data_std)),
            LossTerm("codebook", args.vq_weight, "tokens", lambda output, batch: codebook_sum(output)),
            LossTerm("commitment", args.commit_weight, "tokens", self._commitment),
        ]
        self.keeper = CodebookKeeper(
            model.config.codebook_size,
            args.continuous_steps,
            args.revive_every,
            round(args.revive_until * args.max_train_steps),
            args.seed,
        )
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._codes: deque[torch.Tensor] = deque(maxlen=STATISTICS_BATCHES)
        self._quantize = True

    def start_fresh(self) -> None:
        """Give a new model the recipe's start values."""
        args = self.args
        self.model.reset_parameters(args.gate_start, args.modulation_std, args.output_std, args.post_quant_std)

    def _commitment(self, output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
        # nothing to commit to while latents pass on unquantized
        return commitment_sum(output) * float(self._quantize)

    def parameter_groups(self) -> list[dict]:
        args = self.args
        encoder: list[nn.Parameter] = []
        decoder: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (encoder if name.split(".")[0] in ENCODER_PARTS else decoder).append(parameter)
        rate = args.learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
        return [{"params": decoder, "lr": args.learning_rate}, {"params": encoder, "lr": rate}]

    def amounts(self, batch: dict) -> dict[str, float]:
        starts = self.model.group_start(sample_times(batch["seed"]))
        tokens = (starts + self.model.config.tokens_per_group).sum()
        return {"images": float(len(starts)), "tokens": float(tokens)}

    def forward(self, model: nn.Module, batch: dict, step: int) -> DARTokenizerOutput:
        images, seeds = batch["pixel_values"], batch["seed"]
        self._quantize = step >= self.args.continuous_steps
        output = model(
            images,
            timesteps=sample_times(seeds).to(images.device),
            noise=normal_noise(seeds, images.shape[1:], images.device),
            quantize=self._quantize,
        )
        self._seen.append((output.codes, output.latents.detach()))
        return output

    @torch.no_grad()
    def after_step(self, step: int, accelerator: Accelerator, optimizer: Any, ema: EMAModel | None) -> None:
        seen, self._seen = self._seen, []
        self._codes.extend(codes for codes, _ in seen)
        if not (self.args.continuous_steps or self.args.revive_every):
            return
        gathered = [accelerator.gather(pair) for pair in seen]
        codes, latents = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        self.keeper.observe(step, codes, latents)
        replacements = self.keeper.replacements(step)
        if replacements is None:
            return
        rows, vectors = replacements
        codebook = self.model.quantizer.codebook.weight
        rows, vectors = rows.to(codebook.device), vectors.to(codebook.device, codebook.dtype)
        codebook[rows] = vectors
        broadcast(codebook.data)  # every process found the same; make sure of it
        state = optimizer.state.get(codebook, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][rows] = 0
        if ema is not None:
            index = next(i for i, p in enumerate(self.model.parameters()) if p is codebook)
            ema.shadow_params[index][rows] = vectors

    def statistics(self) -> dict[str, float]:
        figures = codebook_statistics(torch.cat(list(self._codes)), self.model.config.codebook_size)
        self._codes.clear()
        return {f"codebook/{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def validate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """PSNR and codebook figures on the validation images, and a grid of inputs above reconstructions."""
        if self.validation is None:
            return {}, {}
        device = self.model.device
        codes, scores, first = [], [], None
        count = min(len(self.validation), self.args.max_validation_samples)
        for start in range(0, count, VALIDATION_BATCH):
            indices = range(start, min(start + VALIDATION_BATCH, count))
            images = self.validation.stack(indices).to(device)
            batch_codes = self.model.encode(images).codes
            noise = normal_noise(torch.tensor(indices), images.shape[1:], device)
            decoded = self.model.decode(batch_codes, noise=noise).sample
            codes.append(batch_codes)
            scores.append(psnr(decoded, images))
            first = (images, decoded) if first is None else first
        columns = min(NUM_PICTURES // 2, count)
        shown = [part[:NUM_PICTURES] for part in first] if first else []
        statistics = codebook_statistics(torch.cat(codes), self.model.config.codebook_size)
        figures = {"psnr": float(torch.cat(scores).mean()), "codebook_usage": statistics["usage"]}
        return figures, {"reconstructions": image_grid(interleave_rows(*shown, columns=columns), columns)}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def describe(self) -> dict:
        return {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
