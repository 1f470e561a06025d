"""The blocks of a card: what this package wrote, told apart from what people wrote.

A generated block stands between comments, the first of which holds a digest of its text. A block whose text has
another digest was edited by hand. `merge_cards` replaces blocks that nobody touched; edited blocks, text outside
blocks and metadata that somebody added or changed stay, and blocks that somebody deleted do not come back.
"""

import copy
import hashlib
import logging
import re
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

logger = logging.getLogger(__name__)

_BLANK = re.compile(r"<!-- dar-hf:(?P<name>\w+) -->(?P<text>.*?)<!-- /dar-hf:(?P=name) -->", re.DOTALL)
_BLOCK = re.compile(
    r"<!-- dar-hf:(?P<name>\w+) (?P<digest>[0-9a-f]{8}) -->(?P<text>.*?)<!-- /dar-hf:(?P=name) -->", re.DOTALL
)
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def _normal(text: str) -> str:
    """Text without what editors change on their own: line endings, trailing spaces, blank lines around."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(_normal(text).encode()).hexdigest()[:8]


def sign(text: str) -> str:
    """Give every block of a freshly rendered card the digest of its text."""

    def signed(block: re.Match) -> str:
        name = block["name"]
        return f"<!-- dar-hf:{name} {_digest(block['text'])} -->\n{block['text'].strip()}\n<!-- /dar-hf:{name} -->"

    return _BLANK.sub(signed, text)


def _edited(block: re.Match) -> bool:
    return _digest(block["text"]) != block["digest"]


def _split(card: str) -> tuple[str, str]:
    """Front matter and text of a card."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return "", card
    return found["yaml"], card[found.end() :]


def replace_block(card: str, other: str, name: str) -> str:
    """``card`` with its block ``name`` taken from ``other``, unless somebody edited it."""
    source = next((m.group() for m in _BLOCK.finditer(other) if m["name"] == name), None)
    if source is None:
        return card
    return _BLOCK.sub(lambda m: source if m["name"] == name and not _edited(m) else m.group(), card)


def merge_cards(existing: str, new: str) -> str:
    """A new card with everything that people wrote into the existing one.

    - Blocks: those that were edited in the existing card stay, the others are replaced. If the card has any of our
      blocks, the ones it lacks were deleted, and do not come back.
    - Text outside blocks stays. Where the new card has such text too, and one text contains the other, the longer one
      is taken; otherwise the new card's follows at the end.
    - Metadata: keys of the existing card stay, lists are joined, results in the model-index are updated where they
      are of the same metric, data and settings, and added otherwise. (`huggingface_hub.metadata_update` makes a commit
      of its own, refuses or overwrites what differs, and drops keys it does not know.)

    Raises:
        ValueError: if the existing card's metadata cannot be read.
    """
    old_yaml, old_text = _split(existing)
    new_yaml, new_text = _split(new)
    return f"---\n{_merge_yaml(old_yaml, new_yaml)}\n---\n{_merge_text(old_text, new_text)}"


def _merge_text(old: str, new: str) -> str:
    old_blocks = {block["name"]: block for block in _BLOCK.finditer(old)}
    new_blocks = {block["name"]: block for block in _BLOCK.finditer(new)}
    old_own = _normal(_BLOCK.sub("", old))
    new_own = _normal(_BLOCK.sub("", new))
    if not old_blocks:
        if old_own in new_own:
            return new
        if not new_blocks and new_own in old_own:
            return old
        return f"{old.rstrip()}\n\n{new.lstrip()}"
    layout = old
    rest = ""
    if new_own not in old_own:
        if old_own in new_own:
            layout = new
        else:
            rest = f"\n{new_own}\n"

    def choose(block: re.Match) -> str:
        name = block["name"]
        if name not in old_blocks:
            return ""  # deleted by hand
        if _edited(old_blocks[name]) or name not in new_blocks:
            if _edited(old_blocks[name]) and name in new_blocks:
                logger.warning("the card's part %r was edited by hand and is left as it is.", name)
            return old_blocks[name].group()
        return new_blocks[name].group()

    return _BLOCK.sub(choose, layout) + rest


def _read_yaml(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the existing card's metadata is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("the existing card's metadata is not a list of keys and values.")
    return content


def _merge_yaml(old_yaml: str, new_yaml: str) -> str:
    old = _read_yaml(old_yaml)
    new = _read_yaml(new_yaml)
    merged = dict(old)
    for key, value in new.items():
        if old.get(key) is None:
            merged[key] = value
        elif key == "model-index":
            merged[key] = _merge_index(old[key], value)
        elif isinstance(old[key], list) and isinstance(value, list):
            merged[key] = old[key] + [item for item in value if item not in old[key]]
        elif old[key] != value:
            logger.warning("the card keeps %s: %s (now it would be %s).", key, old[key], value)
    if merged == old:
        return old_yaml  # as it was written, comments included
    return yaml_dump(merged, sort_keys=False).rstrip()


def _merge_index(old: Any, new: list[dict]) -> Any:
    """Both model-indices in one: the same measurement gets the new value; all else of the existing one stays."""
    merged = copy.deepcopy(old)
    try:
        for group in (group for model in new for group in model["results"]):
            results = merged[0]["results"]
            same = [other for other in results if _subject(other) == _subject(group)]
            if not same:
                results.append(group)
                continue
            known = [metric for other in same for metric in other["metrics"]]
            for metric in group["metrics"]:
                found = next((other for other in known if _measurement(other) == _measurement(metric)), None)
                if found is None:
                    same[0]["metrics"].append(metric)
                else:
                    found["value"] = metric["value"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        logger.warning("the card's model-index cannot be read (%r) and is left as it is.", error)
        return old
    return merged


def _subject(group: dict) -> tuple:
    """What a group of results is about, whatever it is called there."""
    nameless = [{k: v for k, v in group[key].items() if k != "name"} for key in ("task", "dataset")]
    return *nameless, group.get("source")


def _measurement(metric: dict) -> dict:
    return {k: v for k, v in metric.items() if k not in ("value", "verified", "verifyToken")}
