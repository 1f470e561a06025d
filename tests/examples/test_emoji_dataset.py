"""The data set of emoji drawings, made from small archives instead of the published ones."""

import base64
import hashlib
import io
import json
import sys
import tarfile
import urllib.request

import pytest
from datasets import load_dataset
from PIL import Image
from scripts import load_script

NAMES = [f"thing-{index:02d}" for index in range(60)]
SQUARE = '<path fill="#f00" d="M0 0h16v16H0z"/>'
DARK, LIGHT = "\U0001f3ff", "\U0001f3fb"


@pytest.fixture
def command():
    return load_script("examples/emoji_dataset.py")


@pytest.fixture
def plain(command, monkeypatch):
    """Every drawing is a white image: no renderer needed."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    monkeypatch.setattr(command, "renderer", lambda: None)
    monkeypatch.setattr(command, "to_png", lambda svg: buffer.getvalue())


def archive_of(icons: dict[str, str], group: str = "Objects") -> bytes:
    """A package of icons, given by their names and emoji."""
    characters = {"-".join(f"{ord(part):x}" for part in emoji): name for name, emoji in icons.items()}
    files = {
        "icons.json": {"icons": {name: {"body": SQUARE} for name in icons}, "width": 16, "height": 16},
        "chars.json": characters,
        "metadata.json": {"categories": {group: list(icons)}},
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return buffer.getvalue()


def emoji_of(names: list[str]) -> dict[str, str]:
    return {name: chr(0x1F400 + NAMES.index(name)) for name in names}


def integrity(content: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


@pytest.fixture
def packages(command, tmp_path, monkeypatch):
    """A folder of three archives, whose hashes the command expects: of noto, fluent and twemoji.

    All draw 50 emoji and noto draws ten more. Fluent has another name for the first, and noto draws the second with
    skin tones too.
    """
    all_styles = emoji_of(NAMES[:50])
    person = all_styles["thing-01"]
    tones = {
        "thing-01-dark-skin-tone": person + DARK,
        "thing-01-light-skin-tone": person + LIGHT,
        "thing-01-two": person + DARK + person + LIGHT,
    }
    renamed = {"object" if name == "thing-00" else name: emoji for name, emoji in all_styles.items()}
    contents = [
        archive_of(emoji_of(NAMES) | tones),
        archive_of(renamed, group="Symbols"),
        archive_of(all_styles),
    ]
    found = [
        package._replace(integrity=integrity(content))
        for package, content in zip(command.PACKAGES, contents, strict=True)
    ]
    monkeypatch.setattr(command, "PACKAGES", tuple(found))
    folder = tmp_path / "packages"
    folder.mkdir()
    for package, content in zip(found, contents, strict=True):
        (folder / package.file).write_bytes(content)
    return folder


@pytest.fixture
def make(command, packages, tmp_path, monkeypatch):
    """Run the command; returns its rows, by split."""

    def run(name, *options):
        arguments = ["--packages", str(packages), "--output_dir", str(tmp_path / name), *options]
        monkeypatch.setattr(sys, "argv", ["emoji_dataset.py", *arguments])
        command.main()
        files = {split: str(tmp_path / name / f"{split}.parquet") for split in command.SPLITS}
        return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache" / name))

    return run


def test_columns_and_captions(plain, make, tmp_path):
    data = make("data")
    rows = [row for split in data.values() for row in split]
    features = data["train"].features
    assert list(features) == ["image", "label", "caption", "style", "name", "emoji"]
    assert features["style"].names == ["noto", "fluent", "twemoji"] and len(features["label"].names) == 9
    assert len(rows) == 60 + 50 + 50 + 1  # one of the skin tones
    assert {row["image"].size for row in rows} == {(64, 64)} and {row["image"].mode for row in rows} == {"RGB"}
    assert {row["label"] for row in rows} == {features["label"].str2int("Objects")}  # the first style's
    first = {row["caption"] for row in rows if row["name"] == "thing 00"}
    assert first == {"noto thing 00", "fluent thing 00", "twemoji thing 00"}  # whatever fluent calls it
    toned = [row for row in rows if "skin" in row["caption"]]
    captions = {DARK: "noto thing 01, dark skin", LIGHT: "noto thing 01, light skin"}
    assert [row["caption"] for row in toned] == [captions[row["emoji"][-1]] for row in toned]
    assert toned[0]["name"] == "thing 01"
    card = (tmp_path / "data" / "README.md").read_text()
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in data.items())
    assert counts in card and "CC BY 4.0" in card and "Twitter, Inc and other contributors" in card


def test_splits_share_what_they_promise(plain, make):
    data = make("data")
    names = {split: set(rows["name"]) for split, rows in data.items()}
    assert len(names["test"]) == 1 and not names["test"] & (names["train"] | names["validation"])
    assert len(names["validation"]) == 5
    seen = {name: set() for name in names["validation"]}
    for name, style in zip(data["train"]["name"], data["train"]["style"], strict=True):
        seen.setdefault(name, set()).add(style)
    for name, style in zip(data["validation"]["name"], data["validation"]["style"], strict=True):
        assert seen[name] == {0, 1, 2} - {style}


def test_the_seed_decides(plain, make):
    captions = {
        name: make(name, "--seed", seed)["train"]["caption"][:]
        for name, seed in (("data", "0"), ("again", "0"), ("other", "1"))
    }
    assert captions["data"] == captions["again"] != captions["other"]


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: archive_of({"other": "x"})])
def test_damaged_or_exchanged_archives_are_refused(plain, make, packages, refusal, tmp_path, damage):
    path = next(packages.glob("twemoji-*.tgz"))
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(make, "data")
    assert said.startswith(f"emoji_dataset.py: {path} is damaged or another file") and said.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_missing_archives_are_named(plain, make, packages, refusal):
    path = next(packages.glob("fluent-*.tgz"))
    path.unlink()
    said = refusal(make, "data")
    assert str(path) in said and said.count("\n") == 1


def test_a_network_that_fails(command, plain, monkeypatch, capsys, tmp_path):
    def fail(url, timeout):
        raise urllib.request.URLError("unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(SystemExit) as caught:
        command.main(["--output_dir", str(tmp_path / "data")])
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.count("\n") == 1
    assert "@iconify-json/noto/-/noto-1.2.9.tgz" in said and "--packages" in said


def test_downloads_are_checked(command, plain, packages, monkeypatch):
    package = command.PACKAGES[0]
    content = (packages / package.file).read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    assert command.fetch(package, None) == content
    with pytest.raises(command.CommandError, match="noto-1.2.9.tgz is damaged"):
        command.fetch(package._replace(integrity=integrity(b"")), None)


def test_without_the_renderer(command, make, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    said = refusal(make, "data")
    assert said == 'emoji_dataset.py: drawings are rendered by resvg-py: pip install "dar-hf[emoji]".\n'


def test_drawings_are_rendered_on_white(command):
    pytest.importorskip("resvg_py")
    icons = {"icons": {"tall": {"body": SQUARE, "height": 32}}, "width": 16, "height": 16}
    image = Image.open(io.BytesIO(command.to_png(command.to_svg(icons, "tall"))))
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.getpixel((32, 10)) == (255, 0, 0)  # the square in the upper half of the box, 32 pixels wide
    assert image.getpixel((32, 50)) == image.getpixel((5, 10)) == (255, 255, 255)
