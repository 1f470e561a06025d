"""Texts of a pipeline: what users write, as the ids of the text tokenizer."""

import logging
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase

from .checks_dar import described

logger = logging.getLogger(__name__)

_LOCK = threading.Lock()  # a fast tokenizer keeps the truncation of a call, which another thread would change


def text_list(name: str, texts: Any) -> list[str]:
    """One text or several, as a list.

    Args:
        name: of the argument that they are, for messages.

    Raises:
        ValueError: for anything else.
    """
    found = [texts] if isinstance(texts, str) else texts
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} must be a text or a list of texts, got {described(texts)}.")
    if not found:
        raise ValueError(f"{name} is empty: nothing to generate.")
    return list(found)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, warn: bool = True
) -> list[list[int]]:
    """The ids of each text, cut to ``max_tokens`` with a warning."""
    # what no encoding can hold, such as half of a surrogate pair, becomes a question mark
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    with _LOCK:
        rows = tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
        cut = rows
        if any(len(ids) > max_tokens for ids in rows):
            cut = tokenizer(texts, padding=False, truncation=True, max_length=max_tokens).input_ids
            tokenizer("", truncation=False)  # or the truncation would be saved with the tokenizer
    too_long = [text for text, ids in zip(texts, rows, strict=True) if len(ids) > max_tokens]
    if too_long and warn:
        logger.warning(
            "%d of %d texts have more than the model's %d tokens, and are cut: %.60s",
            len(too_long),
            len(texts),
            max_tokens,
            too_long[0],
        )
    return cut


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt: Any, negative_prompt: Any = None, repeats: int = 1
) -> dict[str, list[list[int]]]:
    """What `DARForCausalLM.stream_codes` draws from: the ids of prompts and of negative ones, each ``repeats`` times.

    A blank negative prompt is none: it has no tokens, also where the text tokenizer marks beginnings and ends.

    Raises:
        ValueError: for anything but texts, or another number of negative prompts than one or one for each.
    """
    texts = {"text_ids": text_list("prompt", prompt)}
    if negative_prompt is not None:
        count = len(texts["text_ids"])
        negative = text_list("negative_prompt", negative_prompt)
        if len(negative) not in (1, count):
            raise ValueError(f"got {len(negative)} negative prompts for {count} prompts: give one, or one for each.")
        texts["negative_text_ids"] = negative * (count // len(negative))
    rows = {name: encode_texts(tokenizer, several, max_tokens) for name, several in texts.items()}
    if negative_prompt is not None:
        negative = texts["negative_text_ids"]
        pairs = zip(negative, rows["negative_text_ids"], strict=True)
        rows["negative_text_ids"] = [ids if text.strip() else [] for text, ids in pairs]
    return {name: [ids for ids in several for _ in range(repeats)] for name, several in rows.items()}


def check_text_tokenizer(tokenizer: Any, text_vocab_size: int) -> None:
    """Refuse a text tokenizer of another kind, one that is missing or not needed, or with too many tokens."""
    if tokenizer is None and text_vocab_size:
        raise ValueError("the transformer draws from text: the pipeline needs its text_tokenizer.")
    if tokenizer is None:
        return
    if not text_vocab_size:
        raise ValueError("the transformer draws from class labels: the pipeline takes no text_tokenizer.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"text_tokenizer must be a tokenizer of transformers, got {described(tokenizer)}.")
    if len(tokenizer) > text_vocab_size:
        raise ValueError(f"text_tokenizer has {len(tokenizer)} tokens, the transformer knows {text_vocab_size}.")
