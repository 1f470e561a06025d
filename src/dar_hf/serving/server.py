"""The server as an application of Ray Serve: `build` for ``serve run`` and ``serve deploy``, and for ``dar-hf serve``.

There are two deployments: `Api` speaks HTTP, `Model` holds a pipeline. Replicas of `Model` share the requests, and
each draws in batches. Requests that no replica has room for wait, up to ``max_queued_requests``.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..utils.loading import load_pipeline
from ..utils.sample import sample_pipeline
from ..utils.threads import limit_threads
from .api import ImagesApi
from .batches import SharedPipeline, StepImages
from .requests import ImageRequest, ModelInfo, RequestError

logger = logging.getLogger(__name__)

QUEUED = 64  # requests that wait for room on a replica; further ones are rejected
CONNECTIONS = 1000  # requests that Api holds at once, including those whose bodies arrive slowly
LAST_ANSWERS = 0.5  # seconds that Ray's HTTP proxy has to send what Api gave it last


@dataclass(frozen=True)
class ServerOptions:
    """What `build` takes, as ``args`` of a Serve file.

    Attributes:
        model: pipeline folder or Hub id; default the package's emoji pipeline.
        model_name: its name in the API; default the last part of ``model``.
        device, dtype: of the pipeline; default the GPU if there is one, and float32.
        max_batch_size: how many images a replica draws together.
        batch_wait_timeout_s: if nothing is being drawn, a batch begins when no request has arrived for this long.
        request_timeout_s: how long a request may take, including the time it waits.
    """

    model: str | None = None
    model_name: str | None = None
    device: str | None = None
    dtype: str = "float32"
    max_batch_size: int = 16
    batch_wait_timeout_s: float = 0.05
    request_timeout_s: float = 120.0

    @property
    def source(self) -> str:
        """The folder, as an absolute path, or the Hub id."""
        if self.model is None:
            return sample_pipeline()
        folder = Path(self.model).expanduser()
        return str(folder.resolve()) if folder.exists() else self.model

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.model_name or Path(self.source).name


class ModelReplica:
    """One pipeline, and the requests that share it."""

    def __init__(self, options: ServerOptions):
        device = options.device
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = load_pipeline(options.source, getattr(torch, options.dtype), device)
        limit_threads(pipe.tokenizer, pipe.transformer)
        self.shared = SharedPipeline(pipe, options.name, options.max_batch_size, options.batch_wait_timeout_s)
        self.shared.warm_up()

    async def info(self) -> ModelInfo:
        """What has to be known to check a request."""
        return self.shared.info()

    async def draw(self, request: ImageRequest) -> AsyncGenerator[StepImages, None]:
        """The previews of a request, then its images. Ray closes it when the client leaves."""
        async with aclosing(self.shared.draw(request)) as steps:
            async for step in steps:
                yield step


class ApiReplica:
    """HTTP; what draws is a handle of `ModelReplica`. One replica is enough, as it computes nothing."""

    def __init__(self, model: DeploymentHandle, options: ServerOptions):
        self.model = model
        self.api = ImagesApi(self, options.request_timeout_s)
        self._counted = (-1.0, 0)
        self._counting = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What `serve.ingress` without an application asks for."""
        return _without_cancelled_receive(self.api.app())

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for those in progress; returns whether all of them ended."""
        ended = await self.api.drain(timeout_s)
        await asyncio.sleep(LAST_ANSWERS)
        return ended

    async def info(self) -> ModelInfo:
        """What has to be known to check a request."""
        with _errors_as_answers():
            return await self.model.info.remote()

    async def draw(self, request: ImageRequest) -> AsyncGenerator[StepImages, None]:
        """A request's results from one of the replicas.

        Raises:
            RequestError: if none has room for it, or the one that drew it ended.
        """
        results = self.model.options(stream=True).draw.remote(request)
        complete = False
        try:
            with _errors_as_answers():
                async for step in results:
                    complete = step.final
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            if not complete:  # the client has left, or the request took too long
                with suppress(Exception):  # an error of the request in the meantime
                    results.cancel()
            raise

    async def replicas(self) -> int:
        """How many replicas of the model run; Ray is asked once a second at most."""
        async with self._counting:
            when, count = self._counted
            if time.monotonic() - when > 1:
                count = await asyncio.to_thread(_running_replicas)
                self._counted = (time.monotonic(), count)
            return count


@contextmanager
def _errors_as_answers() -> Iterator[None]:
    """Inside, Ray's errors about a request become answers."""
    try:
        yield
    except BackPressureError as error:
        message = "Too many requests are waiting: try again later."
        raise RequestError(message, code="rate_limit_exceeded", status=429, retry_after=1) from error
    except (RayActorError, DeploymentUnavailableError) as error:
        message = "The replica that drew this has ended: send the request again."
        raise RequestError(message, code="replica_lost", status=503, retry_after=1) from error


def _without_cancelled_receive(app: ASGIApp) -> ASGIApp:
    """The application, told of a client that leaves in the middle of a stream as ASGI says.

    Ray raises an error in ``receive`` instead, and prints a long traceback for every such client.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await app(scope, receive_or_disconnect, send)

    return wrapped


Model = serve.deployment(name="Model", max_queued_requests=QUEUED, health_check_timeout_s=60)(ModelReplica)
Api = serve.deployment(
    name="Api",
    max_ongoing_requests=CONNECTIONS,
    max_queued_requests=CONNECTIONS,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    ray_actor_options={"num_cpus": 0},
)(serve.ingress()(ApiReplica))


def _running_replicas() -> int:
    """Replicas of the model in the application that this process belongs to."""
    own = serve.status().applications[serve.get_replica_context().app_name]
    return own.deployments[Model.name].replica_states.get("RUNNING", 0)


def application(options: ServerOptions, **model_options: Any) -> serve.Application:
    """Both deployments.

    Args:
        options: of the pipeline and the API.
        model_options: Ray's, of the deployment `Model`: number of replicas, and what each of them needs.
    """
    # requests of the batch that runs and of the next one, if each asks for one image
    model_options.setdefault("max_ongoing_requests", 2 * options.max_batch_size)
    return Api.bind(Model.options(**model_options).bind(options), options)


def build(args: dict[str, Any]) -> serve.Application:
    """The application from the ``args`` of a Serve file, which are those of `ServerOptions`."""
    return application(ServerOptions(**args))
