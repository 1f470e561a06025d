"""Class-conditional image generation with D-AR: language model and tokenizer, composed as two generators.

`DARPipeline.stream` is the composition; calling the pipeline gives its last element, and `DARPipeline.reconstruct` is
the same path over codes that are there already. Image-to-image follows the idea of the original code, which slices its
schedule twice there (the steps it skips are skipped again); here the schedule is entered once, at the step that
``strength`` selects.
"""

import difflib
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .checks_dar import check_generators, check_integer, described
from .images_dar import image_to_pixels
from .modeling_dar import DARForCausalLM, GuidanceScale, guidance_schedule, sampling_warpers
from .scheduling_dar import FlowMatchAdamsBashforthScheduler, check_num_steps, to_adams_bashforth
from .tokenizer_dar import DARPreview, DARTokenizer
from .weights_dar import replacing_earlier_save

OUTPUT_TYPES = ("pil", "np", "pt", "codes", "latent")
_ROUNDING = 1e-3  # how far pixels may lie outside their range
_IMAGE_KINDS = (PIL.Image.Image, np.ndarray, torch.Tensor)


@dataclass
class DARPipelineOutput(BaseOutput):
    """Images after one denoising step.

    Attributes:
        images: in the ``output_type`` asked for: a list of PIL images, a numpy array ``(B, H, W, C)`` or a tensor
            ``(B, C, H, W)`` in [0, 1], codes ``(B, n)``, or the solver's noisy state ``(B, C, H, W)``.
        step, num_steps: the step that gave them, counted from 1, and how many there are.
        num_tokens: how many codes they depend on.
        previews: the images after every step, the last ones included; only where `DARPipeline.reconstruct` was asked.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    step: int | None = None
    num_steps: int | None = None
    num_tokens: int | None = None
    previews: list | None = None


@dataclass
class _Decoding:
    """How codes become images: the checked part of a call that generating and reconstructing share."""

    num_steps: int
    noise: torch.Tensor
    output_type: str
    start_step: int = 0
    callback: Callable | None = None
    callback_inputs: list[str] = field(default_factory=list)


@dataclass
class _Sampling:
    """What codes to generate: arguments of `DARForCausalLM.stream_codes`, checked, by their names there."""

    class_labels: list[int]
    num_tokens: int
    prefix_codes: torch.Tensor | None
    guidance_scale: GuidanceScale
    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator | list[torch.Generator] | None


class _SideStream:
    """A CUDA stream on which denoising runs while the language model goes on on the stream that was current.

    What one stream makes and the other reads is recorded there: else its memory could be given away too early.
    """

    def __init__(self, device: torch.device):
        self.main, self.side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        self.side.wait_stream(self.main)

    def hand_over(self, codes: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Codes for the side stream, on which this is run, made on the main one."""
        try:
            while True:
                with torch.cuda.stream(self.main):
                    group = next(codes, None)
                if group is None:
                    return
                self.side.wait_stream(self.main)
                group.record_stream(self.side)
                yield group
        finally:
            getattr(codes, "close", lambda: None)()

    def last(self, steps: Iterator[DARPreview]) -> DARPreview:
        """The last of the steps, all of which run on the side stream."""
        last = None
        try:
            while True:
                with torch.cuda.stream(self.side):
                    step = next(steps, None)
                if step is None:
                    break
                last = step
        finally:
            self.main.wait_stream(self.side)
        assert last is not None  # a call that completes no step was refused
        for tensor in (last.sample, last.latents):
            tensor.record_stream(self.main)
        return last


class DARPipeline(DiffusionPipeline):
    """Generates images from class labels, step by step as their codes arrive.

    Args:
        tokenizer: codes to images.
        transformer: class labels to codes; its generation configuration holds the default ``guidance_scale``.
        scheduler: the tokenizer's solver. Diffusers' flow-matching Euler scheduler becomes ours with its shift and
            ``solver_order=1``, here and where it is put in its place later; others are refused.
        id2label: class names by id; several names of one class are separated by commas.

    Attributes:
        labels: class ids by name, for every name that stands for one class. Where classes share a name, it belongs to
            the one whose whole entry it is, else to the one whose first name it is.

    Raises:
        ValueError: for components that do not fit together.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _callback_tensor_inputs = ["preview", "codes", "latents"]

    save_pretrained = replacing_earlier_save(DiffusionPipeline.save_pretrained)

    def __init__(
        self,
        tokenizer: DARTokenizer,
        transformer: DARForCausalLM,
        scheduler: FlowMatchAdamsBashforthScheduler,
        id2label: dict | None = None,
    ):
        super().__init__()
        _check_components(tokenizer, transformer)
        scheduler = to_adams_bashforth(scheduler)
        if id2label is not None:
            id2label = names_by_id(id2label, transformer.config.num_classes)
        for name, ours, theirs in (
            ("codebook_size", tokenizer.config.codebook_size, transformer.config.codebook_size),
            ("number of tokens", tokenizer.config.num_tokens, transformer.config.num_image_tokens),
        ):
            if ours != theirs:
                raise ValueError(f"tokenizer and transformer disagree: {name} {ours} and {theirs}.")
        self.register_modules(tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels, self._shared_names = index_names(id2label or {})
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=1,
            resample="bicubic",
            do_convert_rgb=tokenizer.config.in_channels == 3,
            do_convert_grayscale=tokenizer.config.in_channels == 1,
        )
        self._interrupt = False
        self._guidance_scale: GuidanceScale = None
        self._num_timesteps = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """diffusers' own, and like it in float32 unless ``dtype`` says otherwise.

        Without this, transformers would keep the dtype a folder was saved in and diffusers would not: a pipeline saved
        in half precision would come back as a half-precision transformer beside a float32 tokenizer.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        if kwargs.get("scheduler") is not None:  # diffusers accepts none but the class that the folder names
            kwargs["scheduler"] = to_adams_bashforth(kwargs["scheduler"])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

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
            ValueError: for a name this model does not have, or that several of its classes share.
        """
        single = isinstance(names, (str, bytes)) or not isinstance(names, Iterable)
        names = [names] if single else list(names)  # type: ignore[list-item]
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"names must be class names, got {described(name)}.")
            if name in self._shared_names:
                ids = ", ".join(map(str, self._shared_names[name]))
                raise ValueError(f"the class name {name!r} is shared by the classes {ids}: give the id.")
            if name not in self.labels:
                raise ValueError(f"unknown class name {name!r}; {self._known_names(name)}.")
        return [self.labels[name] for name in names]

    def _known_names(self, name: Any) -> str:
        known = [known for known in self.labels if "," not in known]
        if not known:
            return "known names: none: the pipeline has no id2label"
        more = f", … ({len(known)} in all)" if len(known) > 20 else ""
        close = difflib.get_close_matches(str(name), known)
        similar = f"; similar: {', '.join(close)}" if close else ""
        return f"known names: {', '.join(known[:20])}{more}{similar}"

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
            num_inference_steps: denoising steps, any number up to 10000; default the tokenizer's.
            num_tokens: generate and decode only this many codes (a preview).
            num_images_per_prompt: images per label.
            prefix_codes: ``(B or 1, n)`` codes to start from; as with images, one row serves all, one for each label
                all images of that label.
            layout_image, layout_tokens: take the first ``layout_tokens`` codes of an image as the prefix.
            image, strength: image-to-image: the share of the steps, in [0, 1], that is generated anew.
            generator: randomness of noise and codes, one or one per image; the global one stays untouched.
            latents: start noise ``(B, C, H, W)``.
            output_type: "pil", "np", "pt", "codes" (nothing is decoded) or "latent" (the solver's noisy state).
            return_dict: False gives a tuple ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after every step with
                those of "preview", "codes" and "latents" that ``callback_on_step_end_tensor_inputs`` names (default
                all); ``step`` counts the steps of this call, 0 to ``num_timesteps - 1``. It may return a dictionary:
                ``{"stop": True}`` ends the call with the current preview, ``{"latents": tensor}`` replaces the
                solver's state.

        Images are given as PIL images of any size, which are turned upright, laid on white where they are transparent,
        resized and cropped to their middle, as in training; or as arrays ``(B, H, W, C)`` or tensors
        ``(B, C, H, W)`` of the model's size, in [0, 1], or in [-1, 1] if any value is negative.

        Raises:
            ValueError: for arguments out of range or that exclude each other, before any model runs.
        """
        arguments = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        decoding, sampling = self._prepare(**arguments)
        if self._can_overlap(decoding):
            side = _SideStream(self.tokenizer.device)
            last = side.last(self._generate(decoding, sampling, side))
        else:
            (last,) = deque(self._generate(decoding, sampling), maxlen=1)
        if decoding.output_type != "codes":
            self.tokenizer.check_finite(last.sample)
        output = self._output(decoding, last)  # only the last preview is converted
        return output if return_dict else (output.images,)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[DARPipelineOutput]:
        """The same call as a generator: one `DARPipelineOutput` per denoising step, as soon as its codes are there.

        Takes every argument of calling the pipeline but ``return_dict``. The last output is what the call returns.

        Raises:
            ValueError: as calling the pipeline, at once and not at the first step.
        """
        bound = _STREAM_SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        decoding, sampling = self._prepare(**{name: bound.arguments[name] for name in _ARGUMENTS})
        return (self._output(decoding, step) for step in self._generate(decoding, sampling))

    @torch.no_grad()
    def reconstruct(
        self,
        images: Any,
        num_inference_steps: int | None = None,
        num_tokens: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        previews: bool = False,
    ) -> DARPipelineOutput | tuple:
        """Encode images and decode their codes: what the tokenizer keeps of them. The transformer is not used.

        Args:
            images: one or several, in the forms that calling the pipeline takes.
            num_inference_steps, num_tokens, generator, latents, output_type: as in calling the pipeline;
                ``num_tokens`` decodes the first codes only.
            height, width: size in pixels, where the tokenizer takes others than its own (``strict_sample_size``
                False); default the size of arrays and tensors, and the tokenizer's for PIL images.
            return_dict: False gives a tuple ``(images,)``, or ``(images, previews)``.
            previews: also return the images after every step.

        Raises:
            ValueError: for arguments out of range, before any model runs.
        """
        _check_output(output_type)
        self._check_scheduler()
        num_steps = self._num_steps(num_inference_steps)
        num_tokens = self._num_tokens(num_tokens, num_steps, output_type)
        pixels = self._pixels("images", images, height, width)
        noise = self._noise(pixels.shape, generator, latents)
        decoding = _Decoding(num_steps, noise, output_type)
        codes = self.tokenizer.encode(pixels).codes[:, :num_tokens]
        steps = self._run(decoding, iter([codes]))
        outputs = [self._output(decoding, step) for step in (steps if previews else deque(steps, maxlen=1))]
        result = outputs[-1]
        result.previews = [output.images for output in outputs] if previews else None
        if return_dict:
            return result
        return (result.images, result.previews) if previews else (result.images,)

    def _output(self, decoding: _Decoding, step: DARPreview) -> DARPipelineOutput:
        if decoding.output_type in ("codes", "latent"):
            state = step.sample if decoding.output_type == "codes" else step.latents
            images = state.clone()  # the stream goes on with its own
        else:
            if decoding.output_type != "pt":  # the device is waited for anyway
                self.tokenizer.check_finite(step.sample)
            images = self.image_processor.postprocess(step.sample, decoding.output_type)
        return DARPipelineOutput(images, step.step, step.num_steps, step.num_tokens)

    def _can_overlap(self, decoding: _Decoding) -> bool:
        """Whether denoising may run beside the language model: both stay on one CUDA device, no step is looked at.

        Compiled tokenizers are left out: CUDA graphs share memory, and must not be replayed on two streams at once.
        """
        devices = {self.tokenizer.device, self.transformer.device}
        if len(devices) > 1 or devices.pop().type != "cuda" or decoding.callback or decoding.output_type == "codes":
            return False
        parts = [*self.tokenizer.modules(), *self.transformer.modules()]
        moved = any(hasattr(part, name) for part in parts for name in ("_hf_hook", "_diffusers_hook"))
        compiled = any(part._compiled_call_impl or hasattr(part, "_orig_mod") for part in self.tokenizer.modules())
        return not moved and not compiled

    def _generate(
        self, decoding: _Decoding, sampling: _Sampling, side: _SideStream | None = None
    ) -> Iterator[DARPreview]:
        """The composition: groups of codes from the transformer, a denoising step of the tokenizer for each."""
        config = self.tokenizer.config
        self._guidance_scale = sampling.guidance_scale
        codes = self.transformer.stream_codes(
            **vars(sampling),
            group_size=math.gcd(config.num_tokens // config.num_groups, config.tokens_per_group),
        )
        return self._run(decoding, codes if side is None else side.hand_over(codes))

    @torch.no_grad()
    def _run(self, decoding: _Decoding, codes: Iterator[torch.Tensor]) -> Iterator[DARPreview]:
        """Decode codes while they arrive, and report every step."""
        self._interrupt = False
        self._num_timesteps = decoding.num_steps - decoding.start_step
        pieces: list[torch.Tensor] = []

        def groups() -> Iterator[torch.Tensor]:
            for group in codes:
                pieces.append(group)
                yield group

        if decoding.output_type == "codes":
            steps = self._undecoded(decoding, groups())
        else:
            steps = self.tokenizer.decode_stream(
                groups(),
                noise=decoding.noise,
                num_inference_steps=decoding.num_steps,
                scheduler=self.scheduler,
                start_step=decoding.start_step,
                check_codes=False,  # they are the transformer's or the tokenizer's own
            )
        try:
            with self.progress_bar(total=self._num_timesteps) as progress:
                for step in steps:
                    progress.update()
                    stop = self._report(decoding, step, pieces)
                    yield step
                    if stop or self._interrupt:
                        return
        finally:
            for generator in (steps, codes):  # now, not when whoever holds an error's traceback lets go of it
                getattr(generator, "close", lambda: None)()
            self.maybe_free_model_hooks()

    def _undecoded(self, decoding: _Decoding, groups: Iterator[torch.Tensor]) -> Iterator[DARPreview]:
        """The steps that codes complete, with the codes so far in the place of the picture; nothing is decoded.

        Where the last step needs fewer codes than there are, it comes once more with all of them.
        """
        windows = self.tokenizer.step_windows(decoding.num_steps)
        num_steps, step, shown, codes = decoding.num_steps, decoding.start_step, 0, None
        for group in groups:
            codes = group if codes is None else torch.cat([codes, group], dim=1)
            while step < num_steps and windows[step][1] <= codes.shape[1]:
                step, shown = step + 1, codes.shape[1]
                yield DARPreview(step, num_steps, shown, codes, timestep=0.0, latents=decoding.noise)
        if codes is not None and shown < codes.shape[1]:
            yield DARPreview(step, num_steps, codes.shape[1], codes, timestep=0.0, latents=decoding.noise)

    def _report(self, decoding: _Decoding, step: DARPreview, pieces: list[torch.Tensor]) -> bool:
        """Run the caller's callback and do as it says; True if it asks to stop."""
        if decoding.callback is None:
            return False
        tensors = {"preview": step.sample, "codes": torch.cat(pieces, dim=1), "latents": step.latents}
        tensors = {name: tensors[name] for name in decoding.callback_inputs}
        index = max(step.step - decoding.start_step, 1) - 1  # codes alone may complete no step
        answer = decoding.callback(self, index, step.timestep, tensors)
        if answer is not None and not isinstance(answer, dict):
            raise ValueError(f"callback_on_step_end must return a dictionary or None, got {type(answer).__name__}.")
        answer = answer or {}
        if "latents" in answer:
            latents = answer["latents"]
            if not isinstance(latents, torch.Tensor) or latents.shape != step.latents.shape:
                raise ValueError(f"latents returned by callback_on_step_end must have {tuple(step.latents.shape)}.")
            step.latents = latents.to(step.latents)
            if step.step == step.num_steps and decoding.output_type != "codes":
                step.sample = step.latents / self.tokenizer.config.data_std
        return bool(answer.get("stop"))

    # Arguments

    @torch.no_grad()
    def _prepare(
        self,
        class_labels: int | str | list[int] | list[str],
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
        **sampling: Any,
    ) -> tuple[_Decoding, _Sampling]:
        """Check a call's arguments, all of them before any model runs, and make of them what `_generate` needs.

        Raises:
            ValueError: that says what was given and what is accepted.
        """
        _exclude(prefix_codes=prefix_codes, layout_image=layout_image, image=image)
        _exclude(image=image, latents=latents)  # the noise of image-to-image is drawn
        _check_output(output_type)
        self._check_scheduler()
        callback_inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        repeats = check_integer("num_images_per_prompt", num_images_per_prompt)
        labels = self._label_ids(class_labels, repeats)
        num_steps = self._num_steps(num_inference_steps)
        start_step = _start_step(image, strength, num_steps)
        num_tokens = self._num_tokens(num_tokens, num_steps, output_type, start_step)
        layout_tokens = _layout_tokens(layout_image, layout_tokens, num_tokens)
        sampling = self._sampling_options(**sampling)
        if prefix_codes is not None:
            prefix_codes = self.transformer.check_prefix(prefix_codes, len(labels), num_tokens, repeats)
        height, width = self.tokenizer.image_size
        name, reference = ("image", image) if layout_image is None else ("layout_image", layout_image)
        pixels = None if reference is None else self._pixels(name, reference, height, width, len(labels), repeats)
        noise = self._noise((len(labels), self.tokenizer.config.in_channels, height, width), generator, latents)

        if pixels is not None:  # everything is checked: from here on a model may run
            codes = self.tokenizer.encode(pixels).codes
            if layout_image is not None:
                prefix_codes = codes[:, :layout_tokens]
            elif start_step == num_steps:  # strength 0, nothing is generated anew: the reconstruction, from pure noise
                start_step, prefix_codes = 0, codes[:, :num_tokens]
            else:
                prefix_codes = codes[:, : self.tokenizer.step_windows(num_steps)[start_step][0]]
                noise = self._noised(pixels, noise, start_step, num_steps)
        return (
            _Decoding(num_steps, noise, output_type, start_step, callback_on_step_end, callback_inputs),
            _Sampling(labels, num_tokens, prefix_codes, generator=generator, **sampling),
        )

    def _check_scheduler(self) -> None:
        """Refuse a foreign scheduler that was put in the place of the constructor's, or put ours there."""
        scheduler = to_adams_bashforth(self.scheduler)
        if scheduler is not self.scheduler:
            self.register_modules(scheduler=scheduler)

    def _callback_inputs(self, callback: Callable | None, names: list[str] | None) -> list[str]:
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be callable, got {type(callback).__name__}.")
        names = self._callback_tensor_inputs if names is None else names
        if not isinstance(names, (list, tuple)) or not all(name in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {names!r}."
            )
        return list(names)

    def _num_steps(self, num_inference_steps: int | None) -> int:
        default = self.tokenizer.config.num_inference_steps
        return check_num_steps(default if num_inference_steps is None else num_inference_steps)

    def _num_tokens(self, num_tokens: int | None, num_steps: int, output_type: str, start_step: int = 0) -> int:
        most = self.tokenizer.config.num_tokens
        num_tokens = check_integer("num_tokens", most if num_tokens is None else num_tokens)
        if num_tokens > most:
            raise ValueError(f"num_tokens must lie in [1, {most}], got {num_tokens}.")
        kept, needed = self.tokenizer.step_windows(num_steps)[start_step % num_steps]
        if num_tokens < needed and output_type != "codes":
            raise ValueError(f"num_tokens={num_tokens} completes no step: the first one needs {needed}.")
        if num_tokens < kept:
            raise ValueError(
                f"num_tokens={num_tokens} is less than the {kept} tokens of the image that strength keeps."
            )
        return num_tokens

    def _sampling_options(self, guidance_scale: GuidanceScale, temperature: float, top_k: int, top_p: float) -> dict:
        if guidance_scale is None:
            guidance_scale = self.transformer.generation_config.guidance_scale
        guidance_schedule(guidance_scale, self.tokenizer.config.num_tokens)
        sampling_warpers(temperature, top_k, top_p)
        return {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}

    def _label_ids(self, class_labels: int | str | list[int] | list[str], repeats: int) -> list[int]:
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        single = isinstance(class_labels, (str, bytes)) or not isinstance(class_labels, Iterable)
        labels: list[Any] = [class_labels] if single else list(class_labels)  # type: ignore[arg-type]
        while any(isinstance(label, (list, tuple)) for label in labels):  # flattened, as diffusers' DiT does
            labels = [one for label in labels for one in (label if isinstance(label, (list, tuple)) else [label])]
        if not labels:
            raise ValueError("class_labels is empty: nothing to generate.")
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        config = self.transformer.config
        return [config.class_token_id(label) - config.codebook_size for label in ids for _ in range(repeats)]

    def _noise(self, shape: Iterable[int], generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """Start noise: the caller's, or drawn with the caller's generator."""
        shape, device = tuple(shape), self._execution_device
        check_generators(generator, shape[0], device)
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            raise ValueError(f"latents must be a floating-point tensor, got {type(latents).__name__}.")
        latents = latents.to(device, torch.float32)
        if tuple(latents.shape) != shape or not torch.isfinite(latents).all():
            raise ValueError(f"latents must be finite and of shape {shape}, got {tuple(latents.shape)}.")
        return latents

    def _pixels(
        self,
        name: str,
        images: Any,
        height: int | None,
        width: int | None,
        batch_size: int | None = None,
        repeats: int = 1,
    ) -> torch.Tensor:
        """Pixels ``(B, C, H, W)`` in [-1, 1] of images in the forms that `__call__` names.

        With ``batch_size`` one image serves all, and one for each label its ``repeats`` images.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        kinds = {kind for image in images for kind in _IMAGE_KINDS if isinstance(image, kind)}
        if len(kinds) != 1 or not all(isinstance(image, _IMAGE_KINDS) for image in images):
            given = ", ".join(sorted({type(image).__name__ for image in images})) or "an empty list"
            raise ValueError(f"{name} must be PIL images, or arrays, or tensors, got {given}.")
        height = None if height is None else check_integer("height", height)
        width = None if width is None else check_integer("width", width)
        if kinds == {PIL.Image.Image}:
            default = self.tokenizer.image_size
            height, width = height or default[0], width or default[1]
            self.tokenizer.check_size(height, width)
            pixels = torch.stack([self._pixels_of_image(name, image, height, width) for image in images])
        else:
            pixels = self._pixels_of_arrays(name, images, height, width)
        if len(pixels) * repeats == batch_size:
            pixels = pixels.repeat_interleave(repeats, dim=0)
        if batch_size is not None and len(pixels) not in (1, batch_size):
            labels = batch_size // repeats
            raise ValueError(f"got {len(pixels)} images for {labels} labels: give one image, or one for each.")
        return pixels.to(self._execution_device, torch.float32).expand(batch_size or -1, -1, -1, -1)

    def _pixels_of_image(self, name: str, image: PIL.Image.Image, height: int, width: int) -> torch.Tensor:
        """Pixels ``(C, H, W)`` in [-1, 1], as in training."""
        try:
            return image_to_pixels(image, height, width, self.tokenizer.config.in_channels)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _pixels_of_arrays(self, name: str, images: list, height: int | None, width: int | None) -> torch.Tensor:
        shapes, channels = {tuple(image.shape[-3:]) for image in images}, self.tokenizer.config.in_channels
        given = ", ".join(f"{image.dtype} of shape {tuple(image.shape)}" for image in images[:3])
        if isinstance(images[0], np.ndarray):
            floating, axis = all(image.dtype.kind == "f" for image in images), -1
        else:
            floating, axis = all(image.is_floating_point() for image in images), -3
        if not floating or len(shapes) != 1 or images[0].ndim not in (3, 4) or images[0].shape[axis] != channels:
            form = f"(height, width, {channels})" if axis == -1 else f"({channels}, height, width)"
            raise ValueError(f"{name} must be floating point in [0, 1], each of shape {form}, got {given}.")
        tensors = [
            torch.from_numpy(image.astype(np.float32)).movedim(-1, -3) if axis == -1 else image for image in images
        ]
        pixels = torch.cat([tensor.reshape(-1, *tensor.shape[-3:]) for tensor in tensors])
        rows, columns = pixels.shape[2:]
        if (height or rows, width or columns) != (rows, columns):
            raise ValueError(
                f"{name}: arrays and tensors must have {height}x{width} pixels, got {given}; PIL images are resized."
            )
        self.tokenizer.check_size(rows, columns)
        low, high = (float(value) for value in pixels.aminmax()) if pixels.numel() else (math.nan, math.nan)
        if not (low >= -1 - _ROUNDING and high <= 1 + _ROUNDING):  # also catches NaN
            raise ValueError(f"{name} must lie in [0, 1] or [-1, 1], got values from {low:.4g} to {high:.4g}.")
        return (pixels if low < -_ROUNDING else 2 * pixels - 1).clamp(-1, 1)

    def _noised(self, pixels: torch.Tensor, noise: torch.Tensor, start_step: int, num_steps: int) -> torch.Tensor:
        """Image-to-image: the noisy sample at ``start_step``."""
        scheduler = FlowMatchAdamsBashforthScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps)
        clean = pixels * self.tokenizer.config.data_std
        return scheduler.add_noise(clean, noise, float(scheduler.timesteps[start_step]))


_SIGNATURE = inspect.signature(DARPipeline.__call__)
_ARGUMENTS = [name for name in _SIGNATURE.parameters if name not in ("self", "return_dict")]
_STREAM_SIGNATURE = _SIGNATURE.replace(
    parameters=[parameter for name, parameter in _SIGNATURE.parameters.items() if name != "return_dict"],
    return_annotation=Iterator[DARPipelineOutput],
)
DARPipeline.stream.__signature__ = _STREAM_SIGNATURE  # type: ignore[attr-defined]  # for help() and editors


def _check_components(tokenizer: Any, transformer: Any) -> None:
    """Refuse what are no models of this package, None among them; by their methods, as adapters wrap them."""
    for name, model, kind, method in (
        ("tokenizer", tokenizer, "DARTokenizer", "decode_stream"),
        ("transformer", transformer, "DARForCausalLM", "stream_codes"),
    ):
        if not hasattr(model, method):
            raise ValueError(f"{name} must be a {kind}, got {type(model).__name__}.")


def names_by_id(id2label: Any, num_classes: int) -> dict[int, str]:
    """Class names by id, checked; JSON files hold the ids as text.

    Raises:
        ValueError: for anything but names by ids in [0, num_classes).
    """
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must be a dictionary of names by class id, got {type(id2label).__name__}.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        whole = isinstance(key, Integral) and not isinstance(key, bool)
        if not (whole or (isinstance(key, str) and key.isdecimal())) or not 0 <= int(key) < num_classes:
            raise ValueError(f"id2label must name classes in [0, {num_classes}), got the id {described(key)}.")
        if not isinstance(name, str):
            raise ValueError(f"id2label must hold names, got {described(name)} for class {int(key)}.")
        names[int(key)] = name
    return names


def _exclude(**arguments: Any) -> None:
    """Refuse more than one of arguments that exclude each other."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other.")


def index_names(id2label: dict) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Class ids by name, and the classes that share a name: ImageNet has two cranes, and a crayfish by two names.

    A whole entry wins over a first name, and that over any other.
    """
    levels: list[dict[str, set[int]]] = [{}, {}, {}]
    for label, entry in id2label.items():
        first, *others = str(entry).split(",")
        for level, names in zip(levels, ([str(entry)], [first], others), strict=True):
            for name in names:
                level.setdefault(name.strip(), set()).add(int(label))
    owners: dict[str, set[int]] = {}
    for level in levels:
        for name, ids in level.items():
            owners.setdefault(name, ids)
    owners.pop("", None)
    labels = {name: min(ids) for name, ids in owners.items() if len(ids) == 1}
    return labels, {name: sorted(ids) for name, ids in owners.items() if len(ids) > 1}


def _check_output(output_type: Any) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")


def _layout_tokens(layout_image: Any, layout_tokens: int | None, num_tokens: int) -> int | None:
    if (layout_image is None) != (layout_tokens is None):
        raise ValueError("layout_image and layout_tokens go together: give both or neither.")
    if layout_tokens is None:
        return None
    layout_tokens = check_integer("layout_tokens", layout_tokens, least=0)
    if layout_tokens > num_tokens:
        raise ValueError(f"layout_tokens={layout_tokens} is more than num_tokens={num_tokens}.")
    return layout_tokens


def _start_step(image: Any, strength: float | None, num_steps: int) -> int:
    """First step that image-to-image runs; ``num_steps`` where strength leaves none, 0 without an image."""
    if (image is None) != (strength is None):
        raise ValueError("image and strength go together: give both or neither.")
    if strength is None:
        return 0
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength!r}.")
    return num_steps - min(int(num_steps * strength), num_steps)
