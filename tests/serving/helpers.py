"""What the tests of the server share: clients, and images of answers."""

import base64
import io
import socket

import PIL.Image


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_client(port: int, **options):
    """The official client, which goes through no proxy and does not try again."""
    import httpx
    import openai

    options = {"max_retries": 0, "timeout": 60} | options
    http_client = httpx.Client(trust_env=False, limits=httpx.Limits(max_connections=None))
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http_client, **options)


def image_of(part) -> PIL.Image.Image:
    """The image of an answer's element, or of an event."""
    return PIL.Image.open(io.BytesIO(base64.b64decode(part.b64_json)))


def post_raw(port: int, body: bytes, headers: str = "", path: str = "/v1/images/generations", timeout: float = 30):
    """A request as bytes; returns the status and the body of the answer, or 0 if the server hung up."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}\r\n"
        )
        answer = b""
        try:
            connection.sendall(head.encode() + body)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:  # it does not wait for the end of what it does not take
            pass
    head, _, content = answer.partition(b"\r\n\r\n")
    if not head:
        return 0, b""
    return int(head.split()[1]), content
