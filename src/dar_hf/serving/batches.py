"""A pipeline that many requests share: those that wait together are drawn together, as one stream."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ..pipeline_dar import DARPipeline, DARPipelineOutput
from ..utils.pictures import png
from ..utils.untrusted import MAX_GUIDANCE
from .requests import MAX_IMAGES, ImageRequest, ModelInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepImages:
    """The images of one request after a denoising step, as PNG files: one preview, or all final images."""

    images: list[bytes]
    final: bool


@dataclass(eq=False)
class Job:
    """A request that waits or is being drawn.

    Attributes:
        preview_steps: the steps whose previews are sent.
        results: what is drawn for it, and at the end None or an exception.
        left: whether nobody waits for results any more.
    """

    request: ImageRequest
    preview_steps: list[int]
    results: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: bool = False


Send = Callable[[Job, StepImages | Exception | None], None]


class SharedPipeline:
    """Draws requests in batches, one batch at a time, in a thread of its own.

    The next batch is chosen when the last one has ended: the request that has waited longest, and all others with the
    same guidance, up to ``max_batch_size`` images. Every image has its own generator, so that the rest of the batch
    does not change what is drawn.

    Ray Serve's own `serve.batch` forms batches while requests arrive, does not separate scales of guidance, and does
    not tell a running batch that a client has left.

    Args:
        pipe: the pipeline.
        name: of the model, in the API.
        max_batch_size: how many images are drawn together.
        batch_wait_timeout_s: if nothing is being drawn, a batch begins when no request has arrived for this long.
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

    def info(self) -> ModelInfo:
        """What the API has to know to check a request."""
        config = self.pipe.transformer.config
        height, width = self.pipe.tokenizer.image_size
        prompt_tokens = 1
        if self.from_text:
            prompt_tokens = config.max_text_tokens
        scale = self.pipe.transformer.generation_config.guidance_scale or 1.0
        if isinstance(scale, (list, tuple)):  # the start and the end of a linear one
            scale = max(scale)
        return ModelInfo(
            name=self.name,
            created=self.created,
            from_text=self.from_text,
            num_classes=config.num_classes,
            labels=self.pipe.labels,
            shared_names=self.pipe.shared_names,
            height=height,
            width=width,
            prompt_tokens=prompt_tokens,
            image_tokens=self.pipe.tokenizer.config.num_tokens,
            max_images=min(MAX_IMAGES, self.max_batch_size),
            max_guidance=max(MAX_GUIDANCE, scale),
        )

    def warm_up(self) -> None:
        """Draw an image, so that the first request does not wait for what happens once per process."""
        subject: int | str = 0
        if self.from_text:
            subject = "warm up"
        self._draw([Job(ImageRequest(subject, seed=0), [])], lambda job, result: None)

    async def draw(self, request: ImageRequest) -> AsyncGenerator[StepImages, None]:
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
            if job in self._waiting:
                self._waiting.remove(job)
            if self._running and all(job.left for job in self._running):
                self.pipe._interrupt = True

    async def _work(self) -> None:
        """Run batches for as long as requests wait."""
        loop = asyncio.get_running_loop()

        def send(job: Job, result: StepImages | Exception | None) -> None:
            loop.call_soon_threadsafe(job.results.put_nowait, result)

        arrived = 0
        while arrived < self._images_waiting() < self.max_batch_size:  # more have arrived since
            arrived = self._images_waiting()
            await asyncio.sleep(self.batch_wait_timeout_s)
        while jobs := self._next_batch():
            self._running = jobs
            await loop.run_in_executor(self._thread, self._run, jobs, send)
            self._running = []

    def _images_waiting(self) -> int:
        return sum(job.request.n for job in self._waiting)

    def _guidance(self, job: Job) -> Any:
        """The request's guidance scale, or the pipeline's own."""
        if job.request.guidance_scale is None:
            return self.pipe.transformer.generation_config.guidance_scale
        return job.request.guidance_scale

    def _next_batch(self) -> list[Job]:
        """Take the requests of the next batch from those that wait."""
        jobs: list[Job] = []
        free = self.max_batch_size
        for job in self._waiting:
            fits = job.request.n <= free
            if fits and (not jobs or self._guidance(job) == self._guidance(jobs[0])):
                jobs.append(job)
                free -= job.request.n
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _run(self, jobs: list[Job], send: Send) -> None:
        """Draw a batch, in the thread; whatever happens, each of its requests comes to an end."""
        message = None
        try:
            self._draw(jobs, send)
        except Exception as error:
            logger.exception("a batch of %d requests failed", len(jobs))
            message = f"{type(error).__name__}: {error}"
        for job in jobs:
            end = None
            if message is not None:
                end = RuntimeError(message)  # which every process can read, unlike the types of libraries
            send(job, end)

    def _draw(self, jobs: list[Job], send: Send) -> None:
        requests = [job.request for job in jobs]
        subjects: list[Any] = [request.subject for request in requests for _ in range(request.n)]
        generators = [
            torch.Generator().manual_seed(request.seed + index) for request in requests for index in range(request.n)
        ]
        argument = "prompt" if self.from_text else "class_labels"
        stream = self.pipe.stream(
            **{argument: subjects},
            guidance_scale=self._guidance(jobs[0]),
            generator=generators,
            # without previews, a GPU computes steps and codes at the same time
            previews=any(job.preview_steps for job in jobs),
        )
        # the call above reset the pipeline's interrupt flag: whoever left before it is noticed here
        while not all(job.left for job in jobs):
            output = next(stream, None)
            if output is None:
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
                send(job, StepImages(list(map(png, images)), final))


def preview_steps(count: int, num_steps: int) -> list[int]:
    """The steps whose previews are sent: ``count`` of those before the last one, evenly spread, or all there are."""
    count = min(count, num_steps - 1)
    return [index * num_steps // (count + 1) for index in range(1, count + 1)]
