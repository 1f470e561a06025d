"""Image generation from classes or text with D-AR: language model and tokenizer, composed as two generators.

`DARPipeline.stream` is the composition; calling the pipeline gives its last element, and `DARPipeline.reconstruct` is
the same path over codes that exist already. Image-to-image follows the idea of the original code but not its schedule:
the original cuts the skipped steps off twice, and so runs fewer than ``strength`` asks for; here the schedule is
entered at the step that ``strength`` selects.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase

from .acceleration_dar import SideStream, can_overlap
from .checks_dar import check_generators, check_integer, described
from .images_dar import arrays_to_pixels, image_list, image_to_pixels
from .labels_dar import class_id, index_names, names_by_id
from .modeling_dar import DARForCausalLM
from .sampling_dar import GuidanceScale
from .scheduling_dar import FlowMatchAdamsBashforthScheduler, check_num_steps, shift_time, to_adams_bashforth
from .text_dar import check_text_tokenizer, prompt_ids
from .tokenizer_dar import DARPreview, DARTokenizer
from .weights_dar import replacing_earlier_save

OUTPUT_TYPES = ("pil", "np", "pt", "codes", "latent")


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
class CodesPreview:
    """The codes of a denoising step that is not computed (``output_type="codes"``).

    Attributes:
        step, num_steps: this step, counted from 1, and how many there are.
        num_tokens: how many codes there are.
        codes: ``(B, num_tokens)``, all that have arrived.
        timestep: 0, since no time passes.
    """

    step: int
    num_steps: int
    num_tokens: int
    codes: torch.Tensor
    timestep: float = 0.0


class DARPipeline(DiffusionPipeline):
    """Generates images from class labels or from text, step by step as their codes arrive.

    Args:
        tokenizer: codes to images.
        transformer: class labels or text to codes; its generation configuration holds the default ``guidance_scale``.
        scheduler: the tokenizer's solver. Diffusers' flow-matching Euler scheduler becomes ours with its shift and
            ``solver_order=1``, here and where it is put in its place later; others are refused.
        id2label: class names by id; several names of one class are separated by commas.
        text_tokenizer: text to the ids of its tokens; of transformers that draw from text, and of no others.

    Attributes:
        labels: class ids by name, for every name that stands for one class. Where classes share a name, it belongs to
            the one whose whole entry it is, else to the one whose first name it is.

    Raises:
        ValueError: for components that do not fit together.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _optional_components = ["text_tokenizer"]
    _callback_tensor_inputs = ["preview", "codes", "latents"]

    save_pretrained = replacing_earlier_save(DiffusionPipeline.save_pretrained)

    def __init__(
        self,
        tokenizer: DARTokenizer,
        transformer: DARForCausalLM,
        scheduler: FlowMatchAdamsBashforthScheduler,
        id2label: dict | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        _check_components(tokenizer, transformer)
        check_text_tokenizer(text_tokenizer, transformer.config.text_vocab_size)
        scheduler = to_adams_bashforth(scheduler)
        if id2label is not None:
            id2label = names_by_id(id2label, transformer.config.num_classes)
        self.register_modules(
            tokenizer=tokenizer, transformer=transformer, scheduler=scheduler, text_tokenizer=text_tokenizer
        )
        self.register_to_config(id2label=id2label)
        self.labels, self.shared_names = index_names(id2label or {})
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)  # of outputs; images_dar reads inputs
        self._interrupt = False
        self._guidance_scale: GuidanceScale = None
        self._num_timesteps = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """diffusers' own, and like it in float32 unless ``dtype`` says otherwise.

        Without this, transformers would keep the dtype a folder was saved in and diffusers would not: a pipeline saved
        in half precision would come back as a half-precision transformer and a float32 tokenizer.
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
        return [class_id(name, self.labels, self.shared_names) for name in names]

    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | None = None,
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
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> DARPipelineOutput | tuple:
        """Generate images: the last element of `stream`.

        Args:
            class_labels: classes by id or name, one or a list; of pipelines that draw from classes.
            guidance_scale: classifier-free guidance, a number or a pair (start, end) for a scale linear over the
                tokens; None takes the default saved with the transformer, 1.0 switches it off.
            temperature, top_k, top_p: sampling of the codes; temperature 0 takes the most probable ones.
            num_inference_steps: denoising steps, any number up to 10000; default the tokenizer's. Fewer than the
                tokenizer has groups give some groups no step of their own.
            num_tokens: generate only this many codes; the preview shows the last complete group.
            num_images_per_prompt: images per label or prompt.
            prefix_codes: codes to start from: ``(1, n)`` for all images, or one row for each label or each image.
                Images given as ``image`` or ``layout_image`` follow the same rule.
            layout_image, layout_tokens: take the first ``layout_tokens`` codes of an image as the prefix.
            image, strength: image-to-image. ``strength``, in [0, 1], is the share of the denoising steps that is
                generated anew, rounded down to whole steps; where none is left, the image is reconstructed.
            generator: randomness of noise and codes, one or one per image; the global one stays untouched.
            latents: start noise ``(B, C, H, W)``. The generator then draws none, and so gives other codes. Not with
                ``image``, which makes its own start.
            output_type: "pil", "np", "pt", "codes" (nothing is decoded) or "latent" (the solver's noisy state).
            return_dict: False gives a tuple ``(images,)``.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after every step with
                those of "preview", "codes" and "latents" that ``callback_on_step_end_tensor_inputs`` names (default
                all); ``step`` counts the steps of this call, 0 to ``num_timesteps - 1``. It may return a dictionary:
                ``{"stop": True}`` ends the call with the current preview, ``{"latents": tensor}`` replaces the
                solver's state.
            prompt: what to draw, one text or a list; of pipelines that draw from text. A long text is cut, with a
                warning.
            negative_prompt: what guidance leads away from, in place of no text: one for all prompts, or one for each.

        Images are given as PIL images of any size, which are turned upright, laid on white where they are transparent,
        resized and cropped to their middle, as in training; or as arrays ``(B, H, W, C)`` or tensors
        ``(B, C, H, W)`` of the model's size, in [0, 1], or in [-1, 1] if any value is negative.

        Raises:
            ValueError: for arguments out of range or that exclude each other, before any model runs; and later for
                values that are not finite, and for wrong answers of the callback.
        """
        (output,) = self.stream(
            class_labels,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_inference_steps=num_inference_steps,
            num_tokens=num_tokens,
            num_images_per_prompt=num_images_per_prompt,
            prefix_codes=prefix_codes,
            layout_image=layout_image,
            layout_tokens=layout_tokens,
            image=image,
            strength=strength,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            prompt=prompt,
            negative_prompt=negative_prompt,
            previews=False,
        )
        return output if return_dict else (output.images,)

    @torch.no_grad()
    def stream(
        self,
        class_labels: int | str | list[int] | list[str] | None = None,
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
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        previews: bool = True,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> Iterator[DARPipelineOutput]:
        """Generate images and yield one `DARPipelineOutput` per denoising step, as soon as its codes are there.

        The last one is what calling the pipeline returns, where the arguments are explained.

        Args:
            previews: False yields the last output only: others are not converted to images, and on a GPU denoising
                overlaps with the language model.

        Raises:
            ValueError: as calling the pipeline, at once and not at the first step.
        """
        config = self.tokenizer.config
        if num_inference_steps is None:
            num_inference_steps = config.num_inference_steps
        if num_tokens is None:
            num_tokens = config.num_tokens
        if guidance_scale is None:
            guidance_scale = self.transformer.generation_config.guidance_scale
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = self._callback_tensor_inputs
        self._take_scheduler()
        self.check_inputs(
            num_inference_steps,
            num_tokens,
            output_type,
            prefix_codes=prefix_codes,
            layout_image=layout_image,
            layout_tokens=layout_tokens,
            image=image,
            strength=strength,
            latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self.transformer.check_sampling(guidance_scale, temperature, top_k, top_p)
        conditions = self.prepare_conditions(class_labels, prompt, negative_prompt, num_images_per_prompt)
        batch_size = len(next(iter(conditions.values())))
        if prefix_codes is not None:
            prefix_codes = self.transformer.check_prefix(prefix_codes, batch_size, num_tokens, num_images_per_prompt)
        height, width = self.tokenizer.image_size
        if layout_image is not None:
            pixels = self.prepare_images("layout_image", layout_image, height, width)
        if image is not None:
            pixels = self.prepare_images("image", image, height, width)
        if layout_image is not None or image is not None:
            _check_count(pixels, batch_size, num_images_per_prompt)
        noise = self.prepare_latents((batch_size, config.in_channels, height, width), generator, latents)

        # everything is checked: from here on models run
        start_step = 0
        if layout_image is not None:
            codes = self.tokenizer.encode(pixels).codes[:, :layout_tokens]
            prefix_codes = _repeat(codes, batch_size, num_images_per_prompt)
        if image is not None and strength is not None:
            codes, noise, start_step = self.prepare_image_to_image(
                pixels, noise, strength, num_inference_steps, num_tokens, num_images_per_prompt
            )
            prefix_codes = _repeat(codes, batch_size, num_images_per_prompt)
        if output_type != "codes":  # codes that complete no step are not decoded, and not generated
            kept_tokens = 0 if prefix_codes is None else prefix_codes.shape[1]
            num_tokens = max(kept_tokens, *self._step_ends(num_inference_steps, num_tokens, start_step))
        self._guidance_scale = guidance_scale
        groups = self.transformer.stream_codes(
            **conditions,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            prefix_codes=prefix_codes,
            num_tokens=num_tokens,
            # every step's window of tokens ends where one of these groups does
            group_size=math.gcd(config.num_tokens // config.num_groups, config.tokens_per_group),
        )
        return self._decode(
            groups,
            noise,
            num_inference_steps,
            num_tokens,
            output_type,
            start_step=start_step,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            previews=previews,
        )

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
        if num_inference_steps is None:
            num_inference_steps = self.tokenizer.config.num_inference_steps
        if num_tokens is None:
            num_tokens = self.tokenizer.config.num_tokens
        self._take_scheduler()
        self.check_inputs(num_inference_steps, num_tokens, output_type)
        pixels = self.prepare_images("images", images, height, width)
        noise = self.prepare_latents(tuple(pixels.shape), generator, latents)
        codes = self.tokenizer.encode(pixels).codes[:, :num_tokens]
        groups = iter([codes])
        outputs = list(
            self._decode(groups, noise, num_inference_steps, codes.shape[1], output_type, previews=previews)
        )
        result = outputs[-1]
        if previews:
            result.previews = [output.images for output in outputs]
        if return_dict:
            return result
        return (result.images, result.previews) if previews else (result.images,)

    # Codes to images

    def _decode(
        self,
        groups: Iterator[torch.Tensor],
        noise: torch.Tensor,
        num_steps: int,
        num_tokens: int,
        output_type: str,
        *,
        start_step: int = 0,
        callback: Callable | None = None,
        callback_inputs: Sequence[str] = (),
        previews: bool = True,
    ) -> Iterator[DARPipelineOutput]:
        """Decode groups of codes while they arrive, and yield the output of every step, or of the last."""
        ends = self._step_ends(num_steps, num_tokens, start_step)
        self._interrupt = False
        self._num_timesteps = max(len(ends), 1)  # codes alone may complete no step
        steps: Iterator[DARPreview] | Iterator[CodesPreview]
        if output_type == "codes":
            steps = self._codes_previews(groups, num_steps, start_step, ends[:-1] + [num_tokens])
        else:
            # a preview or a callback is read between steps: only an undisturbed call can overlap
            overlap = not previews and callback is None and can_overlap(self.transformer, self.tokenizer)
            side = SideStream(self.tokenizer.device) if overlap else None
            steps = self.tokenizer.decode_stream(
                groups if side is None else side.hand_over(groups),
                noise=noise,
                num_inference_steps=num_steps,
                scheduler=self.scheduler,
                start_step=start_step,
                check_codes=False,  # they are the transformer's or the tokenizer's own
            )
            if side is not None:
                steps = side.run(steps)
        return self._outputs(steps, groups, noise, output_type, start_step, callback, callback_inputs, previews)

    @torch.no_grad()
    def _outputs(
        self,
        steps: Iterator[DARPreview] | Iterator[CodesPreview],
        groups: Iterator[torch.Tensor],
        noise: torch.Tensor,
        output_type: str,
        start_step: int,
        callback: Callable | None,
        callback_inputs: Sequence[str],
        previews: bool,
    ) -> Iterator[DARPipelineOutput]:
        try:
            with self.progress_bar(total=self._num_timesteps) as progress:
                for preview in steps:
                    progress.update()
                    stop = False
                    if callback is not None:
                        tensors = _callback_tensors(preview, noise)
                        tensors = {name: tensors[name] for name in callback_inputs}
                        answer = callback(self, preview.step - start_step - 1, preview.timestep, tensors)
                        stop = self._take_answer(answer, preview)
                    if previews:
                        yield self._output(preview, output_type)
                    if stop or self._interrupt:
                        break
        finally:
            # now: the traceback of an error would keep these generators, and the key-value cache, alive
            for generator in (steps, groups):
                getattr(generator, "close", lambda: None)()
            self.maybe_free_model_hooks()
        if not previews:
            if isinstance(preview, DARPreview):
                self.tokenizer.check_finite(preview.sample)
            yield self._output(preview, output_type)

    def _step_ends(self, num_steps: int, num_tokens: int, start_step: int) -> list[int]:
        """How many codes each of the steps needs that ``num_tokens`` codes complete."""
        windows = self.tokenizer.step_windows(num_steps)[start_step:]
        return [stop for _, stop in windows if stop <= num_tokens]

    def _codes_previews(
        self, groups: Iterator[torch.Tensor], num_steps: int, start_step: int, counts: list[int]
    ) -> Iterator[CodesPreview]:
        """The first codes, as many as ``counts`` says for each step, as soon as they have arrived."""
        step = start_step
        codes = None
        for group in groups:
            codes = group if codes is None else torch.cat([codes, group], dim=1)
            while counts and codes.shape[1] >= counts[0]:
                count = counts.pop(0)
                step += 1
                yield CodesPreview(step, num_steps, count, codes[:, :count])

    def _take_answer(self, answer: Any, preview: DARPreview | CodesPreview) -> bool:
        """Do as the caller's callback says; True if it asks to stop."""
        if answer is None:
            return False
        if not isinstance(answer, dict):
            raise ValueError(f"callback_on_step_end must return a dictionary or None, got {type(answer).__name__}.")
        if "latents" in answer and isinstance(preview, DARPreview):
            latents = answer["latents"]
            if not isinstance(latents, torch.Tensor) or latents.shape != preview.latents.shape:
                raise ValueError(f"latents returned by callback_on_step_end must have {tuple(preview.latents.shape)}.")
            preview.latents = latents.to(preview.latents)
            if preview.step == preview.num_steps:
                preview.sample = preview.latents / self.tokenizer.config.data_std
        return bool(answer.get("stop"))

    def _output(self, preview: DARPreview | CodesPreview, output_type: str) -> DARPipelineOutput:
        images: Any
        if isinstance(preview, CodesPreview):
            images = preview.codes.clone()  # the stream goes on with its own
        elif output_type == "latent":
            images = preview.latents.clone()
        else:
            if output_type != "pt":  # what is not a tensor waits for the device anyway
                self.tokenizer.check_finite(preview.sample)
            images = self.image_processor.postprocess(preview.sample, output_type)
        return DARPipelineOutput(images, preview.step, preview.num_steps, preview.num_tokens)

    # Arguments

    def _take_scheduler(self) -> None:
        """Put our solver in the place of diffusers' Euler scheduler, where a user has set that."""
        scheduler = to_adams_bashforth(self.scheduler)
        if scheduler is not self.scheduler:
            self.register_modules(scheduler=scheduler)

    def check_inputs(
        self,
        num_inference_steps: int,
        num_tokens: int,
        output_type: str,
        *,
        prefix_codes: Any = None,
        layout_image: Any = None,
        layout_tokens: int | None = None,
        image: Any = None,
        strength: float | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> None:
        """Check what the methods that prepare labels, images, codes and noise do not.

        Raises:
            ValueError: that says what was given and what is accepted.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        _check_exclusive(prefix_codes=prefix_codes, layout_image=layout_image, image=image)
        _check_exclusive(image=image, latents=latents)  # latents would be the state to start from, which it makes
        _check_together(image=image, strength=strength)
        _check_together(layout_image=layout_image, layout_tokens=layout_tokens)

        check_num_steps(num_inference_steps)
        if strength is not None and (
            isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1
        ):
            raise ValueError(f"strength must lie in [0, 1], got {strength!r}.")
        most = self.tokenizer.config.num_tokens
        if check_integer("num_tokens", num_tokens) > most:
            raise ValueError(f"num_tokens must lie in [1, {most}], got {num_tokens}.")
        start_step = _start_step(strength, num_inference_steps)
        kept, needed = self.tokenizer.step_windows(num_inference_steps)[start_step]
        if num_tokens < needed and output_type != "codes":
            raise ValueError(f"num_tokens={num_tokens} completes no step: the first one needs {needed}.")
        if num_tokens < kept:
            raise ValueError(
                f"num_tokens={num_tokens} is less than the {kept} tokens of the image that strength keeps."
            )
        if layout_tokens is not None and check_integer("layout_tokens", layout_tokens, least=0) > num_tokens:
            raise ValueError(f"layout_tokens={layout_tokens} is more than num_tokens={num_tokens}.")

        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {type(callback_on_step_end).__name__}.")
        names = callback_on_step_end_tensor_inputs
        if not isinstance(names, (list, tuple)) or not all(name in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {names!r}."
            )

    def prepare_conditions(
        self, class_labels: Any, prompt: Any, negative_prompt: Any, num_images_per_prompt: int = 1
    ) -> dict[str, list]:
        """What `DARForCausalLM.stream_codes` draws from: labels, or the ids of texts; the first one for each image.

        Raises:
            ValueError: for text where the pipeline draws from classes, and the other way round.
        """
        config = self.transformer.config
        if not config.text_vocab_size:
            if prompt is not None or negative_prompt is not None:
                raise ValueError("this pipeline draws from class labels, not from text: give class_labels.")
            return {"class_labels": self.prepare_labels(class_labels, num_images_per_prompt)}
        if class_labels is not None or prompt is None:
            raise ValueError('this pipeline draws from text: give prompt="…", and no class labels.')
        repeats = check_integer("num_images_per_prompt", num_images_per_prompt)
        return prompt_ids(self.text_tokenizer, config.max_text_tokens, prompt, negative_prompt, repeats)

    def prepare_labels(self, class_labels: Any, num_images_per_prompt: int = 1) -> list[int]:
        """Class ids, one for each image, of classes by id or name."""
        repeats = check_integer("num_images_per_prompt", num_images_per_prompt)
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        single = isinstance(class_labels, (str, bytes)) or not isinstance(class_labels, Iterable)
        labels: list[Any] = [class_labels] if single else list(class_labels)
        while any(isinstance(label, (list, tuple)) for label in labels):  # flattened, as diffusers' DiT does
            labels = [one for label in labels for one in (label if isinstance(label, (list, tuple)) else [label])]
        if not labels:
            raise ValueError("class_labels is empty: nothing to generate.")
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        config = self.transformer.config
        # class_token_id checks the label; the model takes labels, not tokens
        return [config.class_token_id(label) - config.codebook_size for label in ids for _ in range(repeats)]

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Start noise ``(B, C, H, W)`` in float32: the caller's, or drawn with the caller's generator."""
        device = self._execution_device
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

    def prepare_images(
        self,
        name: str,
        images: Any,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Pixels ``(B, C, H, W)`` in [-1, 1] of images in the forms that calling the pipeline takes.

        Args:
            name: of the argument that they are, for messages.
            height, width: in pixels; default the size of arrays and tensors, and the tokenizer's for PIL images.
        """
        images = image_list(name, images)
        channels = self.tokenizer.config.in_channels
        height = None if height is None else check_integer("height", height)
        width = None if width is None else check_integer("width", width)
        if isinstance(images[0], PIL.Image.Image):
            height = height or self.tokenizer.image_size[0]
            width = width or self.tokenizer.image_size[1]
            self.tokenizer.check_size(height, width)
            try:
                pixels = torch.stack([image_to_pixels(image, height, width, channels) for image in images])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        else:
            pixels = arrays_to_pixels(name, images, channels)
            size = tuple(pixels.shape[2:])
            if (height or size[0], width or size[1]) != size:
                raise ValueError(
                    f"{name}: arrays and tensors must have {height or size[0]}x{width or size[1]} pixels, got {size}; "
                    "only PIL images are resized."
                )
            self.tokenizer.check_size(*size)
        return pixels.to(self._execution_device, torch.float32)

    def prepare_image_to_image(
        self,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        strength: float,
        num_inference_steps: int,
        num_tokens: int,
        repeats: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Codes of images that are kept, the noisy sample to start from, and the step to start at."""
        codes = self.tokenizer.encode(pixels).codes
        start_step = _start_step(strength, num_inference_steps)
        if int(num_inference_steps * strength) == 0:  # nothing is generated anew: the reconstruction, from noise
            return codes[:, :num_tokens], noise, 0
        kept, _ = self.tokenizer.step_windows(num_inference_steps)[start_step]
        start = torch.tensor(start_step / num_inference_steps, dtype=torch.float64)
        clean = _repeat(pixels * self.tokenizer.config.data_std, len(noise), repeats)
        noisy = self.scheduler.add_noise(clean, noise, float(shift_time(start, self.scheduler.config.shift)))
        return codes[:, :kept], noisy, start_step


def _callback_tensors(preview: DARPreview | CodesPreview, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a callback may look at. Where nothing is decoded, codes stand for the preview and noise for the state."""
    if isinstance(preview, CodesPreview):
        return {"preview": preview.codes, "codes": preview.codes, "latents": noise}
    return {"preview": preview.sample, "codes": preview.codes, "latents": preview.latents}


def _check_count(images: torch.Tensor, batch_size: int, repeats: int) -> None:
    labels = batch_size // repeats
    if len(images) not in (1, labels, batch_size):
        raise ValueError(f"got {len(images)} images for {labels} labels: give one image, or one for each.")


def _repeat(tensor: torch.Tensor, batch_size: int, repeats: int) -> torch.Tensor:
    """One row for the whole batch, one per label ``repeats`` times, or one per image as it is."""
    if len(tensor) * repeats == batch_size:
        return tensor.repeat_interleave(repeats, dim=0)
    return tensor.expand(batch_size, *tensor.shape[1:])


def _check_components(tokenizer: Any, transformer: Any) -> None:
    """Refuse components of another kind, or that do not fit together.

    They are known by a method, not by class, because adapters wrap models.
    """
    for name, model, kind, method in (
        ("tokenizer", tokenizer, "DARTokenizer", "decode_stream"),
        ("transformer", transformer, "DARForCausalLM", "stream_codes"),
    ):
        if not hasattr(model, method):
            raise ValueError(f"{name} must be a {kind}, got {type(model).__name__}.")
    for name, ours, theirs in (
        ("codebook_size", tokenizer.config.codebook_size, transformer.config.codebook_size),
        ("number of tokens", tokenizer.config.num_tokens, transformer.config.num_image_tokens),
    ):
        if ours != theirs:
            raise ValueError(f"tokenizer and transformer disagree: {name} {ours} and {theirs}.")


def _check_exclusive(**arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other.")


def _check_together(**arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) == 1:
        raise ValueError(f"{' and '.join(arguments)} go together: give both or neither.")


def _start_step(strength: float | None, num_steps: int) -> int:
    """The step to start at. 0 also where strength leaves none to generate anew: all steps then run over kept codes."""
    if strength is None:
        return 0
    regenerated = int(num_steps * strength)
    if regenerated == 0:
        return 0
    return num_steps - regenerated
