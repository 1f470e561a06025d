"""Make a data set of captioned emoji drawings, 64x64 on white, from three published icon packages of npm.

    pip install -c constraints.txt -e ".[emoji]"
    python examples/emoji_dataset.py --output_dir outputs/emoji/data      # 6 MB downloaded, half a minute

One row per drawing: `image`, `label` (group of emoji), `caption` ("noto red apple"), `style`, `name`, `emoji`. Each
name of the validation split appears in training, but only in the other two styles; those of the test split do not.
The same seed gives the same rows.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import re
import tarfile
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures

from dar_hf.utils.commands import FAILURE, CommandError, check_output, command, path_option, seed_option, writing
from dar_hf.utils.files import new_folder, write_text

REGISTRY = "https://registry.npmjs.org/@iconify-json"
SIZE = 64
SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.1  # of the names that all styles draw
TEST_SHARE = 0.02  # of all names
GROUPS = [
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
]  # fmt: skip
TONES = dict(zip("🏻🏼🏽🏾🏿", ("light", "medium light", "medium", "medium dark", "dark"), strict=True))
TONE = re.compile(f"[{''.join(TONES)}]")


class Package(NamedTuple):
    """A pinned package, with the hash that the registry publishes."""

    style: str
    name: str
    version: str
    integrity: str
    licence: str
    credit: str

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.tgz"


PACKAGES = (
    Package(
        "noto",
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)",
        "[Noto Emoji](https://github.com/googlefonts/noto-emoji), Google Inc",
    ),
    Package(
        "fluent",
        "fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
        "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji), Copyright (c) Microsoft Corporation",
    ),
    Package(
        "twemoji",
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
        "[Twemoji](https://github.com/twitter/twemoji), Copyright Twitter, Inc and other contributors",
    ),
)
STYLES = [package.style for package in PACKAGES]
FEATURES = Features(
    image=Image(),
    label=ClassLabel(names=GROUPS),
    caption=Value("string"),
    style=ClassLabel(names=STYLES),
    name=Value("string"),
    emoji=Value("string"),
)
CARD = """\
---
pretty_name: Captioned emoji in three styles
license: [apache-2.0, mit, cc-by-4.0]
task_categories: [text-to-image]
language: [en]
---

# Captioned emoji in three styles

Images: {counts}.

Every image is one drawing of an emoji, {size}x{size} RGB on white. `label` is the emoji's group; `caption` is the
style, the emoji's name and, where it has one, the skin tone.

- `validation`: each of these names appears in training, but only in the other two styles.
- `test`: training shows these names in no style.

Every drawing without a skin tone is in it, and of each emoji with skin tones one tone per style, by chance. Drawings
with two different tones are left out. Names and groups are those of the first style that draws an emoji.

## Sources and licences

| style | drawings by | licence | npm package |
|---|---|---|---|
{sources}

The drawings were rendered to pixels and otherwise left as they are. Keep these credits with the data, and with what is
made from it as far as the licences ask for that.

Made by `python examples/emoji_dataset.py --seed {seed}` of dar-hf.
"""


class Drawing(NamedTuple):
    """One emoji in one style."""

    style: str
    icon: str
    group: str
    emoji: str
    svg: str

    @property
    def base(self) -> str:
        """The emoji without a skin tone."""
        return TONE.sub("", self.emoji)

    @property
    def tone(self) -> str:
        found = TONE.search(self.emoji)
        return f", {TONES[found.group()]} skin" if found else ""


class Row(NamedTuple):
    """A drawing with the name and the group that it has in all styles."""

    name: str
    group: str
    drawing: Drawing


def renderer() -> ModuleType:
    """The library that renders drawings.

    Raises:
        ImportError: without resvg-py.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError('drawings are rendered by resvg-py: pip install "dar-hf[emoji]".') from error
    return resvg_py


def fetch(package: Package, folder: Path | None) -> bytes:
    """A package's archive, from a folder or else from the registry.

    Raises:
        CommandError: if it cannot be downloaded, or is not the archive that the integrity hash is of.
    """
    if folder is not None:
        source = str(folder / package.file)
        content = Path(source).read_bytes()
    else:
        source = f"{REGISTRY}/{package.name}/-/{package.file}"
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                content = response.read()
        except (OSError, HTTPException) as error:
            advice = "Or put the archives of the packages into a folder and give it by --packages."
            raise CommandError(f"cannot download {source}: {error}. {advice}", FAILURE) from error
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.integrity:
        raise CommandError(f"{source} is damaged or another file: its hash is {found}, not {package.integrity}.")
    return content


def read_drawings(package: Package, content: bytes) -> list[Drawing]:
    """The drawings of emoji in a package's archive, those of two different skin tones left out.

    Icons that stand for no emoji, and aliases, are not among a package's characters.
    """
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        icons = read_json(archive, "icons.json")
        characters = read_json(archive, "chars.json")
        categories = read_json(archive, "metadata.json")["categories"]
    groups = {icon: group for group, members in categories.items() for icon in members}
    drawings = []
    for code, icon in characters.items():
        emoji = "".join(chr(int(point, 16)) for point in code.split("-"))
        if len(set(TONE.findall(emoji))) < 2:
            drawings.append(Drawing(package.style, icon, groups[icon], emoji, to_svg(icons, icon)))
    return drawings


def read_json(archive: tarfile.TarFile, name: str) -> dict:
    """A JSON file of a package, read in memory."""
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise ValueError(f"{name} of the package is no file.")
    return json.load(file)


def to_svg(icons: dict, icon: str) -> str:
    """An icon as an SVG document, centered where it is not square."""
    found = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"], **icons["icons"][icon]}
    box = " ".join(str(found[part]) for part in ("left", "top", "width", "height"))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{SIZE}" height="{SIZE}" viewBox="{box}">{found["body"]}</svg>'


def to_png(svg: str) -> bytes:
    """An SVG document rendered on white, as RGB."""
    rendered = renderer().svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    buffer = io.BytesIO()
    Pictures.open(io.BytesIO(rendered)).convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def name_drawings(drawings: list[Drawing]) -> list[Row]:
    """Drawings with the name and group of the first style that draws the emoji, sorted."""
    first: dict[str, Drawing] = {}
    for drawing in sorted(drawings, key=lambda drawing: STYLES.index(drawing.style)):
        if not drawing.tone:
            first.setdefault(drawing.base, drawing)
    known = [drawing for drawing in drawings if drawing.base in first]
    rows = [Row(first[drawing.base].icon.replace("-", " "), first[drawing.base].group, drawing) for drawing in known]
    return sorted(rows, key=lambda row: (row.name, STYLES.index(row.drawing.style), row.drawing.emoji))


def keep_one_tone(rows: list[Row], generator: random.Random) -> list[Row]:
    """All rows without a skin tone, and one of those that differ only in it."""
    tones: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.drawing.tone:
            tones[row.drawing.base, row.drawing.style].append(row)
    kept = {generator.choice(alike).drawing for alike in tones.values()}
    return [row for row in rows if not row.drawing.tone or row.drawing in kept]


def split_rows(rows: list[Row], generator: random.Random) -> dict[str, list[Row]]:
    """Rows by split: some names are all in test, and of some others one style in validation."""
    styles: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        styles[row.name].add(row.drawing.style)
    names = sorted(styles)
    test = set(generator.sample(names, round(TEST_SHARE * len(names))))
    everywhere = [name for name in names if len(styles[name]) == len(STYLES) and name not in test]
    held = generator.sample(everywhere, round(VALIDATION_SHARE * len(everywhere)))
    validation = {(name, generator.choice(STYLES)) for name in held}
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.name in test:
            splits["test"].append(row)
        elif (row.name, row.drawing.style) in validation:
            splits["validation"].append(row)
        else:
            splits["train"].append(row)
    return splits


def to_dataset(rows: list[Row]) -> Dataset:
    """Rendered rows."""
    columns: dict[str, list] = {column: [] for column in FEATURES}
    for name, group, drawing in rows:
        columns["image"].append({"bytes": to_png(drawing.svg), "path": None})
        columns["label"].append(GROUPS.index(group))
        columns["caption"].append(f"{drawing.style} {name}{drawing.tone}")
        columns["style"].append(STYLES.index(drawing.style))
        columns["name"].append(name)
        columns["emoji"].append(drawing.emoji)
    return Dataset.from_dict(columns, features=FEATURES)


def make_card(counts: str, seed: int) -> str:
    """The README of the data: what is in it, credits and licences."""
    sources = [
        f"| {style} | {credit} | {licence} | `@iconify-json/{name}` {version} |"
        for style, name, version, _, licence, credit in PACKAGES
    ]
    return CARD.format(counts=counts, size=SIZE, sources="\n".join(sources), seed=seed)


@command("emoji_dataset.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=path_option, default="outputs/emoji/data", help="a new or empty folder")
    parser.add_argument("--packages", type=path_option, help="a folder that holds the packages' .tgz: no download")
    parser.add_argument("--seed", type=seed_option, default=0, help="of the split and the skin tones")
    args = parser.parse_args(argv)
    renderer()
    check_output(args.output_dir)
    drawings: list[Drawing] = []
    for package in PACKAGES:
        found = read_drawings(package, fetch(package, args.packages))
        print(f"{package.file}: {len(found):,} drawings", flush=True)
        drawings += found
    generator = random.Random(args.seed)
    rows = keep_one_tone(name_drawings(drawings), generator)
    generator.shuffle(rows)
    splits = split_rows(rows, generator)
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    with new_folder(args.output_dir) as folder:
        rendered = {split: to_dataset(rows) for split, rows in splits.items()}
        with writing(args.output_dir):
            for split, dataset in rendered.items():
                dataset.to_parquet(folder / f"{split}.parquet")
            write_text(folder / "README.md", make_card(counts, args.seed))
    print(f"{args.output_dir}: {counts}")


if __name__ == "__main__":
    main()
