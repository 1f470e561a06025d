"""Guidance distilled: the language model learns its own guided distribution, for which it then needs one pass.

As in "On Distillation of Guided Diffusion Models" (arXiv 2210.03142), for the next code instead of the velocity.
"""

import copy

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.batches import SeedFor, draw_seed
from ..data.transforms import ImageTransform
from ..modeling_dar import DARForCausalLM
from ..sampling_dar import GuidanceScale, apply_guidance, guidance_schedule
from .codes import ENCODE_BATCH, CodeSamples, in_batches

ONE_VARIANT = ImageTransform((1, 1))  # codes that are drawn are of no crop


class GuidedTeacher:
    """The language model as a run begins, with guidance: what the run's model is to say without it.

    Args:
        model: copied.
        scale: guidance scale, or its two ends.

    Raises:
        ValueError: for a scale that is no guidance.
    """

    def __init__(self, model: DARForCausalLM, scale: list[float]):
        self.scale: GuidanceScale = scale[0] if len(scale) == 1 else scale
        schedule = guidance_schedule(self.scale, model.config.num_image_tokens)
        if schedule is None:
            raise ValueError("distill_guidance=1 is no guidance: there is nothing to distill.")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.scales = torch.tensor(schedule)[:, None]

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)
        self.scales = self.scales.to(device)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, drop_class: torch.Tensor) -> torch.Tensor:
        """Guided logits ``(B, N, codebook_size)`` of every code, of prompts and codes ``(B, prompt + N - 1)``.

        Where ``drop_class (B,)`` is true, there is nothing to guide to: the result is the unconditional logits.
        """
        unconditional = self.model.model.to_unconditional(tokens)
        both = torch.cat([torch.where(drop_class[:, None], unconditional, tokens), unconditional])
        num_codes = self.model.config.num_image_tokens
        return apply_guidance(self.model(both, use_cache=False, logits_to_keep=num_codes).logits, self.scales)

    @torch.no_grad()
    def draw(self, count: int, seed: int) -> CodeSamples:
        """Sequences of codes that the teacher draws, the same number of each class; every process has them all.

        They do not depend on the number of processes.
        """
        classes = self.model.config.num_classes
        state = PartialState()
        with state.split_between_processes(in_batches(range(count), ENCODE_BATCH)) as mine:
            parts = []
            for batch in tqdm(mine, desc="codes", disable=not state.is_main_process, mininterval=1.0):
                labels = [index % classes for index in batch]
                seeds = [draw_seed(seed, SeedFor.TEACHER, index) for index in batch]
                generators = [torch.Generator().manual_seed(number) for number in seeds]
                groups = self.model.stream_codes(labels, guidance_scale=self.scale, generator=generators)
                parts.append((torch.cat(list(groups), dim=1).cpu(), labels))
            gathered = gather_object([parts])
        codes = torch.cat([codes for parts in gathered for codes, _ in parts])
        labels = [label for parts in gathered for _, batch in parts for label in batch]
        return CodeSamples(codes[:, None], labels, ONE_VARIANT)


def divergence_sum(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the teacher's distribution to the model's, in nats, summed over codes."""
    targets = teacher_logits.float().log_softmax(dim=-1)
    return F.kl_div(logits.float().log_softmax(dim=-1), targets, reduction="sum", log_target=True)
