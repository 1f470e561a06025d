"""Class-conditional image generation with D-AR: language model and tokenizer, composed as two generators.

`DARPipeline.stream` is the composition; calling the pipeline gives its last element. Image-to-image follows the idea
of the original code, which slices its schedule twice there (the steps it skips are skipped again); here the schedule
is entered once, at the step that ``strength`` selects.
"""

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .modeling_dar import DARForCausalLM, GuidanceScale, check_generators, guidance_schedule, sampling_warpers
from .scheduling_dar import FlowMatchAdamsBashforthScheduler
from .tokenizer_dar import DARPreview, DARTokenizer

OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass
class DARPipelineOutput(BaseOutput):
    """Images after one denoising step.

    Attributes:
        images: in the ``output_type`` asked for: a list of PIL images, a numpy array ``(B, H, W, C)`` or a tensor
            ``(B, C, H, W)`` in [0, 1], or codes ``(B, n)``.
        step, num_steps: the step that gave them, counted from 1, and how many there are.
        num_tokens: how many codes they depend on.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    step: int | None = None
    num_steps: int | None = None
    num_tokens: int | None = None


@dataclass
class _Request:
    """A checked call: what `DARPipeline._run` needs, whichever way it was asked for."""

    labels: list[int]
    guidance_scale: GuidanceScale
    temperature: float
    top_k: int
    top_p: float
    num_steps: int
    start_step: int
    num_tokens: int
    prefix_codes: torch.Tensor | None
    noise: torch.Tensor
    generator: torch.Generator | list[torch.Generator] | None
    output_type: str
    callback: Callable | None
    callback_inputs: list[str]


class DARPipeline(DiffusionPipeline):
    """Generates images from class labels, step by step as their codes arrive.

    Args:
        tokenizer: codes to images.
        transformer: class labels to codes; its generation configuration holds the default ``guidance_scale``.
        scheduler: the tokenizer's solver.
        id2label: class names by id; several names of one class are separated by commas.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _callback_tensor_inputs = ["preview", "codes", "latents"]

    def __init__(
        self,
        tokenizer: DARTokenizer,
        transformer: DARForCausalLM,
        scheduler: FlowMatchAdamsBashforthScheduler,
        id2label: dict | None = None,
    ):
        super().__init__()
        for name, ours, theirs in (
            ("codebook_size", tokenizer.config.codebook_size, transformer.config.codebook_size),
            ("number of tokens", tokenizer.config.num_tokens, transformer.config.num_image_tokens),
        ):
            if ours != theirs:
                raise ValueError(f"tokenizer and transformer disagree: {name} {ours} and {theirs}.")
        self.register_modules(tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=None if id2label is None else {int(k): v for k, v in id2label.items()})
        self.labels: dict[str, int] = {}
        for label, names in (id2label or {}).items():
            for name in (str(names), *str(names).split(",")):
                self.labels[name.strip()] = int(label)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=1,
            resample="bicubic",
            do_convert_rgb=tokenizer.config.in_channels == 3,
            do_convert_grayscale=tokenizer.config.in_channels == 1,
        )
        self._interrupt = False
        self._guidance_scale: GuidanceScale = None
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> GuidanceScale:
        """Guidance scale of the call that runs or ran last."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the call that runs or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipeline._interrupt = True`` to end the running call with its current preview."""
        return self._interrupt

    def get_label_ids(self, names: str | list[str]) -> list[int]:
        """Class ids of class names.

        Raises:
            ValueError: for a name this model does not have.
        """
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.labels:
                names_known = [known for known in self.labels if "," not in known]
                known = ", ".join(names_known[:20]) or "none: the pipeline has no id2label"
                more = f", … ({len(names_known)} in all)" if len(names_known) > 20 else ""
                raise ValueError(f"unknown class name {name!r}; known names: {known}{more}.")
        return [self.labels[name] for name in names]

    def __call__(
        self,
        class_labels: int | str | list[int] | list[str],
        guidance_scale: GuidanceScale = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_inference_steps: int | None = None,
        num_tokens: int | None = None,
        num_images_per_prompt: int = 1,
        prefix_codes: torch.Tensor | None = None,
        layout_image: Any = None,
        layout_tokens: int | None = None,
        image: Any = None,
        strength: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DARPipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: classes by id or name, one or a list.
            guidance_scale: classifier-free guidance, a number or a pair (start, end) for a scale linear over the
                tokens; None takes the default saved with the transformer, 1.0 switches it off.
            temperature, top_k, top_p: sampling of the codes; temperature 0 takes the most probable ones.
            num_inference_steps: denoising steps, any number; default the tokenizer's.
            num_tokens: generate and decode only this many codes (a preview).
            num_images_per_prompt: images per label.
            prefix_codes: ``(B or 1, n)`` codes to start from.
            layout_image, layout_tokens: take the first ``layout_tokens`` codes of an image as the prefix.
            image, strength: image-to-image: the share of the steps, in [0, 1], that is generated anew.
            generator: randomness of noise and codes, one or one per image; the global one stays untouched.
            latents: start noise ``(B, C, H, W)``.
            output_type: "pil", "np", "pt", or "codes" (nothing is decoded).
            return_dict: False gives a tuple ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after every step with
                those of "preview", "codes" and "latents" that ``callback_on_step_end_tensor_inputs`` names (default
                all); returning ``{"stop": True}`` ends the call with the current preview.

        Raises:
            ValueError: for arguments out of range or that exclude each other, before any model runs.
        """
        arguments = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        request = self._prepare(**arguments)
        (last,) = deque(self._run(request), maxlen=1)
        output = self._output(request, last)  # only the last preview is converted
        return output if return_dict else (output.images,)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[DARPipelineOutput]:
        """The same call as a generator: one `DARPipelineOutput` per denoising step, as soon as its codes are there.

        Takes every argument of calling the pipeline but ``return_dict``. The last output is what the call returns.

        Raises:
            ValueError: as calling the pipeline, at once and not at the first step.
        """
        bound = _STREAM_SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        request = self._prepare(**{name: bound.arguments[name] for name in _ARGUMENTS})
        return (self._output(request, step) for step in self._run(request))

    def _output(self, request: _Request, step: DARPreview) -> DARPipelineOutput:
        if request.output_type == "codes":
            images = step.sample
        else:
            images = self.image_processor.postprocess(step.sample, request.output_type)
        return DARPipelineOutput(images, step.step, step.num_steps, step.num_tokens)

    @torch.no_grad()
    def _run(self, request: _Request) -> Iterator[DARPreview]:
        """The composition: groups of codes from the transformer, a denoising step of the tokenizer for each."""
        self._interrupt = False
        self._guidance_scale = request.guidance_scale
        self._num_timesteps = request.num_steps - request.start_step
        pieces: list[torch.Tensor] = []

        def groups() -> Iterator[torch.Tensor]:
            for group in self._stream_codes(request):
                pieces.append(group)
                yield group

        if request.output_type == "codes":
            steps = self._undecoded(request, groups())
        else:
            steps = self.tokenizer.decode_stream(
                groups(),
                noise=request.noise,
                num_inference_steps=request.num_steps,
                scheduler=self.scheduler,
                start_step=request.start_step,
            )
        try:
            with self.progress_bar(total=self._num_timesteps) as progress:
                for step in steps:
                    progress.update()
                    stop = self._report(request, step, pieces)
                    yield step
                    if stop or self._interrupt:
                        return
        finally:
            self.maybe_free_model_hooks()

    def _undecoded(self, request: _Request, groups: Iterator[torch.Tensor]) -> Iterator[DARPreview]:
        """The steps that codes complete, with the codes so far in the place of the picture; nothing is decoded.

        Where the last step needs fewer codes than there are, it comes once more with all of them.
        """
        windows = self.tokenizer.step_windows(request.num_steps)
        num_steps, step, shown, codes = request.num_steps, request.start_step, 0, None
        for group in groups:
            codes = group if codes is None else torch.cat([codes, group], dim=1)
            while step < num_steps and windows[step][1] <= codes.shape[1]:
                step, shown = step + 1, codes.shape[1]
                yield DARPreview(step, num_steps, shown, codes, timestep=0.0, latents=request.noise)
        if codes is not None and shown < codes.shape[1]:
            yield DARPreview(step, num_steps, codes.shape[1], codes, timestep=0.0, latents=request.noise)

    def _stream_codes(self, request: _Request) -> Iterator[torch.Tensor]:
        config = self.tokenizer.config
        return self.transformer.stream_codes(
            request.labels,
            guidance_scale=request.guidance_scale,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            generator=request.generator,
            prefix_codes=request.prefix_codes,
            num_tokens=request.num_tokens,
            group_size=math.gcd(config.num_tokens // config.num_groups, config.tokens_per_group),
        )

    def _report(self, request: _Request, preview: DARPreview, pieces: list[torch.Tensor]) -> bool:
        """Run the caller's callback; True if it asks to stop."""
        if request.callback is None:
            return False
        tensors = {"preview": preview.sample, "codes": torch.cat(pieces, dim=1), "latents": preview.latents}
        tensors = {name: tensors[name] for name in request.callback_inputs}
        answer = request.callback(self, preview.step - 1, preview.timestep, tensors)
        return bool(answer and answer.get("stop"))

    # Arguments

    @torch.no_grad()
    def _prepare(
        self,
        class_labels: int | str | list[int] | list[str],
        guidance_scale: GuidanceScale,
        temperature: float,
        top_k: int,
        top_p: float,
        num_inference_steps: int | None,
        num_tokens: int | None,
        num_images_per_prompt: int,
        prefix_codes: torch.Tensor | None,
        layout_image: Any,
        layout_tokens: int | None,
        image: Any,
        strength: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> _Request:
        """Check a call's arguments, all of them before any model runs, and make of them what `_run` needs.

        Raises:
            ValueError: that says what was given and what is accepted.
        """
        config = self.tokenizer.config
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        _exclude(prefix_codes=prefix_codes, layout_image=layout_image, image=image)
        _exclude(image=image, latents=latents)  # the noise of image-to-image is drawn
        callback_inputs = callback_on_step_end_tensor_inputs or self._callback_tensor_inputs
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, "
                f"got {callback_inputs}."
            )
        num_images_per_prompt = _positive_int("num_images_per_prompt", num_images_per_prompt)
        if num_inference_steps is None:
            num_inference_steps = config.num_inference_steps
        num_steps = _positive_int("num_inference_steps", num_inference_steps)
        num_tokens = _positive_int("num_tokens", config.num_tokens if num_tokens is None else num_tokens)
        if num_tokens > config.num_tokens:
            raise ValueError(f"num_tokens must lie in [1, {config.num_tokens}], got {num_tokens}.")
        labels = [label for label in self._label_ids(class_labels) for _ in range(num_images_per_prompt)]
        generator = list(generator) if isinstance(generator, tuple) else generator
        check_generators(generator, len(labels))
        if guidance_scale is None:
            guidance_scale = self.transformer.generation_config.guidance_scale
        guidance_schedule(guidance_scale, config.num_tokens)
        sampling_warpers(temperature, top_k, top_p)
        _check_layout(layout_image, layout_tokens, num_tokens)
        start_step = _start_step(image, strength, num_steps)
        needed = self.tokenizer.step_windows(num_steps)[start_step % num_steps][1]
        if num_tokens < needed and output_type != "codes":
            raise ValueError(f"num_tokens={num_tokens} completes no step: the first one needs {needed}.")
        if prefix_codes is not None:
            prefix_codes = self.transformer.check_prefix(prefix_codes, len(labels), num_tokens)
        pixels = self._pixels(image if layout_image is None else layout_image, len(labels))
        noise = self._noise(len(labels), generator, latents)

        if layout_image is not None:
            prefix_codes = self.tokenizer.encode(pixels).codes[:, :layout_tokens]
        elif start_step == num_steps:  # strength 0, nothing is generated anew: the reconstruction, from pure noise
            start_step, prefix_codes = 0, self.tokenizer.encode(pixels).codes[:, :num_tokens]
        elif pixels is not None:
            noise, prefix_codes = self._noised(pixels, noise, start_step, num_steps)
        return _Request(
            labels=labels,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_steps=num_steps,
            start_step=start_step,
            num_tokens=num_tokens,
            prefix_codes=prefix_codes,
            noise=noise,
            generator=generator,
            output_type=output_type,
            callback=callback_on_step_end,
            callback_inputs=list(callback_inputs),
        )

    def _label_ids(self, class_labels: int | str | list[int] | list[str]) -> list[int]:
        single = isinstance(class_labels, str) or not isinstance(class_labels, Iterable) or _is_scalar(class_labels)
        labels: list[Any] = [class_labels] if single else list(class_labels)  # type: ignore[arg-type]
        if not labels:
            raise ValueError("class_labels is empty: nothing to generate.")
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        config = self.transformer.config
        return [config.class_token_id(label) - config.codebook_size for label in ids]

    def _noise(self, batch_size: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        shape = (batch_size, self.tokenizer.config.in_channels, *self.tokenizer.image_size)
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape or not torch.isfinite(latents).all():
            raise ValueError(f"latents must be finite and of shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def _pixels(self, image: Any, batch_size: int) -> torch.Tensor | None:
        """Pixels in [-1, 1] of images in any form diffusers takes, centre-cropped to the model's size."""
        if image is None:
            return None
        first = image[0] if isinstance(image, (list, tuple)) and image else image
        mode = "crop" if isinstance(first, PIL.Image.Image) else "default"
        pixels = self.image_processor.preprocess(image, *self.tokenizer.image_size, resize_mode=mode)
        if len(pixels) not in (1, batch_size):
            raise ValueError(f"got {len(pixels)} images for {batch_size} labels: give one image, or one for each.")
        return pixels.to(self._execution_device, torch.float32).expand(batch_size, -1, -1, -1)

    def _noised(
        self, pixels: torch.Tensor, noise: torch.Tensor, start_step: int, num_steps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image-to-image: the noisy sample at ``start_step``, and the codes of the groups before it."""
        scheduler = FlowMatchAdamsBashforthScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps)
        clean = pixels * self.tokenizer.config.data_std
        sample = scheduler.add_noise(clean, noise, float(scheduler.timesteps[start_step]))
        kept = self.tokenizer.step_windows(num_steps)[start_step][0]
        return sample, self.tokenizer.encode(pixels).codes[:, :kept]


_SIGNATURE = inspect.signature(DARPipeline.__call__)
_ARGUMENTS = [name for name in _SIGNATURE.parameters if name not in ("self", "return_dict")]
_STREAM_SIGNATURE = _SIGNATURE.replace(
    parameters=[parameter for name, parameter in _SIGNATURE.parameters.items() if name != "return_dict"],
    return_annotation=Iterator[DARPipelineOutput],
)
DARPipeline.stream.__signature__ = _STREAM_SIGNATURE  # type: ignore[attr-defined]  # for help() and editors


def _exclude(**arguments: Any) -> None:
    """Refuse more than one of arguments that exclude each other."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other.")


def _is_scalar(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0  # a numpy or torch number


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return value


def _check_layout(layout_image: Any, layout_tokens: int | None, num_tokens: int) -> None:
    if (layout_image is None) != (layout_tokens is None):
        raise ValueError("layout_image and layout_tokens go together: give both or neither.")
    if layout_tokens is None:
        return
    if isinstance(layout_tokens, bool) or not isinstance(layout_tokens, int) or layout_tokens < 0:
        raise ValueError(f"layout_tokens must be an integer >= 0, got {layout_tokens!r}.")
    if layout_tokens > num_tokens:
        raise ValueError(f"layout_tokens={layout_tokens} is more than num_tokens={num_tokens}.")


def _start_step(image: Any, strength: float | None, num_steps: int) -> int:
    """First step that image-to-image runs; ``num_steps`` where strength leaves none, 0 without an image."""
    if (image is None) != (strength is None):
        raise ValueError("image and strength go together: give both or neither.")
    if strength is None:
        return 0
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength!r}.")
    return num_steps - min(int(num_steps * strength), num_steps)
