"""Stage 1: the sequential diffusion tokenizer on images (D-AR, section 3.2).

The terms are flow matching, codebook and commitment losses and, where their weights are not 0, LPIPS, REPA and a
discriminator's. A further term is one more `LossTerm` in ``terms``: it gets the model's whole output and the batch.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from ..acceleration_dar import SHORT_SEQUENCE
from ..data import (
    ImageSamples,
    SeedFor,
    StreamedImages,
    bernoulli_mask,
    image_splits,
    normal_noise,
    sample_times,
)
from ..layers_dar import NUM_REPA_ROWS, DARAttention
from ..metrics import codebook_statistics, psnr
from ..metrics.lpips import load_lpips
from ..tokenizer_dar import DARTokenizer, DARTokenizerOutput
from ..utils.pictures import image_grid, interleave_rows
from .adversary import Adversary, discriminator_sum, generator_sum, make_adversary
from .arguments import TokenizerArguments
from .codebook import CodebookKeeper
from .codes import in_batches
from .losses import LossTerm, codebook_sum, commitment_sum, flow_matching_sum, perceptual_sum
from .models import build_tokenizer
from .muon import matrices_of_blocks
from .repa import load_teacher, repa_grid, repa_sum
from .stage import Stage

ENCODER_PARTS = ("patch_embed", "query_embed", "query_proj", "encoder_blocks", "quant_proj")
VALIDATION_BATCH = 64
STATISTICS_BATCHES = 100
NUM_SHOWN = 16  # validation images, each with its reconstruction


class TokenizerStage(Stage):
    """Trains a `DARTokenizer`.

    Args:
        model: the tokenizer.
        samples: training images.
        args: the recipe.
        validation: images for validation, or None.
    """

    name = "tokenizer"
    saved_class = "DARTokenizer"

    def __init__(
        self,
        model: DARTokenizer,
        samples: ImageSamples | StreamedImages,
        args: TokenizerArguments,
        validation: ImageSamples | None,
    ):
        self.model = model
        self.samples = samples
        self.args = args
        self.validation = validation
        self.keeper = CodebookKeeper(
            model.config.codebook_size,
            args.unquantized_steps,
            args.dead_code_interval,
            round(args.revive_until * args.max_train_steps),
            args.seed,
        )
        self.stateful: list[Any] = [self.keeper]
        self._loss_networks: dict[str, nn.Module] = {}  # networks of the loss terms, moved to the device by `prepare`
        self._accelerator: Accelerator | None = None
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # codes and latents of the step's micro-batches
        # what the codebook's metrics look back on: at most N micro-batches, of the main process alone
        self._codes: deque[torch.Tensor] = deque(maxlen=STATISTICS_BATCHES)
        self.terms = [
            LossTerm("flow", 1.0, "images", self._flow),
            # also in the unquantized steps, though k-means then replaces the codebook: DDP waits for a gradient of
            # every parameter
            LossTerm("codebook", args.vq_weight, "tokens", self._codebook),
            LossTerm("commitment", args.commit_weight, "tokens", self._commitment),
        ]
        if args.perceptual_weight:
            self._loss_networks["lpips"] = load_lpips(args.lpips_weights, model.image_size)
            self.terms.append(LossTerm("perceptual", args.perceptual_weight, "images", self._perceptual))
        if args.repa_weight:
            repa_dim = None if model.config.repa_layer is None else model.config.repa_dim
            self._loss_networks["repa"] = load_teacher(args.repa_model, repa_dim)
            self.terms.append(LossTerm("repa", args.repa_weight, "images", self._repa))
        elif model.config.repa_layer is not None:
            # no term uses it: DDP must not wait for its gradients
            model.denoiser.repa_head.requires_grad_(False)
        self.adversary: Adversary | None = None
        if args.discriminator_weight:
            self.adversary = make_adversary(args, model.image_size, model.config.in_channels)
            self.stateful.append(self.adversary)
            self._loss_networks["discriminator"] = self.adversary.network
            self.terms.append(LossTerm("adversarial", args.discriminator_weight, "images", self._adversarial))
            self.terms.append(LossTerm("discriminator", 1.0, "images", self._discriminator, in_total=False))

    @classmethod
    def build(cls, args: TokenizerArguments, device: torch.device | str = "cpu") -> "TokenizerStage":
        """The stage from its arguments; nothing is encoded before training, so ``device`` changes nothing.

        Raises:
            ValueError: for an unknown preset, option, data set or column.
        """
        model = build_tokenizer(args)
        samples, validation, _ = image_splits(args, model.image_size, model.config.in_channels, with_labels=False)
        return cls(model, samples, args, validation)

    # The terms

    def _flow(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        return flow_matching_sum(output, self.model.config.data_std)

    def _codebook(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        return codebook_sum(output)

    def _commitment(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        # nothing to commit to while nothing is quantized
        return commitment_sum(output) * float(step >= self.args.unquantized_steps)

    def _perceptual(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        with self._autocast():
            return perceptual_sum(self._loss_networks["lpips"], output, self._for_each_time(batch["pixel_values"]))

    def _repa(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        images = batch["pixel_values"]
        grid = repa_grid(images.shape[2], images.shape[3], self.model.config.diffusion_patch_size, NUM_REPA_ROWS)
        with self._autocast():
            targets = self._loss_networks["repa"](images, grid)
        return repa_sum(output.repa_features, self._for_each_time(targets))

    def _adversarial(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        if step < self.args.discriminator_start:
            return output.velocity.new_zeros(())
        with self._autocast():
            return generator_sum(self._loss_networks["discriminator"], output.pred_original_sample)

    def _discriminator(self, output: DARTokenizerOutput, batch: dict, step: int) -> torch.Tensor:
        if step < self.args.discriminator_start:
            return output.velocity.new_zeros(())
        with self._autocast():
            network = self._loss_networks["discriminator"]
            images = self._for_each_time(batch["pixel_values"])
            return discriminator_sum(network, images, output.pred_original_sample)

    def _for_each_time(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a batch's images, each as often as its image is denoised in a step."""
        return rows.repeat_interleave(self.args.times_per_image, dim=0)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """bf16 for the loss networks, where the run has it; not fp16, whose range their gradients leave."""
        if self._accelerator is not None and self._accelerator.mixed_precision == "bf16":
            with self._accelerator.autocast():
                yield
        else:
            yield

    # What the loop asks for

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        if accelerator.device.type == "cpu":
            use_unfused_attention(self.model)
        self.model.make_tables()
        for network in self._loss_networks.values():
            network.to(accelerator.device)

    def parameter_groups(self) -> list[dict]:
        """All but the encoder, which trains at ``learning_rate``, the rate that is logged; then the encoder.

        With Muon, the matrices of their blocks are two more groups, the encoder's at the share of Muon's rate that
        its own rate is of ``learning_rate``. Weight decay, where there is any, falls on gates, norms and codebook,
        too.
        """
        args = self.args
        encoder_rate = args.encoder_learning_rate
        if encoder_rate is None:
            encoder_rate = args.learning_rate
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        encoder = {name: trained[name] for name in trained if name.split(".")[0] in ENCODER_PARTS}
        decoder = {name: trained[name] for name in trained if name not in encoder}
        groups: list[dict] = []
        matrices: list[dict] = []
        for part, rate in ((decoder, args.learning_rate), (encoder, encoder_rate)):
            others = part
            if args.muon_learning_rate:
                of_blocks, others = matrices_of_blocks(part)
                muon_rate = args.muon_learning_rate * rate / args.learning_rate
                matrices.append({"params": list(of_blocks.values()), "lr": muon_rate, "muon": True})
            groups.append({"params": list(others.values()), "lr": rate})
        return groups + matrices

    def prepare_batch(self, batch: dict) -> dict:
        """With each image's times of the diffusion, from its own seed."""
        return batch | {"timesteps": sample_times(batch["seed"], self.args.times_per_image)}

    def loss_denominators(self, batch: dict) -> dict[str, float]:
        starts = self.model.group_start(batch["timesteps"])
        tokens = (starts + self.model.config.tokens_per_group).sum()
        return {"images": float(starts.numel()), "tokens": float(tokens)}

    def forward(self, model: nn.Module, batch: dict, step: int) -> DARTokenizerOutput:
        images = batch["pixel_values"]
        hide_group = None
        if self.args.group_dropout:
            hide_group = bernoulli_mask(batch["seed"], self.args.group_dropout, SeedFor.GROUP_DROPOUT)
            hide_group = self._for_each_time(hide_group)
        if self.adversary is not None and self._accelerator is not None:
            self.adversary.note_scale(self._accelerator)
        noise_size = (self.args.times_per_image, *images.shape[1:])
        output = model(
            images,
            timesteps=batch["timesteps"],
            noise=normal_noise(batch["seed"], noise_size, images.device).flatten(0, 1),
            quantize=step >= self.args.unquantized_steps,
            hide_group=hide_group,
            output_repa=self.args.repa_weight > 0,
        )
        self._seen.append((output.codes, output.latents.detach()))
        return output

    def _in_order(self, gathered: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """Gathered rows in the order of the data.

        Of a stream, process p holds rows p, p + P, p + 2P, ..., so they are interleaved; of other data each process
        holds consecutive rows.
        """
        if not self.args.streaming:
            return gathered
        return torch.stack(gathered.chunk(accelerator.num_processes), dim=1).flatten(0, 1)

    @torch.no_grad()
    def after_step(self, step: int, accelerator: Accelerator, optimizer: Any, ema: EMAModel | None) -> None:
        seen = self._seen
        self._seen = []
        self._codes.extend(codes for codes, _ in seen)
        if self.adversary is not None and step >= self.args.discriminator_start:
            self.adversary.step(accelerator, self.args.learning_rate_factor(step))
        if not self.keeper.watches(step):
            return
        gathered = [[self._in_order(accelerator.gather(x), accelerator) for x in pair] for pair in seen]
        codes, latents = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        self.keeper.observe(step, codes, latents)
        replacements = self.keeper.replacements(step)
        if replacements is not None:
            self._move_codes(*replacements, optimizer, ema)

    def _move_codes(self, rows: torch.Tensor, vectors: torch.Tensor, optimizer: Any, ema: EMAModel | None) -> None:
        """Put vectors into rows of the codebook and of its average, and forget the optimizer's momenta of them."""
        codebook = self.model.quantizer.codebook.weight
        rows = rows.to(codebook.device)
        vectors = broadcast(vectors.to(codebook))  # every process found the same; make sure of it
        codebook[rows] = vectors
        state = optimizer.state.get(codebook, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][rows] = 0
        if ema is not None:
            index = next(i for i, p in enumerate(self.model.parameters()) if p is codebook)
            ema.shadow_params[index][rows] = vectors

    def statistics(self) -> dict[str, float]:
        metrics = codebook_statistics(torch.cat(list(self._codes)), self.model.config.codebook_size)
        self._codes.clear()
        return {f"codebook/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def validate(self, step: int) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """PSNR and codebook usage on the validation images, and a grid of inputs above reconstructions."""
        if self.validation is None:
            return {}, {}
        device = self.model.device
        codes: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        shown: list[torch.Tensor] = []
        for batch in in_batches(range(len(self.validation)), VALIDATION_BATCH):
            indices, images = self.validation.stack_readable(batch)
            if not indices:
                continue
            images = images.to(device)
            batch_codes = self.model.encode(images).codes
            noise = normal_noise(torch.tensor(indices), images.shape[1:], device)
            decoded = self.model.decode(batch_codes, noise=noise).sample
            codes.append(batch_codes)
            scores.append(psnr(decoded, images))
            shown = shown or [images[:NUM_SHOWN], decoded[:NUM_SHOWN]]
        if not codes:
            return {}, {}
        columns = min(NUM_SHOWN // 2, len(shown[0]))
        usage = codebook_statistics(torch.cat(codes), self.model.config.codebook_size)["usage"]
        metrics = {"psnr": float(torch.cat(scores).mean()), "codebook_usage": usage}
        return metrics, {"reconstructions": image_grid(interleave_rows(*shown, columns=columns), columns)}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def describe(self) -> dict:
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        if config["condition_scope"] == "group":
            del config["condition_scope"]  # which runs of earlier versions do not note
        return config


def use_unfused_attention(model: DARTokenizer) -> None:
    """Have short sequences attended by plain matrix products, whose backward pass is the faster one on CPUs.

    It is a setting of the model in memory, and not saved.
    """
    config = model.config
    pixels = model.image_size[0] * model.image_size[1]
    num_keys = {
        "encoder_blocks": pixels // config.encoder_patch_size**2 + config.num_tokens,
        "causal_blocks": config.num_tokens,
        "denoiser": pixels // config.diffusion_patch_size**2,
        "cross_attn": config.num_tokens if config.condition_scope == "prefix" else config.tokens_per_group,
    }
    for name, module in model.named_modules():
        if isinstance(module, DARAttention):
            parts = name.split(".")
            length = num_keys["cross_attn" if "cross_attn" in parts else parts[0]]
            if length <= SHORT_SEQUENCE:
                module.set_attention_backend("_native_math")
