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
from ..data import ImageSamples, SeedFor, StreamedImages, bernoulli_mask, draw_seed, image_splits, normal_noise
from ..layers_dar import NUM_REPA_ROWS, DARAttention
from ..metrics import codebook_statistics, psnr
from ..metrics.lpips import MIN_SIZE, load_lpips
from ..tokenizer_dar import DARTokenizer, DARTokenizerOutput
from ..utils.pictures import image_grid, interleave_rows
from .adversary import Adversary, PatchDiscriminator, discriminator_sum, generator_sum
from .arguments import TokenizerArguments
from .codebook import CodebookKeeper
from .losses import LossTerm, codebook_sum, commitment_sum, flow_matching_sum, perceptual_sum
from .models import build_tokenizer
from .repa import load_teacher, repa_grid, repa_sum
from .stage import Stage, readable_batches

ENCODER_PARTS = ("patch_embed", "query_embed", "query_proj", "encoder_blocks", "quant_proj")
VALIDATION_BATCH = 64
STATISTICS_BATCHES = 100  # codebook metrics look back this many micro-batches at most, on the main process
NUM_SHOWN = 16  # validation images, each with its reconstruction


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
        data_std = model.config.data_std
        self.terms = [
            LossTerm("flow", 1.0, "images", lambda output, batch: flow_matching_sum(output, data_std)),
            LossTerm("codebook", args.vq_weight, "tokens", lambda output, batch: codebook_sum(output)),
            LossTerm("commitment", args.commit_weight, "tokens", self._commitment),
        ]
        self.keeper = CodebookKeeper(
            model.config.codebook_size,
            args.unquantized_steps,
            args.dead_code_interval,
            round(args.revive_until * args.max_train_steps),
            args.seed,
        )
        self.stateful: list[Any] = [self.keeper]
        self._frozen: list[nn.Module] = []  # networks that judge the images, on the device of the model
        self._accelerator: Accelerator | None = None
        self.adversary: Adversary | None = None
        with torch.random.fork_rng(devices=[]):  # the model starts the same whatever judges it
            self._add_perceptual()
            self._add_repa()
            self._add_adversary()
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._codes: deque[torch.Tensor] = deque(maxlen=STATISTICS_BATCHES)
        self._quantize = True
        self._judging = False

    @classmethod
    def build(cls, args: TokenizerArguments) -> "TokenizerStage":
        """The stage from its arguments.

        Raises:
            ValueError: for an unknown preset, option, data set or column.
        """
        model = build_tokenizer(args)
        samples, validation, _ = image_splits(args, model.image_size, model.config.in_channels, with_labels=False)
        stage = cls(model, samples, args, validation)
        if not args.init_from:
            stage.start_fresh()
        return stage

    def _add_perceptual(self) -> None:
        if not self.args.perceptual_weight:
            return
        if min(self.model.image_size) < MIN_SIZE:
            raise ValueError(
                f"LPIPS needs images of {MIN_SIZE} pixels or more, these are {self.model.image_size}: "
                "--perceptual_weight 0."
            )
        network = load_lpips(self.args.lpips_weights)
        self._frozen.append(network)

        def term(output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
            with self._autocast():
                return perceptual_sum(network, output, batch["pixel_values"])

        self.terms.append(LossTerm("perceptual", self.args.perceptual_weight, "images", term))

    def _add_repa(self) -> None:
        config = self.model.config
        if not self.args.repa_weight:
            if config.repa_layer is not None:
                # no term uses it: DDP must not wait for its gradients
                self.model.denoiser.repa_head.requires_grad_(False)
            return
        if config.repa_layer is None:
            raise ValueError("REPA needs a head: --model_overrides repa_layer=N (8 in v1), or --repa_weight 0.")
        teacher = load_teacher(self.args.repa_model)
        if teacher.dim != config.repa_dim:
            raise ValueError(
                f"{self.args.repa_model} has features of width {teacher.dim}, the REPA head of {config.repa_dim}: "
                f"--model_overrides repa_dim={teacher.dim}."
            )
        self._frozen.append(teacher)

        def term(output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
            images = batch["pixel_values"]
            grid = repa_grid(images.shape[2], images.shape[3], config.diffusion_patch_size, NUM_REPA_ROWS)
            with self._autocast():
                targets = teacher(images, grid)
            return repa_sum(output.repa_features, targets)

        self.terms.append(LossTerm("repa", self.args.repa_weight, "images", term))

    def _add_adversary(self) -> None:
        args = self.args
        if not args.discriminator_weight:
            return
        least = PatchDiscriminator.min_size(args.discriminator_layers)
        if min(self.model.image_size) < least:
            raise ValueError(
                f"a discriminator of {args.discriminator_layers} layers needs images of {least} pixels or more, these "
                f"are {self.model.image_size}: fewer --discriminator_layers, or --discriminator_weight 0."
            )
        torch.manual_seed(draw_seed(args.seed, SeedFor.DISCRIMINATOR))
        network = PatchDiscriminator(
            self.model.config.in_channels, args.discriminator_layers, args.discriminator_width
        )
        rate = args.discriminator_learning_rate or args.learning_rate
        betas = (args.adam_beta1, args.adam_beta2)
        self.adversary = Adversary(network, rate, betas, args.adam_epsilon, args.max_grad_norm)
        self.stateful.append(self.adversary)
        self._frozen.append(network)

        def judged(output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
            if not self._judging:
                return output.velocity.new_zeros(())
            with self._autocast():
                return generator_sum(network, output.pred_original_sample)

        def learning(output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
            if not self._judging:
                return output.velocity.new_zeros(())
            with self._autocast():
                return discriminator_sum(network, batch["pixel_values"], output.pred_original_sample)

        self.terms.append(LossTerm("adversarial", args.discriminator_weight, "images", judged))
        self.terms.append(LossTerm("discriminator", 1.0, "images", learning, in_total=False))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """bf16 for the networks that judge, where the run has it; not fp16, whose range their gradients leave."""
        if self._accelerator is not None and self._accelerator.mixed_precision == "bf16":
            with self._accelerator.autocast():
                yield
        else:
            yield

    def prepare(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        if accelerator.device.type == "cpu":
            use_unfused_attention(self.model)
        self.model.make_tables()
        for network in self._frozen:
            network.to(accelerator.device)

    def start_fresh(self) -> None:
        """Give a new model the recipe's start values."""
        args = self.args
        self.model.reset_parameters(args.gate_start, args.modulation_std, args.output_std, args.post_quant_std)

    def _commitment(self, output: DARTokenizerOutput, batch: dict) -> torch.Tensor:
        # nothing to commit to while latents pass on unquantized
        return commitment_sum(output) * float(self._quantize)

    def parameter_groups(self) -> list[dict]:
        args = self.args
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        encoder = [parameter for name, parameter in trained.items() if name.split(".")[0] in ENCODER_PARTS]
        decoder = [parameter for name, parameter in trained.items() if name.split(".")[0] not in ENCODER_PARTS]
        rate = args.encoder_learning_rate
        if rate is None:
            rate = args.learning_rate
        return [{"params": decoder, "lr": args.learning_rate}, {"params": encoder, "lr": rate}]

    def loss_denominators(self, batch: dict) -> dict[str, float]:
        starts = self.model.group_start(batch["timesteps"])
        tokens = (starts + self.model.config.tokens_per_group).sum()
        return {"images": float(len(starts)), "tokens": float(tokens)}

    def forward(self, model: nn.Module, batch: dict, step: int) -> DARTokenizerOutput:
        images = batch["pixel_values"]
        hide_group = None
        if self.args.group_dropout:
            hide_group = bernoulli_mask(batch["seed"], self.args.group_dropout, SeedFor.GROUP_DROPOUT)
        self._quantize = step >= self.args.unquantized_steps
        self._judging = step >= self.args.discriminator_start
        if self.adversary is not None and self._accelerator is not None:
            self.adversary.note_scale(self._accelerator)
        output = model(
            images,
            timesteps=batch["timesteps"],
            noise=normal_noise(batch["seed"], images.shape[1:], images.device),
            quantize=self._quantize,
            hide_group=hide_group,
            output_repa=self.args.repa_weight > 0,
        )
        self._seen.append((output.codes, output.latents.detach()))
        return output

    def _in_order(self, gathered: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """What processes hold, in the order of the data: they read streams turn by turn, other data in batches.

        A stream whose shards are dealt out to the processes has no order that is independent of their number.
        """
        if not self.args.streaming:
            return gathered
        return torch.stack(gathered.chunk(accelerator.num_processes), dim=1).flatten(0, 1)

    @torch.no_grad()
    def after_step(self, step: int, accelerator: Accelerator, optimizer: Any, ema: EMAModel | None) -> None:
        seen = self._seen
        self._seen = []
        self._codes.extend(codes for codes, _ in seen)
        if self.adversary is not None and self._judging:
            self.adversary.step(accelerator, self.args.learning_rate_factor(step))
        if not (self.args.unquantized_steps or self.args.dead_code_interval):
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
        vectors = vectors.to(codebook)
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
        batches = readable_batches(self.validation, self.args.max_validation_samples, VALIDATION_BATCH)
        if not batches:
            return {}, {}
        for indices in batches:
            images = self.validation.stack(indices).to(device)
            batch_codes = self.model.encode(images).codes
            noise = normal_noise(torch.tensor(indices), images.shape[1:], device)
            decoded = self.model.decode(batch_codes, noise=noise).sample
            codes.append(batch_codes)
            scores.append(psnr(decoded, images))
            shown = shown or [images[:NUM_SHOWN], decoded[:NUM_SHOWN]]
        columns = min(NUM_SHOWN // 2, len(batches[0]))
        usage = codebook_statistics(torch.cat(codes), self.model.config.codebook_size)["usage"]
        metrics = {"psnr": float(torch.cat(scores).mean()), "codebook_usage": usage}
        return metrics, {"reconstructions": image_grid(interleave_rows(*shown, columns=columns), columns)}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def describe(self) -> dict:
        return {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}


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
        "cross_attn": config.tokens_per_group,
    }
    for name, module in model.named_modules():
        if isinstance(module, DARAttention):
            parts = name.split(".")
            length = num_keys["cross_attn" if "cross_attn" in parts else parts[0]]
            if length <= SHORT_SEQUENCE:
                module.set_attention_backend("_native_math")
