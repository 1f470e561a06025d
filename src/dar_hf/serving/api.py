"""OpenAI's images API over HTTP, for any `Backend`: Ray Serve's in the server, a pipeline of this process in tests."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batches import Drawn
from .requests import MAX_BODY, Facts, ImageRequest, RequestError, no_such_model, read_request

logger = logging.getLogger(__name__)

BODY_TIMEOUT = 10.0  # seconds that a client has to send its request


class Backend(Protocol):
    """What draws."""

    async def facts(self) -> Facts:
        """What has to be known to check a request."""

    def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """The previews of a request, then its images. What raises `RequestError` becomes an answer."""

    async def replicas(self) -> int:
        """How many replicas can draw now."""


class Api:
    """The routes, and what they count.

    Args:
        backend: what draws.
        request_timeout_s: how long a request may take, the time it waits included.

    Attributes:
        closing: no further requests are taken.
        in_progress: how many answers are not finished yet.
    """

    def __init__(self, backend: Backend, request_timeout_s: float = 120.0):
        self.backend = backend
        self.request_timeout_s = request_timeout_s
        self.closing = False
        self.in_progress = 0
        self.metrics = Metrics()
        self._facts: Facts | None = None

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # the page of docs loads from elsewhere
        routes.get("/health")(self.health)
        routes.get("/metrics")(self.show_metrics)
        routes.get("/v1/models")(self.list_models)
        routes.get("/v1/models/{model:path}")(self.show_model)
        routes.post("/v1/images/generations")(self.generate)
        routes.add_exception_handler(RequestError, _answer_error)
        routes.add_exception_handler(HTTPException, _answer_http_error)
        routes.add_exception_handler(Exception, _answer_fault)
        return _Counting(routes, self)

    async def drain(self, timeout_s: float) -> bool:
        """Take no further requests, and wait for those in progress; returns whether all came to an end."""
        self.closing = True
        end = time.monotonic() + timeout_s
        while self.in_progress and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.in_progress == 0

    # Routes

    async def health(self) -> Response:
        """200 where a request can be drawn now, else 503."""
        replicas = await self.backend.replicas()
        status = "ok"
        if not replicas:
            status = "starting"
        if self.closing:
            status = "stopping"
        return JSONResponse({"status": status, "replicas": replicas}, 200 if status == "ok" else 503)

    async def show_metrics(self) -> Response:
        """Counts since this server started, as Prometheus reads them."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> Response:
        return JSONResponse({"object": "list", "data": [_model(await self.facts())]})

    async def show_model(self, model: str) -> Response:
        facts = await self.facts()
        if model != facts.name:
            raise no_such_model(model)
        return JSONResponse(_model(facts))

    async def generate(self, request: Request) -> Response:
        """Images of a class or a text; with ``stream``, previews while they are drawn."""
        if self.closing:
            raise RequestError("The server is stopping.", code=None, status=503, retry_after=5)
        body = await _read_body(request)
        facts = await self.facts()
        wanted = read_request(body, facts)
        results = self._draw_in_time(wanted)
        # what goes wrong before the first result is answered with a status, in both forms
        first = await anext(results)
        if wanted.stream:
            return StreamingResponse(self._events(first, results, facts), media_type="text/event-stream")
        async with aclosing(results):
            while not first.final:
                first = await anext(results)
        return JSONResponse(self._images(first, wanted, facts))

    async def facts(self) -> Facts:
        if self._facts is None:
            try:
                self._facts = await asyncio.wait_for(self.backend.facts(), self.request_timeout_s)
            except TimeoutError as error:
                message = "The model does not answer."
                raise RequestError(message, code="timeout", status=503, retry_after=5) from error
        return self._facts

    # Answers

    async def _draw_in_time(self, wanted: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """The backend's results; always with the final one, or an error.

        Raises:
            RequestError: where the backend fails, or takes too long.
        """
        results = self.backend.draw(wanted)
        end = time.monotonic() + self.request_timeout_s
        try:
            while (drawn := await asyncio.wait_for(anext(results, None), end - time.monotonic())) is not None:
                if drawn.final:
                    self.metrics.images.inc(len(drawn.images))
                yield drawn
                if drawn.final:
                    return
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
        raise RequestError("The images could not be drawn.", code=None, status=500)

    def _images(self, drawn: Drawn, wanted: ImageRequest, facts: Facts) -> dict[str, Any]:
        images = [
            {"b64_json": _base64(image), "seed": wanted.seed + index} for index, image in enumerate(drawn.images)
        ]
        return {
            "created": int(time.time()),
            "data": images,
            **_form(facts),
            "usage": _usage(facts, len(images)),
        }

    async def _events(self, drawn: Drawn, results: AsyncGenerator[Drawn, None], facts: Facts) -> AsyncIterator[str]:
        """Server-sent events: ``image_generation.partial_image`` and, last, ``image_generation.completed``."""
        index = 0
        try:
            while not drawn.final:
                yield _event("image_generation.partial_image", drawn, facts, partial_image_index=index)
                index += 1
                drawn = await anext(results)
            yield _event("image_generation.completed", drawn, facts, usage=_usage(facts, 1))
        except RequestError as error:  # the status is sent already
            yield _sse("error", {"type": "error", **error.body()})
        finally:
            await results.aclose()


class Metrics:
    """What the server counts, for Prometheus."""

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

    def __init__(self, app: ASGIApp, api: Api):
        self.app = app
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/images/"):
            await self.app(scope, receive, send)
            return
        status = 499  # of a client that leaves before the answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics = self.api.metrics
        self.api.in_progress += 1
        try:
            with metrics.in_progress.track_inprogress(), metrics.seconds.time():
                await self.app(scope, receive, noting)
        finally:
            self.api.in_progress -= 1
            metrics.requests.labels(str(status)).inc()


async def _read_body(request: Request) -> bytes:
    """The body of a request, of which no more is read than is taken.

    Raises:
        RequestError: for one that is too long, or comes too slowly.
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


def _model(facts: Facts) -> dict[str, Any]:
    return {"id": facts.name, "object": "model", "created": facts.created, "owned_by": "dar-hf"}


def _form(facts: Facts) -> dict[str, str]:
    return {"background": "opaque", "output_format": "png", "quality": "auto", "size": facts.size}


def _usage(facts: Facts, images: int) -> dict[str, Any]:
    prompt, image = facts.prompt_tokens, facts.image_tokens * images
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
        "output_tokens": image,
        "total_tokens": prompt + image,
    }


def _event(kind: str, drawn: Drawn, facts: Facts, **more: Any) -> str:
    (image,) = drawn.images
    data = {"type": kind, "b64_json": _base64(image), "created_at": int(time.time()), **_form(facts), **more}
    return _sse(kind, data)


def _sse(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """For addresses and methods that there are not."""
    assert isinstance(error, HTTPException)
    answer = RequestError(f"{error.detail}: {request.method} {request.url.path[:100]}", code=None)
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def _answer_fault(request: Request, error: Exception) -> Response:
    answer = RequestError("The server made a mistake.", code=None, status=500)
    return JSONResponse(answer.body(), 500)
