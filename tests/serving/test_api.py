"""OpenAI's images API, with the official client, over a pipeline of this process."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from pipeline_helpers import same, seeded
from tiny_models import make_text_pipeline

openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
uvicorn = pytest.importorskip("uvicorn")

from dar_hf.serving import api  # noqa: E402
from dar_hf.serving.batches import SharedPipeline  # noqa: E402
from dar_hf.serving.requests import MAX_BODY, RequestError  # noqa: E402
from serving.helpers import free_port, image_of, make_client, post_raw  # noqa: E402


class Local:
    """A backend without Ray."""

    def __init__(self, shared):
        self.shared = shared

    async def info(self):
        return self.shared.info()

    def draw(self, request):
        return self.shared.draw(request)

    async def replicas(self):
        return 1


def make_routes(pipe):
    return api.ImagesApi(Local(SharedPipeline(pipe, "tiny")), request_timeout_s=30)


@contextmanager
def running(routes):
    """Inside, a server runs; gives its port."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(routes.app(), port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join()


@pytest.fixture
def routes(tiny_pipeline):
    return make_routes(tiny_pipeline)


@pytest.fixture
def port(routes):
    with running(routes) as port:
        yield port


@pytest.fixture
def client(port):
    with make_client(port) as client:
        yield client


@pytest.fixture
def slow_steps(tiny_pipeline, monkeypatch):
    """Each step takes at least this many seconds."""
    seconds = 0.2
    step = tiny_pipeline._output

    def slow(*args):
        time.sleep(seconds)
        return step(*args)

    monkeypatch.setattr(tiny_pipeline, "_output", slow)
    return seconds


def get(port, path):
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)


def test_images_are_the_pipelines(client, tiny_pipeline):
    answer = client.images.generate(prompt="shark", n=2, model="tiny", size="8x8", extra_body={"seed": 7})
    alone = [tiny_pipeline("shark", generator=seeded(7 + index)).images[0] for index in range(2)]
    assert same([image_of(part) for part in answer.data], alone)
    assert [part.seed for part in answer.data] == [7, 8]
    assert (answer.size, answer.output_format, answer.usage.output_tokens) == ("8x8", "png", 32)
    guided = client.images.generate(prompt="2", extra_body={"seed": 7, "guidance_scale": 4.0})
    assert same([image_of(guided.data[0])], tiny_pipeline(2, guidance_scale=4.0, generator=seeded(7)).images)


def test_an_image_of_no_seed_says_its_seed(client, tiny_pipeline):
    part = client.images.generate(prompt="ray").data[0]
    assert same([image_of(part)], tiny_pipeline("ray", generator=seeded(part.seed)).images)


def test_partial_images_are_the_streams_and_come_before_the_end(client, tiny_pipeline, slow_steps):
    events = client.images.generate(prompt="shark", stream=True, partial_images=3, extra_body={"seed": 7})
    received = [(time.monotonic(), event) for event in events]
    stream = [output.images for output in tiny_pipeline.stream("shark", generator=seeded(7))]
    assert len(stream) == 4
    assert [event.type for _, event in received] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert isinstance(received[0][1], openai.types.ImageGenPartialImageEvent)
    assert isinstance(received[3][1], openai.types.ImageGenCompletedEvent)
    assert [event.partial_image_index for _, event in received[:3]] == [0, 1, 2]
    assert all(same([image_of(event)], images) for (_, event), images in zip(received, stream, strict=True))
    assert received[3][1].usage.output_tokens == 16
    times = [when for when, _ in received]
    assert all(later - earlier > slow_steps / 2 for earlier, later in zip(times, times[1:], strict=False))


def test_a_stream_may_have_no_partial_images(client, tiny_pipeline):
    (event,) = client.images.generate(prompt="shark", stream=True, extra_body={"seed": 7})
    assert event.type == "image_generation.completed"
    assert same([image_of(event)], tiny_pipeline("shark", generator=seeded(7)).images)


def test_a_pipeline_that_draws_from_text(tiny_tokenizer):
    pipe = make_text_pipeline(tiny_tokenizer)
    with running(make_routes(pipe)) as port, make_client(port) as client:
        answer = client.images.generate(
            prompt="un café  rouge\n🍎", n=2, extra_body={"seed": 7, "guidance_scale": 3.0}
        )
        alone = [
            pipe(prompt="un café rouge 🍎", guidance_scale=3.0, generator=seeded(7 + index)).images[0]
            for index in range(2)
        ]
        assert same([image_of(part) for part in answer.data], alone)
        assert answer.usage.input_tokens == 6
        events = client.images.generate(prompt="shark", stream=True, partial_images=1, extra_body={"seed": 8})
        *_, last = events
        assert same([image_of(last)], pipe(prompt="shark", generator=seeded(8)).images)
        with pytest.raises(openai.BadRequestError, match="at most 300 characters"):
            client.images.generate(prompt="a" * 301)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").owned_by == "dar-hf"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("a/b")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": "whale"}, "prompt"), ({"n": 11}, "n"), ({"size": "9x9"}, "size"), ({"stream": True, "n": 2}, "n")],
)
def test_errors_are_openais(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "shark"} | fields)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_addresses_and_methods_that_there_are_not(port):
    for answer, status in ((get(port, "/v1/files"), 404), (get(port, "/v1/images/generations"), 405)):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    for path in ("/docs", "/openapi.json", "/v1/models/../../etc/passwd", "/v1/images/edits"):
        assert get(port, path).status_code == 404


def test_health_and_metrics(client, port):
    client.images.generate(prompt="shark", n=2)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="whale")
    assert get(port, "/health").json() == {"status": "ok", "replicas": 1}
    text = get(port, "/metrics").text
    assert 'dar_requests_total{status="200"} 1.0' in text and 'dar_requests_total{status="400"} 1.0' in text
    assert "dar_images_total 2.0" in text and "dar_requests_in_progress 0.0" in text


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", "Content-Length: 1\r\n", 400),
        (b"", "Content-Length: 9999999999\r\n", 413),
        (b"%x\r\n" % (MAX_BODY + 1) + b"x" * (MAX_BODY + 1) + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n", 413),
        (b'{"prompt":', "Content-Length: 100\r\n", 408),
    ],
    ids=["nonsense", "giant", "giant in chunks", "slow"],
)
def test_bodies_that_are_not_taken(port, client, monkeypatch, body, headers, status):
    monkeypatch.setattr(api, "BODY_TIMEOUT", 0.3)
    found, content = post_raw(port, body, headers)
    assert found == status and json.loads(content)["error"]["message"]
    assert client.images.generate(prompt="shark").data


def test_what_the_backend_says_becomes_an_answer(client, routes, monkeypatch):
    async def full(request):
        raise RequestError("full", code="rate_limit_exceeded", status=429, retry_after=3)
        yield

    async def broken(request):
        raise KeyError("secret")
        yield

    monkeypatch.setattr(routes.backend, "draw", full)
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="shark", stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    monkeypatch.setattr(routes.backend, "draw", broken)
    with pytest.raises(openai.InternalServerError) as fault:
        client.images.generate(prompt="shark")
    assert fault.value.status_code == 500 and "secret" not in fault.value.response.text


def test_a_request_that_takes_too_long(client, routes, tiny_pipeline, monkeypatch):
    steps = threading.Semaphore(0)
    output = tiny_pipeline._output

    def wait(*args):
        assert steps.acquire(timeout=60)
        return output(*args)

    monkeypatch.setattr(tiny_pipeline, "_output", wait)
    routes.request_timeout_s = 0.1
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="shark")
    assert caught.value.status_code == 503 and caught.value.code == "timeout"
    routes.request_timeout_s = 3
    steps.release(2)  # the last one of the request before, and the first one of the next
    events = client.images.generate(prompt="shark", stream=True, partial_images=3)
    next(events)
    with pytest.raises(openai.APIError, match="took more than"):
        list(events)
    routes.request_timeout_s = 30
    steps.release(10)
    assert client.images.generate(prompt="shark").data


def test_a_model_that_does_not_answer(client, routes, monkeypatch):
    async def wait():
        await asyncio.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(routes, "request_timeout_s", 0.1)
        patch.setattr(routes.backend, "info", wait)
        with pytest.raises(openai.InternalServerError, match="does not answer"):
            client.models.list()
    assert client.models.list().data


def test_draining_finishes_what_runs_and_takes_no_more(client, port, routes, slow_steps):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.images.generate(prompt="shark")))
    thread.start()
    while not routes.in_progress:
        time.sleep(0.01)
    routes.closing = True
    assert get(port, "/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="stopping"), make_client(port) as other:
        other.images.generate(prompt="shark")
    thread.join()
    assert answers[0].data


def test_drain_waits_for_what_runs(routes):
    async def wait():
        routes.in_progress = 1
        assert not await routes.drain(0.1)
        asyncio.get_running_loop().call_later(0.2, lambda: setattr(routes, "in_progress", 0))
        assert await routes.drain(5)

    asyncio.run(wait())
