"""``dar-hf serve``: the server on this machine, with a Ray of its own that nothing else can reach."""

import argparse
import contextlib
import io
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ..pipeline_dar import DARPipeline
from ..utils.commands import FAILURE, CommandError, add_precision_options, port_option, positive_option
from ..utils.errors import one_line
from ..utils.loading import LoadError
from .server import QUEUED, ServerOptions, application

OBJECT_STORE = 200 * 2**20  # bytes; images are sent directly
KEEP_ALIVE = 15  # seconds that a connection stays open between requests
ERRORS_ONLY = LoggingConfig(log_level="ERROR", enable_access_log=False)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="dar-hf serve", description="Serve a pipeline with OpenAI's images API.")
    parser.add_argument(
        "--model", "--pipeline", help="pipeline folder or Hub id; default the package's emoji pipeline"
    )
    parser.add_argument("--model_name", help="the model's name in the API; default the last part of --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default this machine only")
    parser.add_argument("--port", type=port_option, default=8000)
    parser.add_argument("--replicas", type=positive_option, default=1, help="copies of the model, one process each")
    parser.add_argument(
        "--cpus", type=positive_option, default=1, help="cores of each replica, which set its number of threads"
    )
    parser.add_argument("--max_batch_size", type=positive_option, default=16, help="images drawn together")
    parser.add_argument(
        "--batch_wait",
        type=positive_option,
        default=50,
        help="milliseconds: if nothing is being drawn, a batch begins when no request has arrived for this long",
    )
    parser.add_argument(
        "--max_queued_requests",
        type=positive_option,
        default=QUEUED,
        help="requests that wait for room on a replica; further ones are answered with 429",
    )
    parser.add_argument(
        "--request_timeout", type=positive_option, default=120, help="seconds, including the time it waits"
    )
    add_precision_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what is running. A second signal ends at once."""
    args = make_parser().parse_args(argv)
    options = ServerOptions(
        model=args.model,
        model_name=args.model_name,
        device=args.device.type,  # Ray chooses the GPU
        dtype=args.dtype,
        max_batch_size=args.max_batch_size,
        batch_wait_timeout_s=args.batch_wait / 1000,
        request_timeout_s=args.request_timeout,
    )
    options = replace(options, model=options.source)  # replicas may run in another folder
    check_model(options.source)
    check_port(args.host, args.port)
    start_ray(args)
    try:
        handle = deploy(args, options)
        stop = stop_signals()
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {options.name} at http://{host}:{args.port}/v1 (replicas: {args.replicas})", flush=True)
        stop.wait()
        print("finishing what is running", flush=True)
        if not drain(handle, args.request_timeout):
            print("some requests were not finished in time", flush=True)
    finally:
        stop_ray()


def drain(handle: DeploymentHandle, timeout_s: float) -> bool:
    """Finish what is running; returns whether that was possible in time."""
    try:
        return handle.drain.remote(timeout_s).result(timeout_s=timeout_s + 10)
    except (TimeoutError, RayError):
        return False


def check_model(source: str) -> None:
    """Refuse what has no configuration of a pipeline, before anything is started.

    Raises:
        LoadError: that says why.
    """
    try:
        DARPipeline.load_config(source)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load the pipeline at {source}: {one_line(error)}") from error


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        CommandError: that says why.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}, port {port}: {one_line(error)}", FAILURE) from error


def start_ray(args: argparse.Namespace) -> None:
    """Start Ray on this machine, and Serve's HTTP proxy."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # of this process
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, args.replicas * args.cpus),
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": args.host,
            "port": args.port,
            # a little more than the application's own limit, which is answered in the API's form
            "request_timeout_s": args.request_timeout + 10,
            "keep_alive_timeout_s": KEEP_ALIVE,
        },
        logging_config=ERRORS_ONLY,
    )


def stop_ray() -> None:
    """End all of Ray's processes."""
    with quiet():  # Ray reports actors that it ends itself as failures
        serve.shutdown()
        ray.shutdown()


def deploy(args: argparse.Namespace, options: ServerOptions) -> DeploymentHandle:
    """Start the replicas, and wait for them.

    Raises:
        CommandError: if they do not start.
    """
    resources: dict[str, Any] = {"num_cpus": args.cpus}
    if args.device.type == "cuda":
        resources["num_gpus"] = 1 / math.ceil(args.replicas / torch.cuda.device_count())
    served = application(
        options,
        num_replicas=args.replicas,
        max_queued_requests=args.max_queued_requests,
        ray_actor_options=resources,
        max_constructor_retry_count=1,
    )
    try:
        with quiet():  # the error below says why, in one line
            return serve.run(served, name="dar", logging_config=ERRORS_ONLY)
    except RuntimeError as error:
        raise CommandError(f"the model does not start: {start_failure() or one_line(error)}", FAILURE) from error


def start_failure() -> str:
    """Why a replica did not start, as far as Ray says: the last line of its traceback."""
    application = serve.status().applications.get("dar")
    if application is None:
        return ""
    messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what Ray's processes print is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def stop_signals() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set; a second signal does what it does elsewhere."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop
