"""What the page opens for whoever writes requests by hand: uploads, and nothing else of the machine."""

import io
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
from pipeline_helpers import picture
from tiny_models import make_text_pipeline

APP = Path(__file__).parents[2] / "examples" / "app.py"
SHARED = [2.0, 7, False, 0.0]  # guidance, seed, another seed each time, pause
MARK = {"_type": "gradio.FileData"}
REFUSED = "not uploaded here"


class Visitor:
    """Requests to a running page, and what it opened for them."""

    def __init__(self, address, opened):
        self.address, self.opened = address.rstrip("/"), opened

    def send(self, path, body=None, headers=None, timeout=20):
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/gradio_api/{path}", body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def upload(self, content, name="a.png"):
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--x--\r\n"
        return json.loads(self.send("upload", body, {"Content-Type": "multipart/form-data; boundary=x"}))[0]

    def press(self, button, *inputs):
        """(kind, data) of the last event."""
        event = json.loads(self.send(f"call/{button}", {"data": [*SHARED, *inputs]}))["event_id"]
        lines = self.send(f"call/{button}/{event}").splitlines()
        kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return kinds[-1], data[-1]

    def files(self, file):
        """The answers of the four buttons that take files."""
        yield self.press("reconstruct", file)
        yield self.press("vary", file, 0, 0.5)
        yield self.press("lay_out", file, 4, [0])
        yield self.press("explain", file, file)


@pytest.fixture
def serve(app, tmp_path, monkeypatch):
    """A function that serves the page of a pipeline; returns a visitor."""
    (tmp_path / "uploads").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    opened, open_regular = [], app.open_regular

    def recorded(path):
        opened.append(path)
        return open_regular(path)

    monkeypatch.setattr(app, "open_regular", recorded)
    pages = []

    def start(pipeline):
        pages.append(app.build(app.Artist(pipeline)))
        _, address, _ = app.launch(pages[-1], prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        return Visitor(address, opened)

    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture
def visitor(serve, tiny_pipeline):
    return serve(tiny_pipeline)


def png_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_an_upload_is_read_with_and_without_its_mark(visitor):
    path = visitor.upload(png_of(picture()))
    for file in ({"path": path, "meta": MARK}, {"path": path}, {"path": path, "meta": "odd", "url": "http://[::1]/"}):
        assert [kind for kind, _ in visitor.files(file)] == ["complete"] * 4
    assert visitor.opened == [path] * 15


def test_no_other_file_is_opened_whatever_the_request_looks_like(visitor, tmp_path):
    secret, folder = tmp_path / "secret.png", tmp_path / "uploads"
    secret.write_bytes(png_of(picture()))
    (folder / "link.png").symlink_to(secret)
    (folder / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(tmp_path / "pipe.png")
    paths = [
        secret,
        f"{folder}/../secret.png",
        f"{folder}x/../secret.png",
        os.path.relpath(secret),
        f"file://{secret}",
        folder / "link.png",
        folder / "folder" / "secret.png",
        folder / "pipe.png",
        tmp_path / "pipe.png",
        folder,
        folder / "gone.png",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/environ",
        f"{secret}\0.png",
        "a" * 5000,
        "",
        ".",
        "http://127.0.0.1:9/a.png",
        visitor.address + "/gradio_api/file=" + str(secret),
    ]
    files = [{"path": str(path)} | more for path in paths for more in ({}, {"meta": MARK})]
    files += [{"path": str(secret)} | more for more in ({"meta": {}}, {"is_stream": True, "meta": MARK}, {"url": "x"})]
    files += [{"path": odd} for odd in (3, True, [str(secret)], {"path": str(secret)})]
    for number, file in enumerate(files):
        button, *more = [("reconstruct",), ("vary", 0, 0.5), ("lay_out", 4, [0])][number % 3]
        kind, data = visitor.press(button, file, *more)
        assert kind == "error" and REFUSED in data, file
        assert str(tmp_path) not in data
    for file in ({"path": str(secret)}, {"path": str(tmp_path / "pipe.png")}):
        assert [kind for kind, _ in visitor.files(file)] == ["error"] * 4
        assert REFUSED in visitor.press("draw", file, 16)[1]  # in the place of a number
        assert REFUSED in visitor.press("lay_out", None, 4, [[file]])[1]
        answer = visitor.send("run/reconstruct", {"data": [*SHARED, file]})
        assert "data:image" not in answer
    assert visitor.opened == []
    assert visitor.press("draw", 0, 16)[0] == "complete"  # nothing waits for a pipe


@pytest.mark.parametrize("file", ["text", 3, True, ["a"], [], {"url": "data:image/png;base64,AAAA"}, {}])
def test_what_is_no_file_is_a_clear_error(visitor, file):
    for kind, data in visitor.files(file):
        assert kind == "error" and ("not the inputs" in data or "Choose a picture first" in data)
    assert visitor.opened == []


def test_inputs_of_another_number_or_type_are_clear_errors(visitor):
    assert "not the inputs" in visitor.press("draw")[1]
    event = json.loads(visitor.send("call/draw", {"data": []}))["event_id"]
    assert "not the inputs" in visitor.send(f"call/draw/{event}")
    for new_seed in ("no", 0, None, [], 2.5):
        event = json.loads(visitor.send("call/draw", {"data": [2.0, 7, new_seed, 0.0, 1, 16]}))["event_id"]
        assert "must be true or false" in visitor.send(f"call/draw/{event}")


def test_prompts_name_no_file(serve, tiny_tokenizer, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png_of(picture()))
    visitor = serve(make_text_pipeline(tiny_tokenizer))
    assert visitor.press("draw", "", "a red apple", 16)[0] == "complete"
    assert "? apple \\u732b" in visitor.press("draw", "", "\ud800 apple 猫", 16)[1]  # half of a surrogate pair
    assert str(secret) in visitor.press("draw", "", str(secret), 16)[1]  # a text like any other
    for file in ({"path": str(secret)}, {"path": str(secret), "meta": MARK}):
        for inputs in (("", file, 16), (file, "apple", 16)):
            kind, data = visitor.press("draw", *inputs)
            assert kind == "error" and REFUSED in data
        assert REFUSED in visitor.press("lay_out", "", None, 4, [file])[1]
    assert "The prompt must be a text, not empty" in visitor.press("draw", "", {"url": "http://[::1]/"}, 16)[1]
    assert "at most 300 characters, not 100000" in visitor.press("draw", "", "a" * 100_000, 16)[1]
    assert visitor.opened == []


def test_no_request_uses_the_machines_hub_token(visitor, monkeypatch):
    """Gradio's run history does, for those who come from this machine; behind a proxy all seem to."""
    monkeypatch.setattr("gradio.workflow._get_locally_saved_hf_token", lambda: "hf_of_the_owner")
    used = []
    monkeypatch.setattr("gradio.history.HfApi", lambda *args, **options: used.append(options), raising=False)
    monkeypatch.setattr("gradio.routes.HfApi", lambda *args, **options: used.append(options), raising=False)
    visitor.send("run-history/buckets")
    visitor.send("run-history/connect", {"bucket_id": "owner/bucket"})
    assert used == []


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder", "large"])
def test_a_path_that_is_no_regular_file_does_not_block(app, name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "large", "wb") as file:
        file.truncate(app.MAX_FILE + 1)
    with pytest.raises(ValueError, match="no picture"):
        app.read_upload(str(tmp_path / name), 8, 8, 3)


def resident(field):
    """Megabytes of this process, from the system's own account."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is measured on Linux")
def test_four_large_uploads_at_once_need_the_memory_of_one(app, tmp_path):
    """7000x7000 pixels of 16 bits are 93 MB, and as RGB in pillow's four bytes 187 MB."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((7000, 7000), dtype=np.uint16)).save(path, compress_level=1)
    child = os.fork()  # a process of its own, for its peak
    if child == 0:
        code = 1
        try:
            app.READER = ThreadPoolExecutor(1)  # threads do not come along
            before = resident("VmRSS")
            threads = [threading.Thread(target=app.read_upload, args=(str(path), 256, 256, 3)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peak, left = resident("VmHWM") - before, resident("VmRSS") - before
            print(f"peak {peak:.0f} MB, left {left:.0f} MB")
            code = int(not (100 < peak < 450 and left < 100))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
