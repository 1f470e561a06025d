"""``dar-hf serve``: Ray, two replicas, and the official client on loopback.

Ray takes long to start: the tests share one server, which the last of them that uses it stops. The others share a Ray
of this process.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from pipeline_helpers import same, seeded
from tiny_models import make_pipeline, make_text_pipeline, make_tokenizer, make_transformer

pytest.importorskip("ray")
openai = pytest.importorskip("openai")

from ray.serve.schema import ServeDeploySchema  # noqa: E402

from dar_hf.serving import command  # noqa: E402
from dar_hf.serving.server import Api, Model, ServerOptions, build  # noqa: E402
from dar_hf.utils.commands import CommandError  # noqa: E402
from dar_hf.utils.loading import LoadError  # noqa: E402
from serving.helpers import free_port, image_of, make_client, post_raw  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOGETHER = 16
QUEUED = 24  # also holds requests for which Ray chooses a replica: all that come together


class Server:
    """A running ``dar-hf serve``."""

    def __init__(self, model, *options):
        self.port = free_port()
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        command = [sys.executable, "-m", "dar_hf", "serve", "--model", model, "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self.reader.start()

    def client(self, **options):
        return make_client(self.port, **options)

    def get(self, path):
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False)

    def replicas(self):
        """The processes of the replicas that hold the model."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ServeReplica:dar:Model" in " ".join(child.cmdline())]

    def memory(self):
        """Bytes that the server's processes have for themselves."""
        total = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().uss
        return total

    def in_progress(self, count):
        """Whether this many image requests are being answered."""
        return f"dar_requests_in_progress {count}.0" in self.get("/metrics").text

    def end(self):
        """Stop it, if it runs."""
        self.process.terminate()
        self.process.wait(timeout=120)
        self.reader.join()


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(make_tokenizer(), make_transformer())


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model):
    server = Server(model, "--replicas", 2, "--max_queued_requests", QUEUED)
    yield server
    server.end()


def drawn_alone(pipe, seed, label):
    return pipe(label, generator=seeded(seed)).images


@contextmanager
def suspended(processes):
    """Inside, these processes stand still."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def draw(client, seed, label, **fields):
    answer = client.images.generate(prompt=str(label), extra_body={"seed": seed}, **fields)
    return [image_of(part) for part in answer.data]


def test_an_image_is_the_pipelines(server, pipe):
    with server.client() as client:
        assert same(draw(client, 5, "shark"), drawn_alone(pipe, 5, "shark"))
        assert [found.id for found in client.models.list().data] == ["tiny"]
    assert server.get("/health").json() == {"status": "ok", "replicas": 2}
    assert "dar_images_total" in server.get("/metrics").text


def test_partial_images_are_the_streams(server, pipe):
    with server.client() as client:
        events = list(client.images.generate(prompt="2", stream=True, partial_images=3, extra_body={"seed": 6}))
    stream = [output.images for output in pipe.stream(2, generator=seeded(6))]
    assert [event.type.split(".")[1] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert all(same([image_of(event)], images) for event, images in zip(events, stream, strict=True))


def test_many_clients_at_once(server, pipe):
    with server.client() as client, ThreadPoolExecutor(TOGETHER) as pool:
        images = list(pool.map(lambda seed: draw(client, seed, seed % 5), range(TOGETHER)))
    assert all(same(found, drawn_alone(pipe, seed, seed % 5)) for seed, found in enumerate(images))


def test_clients_that_leave_free_their_places(server, pipe):
    def leave(seed):
        with pytest.raises(openai.APITimeoutError), server.client(timeout=1) as client:
            draw(client, seed, 1)

    with suspended(server.replicas()), ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(8)))
        wait_until(lambda: server.in_progress(0))
    with server.client() as client:
        assert same(draw(client, 5, "shark"), drawn_alone(pipe, 5, "shark"))


def abuse(server, index):
    """What a client does that is not welcome; the answer is an error, or nobody waits for it."""
    kind = index % 5
    if kind == 0:
        assert post_raw(server.port, b"{" * 2000, "Content-Length: 2000\r\n")[0] == 400
    elif kind == 1:
        assert post_raw(server.port, b"x" * 30_000_000, "Content-Length: 30000000\r\n")[0] in (413, 0)
    elif kind == 2:  # does not send the rest
        with pytest.raises(TimeoutError):
            post_raw(server.port, b"{", "Content-Length: 100\r\n", timeout=1)
    elif kind == 3:  # leaves at once
        with pytest.raises(openai.APITimeoutError), server.client(timeout=0.01) as client:
            client.images.generate(prompt="shark", n=10)
    else:  # leaves in the middle of a stream
        with server.client() as client:
            events = client.images.generate(prompt="shark", stream=True, partial_images=3)
            next(iter(events))
            events.close()


def test_abusive_clients_leave_it_healthy(server, pipe):
    def all_at_once():
        with ThreadPoolExecutor(50) as pool:
            list(pool.map(lambda index: abuse(server, index), range(50)))

    all_at_once()
    before = server.memory()
    all_at_once()
    with server.client() as client:
        assert same(draw(client, 5, "shark"), drawn_alone(pipe, 5, "shark"))
    wait_until(lambda: server.in_progress(0))
    wait_until(lambda: server.memory() <= 1.1 * before)
    assert not [line for line in server.lines if "Traceback" in line]


def test_more_than_can_wait_are_told_so(server):
    """Each replica takes two batches of requests, and more wait; Ray counts them roughly."""
    taken = 2 * 2 * 16 + QUEUED
    asked = taken + 20
    rejected = []

    def ask(seed):
        try:
            return len(draw(client, seed, 1))
        except openai.RateLimitError as error:
            assert error.code == "rate_limit_exceeded" and error.response.headers["retry-after"] == "1"
            rejected.append(seed)
            return 0

    with server.client() as client, ThreadPoolExecutor(asked) as pool:
        with suspended(server.replicas()):
            waiting = [pool.submit(ask, seed) for seed in range(asked)]
            wait_until(lambda: len(rejected) >= 10)
        counts = [future.result() for future in waiting]
    assert sum(counts) == asked - len(rejected) > 0
    assert server.get("/health").status_code == 200


def test_a_replica_that_is_killed_loses_only_what_it_drew(server, pipe):
    """Ray starts another one in its place."""
    victim, other = server.replicas()
    images = [drawn_alone(pipe, seed, 1) for seed in range(8)]
    outcomes = [[] for _ in range(8)]
    stop = threading.Event()

    def ask(seed):
        while not stop.is_set():
            try:
                assert same(draw(client, seed, 1), images[seed])
                outcomes[seed].append("drawn")
            except openai.InternalServerError as error:
                assert error.status_code == 503 and error.code == "replica_lost"
                outcomes[seed].append("lost")

    with server.client() as client, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, seed) for seed in range(8)]
        try:
            wait_until(lambda: all(outcomes))
            with suspended([victim, other]):  # each with its share of the eight requests
                wait_until(lambda: server.in_progress(8))
                time.sleep(0.5)
                victim.kill()
            counts = list(map(len, outcomes))
            wait_until(lambda: all(len(found) > count + 1 for found, count in zip(outcomes, counts, strict=True)))
        finally:
            stop.set()
        for future in asking:
            future.result()
    lost = [found.count("lost") for found in outcomes]
    assert sum(lost) >= 1 and max(lost) == 1
    wait_until(lambda: len(set(server.replicas()) - {victim}) == 2, seconds=120)
    wait_until(lambda: server.get("/health").json()["replicas"] == 2, seconds=120)
    assert other in server.replicas()


def test_sigterm_finishes_what_is_running(server, pipe):
    """The last test of the shared server."""
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        with suspended(server.replicas()):
            running = [pool.submit(draw, client, seed, 1, n=2) for seed in range(8)]
            wait_until(lambda: server.in_progress(8))
            server.process.terminate()
            wait_until(lambda: "finishing what is running\n" in server.lines)
            wait_until(lambda: server.get("/health").status_code == 503)
        for seed, future in enumerate(running):
            assert same(future.result()[:1], drawn_alone(pipe, seed, 1))
    assert server.process.wait(timeout=60) == 0, server.lines
    with pytest.raises(httpx.ConnectError):
        server.get("/health")


@pytest.fixture(scope="module")
def own_ray():
    """A Ray of this process; gives the options of ``dar-hf serve`` that started it."""
    args = command.make_parser().parse_args(["--port", str(free_port())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        command.start_ray(args)
        yield args
        command.stop_ray()


def test_a_model_that_does_not_load_is_one_line(own_ray, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged/transformer/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CommandError, match="the model does not start: .*model.safetensors is damaged") as caught:
        command.deploy(own_ray, ServerOptions(str(tmp_path / "damaged"), device="cpu"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipeline_that_draws_from_text(own_ray, tmp_path):
    pipe = make_text_pipeline(make_tokenizer())
    pipe.save_pretrained(tmp_path / "words")
    command.deploy(own_ray, ServerOptions(str(tmp_path / "words"), device="cpu"))
    with make_client(own_ray.port) as client:
        assert [model.id for model in client.models.list().data] == ["words"]
        for prompt in ("a red apple", "été 🍎"):
            assert same(draw(client, 3, prompt), pipe(prompt=prompt, generator=seeded(3)).images)


def test_what_cannot_be_served_is_refused_before_ray_starts(model, tmp_path):
    with pytest.raises(LoadError, match="cannot load the pipeline"):
        command.main(["--model", str(tmp_path)])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CommandError, match="cannot listen on 127.0.0.1"):
            command.main(["--model", str(model), "--port", str(taken.getsockname()[1])])


def test_the_serve_file_is_understood():
    content = yaml.safe_load((ROOT / "examples/serve.yaml").read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema(**content).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert ServerOptions(**application.args).max_batch_size == 32
    assert {part.name for part in application.deployments} == {Model.name, Api.name}
    assert build(application.args)._bound_deployment.name == "Api"
