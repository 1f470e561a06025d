"""OpenAI's images API over HTTP, for any `Backend`: Ray Serve's in the server, a pipeline of this process in tests."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batches import StepImages
from .requests import MAX_BODY, ImageRequest, ModelInfo, RequestError, no_such_model, read_request

logger = logging.getLogger(__name__)

BODY_TIMEOUT = 10.0  # seconds that a client has to send its request


class Backend(Protocol):
    """What draws the images."""

    async def info(self) -> ModelInfo:
        """What has to be known to check a request."""

    def draw(self, request: ImageRequest) -> AsyncGenerator[StepImages, None]:
        """The previews of a request, then its images; a `RequestError` becomes the answer."""

    async def replicas(self) -> int:
        """How many replicas can draw now."""


class ImagesApi:
    """The routes and their metrics.

    Args:
        backend: what draws the images.
        request_timeout_s: how long a request may take, including the time it waits.

    Attributes:
        closing: whether new requests are refused.
        in_progress: number of unfinished answers.
    """

    def __init__(self, backend: Backend, request_timeout_s: float = 120.0):
        self.backend = backend
        self.request_timeout_s = request_timeout_s
        self.closing = False
        self.in_progress = 0
        self.metrics = Metrics()
        self._info: ModelInfo | None = None

    def app(self) -> ASGIApp:
        """The ASGI application."""
        # without FastAPI's own pages, which load scripts from other sites
        routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        routes.get("/health")(self.health)
        routes.get("/metrics")(self.show_metrics)
        routes.get("/v1/models")(self.list_models)
        routes.get("/v1/models/{model:path}")(self.show_model)
        routes.post("/v1/images/generations")(self.generate)
        routes.add_exception_handler(RequestError, _answer_error)
        routes.add_exception_handler(HTTPException, _answer_http_error)
        routes.add_exception_handler(Exception, _answer_bug)
        return _Counting(routes, self)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for those in progress; returns whether all of them ended."""
        self.closing = True
        end = time.monotonic() + timeout_s
        while self.in_progress and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.in_progress == 0

    # Routes

    async def health(self) -> Response:
        """200 if a request can be drawn now, else 503."""
        replicas = await self.backend.replicas()
        status = "ok"
        if not replicas:
            status = "starting"
        if self.closing:
            status = "stopping"
        code = 200 if status == "ok" else 503
        return JSONResponse({"status": status, "replicas": replicas}, code)

    async def show_metrics(self) -> Response:
        """Metrics since this server started, in Prometheus' format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [_model(await self.info())]})

    async def show_model(self, model: str) -> Response:
        """The model by its name."""
        info = await self.info()
        if model != info.name:
            raise no_such_model(model)
        return JSONResponse(_model(info))

    async def generate(self, request: Request) -> Response:
        """Images of a class or a text; with ``stream``, previews while they are drawn."""
        if self.closing:
            raise RequestError("The server is stopping.", code=None, status=503, retry_after=5)
        body = await _read_body(request)
        info = await self.info()
        wanted = read_request(body, info)
        results = self._draw_in_time(wanted)
        # the first result is awaited before the answer begins: until then an error has a status of its own
        first = await anext(results)
        if wanted.stream:
            return StreamingResponse(self._events(first, results, info), media_type="text/event-stream")
        await results.aclose()  # without previews, the first result is the last one
        return JSONResponse(_images(first, wanted, info))

    async def info(self) -> ModelInfo:
        """The backend's answer, which is asked for once."""
        if self._info is None:
            try:
                self._info = await asyncio.wait_for(self.backend.info(), self.request_timeout_s)
            except TimeoutError as error:
                message = "The model does not answer."
                raise RequestError(message, code="timeout", status=503, retry_after=5) from error
        return self._info

    # Answers

    async def _draw_in_time(self, wanted: ImageRequest) -> AsyncGenerator[StepImages, None]:
        """The backend's results, of which the last one is final.

        Raises:
            RequestError: if the backend fails or takes too long.
        """
        results = self.backend.draw(wanted)
        end = time.monotonic() + self.request_timeout_s
        try:
            final = False
            while not final:
                step = await asyncio.wait_for(anext(results), end - time.monotonic())
                final = step.final
                if final:
                    self.metrics.images.inc(len(step.images))
                yield step
        except TimeoutError as error:
            message = f"The request took more than {self.request_timeout_s:g} s."
            raise RequestError(message, code="timeout", status=503, retry_after=5) from error
        except RequestError:
            raise
        except Exception as error:
            logger.exception("a request failed")
            raise RequestError("The images could not be drawn.", code=None, status=500) from error
        finally:
            await results.aclose()

    async def _events(
        self, step: StepImages, results: AsyncGenerator[StepImages, None], info: ModelInfo
    ) -> AsyncIterator[str]:
        """Server-sent events: ``image_generation.partial_image`` and, last, ``image_generation.completed``."""
        index = 0
        try:
            while not step.final:
                yield _event("image_generation.partial_image", step, info, partial_image_index=index)
                index += 1
                step = await anext(results)
            yield _event("image_generation.completed", step, info, usage=_usage(info, 1))
        except RequestError as error:  # the status has been sent
            yield _sse("error", {"type": "error", **error.body()})
        finally:
            await results.aclose()


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dar_requests", "Answers to image requests, by HTTP status", ["status"], registry=self.registry
        )
        self.images = Counter("dar_images", "Images drawn", registry=self.registry)
        self.seconds = Histogram(
            "dar_request_seconds", "Time from an image request to the end of its answer", registry=self.registry
        )
        self.in_progress = Gauge("dar_requests_in_progress", "Image requests in progress", registry=self.registry)


class _Counting:
    """Counts image requests until the end of their answers."""

    def __init__(self, app: ASGIApp, api: ImagesApi):
        self.app = app
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/images/"):
            await self.app(scope, receive, send)
            return
        status = 499  # nginx's, for a client that leaves before the answer

        async def remember_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics = self.api.metrics
        self.api.in_progress += 1
        try:
            with metrics.in_progress.track_inprogress(), metrics.seconds.time():
                await self.app(scope, receive, remember_status)
        finally:
            self.api.in_progress -= 1
            metrics.requests.labels(str(status)).inc()


async def _read_body(request: Request) -> bytes:
    """The body of a request; one that is too long is not read to its end.

    Raises:
        RequestError: for a body that is too long or arrives too slowly.
    """
    too_long = RequestError(f"The body must be at most {MAX_BODY} bytes.", code="body_too_large", status=413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > MAX_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_long
    except TimeoutError as error:
        raise RequestError(f"The body took more than {BODY_TIMEOUT:g} s.", code="timeout", status=408) from error
    except ClientDisconnect as error:
        raise RequestError("The client has left.", code=None, status=499) from error
    return bytes(body)


# OpenAI's forms


def _model(info: ModelInfo) -> dict[str, Any]:
    return {"id": info.name, "object": "model", "created": info.created, "owned_by": "dar-hf"}


def _images(step: StepImages, wanted: ImageRequest, info: ModelInfo) -> dict[str, Any]:
    """The answer of a request without ``stream``; each image says its seed."""
    images = [{"b64_json": _base64(image), "seed": wanted.seed + index} for index, image in enumerate(step.images)]
    return {"created": int(time.time()), "data": images, **_format(info), "usage": _usage(info, len(images))}


def _format(info: ModelInfo) -> dict[str, str]:
    return {"background": "opaque", "output_format": "png", "size": info.size}


def _usage(info: ModelInfo, images: int) -> dict[str, Any]:
    prompt = info.prompt_tokens
    image = info.image_tokens * images
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
        "output_tokens": image,
        "total_tokens": prompt + image,
    }


def _event(kind: str, step: StepImages, info: ModelInfo, **more: Any) -> str:
    (image,) = step.images
    data = {"type": kind, "b64_json": _base64(image), "created_at": int(time.time()), "quality": "auto"}
    return _sse(kind, data | _format(info) | more)


def _sse(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """For unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    answer = RequestError(f"{error.detail}: {request.method} {request.url.path[:100]}", code=None)
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """For what nobody expected; the server's log has the traceback."""
    answer = RequestError("Internal server error.", code=None, status=500)
    return JSONResponse(answer.body(), answer.status)
