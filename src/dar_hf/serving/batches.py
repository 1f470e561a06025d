"""A pipeline that many requests share: those that wait together are drawn together, as one stream."""

import asyncio
import io
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch

from ..labels_dar import index_names
from ..pipeline_dar import DARPipeline, DARPipelineOutput
from ..utils.untrusted import MAX_GUIDANCE
from .requests import MAX_IMAGES, Facts, ImageRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """Images of a request after a step, as PNG files: one preview, or all the final ones."""

    images: list[bytes]
    final: bool


@dataclass(eq=False)
class Job:
    """A request on its way: what is drawn for it arrives in ``results``, and None or an exception at the end.

    Attributes:
        preview_steps: the steps whose previews are sent.
        left: whether its client has left, or has everything.
    """

    request: ImageRequest
    preview_steps: list[int]
    results: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: bool = False


Send = Callable[[Job, Drawn | Exception | None], None]


class SharedPipeline:
    """Draws requests in batches, one batch at a time, in a thread of its own.

    An image does not depend on its batch: each one has its own generator. A batch is chosen when the pipeline is free:
    the request that waits longest, and all others with the same guidance, up to ``max_batch_size`` images.

    Ray Serve's own `serve.batch` chooses when requests arrive, so behind a batch that runs they would queue up one by
    one; and it neither separates scales of guidance nor tells a batch that a client has left.

    Args:
        pipe: the pipeline.
        name: of the model, in the API.
        max_batch_size: how many images are drawn together.
        batch_wait_timeout_s: where nothing runs, a batch begins when no request has come for as long as this.
    """

    def __init__(self, pipe: DARPipeline, name: str, max_batch_size: int = 16, batch_wait_timeout_s: float = 0.05):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.name = name
        self.created = int(time.time())
        self.max_batch_size = max_batch_size
        self.batch_wait_timeout_s = batch_wait_timeout_s
        self.num_steps: int = pipe.tokenizer.config.num_inference_steps
        self.from_text: bool = pipe.transformer.config.text_vocab_size > 0
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._worker: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "pipeline")

    def facts(self) -> Facts:
        """What has to be known to check a request."""
        config = self.pipe.transformer.config
        labels, shared_names = index_names(self.pipe.config.id2label or {})
        height, width = self.pipe.tokenizer.image_size
        scale = self.pipe.transformer.generation_config.guidance_scale or 1.0
        if isinstance(scale, (list, tuple)):  # the start and the end of a linear one
            scale = max(scale)
        return Facts(
            name=self.name,
            created=self.created,
            from_text=self.from_text,
            num_classes=config.num_classes,
            labels=labels,
            shared_names=shared_names,
            height=height,
            width=width,
            prompt_tokens=config.max_text_tokens if self.from_text else 1,
            image_tokens=self.pipe.tokenizer.config.num_tokens,
            max_images=min(MAX_IMAGES, self.max_batch_size),
            max_guidance=max(MAX_GUIDANCE, scale),
        )

    def warm_up(self) -> None:
        """Whatever happens once in a process happens before the first request waits for it."""
        self._draw([Job(self._example(), [])], lambda job, result: None)

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """The previews of a request that were asked for, then its images.

        Whoever stops iterating frees the request's place: nothing more is done for it, and a batch that nobody waits
        for any more ends after its current step.
        """
        job = Job(request, preview_steps(request.partial_images, self.num_steps))
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            job.left = True
            if self._running and all(job.left for job in self._running):
                self.pipe._interrupt = True

    async def _work(self) -> None:
        """Run batches for as long as requests wait."""
        loop = asyncio.get_running_loop()

        def send(job: Job, result: Drawn | Exception | None) -> None:
            loop.call_soon_threadsafe(job.results.put_nowait, result)

        arrived = 0
        while arrived < len(self._waiting) < self.max_batch_size:  # more have come since
            arrived = len(self._waiting)
            await asyncio.sleep(self.batch_wait_timeout_s)
        while jobs := self._next_batch():
            self._running = jobs
            await loop.run_in_executor(self._thread, self._run, jobs, send)
            self._running = []

    def _next_batch(self) -> list[Job]:
        """Take the requests of the next batch from those that wait."""
        self._waiting = [job for job in self._waiting if not job.left]
        jobs: list[Job] = []
        free = self.max_batch_size
        for job in self._waiting:
            fits = job.request.n <= free
            if fits and (not jobs or job.request.guidance_scale == jobs[0].request.guidance_scale):
                jobs.append(job)
                free -= job.request.n
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _run(self, jobs: list[Job], send: Send) -> None:
        """Draw a batch in the thread; whatever happens, each of its requests comes to an end."""
        try:
            self._draw(jobs, send)
            end = None
        except Exception as error:
            logger.exception("a batch of %d requests failed", len(jobs))
            end = RuntimeError(f"{type(error).__name__}: {error}")  # others may not cross processes
        for job in jobs:
            send(job, end)

    def _draw(self, jobs: list[Job], send: Send) -> None:
        requests = [job.request for job in jobs]
        subjects: list[Any] = [request.subject for request in requests for _ in range(request.n)]
        generators = [
            torch.Generator().manual_seed(request.seed + index) for request in requests for index in range(request.n)
        ]
        stream = self.pipe.stream(
            **{"prompt" if self.from_text else "class_labels": subjects},
            guidance_scale=requests[0].guidance_scale,
            generator=generators,
            # without previews, a GPU computes steps and codes at the same time
            previews=any(job.preview_steps for job in jobs),
        )
        for output in stream:
            if all(job.left for job in jobs):
                stream.close()  # type: ignore[attr-defined]
                return
            self._send_step(jobs, output, send)

    def _send_step(self, jobs: list[Job], output: DARPipelineOutput, send: Send) -> None:
        """Send each request what it asked for of a step."""
        final = output.step == self.num_steps
        start = 0
        for job in jobs:
            images = output.images[start : start + job.request.n]
            start += job.request.n
            if not job.left and (final or output.step in job.preview_steps):
                send(job, Drawn(list(map(png, images)), final))

    def _example(self) -> ImageRequest:
        subject: int | str = 0
        if self.from_text:
            subject = "warm up"
        return ImageRequest(subject, seed=0)


def preview_steps(count: int, num_steps: int) -> list[int]:
    """The steps whose previews are sent: ``count`` of those before the last one, evenly spread, or all there are."""
    count = min(count, num_steps - 1)
    return [index * num_steps // (count + 1) for index in range(1, count + 1)]


def png(image: PIL.Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
