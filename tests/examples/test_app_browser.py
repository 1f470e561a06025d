"""The page as people use it: the command, headless Chromium, the pipeline that comes with the package."""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dar_hf
from dar_hf.utils.pictures import image_grid

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver"),
]

APP = Path(__file__).parents[2] / "examples" / "app.py"
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
# what is not on the page yet, or was replaced while it was looked at
NOT_YET = [StaleElementReferenceException, IndexError]
# every picture that appears, as (milliseconds since the start, step, steps, PNG)
WATCH = """
window.seen = []; window.start = performance.now();
window.watcher?.disconnect();
window.watcher = new MutationObserver(() => {
    const view = document.querySelector('.view[data-step]'), image = view?.querySelector('.now img');
    if (image && image.src !== window.seen.at(-1)?.at(-1))
        window.seen.push([performance.now() - window.start, +view.dataset.step, +view.dataset.steps, image.src]);
});
window.watcher.observe(document.body, {subtree: true, childList: true, attributes: true});
window.seen.push([0, 0, 0, document.querySelector('.view[data-step] .now img')?.src]);
"""


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(*options):
    """A page served by the command; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--host", "127.0.0.1", "--port", str(port), *options]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert server.poll() is None, "the command ended"
            assert time.monotonic() < deadline, "the command does not serve the page"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        assert server.poll() is None, "the server ended"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def address():
    """The page of a pipeline that draws classes."""
    with serving("--model", dar_hf.sample_pipeline("mnist")) as address:
        yield address


class Browser:
    """One visitor."""

    def __init__(self, address: str, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for name in ("headless", *QUIET.split(), "disable-sync", f"user-data-dir={profile}", "window-size=1200,900"):
            options.add_argument(f"--{name}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.get(address)
        self.wait(lambda: self.button("Draw") and self.field("Seconds") and self.visible(".view"))

    def wait(self, condition, seconds=60):
        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.05, ignored_exceptions=NOT_YET)
        return waiting.until(lambda _: condition())

    def do(self, action):
        """Look up and use an element, again where the page has just replaced it."""
        self.wait(lambda: [action()])

    def visible(self, selector):
        return [found for found in self.driver.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def button(self, name):
        # the last, since gradio keeps copies of the tabs above the page, to measure them
        return [found for found in self.visible("button:not([role=tab])") if found.text == name][-1]

    def tab(self, name):
        self.do(lambda: [tab for tab in self.visible("[role=tab]") if tab.text == name][0].click())
        self.wait(lambda: len(self.visible("[role=tabpanel]")) == 1)

    def field(self, label):
        fields = self.visible("input[type=number]")
        return [found for found in fields if label in (found.get_attribute("aria-label") or "")][0]

    def choose(self, label):
        """A class, with the keyboard."""
        self.do(lambda: self.visible("input[type=radio]")[label].send_keys(Keys.SPACE))

    def uncheck(self):
        """The first box of the tab."""

        def empty():
            box = self.visible("input[type=checkbox]")[0]
            if box.is_selected():
                box.send_keys(Keys.SPACE)

        self.do(empty)

    def fill(self, label, value):
        self.do(lambda: self.field(label).send_keys(Keys.CONTROL, "a", Keys.NULL, str(value), Keys.TAB))

    def write(self, *keys):
        """The prompt."""
        self.do(lambda: self.visible("[role=tabpanel] :is(textarea, input[type=text])")[0].send_keys(*keys))

    def upload(self, path):
        def give():
            panel = self.visible("[role=tabpanel]")[0]
            panel.find_elements(By.CSS_SELECTOR, "input[type=file]")[0].send_keys(str(path))

        self.do(give)
        self.wait(lambda: self.visible("[role=tabpanel] .upload img"))

    def press(self, name):
        """Watch, and press a button with the keyboard."""
        self.driver.execute_script(WATCH)
        self.do(lambda: self.button(name).send_keys(Keys.ENTER))

    def seen(self):
        """Pictures since `press`, until the last step's is there."""
        self.wait(lambda: self.driver.execute_script("const s = seen.at(-1); return seen.length > 1 && s[1] === s[2]"))
        return self.driver.execute_script("return seen.slice(1)")

    def text(self):
        return self.wait(lambda: self.driver.find_element(By.CSS_SELECTOR, ".view").text)


@contextmanager
def visitor(address, profile):
    browser = Browser(address, profile)
    try:
        yield browser
    finally:
        browser.driver.quit()


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_the_page(address, tmp_path):
    with visitor(address, tmp_path / "one") as one:
        # a class is chosen with the keyboard; previews appear while it is drawn
        one.uncheck()
        one.fill("Seed", 7)
        one.choose(3)
        one.press("Draw")
        seen = one.seen()
        steps = [step for _, step, _, _ in seen]
        assert steps == sorted(steps) and len(set(steps)) == len({source for *_, source in seen})
        assert len({source for _, step, count, source in seen if step < count}) >= 3
        print(f"first preview after {seen[0][0]:.0f} ms")  # pytest -s; no bound: it depends on what else runs
        pipe = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline("mnist"))
        expected = pipe(3, generator=torch.Generator().manual_seed(7), output_type="pt").images
        assert np.array_equal(decoded(seen[-1][-1]), np.asarray(image_grid(expected * 2 - 1, 1, gap=0)))
        one.driver.save_screenshot(str(tmp_path / "draw.png"))

        one.tab("Layout")
        one.press("Use the last drawing")
        one.wait(lambda: one.visible("[role=tabpanel] .upload img"))
        one.press("Draw the classes")
        assert len(one.seen()) >= 3 and " of the reference" in one.text()
        one.driver.save_screenshot(str(tmp_path / "layout.png"))

        one.tab("Reconstruct")
        Image.fromarray(decoded(seen[-1][-1])).resize((200, 300)).save(tmp_path / "upload.png")
        one.upload(tmp_path / "upload.png")
        one.press("Reconstruct")
        assert len(one.seen()) >= 3 and " dB" in one.text()

        one.tab("Groups")
        one.upload(tmp_path / "upload.png")
        one.press("Use the last drawing")  # of both pictures, the second one
        one.wait(lambda: len(one.visible("[role=tabpanel] .upload img")) == 2)
        one.press("Exchange the groups")
        assert len(one.seen()) >= 3 and "How much each group changes A: group 1 " in one.text()
        one.driver.save_screenshot(str(tmp_path / "groups.png"))

        (tmp_path / "bad.png").write_bytes(b"this is text")
        one.tab("Image to image")
        one.upload(tmp_path / "bad.png")
        one.press("Change it")
        one.wait(lambda: "no picture that can be read" in one.driver.find_element(By.TAG_NAME, "body").text)

        # two at once, then one leaves in the middle; each sees its own drawing
        one.tab("Draw")
        with visitor(address, tmp_path / "two") as two:
            two.choose(8)
            for browser in (one, two):
                browser.fill("Seconds between previews", 2)
            one.press("Draw")
            two.press("Draw")
            two.wait(lambda: two.driver.execute_script("return seen.length > 1"))
            assert one.driver.execute_script("return seen.at(-1)[1] < seen.at(-1)[2]")  # nobody waits for the other
            assert len(one.seen()) >= 4 and one.text().startswith("3 ·")
            assert len(two.seen()) >= 4 and two.text().startswith("8 ·")
            two.press("Draw")
            two.wait(lambda: two.driver.execute_script("return seen.length > 1"))
        one.press("Draw")
        assert len(one.seen()) >= 4

        # on a phone, and nothing came from elsewhere
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        one.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        one.wait(lambda: one.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"))
        one.driver.save_screenshot(str(tmp_path / "phone.png"))
        loaded = one.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert loaded and all(name.startswith((address, "data:")) for name in loaded)


def test_the_page_draws_from_text(tmp_path):
    pipe = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline())
    options = {"prompt": "noto red apple", "generator": torch.Generator().manual_seed(7), "output_type": "pt"}
    expected = pipe(**options).images
    with serving() as address, visitor(address, tmp_path / "one") as one:
        assert "Write what to draw" in one.text()
        one.uncheck()
        one.fill("Seed", 7)
        one.write("noto red apple")
        one.press("Draw")
        seen = one.seen()
        print(f"first preview after {seen[0][0]:.0f} ms")
        assert len({source for *_, source in seen}) >= 4 and one.text().startswith("noto red apple ·")
        assert np.array_equal(decoded(seen[-1][-1]), np.asarray(image_grid(expected * 2 - 1, 1, gap=0)))
        one.driver.execute_script(WATCH)
        one.write(" and a book", Keys.ENTER)
        assert len(one.seen()) >= 4 and one.text().startswith("noto red apple and a book ·")
        one.driver.save_screenshot(str(tmp_path / "text.png"))
