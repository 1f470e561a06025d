"""The server as an application of Ray Serve: `build` for ``serve run`` and ``serve deploy``, and for ``dar-hf serve``.

Two deployments: `Api` speaks HTTP, `Model` holds a pipeline. Replicas of `Model` share the requests; each draws those
that reach it together in one batch. Requests that no replica has room for wait, up to ``max_queued_requests``.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ..utils.loading import load_pipeline
from ..utils.sample import sample_pipeline
from ..utils.threads import limit_threads
from . import api
from .batches import Drawn, SharedPipeline
from .requests import Facts, ImageRequest, RequestError

logger = logging.getLogger(__name__)

QUEUED = 64  # requests that wait for room on a replica; further ones are rejected
CONNECTIONS = 1000  # requests that the ingress holds at once, those whose bodies arrive slowly included


@dataclass(frozen=True)
class Options:
    """What `build` takes, as ``args`` of a Serve file.

    Attributes:
        model: pipeline folder or Hub id; default the one that comes with the package.
        model_name: its name in the API; default the last part of ``model``.
        device, dtype: of the pipeline; default the GPU if there is one, and float32.
        max_batch_size: how many images a replica draws together.
        batch_wait_timeout_s: where nothing runs, a batch begins when no request has come for as long as this.
        request_timeout_s: how long a request may take, the time it waits included.
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

    def __init__(self, options: Options):
        device = options.device
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = load_pipeline(options.source, getattr(torch, options.dtype), device)
        limit_threads(pipe.tokenizer, pipe.transformer)
        self.shared = SharedPipeline(pipe, options.name, options.max_batch_size, options.batch_wait_timeout_s)
        self.shared.warm_up()

    async def facts(self) -> Facts:
        return self.shared.facts()

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        async for drawn in self.shared.draw(request):
            yield drawn


class ApiReplica:
    """HTTP. One replica is enough: it computes nothing."""

    def __init__(self, model: DeploymentHandle, options: Options):
        self.model = model
        self.api = api.Api(self, options.request_timeout_s)
        self._counted = (-1.0, 0)
        self._counting = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.api.app()

    async def drain(self, timeout_s: float) -> bool:
        """Take no further requests, and wait for those in progress."""
        return await self.api.drain(timeout_s)

    async def facts(self) -> Facts:
        with _answering():
            return await self.model.facts.remote()

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """A request's results from one of the replicas.

        Raises:
            RequestError: if none has room for it, or the one that drew it ended.
        """
        results = self.model.options(stream=True).draw.remote(request)
        complete = False
        try:
            with _answering():
                async for drawn in results:
                    complete = drawn.final
                    yield drawn
        except (asyncio.CancelledError, GeneratorExit):
            if not complete:  # the client has left
                with suppress(Exception):  # what went wrong with the request meanwhile
                    results.cancel()
            raise

    async def replicas(self) -> int:
        """How many replicas of the model run; Ray is asked once a second at most, whoever asks here."""
        async with self._counting:
            when, count = self._counted
            if time.monotonic() - when > 1:
                count = await asyncio.to_thread(_running_replicas)
                self._counted = (time.monotonic(), count)
            return count


@contextmanager
def _answering() -> Iterator[None]:
    """Inside, what Ray says about a request becomes an answer."""
    try:
        yield
    except BackPressureError as error:
        message = "Too many requests are waiting: try again later."
        raise RequestError(message, code="rate_limit_exceeded", status=429, retry_after=1) from error
    except (RayActorError, DeploymentUnavailableError) as error:
        message = "The replica that drew this has ended: send the request again."
        raise RequestError(message, code="replica_lost", status=503, retry_after=1) from error


Model = serve.deployment(name="Model", max_queued_requests=QUEUED, health_check_timeout_s=60)(ModelReplica)
Api = serve.deployment(
    name="Api",
    max_ongoing_requests=CONNECTIONS,
    max_queued_requests=CONNECTIONS,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    ray_actor_options={"num_cpus": 0},
)(serve.ingress()(ApiReplica))


def _running_replicas() -> int:
    states = [
        deployment.replica_states
        for application in serve.status().applications.values()
        for name, deployment in application.deployments.items()
        if name == "Model"
    ]
    return sum(count for state in states for key, count in state.items() if key == "RUNNING")


def application(options: Options, **model_options: Any) -> serve.Application:
    """Both deployments.

    Args:
        options: of the pipeline and the API.
        model_options: of the deployment Model: its replicas, and what each of them needs.
    """
    # next to the batch that runs, the next one
    model_options.setdefault("max_ongoing_requests", 2 * options.max_batch_size)
    return Api.bind(Model.options(**model_options).bind(options), options)


def build(args: dict[str, Any]) -> serve.Application:
    """The application from the ``args`` of a Serve file, which are those of `Options`."""
    return application(Options(**args))
