"""A page that shows images while they are drawn: say what to draw and watch the previews sharpen, token by token.

    python examples/app.py                             # the package's emoji pipeline
    python examples/app.py --model outputs/digits/pipeline --port 7861

A pipeline draws from a prompt or, where it was trained on classes, from a class. Also layout control, image-to-image,
what the tokenizer keeps of an upload, and what each group of tokens holds. Needs gradio (`pip install -c
constraints.txt -e ".[app]"`) and no network. Several visitors share one model: their streams take turns, a denoising
step at a time.
"""

import argparse
import base64
import contextlib
import html
import math
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO, Any

import gradio as gr
import torch
from PIL import Image

from dar_hf import DARPipeline, sample_pipeline
from dar_hf.data import center_crop, convert_channels, to_tensor
from dar_hf.evaluation import GroupSwaps, draw_swaps, swap_groups
from dar_hf.hub import describe
from dar_hf.metrics import psnr
from dar_hf.utils.commands import command, device_option, port_option
from dar_hf.utils.loading import load_pipeline
from dar_hf.utils.pictures import image_grid, png
from dar_hf.utils.sample import EMOJI_PROMPTS
from dar_hf.utils.threads import limit_threads
from dar_hf.utils.untrusted import (
    MAX_GUIDANCE,
    MAX_PROMPT,
    MAX_SEED,
    NO_UPLOAD,
    UploadError,
    number,
    only_uploads,
    text,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_FILE = 20 * 2**20  # bytes of an upload
MIN_SIDE, MAX_SIDE, MAX_PIXELS = 4, 16_384, 50_000_000  # of an upload
MAX_CLASSES = 10  # or prompts: generated in one call
SMALL = 128  # pixels per side; smaller images are shown pixel by pixel
MIN_COLUMN = 60  # pixels of a column in the picture of exchanged groups, for its text to be readable
PAUSE, MAX_PAUSE = "Seconds between previews", 2.0
NEW_SEED = "Another seed each time"
VISITORS = 4  # served at the same time; others wait
WAITING = 32  # at most; further ones are rejected
# one upload is decoded at a time, because a large one takes hundreds of megabytes, and always by the same thread, so
# that its memory is used again
READER = ThreadPoolExecutor(1, "reader")
TOO_LARGE = f"This picture is too large: at most {MAX_PIXELS // 10**6} million pixels are taken."

# blocks of images above 32 MiB go back to the system when they are freed, and smaller ones may not
Image.core.set_block_size(64 * 2**20)

TITLE = "D-AR draws"
INTRO = (
    "A language model predicts the tokens of an image from left to right, and every few tokens give one step of a "
    "diffusion decoder. So each image has a preview long before it is finished "
    "([Diffusion via Autoregressive Models](https://arxiv.org/abs/2505.23660))."
)
CSS = """
.page { display: grid; grid-template-columns: minmax(0, 1fr); gap: 24px }
@media (min-width: 768px) {
    .page { grid-template: "actions result" auto "settings result" 1fr / minmax(0, 1fr) minmax(0, 1fr) }
    .page > .actions { grid-area: actions }
    .page > .result { grid-area: result }
    .page > .settings { grid-area: settings }
}
.actions .tab-container button { padding: 0 10px }
.view figure { margin: 0; text-align: center }
.view img { border-radius: 4px; background: #8882 }
.view.small .row img { image-rendering: pixelated }
.view .row { display: flex; flex-wrap: wrap; gap: 12px; justify-content: center; align-items: flex-start }
.view .now img { width: 320px }
.view .now.many img { width: 480px }
.view .swaps { overflow-x: auto }
.view .swaps img { width: 100% }
.view .given img { width: 96px }
.view figure img { max-width: 100% }
.view figcaption { margin-top: 6px }
.view figcaption, .view .steps li { font-size: var(--text-sm) }
.view ol.steps { display: flex; flex-wrap: wrap; gap: 6px; justify-content: center; list-style: none; padding: 0;
    margin: 16px 0 }
.view .steps li { margin: 0; text-align: center }
.view .steps img, .view .steps .blank { display: block; width: 50px; height: auto; aspect-ratio: var(--shape) }
.view.many .steps img, .view.many .steps .blank { width: 105px }
.view .blank { border: 1px dashed var(--border-color-primary); border-radius: 4px }
.view .tokens { display: flex; flex-wrap: wrap; gap: 4px; justify-content: center; font-family: var(--font-mono);
    font-size: 11px }
.view .tokens span { min-width: 34px; padding: 1px 4px; border-radius: 3px; text-align: center;
    background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary) }
.view .tokens .kept { border-color: var(--color-accent); border-width: 2px; padding: 0 3px }
.upload img { width: 100%; height: 100%; object-fit: contain }
.view .empty { margin: 0; padding: 144px 16px; text-align: center; border: 1px dashed var(--border-color-primary);
    border-radius: 4px; color: var(--body-text-color-subdued) }
"""
EMPTY = '<div class="view"><p class="empty">{} and press Draw.</p></div>'


@dataclass(frozen=True)
class Step:
    """What a visitor sees after one denoising step.

    Attributes:
        images: ``(B, C, H, W)`` in [0, 1].
        step, num_steps: counted from 1.
        codes: of the first image, all that exist.
    """

    images: torch.Tensor
    step: int
    num_steps: int
    codes: list[int]


class Artist:
    """A pipeline that visitors share. Only one of them computes at a time, and nobody holds it while a step is shown.

    So a visitor who leaves in the middle leaves nothing behind: the stream is dropped between two steps.
    """

    def __init__(self, pipe: DARPipeline, hint: str = "what to draw"):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.hint = hint  # in the empty field for a prompt
        self._turn = threading.Lock()
        config = pipe.tokenizer.config
        self.num_tokens: int = config.num_tokens
        self.stops = sorted({stop for _, stop in pipe.tokenizer.step_windows(config.num_inference_steps)})
        id2label = {int(label): name for label, name in (pipe.config.id2label or {}).items()}
        self.names = [str(id2label.get(label, label)) for label in range(pipe.transformer.config.num_classes)]
        self.from_text = pipe.transformer.config.text_vocab_size > 0  # then there are no classes
        # one scale, or the start and the end of a linear one, of which the page sets the end
        scale = pipe.transformer.generation_config.guidance_scale or 1.0
        self.first_guidance = None
        if isinstance(scale, (list, tuple)):
            self.first_guidance, scale = scale
        self.guidance = scale
        self.max_guidance = max(MAX_GUIDANCE, self.guidance)

    def steps(self, **call: Any) -> Iterator[Step]:
        """`DARPipeline.stream` with this call's arguments.

        Raises:
            ValueError: as the pipeline does, at the first step.
        """
        codes: list[int] = []

        def remember(pipe: DARPipeline, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> None:
            codes[:] = tensors["codes"][0].tolist()

        with self._turn:
            stream = self.pipe.stream(
                **call,
                output_type="pt",
                callback_on_step_end=remember,
                callback_on_step_end_tensor_inputs=["codes"],
            )
        for output in self.in_turns(stream):
            yield Step(output.images.float().cpu(), output.step, output.num_steps, list(codes))

    def in_turns(self, stream: Iterator[Any]) -> Iterator[Any]:
        """A stream of which each element is computed while nobody else computes."""
        while True:
            with self._turn:
                element = next(stream, None)
            if element is None:
                return
            yield element

    def subjects(self, values: list[Any]) -> tuple[list[str], dict[str, list]]:
        """What to draw: names for people, and the argument of the pipeline's call.

        Args:
            values: classes by id, or prompts, as they come from the page.

        Raises:
            ValueError: for anything else, and where nothing is chosen.
        """
        if self.from_text:
            prompts = [text("The prompt", value, MAX_PROMPT) for value in values]
            if not all(prompts):
                raise ValueError("The prompt is empty: write what to draw.")
            return prompts, {"prompt": prompts}
        if None in values:
            raise ValueError("Choose a class first.")
        labels = [int(number("The class", value, 0, len(self.names) - 1)) for value in values]
        return [self.names[label] for label in labels], {"class_labels": labels}

    def no_subject(self) -> dict[str, list]:
        """The argument for calls in which the language model draws nothing that is seen."""
        if self.from_text:
            return {"prompt": [""]}
        return {"class_labels": [0]}

    def scale(self, guidance: float) -> float | tuple[float, float]:
        """Guidance as the pipeline takes it: linear from the model's own start if its default is linear."""
        guidance = number("Guidance", guidance, 1.0, self.max_guidance)
        if self.first_guidance is None:
            return guidance
        return self.first_guidance, guidance

    def read(self, path: str | None) -> tuple[Image.Image, str]:
        """An upload as the model takes it, see `read_upload`."""
        return read_upload(path, *self.pipe.tokenizer.image_size, self.pipe.tokenizer.config.in_channels)


# Uploads: no request opens anything else


class Page(gr.Blocks):
    """Blocks in which no request opens anything but uploads, whichever of its inputs names it."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            inputs = only_uploads(inputs, gr.utils.get_upload_folder())
        except (ValueError, RecursionError) as error:
            raise gr.Error(NO_UPLOAD, print_exception=False) from error
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # too few inputs, or others than gradio's components take
            raise gr.Error("These are not the inputs that this button takes.", print_exception=False) from error


def read_upload(path: str | None, height: int, width: int, channels: int) -> tuple[Image.Image, str]:
    """An uploaded image, center-cropped and scaled to the model's size, and a remark or "".

    Nothing is decoded before format and size are known.

    Raises:
        ValueError: if there is none, or it cannot be read, or it is too small or too large.
    """
    if not path:
        raise ValueError("Choose a picture first: upload one, or use the last drawing.")

    def read() -> tuple[Image.Image, str]:
        image, remark = _decode(path, channels)
        return center_crop(image, height, width), remark

    return READER.submit(read).result()


def _decode(path: str, channels: int) -> tuple[Image.Image, str]:
    """The upright image and a remark; what it was decoded to is given up here, before anything else is made."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size)
            remark = ""
            if getattr(image, "is_animated", False):
                remark = "the first frame of an animation"
            return convert_channels(image, channels), remark
    except (UploadError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UploadError(TOO_LARGE) from error
    except Exception as error:  # pillow's readers raise nearly any type for damaged files
        raise UploadError(f"This file is no picture that can be read here ({', '.join(FORMATS)}).") from error


def _check_size(columns: int, rows: int) -> None:
    if max(columns, rows) > MAX_SIDE or columns * rows > MAX_PIXELS:
        raise UploadError(TOO_LARGE)
    if min(columns, rows) < MIN_SIDE:
        raise UploadError(
            f"This picture is too small: {columns}x{rows} pixels, at least {MIN_SIDE} a side are needed."
        )


def open_regular(path: str) -> IO[bytes]:
    """Open a file, if it is a regular one of at most ``MAX_FILE`` bytes; pipes and devices do not block.

    Raises:
        OSError: if it is not, or cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
        file.close()
        raise OSError("no regular file, or too large")
    return file


# What a visitor sees: one piece of HTML with embedded images, so that no file is written for a preview


def picture(images: torch.Tensor, alt: str) -> str:
    """Images ``(B, C, H, W)`` in [0, 1] as an ``<img>``, five per row."""
    gap = 0 if len(images) == 1 else 2
    return embedded(image_grid(images * 2 - 1, min(len(images), MAX_CLASSES // 2), gap=gap), alt)


def embedded(image: Image.Image, alt: str) -> str:
    """An image as an ``<img>``."""
    data = base64.b64encode(png(image)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


@dataclass
class View:
    """The result's side of the page: the image so far, the steps that led to it, and its tokens.

    Attributes:
        title: of what is generated.
        num_tokens: of the whole image.
        kept: how many of them are given.
        given: the image they come from ``(1, C, H, W)`` in [0, 1], and its caption.
        compare: also show the PSNR against the given image.
    """

    title: str
    num_tokens: int
    kept: int = 0
    given: torch.Tensor | None = None
    given_caption: str = ""
    compare: bool = False
    steps: list[str] = field(default_factory=list)

    def render(self, step: Step) -> str:
        """The HTML after another step."""
        known = len(step.codes)
        many = len(step.images) > 1
        self.steps.append(f"<li>{picture(step.images, f'after {known} tokens')}{known}</li>")
        height, width = step.images.shape[2:]
        blanks = (step.num_steps - step.step) * '<li><span class="blank"></span>&nbsp;</li>'
        caption = f"{self.title} · step {step.step} of {step.num_steps} · {known} of {self.num_tokens} tokens"
        if self.compare and self.given is not None:
            caption += f" · {float(psnr(step.images * 2 - 1, self.given * 2 - 1).mean()):.1f} dB"
        tokens = "" if many else self._tokens(step.codes)
        now = f"<figure class='now{' many' * many}'>{picture(step.images, caption)}"
        kind = f"view{' many' * many}{' small' * (max(height, width) < SMALL)}"
        return (
            f'<div class="{kind}" style="--shape: {width} / {height}" data-step="{step.step}" '
            f'data-steps="{step.num_steps}"><div class="row{" many" * many}">{self._given()}{now}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure></div>"
            f'<ol class="steps" aria-label="Previews, by tokens">{"".join(self.steps)}{blanks}</ol>'
            f"{tokens}</div>"
        )

    def _given(self) -> str:
        if self.given is None:
            return ""
        caption = html.escape(self.given_caption)
        return f'<figure class="given">{picture(self.given, caption)}<figcaption>{caption}</figcaption></figure>'

    def _tokens(self, codes: Sequence[int]) -> str:
        boxes = [f"<span class=kept>{code}</span>" for code in codes[: self.kept]]
        boxes += [f"<span>{code}</span>" for code in codes[self.kept :]]
        boxes += ["<span>&nbsp;</span>"] * (self.num_tokens - len(codes))
        return f'<div class="tokens" role="group" aria-label="Tokens">{"".join(boxes)}</div>'


def render_swaps(swaps: GroupSwaps) -> str:
    """The HTML of `explain` after another step."""
    parts = [
        f"group {index + 1} (tokens {start + 1} to {stop}): {effect:.1%}"
        for index, ((start, stop), effect) in enumerate(zip(swaps.groups, swaps.effects(), strict=True))
    ]
    caption = f"How much each group changes A: {', '.join(parts)} · step {swaps.step} of {swaps.num_steps}"
    return (
        f'<div class="view" data-step="{swaps.step}" data-steps="{swaps.num_steps}"><figure class="now swaps">'
        f'<div style="min-width: {MIN_COLUMN * (len(swaps.groups) + 3)}px">'
        f"{embedded(draw_swaps(swaps), 'A with groups of its tokens from B')}</div>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure></div>"
    )


# What the buttons do: generators of (HTML, seed, the finished image)

Shown = Iterator[tuple[str, int, Any]]


@dataclass(frozen=True)
class Sampling:
    """The settings that all buttons share, as they come from the page."""

    guidance: float
    seed: float
    new_seed: bool
    pause: float
    negative_prompt: str = ""

    def draw_seed(self) -> int:
        if self.new_seed:
            return random.randrange(MAX_SEED + 1)
        return int(number("Seed", self.seed, 0, MAX_SEED))


def show(artist: Artist, view: View, sampling: Sampling, subject: dict[str, list], **call: Any) -> Shown:
    """Run one call and show every step for a moment; image i has the generator ``seed + i``."""
    (count,) = map(len, subject.values())
    seed = sampling.draw_seed()
    pause = number(PAUSE, sampling.pause, 0.0, MAX_PAUSE)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    call |= subject | {"generator": generators, "guidance_scale": artist.scale(sampling.guidance)}
    if artist.from_text:
        call["negative_prompt"] = text("The negative prompt", sampling.negative_prompt, MAX_PROMPT)
    for step in artist.steps(**call):
        last = step.step == step.num_steps or len(step.codes) == call.get("num_tokens")
        finished = gr.skip()
        if last:
            finished = artist.pipe.image_processor.postprocess(step.images[:1] * 2 - 1, "pil")[0]
        yield view.render(step), seed, finished
        if not last:
            time.sleep(pause)


def draw(artist: Artist, sampling: Sampling, subject: Any, tokens: float) -> Shown:
    """A class or a prompt from nothing."""
    (name,), subject = artist.subjects([subject])
    tokens = number("Tokens", tokens, artist.stops[0], artist.num_tokens)
    return show(artist, View(name, artist.num_tokens), sampling, subject, num_tokens=tokens)


def lay_out(artist: Artist, sampling: Sampling, path: str | None, keep: float, subjects: Any) -> Shown:
    """Several classes or prompts with the first tokens of one image."""
    keep = number("Tokens to keep", keep, 0, artist.num_tokens)
    if artist.from_text and isinstance(subjects, str):
        subjects = [line for line in subjects.splitlines() if line.strip()]
    if not isinstance(subjects, list) or not 1 <= len(subjects) <= MAX_CLASSES:
        what = "Write 1 to {} prompts, one per line." if artist.from_text else "Choose 1 to {} classes."
        raise ValueError(what.format(MAX_CLASSES))
    names, subject = artist.subjects(subjects)
    if not artist.from_text:
        names = [name.split(",")[0] for name in names]  # the first of several names of one class
    image, remark = artist.read(path)
    title = f"{', '.join(names)}: {keep} token{'s' * (keep != 1)} of the reference"
    view = View(title, artist.num_tokens, keep, _pixels(image), remark or "reference")
    return show(artist, view, sampling, subject, layout_image=image, layout_tokens=keep)


def vary(artist: Artist, sampling: Sampling, path: str | None, subject: Any, strength: float) -> Shown:
    """Image-to-image."""
    (name,), subject = artist.subjects([subject])
    strength = number("Strength", strength, 0.0, 1.0)
    image, remark = artist.read(path)
    view = View(name, artist.num_tokens, 0, _pixels(image), remark or "start")
    return show(artist, view, sampling, subject, image=image, strength=strength)


def reconstruct(artist: Artist, sampling: Sampling, path: str | None) -> Shown:
    """What the tokens of an image keep of it: image-to-image of strength 0, which generates nothing."""
    image, remark = artist.read(path)
    pixels = _pixels(image)
    view = View("reconstruction", artist.num_tokens, 0, pixels, remark or "upload", compare=True)
    return show(artist, view, sampling, artist.no_subject(), image=image, strength=0.0)


def explain(artist: Artist, sampling: Sampling, first: str | None, second: str | None) -> Shown:
    """What each group of tokens holds: picture A with groups of its tokens replaced by those of picture B."""
    seed = sampling.draw_seed()
    pause = number(PAUSE, sampling.pause, 0.0, MAX_PAUSE)
    images = [artist.read(path)[0] for path in (first, second)]
    for swaps in artist.in_turns(swap_groups(artist.pipe, *images, generator=torch.Generator().manual_seed(seed))):
        yield render_swaps(swaps), seed, gr.skip()
        if swaps.step < swaps.num_steps:
            time.sleep(pause)


def _pixels(image: Image.Image) -> torch.Tensor:
    return to_tensor(image)[None] / 2 + 0.5


def handler(action: Callable[..., Shown], artist: Artist) -> Callable[..., Shown]:
    """A function for gradio: the shared settings come first, and what is wrong becomes a message on the page."""

    def handle(guidance: float, seed: float, new_seed: bool, pause: float, *inputs: Any) -> Shown:
        try:
            if not isinstance(new_seed, bool):
                raise ValueError(f"{NEW_SEED} must be true or false, not {repr(new_seed)[:40]}.")
            sampling = Sampling(guidance, seed, new_seed, pause)
            if artist.from_text:
                sampling = replace(sampling, negative_prompt=inputs[0])
                inputs = inputs[1:]
            yield from action(artist, sampling, *inputs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise gr.Error("There is not enough memory for this now.", print_exception=False) from error

    return handle


# The page


@dataclass
class Tab:
    """One tab: its button, what that does, and the inputs that it takes in addition to the shared settings."""

    button: gr.Button
    action: Callable[..., Shown]
    inputs: list[Any]

    def triggers(self) -> list[Any]:
        """The button, and the Enter key where a text is written."""
        return [self.button.click, *(box.submit for box in self.inputs if isinstance(box, gr.Textbox))]


def unchecked(component: Any) -> Any:
    """A component whose value comes as it was sent: `number` says what is wrong, and with what; gradio would not."""
    component.preprocess = lambda value: value
    return component


def write(label: str, longest: int = MAX_PROMPT, **options: Any) -> Any:
    """A text of at most ``longest`` characters."""
    return unchecked(gr.Textbox(label=label, max_length=longest, **options))


def choose_subject(artist: Artist) -> Any:
    """A class, or a prompt."""
    if artist.from_text:
        return write("Prompt", placeholder=artist.hint)
    choices = [(name, label) for label, name in enumerate(artist.names)]
    if len(choices) <= MAX_CLASSES:
        return unchecked(gr.Radio(choices, value=0, label="Class"))
    return unchecked(gr.Dropdown(choices, value=0, label="Class", filterable=True))


def choose_subjects(artist: Artist) -> Any:
    """Several classes, or prompts."""
    if artist.from_text:
        info = f"one per line, at most {MAX_CLASSES}"
        return write("Prompts", MAX_CLASSES * (MAX_PROMPT + 1), info=info, lines=3)
    names = [(name, number) for number, name in enumerate(artist.names)]
    chosen = [number for _, number in names[:MAX_CLASSES]]
    return unchecked(gr.Dropdown(names, value=chosen, label="Classes", multiselect=True, max_choices=MAX_CLASSES))


def choose_picture(label: str, last: gr.State) -> gr.Image:
    """An upload, given to the handlers as a path: `read_upload` opens the file with its limits, not gradio.

    `Page` has seen to it that the path is an upload's.
    """
    upload = gr.Image(label=label, sources=["upload", "clipboard"], format="png", height=200, elem_classes="upload")
    upload.preprocess = lambda payload: getattr(payload, "path", None)

    def use(drawing: Any) -> Any:
        if drawing is None:
            raise gr.Error("Nothing is drawn yet.", print_exception=False)
        return drawing

    gr.Button("Use the last drawing", size="sm").click(
        use, last, upload, show_progress="hidden", api_visibility="private"
    )
    return upload


def tabs(artist: Artist, last: gr.State) -> list[Tab]:
    """The five things this page does."""
    group = artist.stops[0]
    most = artist.num_tokens
    with gr.Tab("Draw"):
        subject = choose_subject(artist)
        tokens = gr.Slider(
            group, most, most, step=math.gcd(*artist.stops), label="Tokens", info="fewer: it ends at a preview"
        )
        drawn = Tab(gr.Button("Draw", variant="primary"), draw, [subject, unchecked(tokens)])
    with gr.Tab("Layout"):
        reference = choose_picture("Reference", last)
        keep = gr.Slider(
            0, most, max(1, group // 8), step=1, label="Tokens to keep", info="the first ones carry the layout"
        )
        inputs = [reference, unchecked(keep), choose_subjects(artist)]
        what = "prompts" if artist.from_text else "classes"
        laid = Tab(gr.Button(f"Draw the {what}", variant="primary"), lay_out, inputs)
    with gr.Tab("Image to image"):
        start = choose_picture("Start", last)
        target = choose_subject(artist)
        strength = gr.Slider(0.0, 1.0, 0.5, step=0.05, label="Strength", info="the share of the steps drawn anew")
        varied = Tab(gr.Button("Change it", variant="primary"), vary, [start, target, unchecked(strength)])
    with gr.Tab("Reconstruct"):
        upload = choose_picture("Picture", last)
        rebuilt = Tab(gr.Button("Reconstruct", variant="primary"), reconstruct, [upload])
    with gr.Tab("Groups"):
        gr.Markdown("What each group of tokens holds: picture A with groups of its tokens replaced by picture B's.")
        pair = [choose_picture(f"Picture {name}", last) for name in "AB"]
        explained = Tab(gr.Button("Exchange the groups", variant="primary"), explain, pair)
    return [drawn, laid, varied, rebuilt, explained]


def build(artist: Artist) -> gr.Blocks:
    """The page."""
    with Page(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{INTRO}")
        last = gr.State(time_to_live=3600)
        with gr.Row(elem_classes="page"):
            with gr.Column(elem_classes="actions"):
                actions = tabs(artist, last)
            with gr.Column(elem_classes="result"):
                first = "Write what to draw" if artist.from_text else "Choose a class"
                view = gr.HTML(EMPTY.format(first), label="Result")
                stop = gr.Button("Stop", size="sm")
            with gr.Column(elem_classes="settings"):
                guidance = gr.Slider(1.0, artist.max_guidance, artist.guidance, step=0.1, label="Guidance")
                negative = []
                if artist.from_text:
                    negative.append(write("Negative prompt", info="what guidance leads away from"))
                with gr.Group():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                    new_seed = gr.Checkbox(True, label=NEW_SEED)
                pause = gr.Slider(0.0, MAX_PAUSE, 0.2, step=0.1, label=PAUSE)
        facts = " · ".join(f"{name}: {fact}" for name, fact in describe(artist.pipe).items())
        gr.Markdown(f"<small>{html.escape(facts)}</small>")
        shared = [unchecked(guidance), unchecked(seed), new_seed, unchecked(pause), *negative]
        outputs = [view, seed, last]
        events = [
            gr.on(
                tab.triggers(),
                handler(tab.action, artist),
                shared + tab.inputs,
                outputs,
                show_progress="minimal",
                show_progress_on=view,
                concurrency_id="draw",
                concurrency_limit=VISITORS,
                api_name=tab.action.__name__,
            )
            for tab in actions
        ]
        for tab, event in zip(actions, events, strict=True):  # one drawing per visitor
            gr.on(tab.triggers(), None, cancels=[other for other in events if other is not event])
        stop.click(None, cancels=events)
    return page.queue(max_size=WAITING, api_open=False)


def warm_up(artist: Artist) -> None:
    """Whatever happens once in a process happens before the first visitor waits for it."""
    next(artist.steps(**artist.no_subject(), num_tokens=artist.stops[0]))
    with contextlib.suppress(ImportError):  # gradio asks for this at its first event, which takes most of a second
        import matplotlib

        matplotlib.get_backend()


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve the page without anything from elsewhere: no fonts, no analytics, no share link.

    Nor gradio's run history, which uses the machine's own Hub token for requests that seem to come from it, as all do
    behind a proxy.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # readable on white
    options |= {"share": False, "ssr_mode": False, "run_history": False}
    options["_frontend"] = False  # or gradio ends where a busy machine does not answer it in 3 s
    return page.launch(theme=theme, css=CSS, footer_links=[], max_file_size=MAX_FILE, **options)


@command("app.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="pipeline folder or Hub id; default the package's emoji pipeline")
    parser.add_argument("--host", help="address to listen on; default GRADIO_SERVER_NAME, else this machine only")
    parser.add_argument(
        "--port", type=port_option, help="default GRADIO_SERVER_PORT, else the first free one from 7860 on"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_option, default=device)
    args = parser.parse_args(argv)
    model = args.model
    hint = "what to draw"
    if model is None:
        model = sample_pipeline()
        hint = f"such as: {EMOJI_PROMPTS[0]}"
    artist = Artist(load_pipeline(model, device=args.device), hint)
    limit_threads(artist.pipe.tokenizer, artist.pipe.transformer)
    warm_up(artist)
    launch(build(artist), server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
