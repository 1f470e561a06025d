"""Text tokenizers: one learned from the captions of a data set, or a given one."""

import hashlib
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_dar import DARConfig
from ..text_dar import encode_texts

NUM_BYTES = 256  # the least vocabulary


def learn_text_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, learned from captions.

    Every text has tokens, at worst one per byte. Upper and lower case are the same.

    Raises:
        ValueError: for fewer tokens than there are bytes.
    """
    if vocab_size < NUM_BYTES:
        raise ValueError(f"a text tokenizer has at least {NUM_BYTES} tokens, one per byte; got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    # a word is the same at the beginning of a text and later
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def caption_tokens(
    tokenizer: PreTrainedTokenizerBase, config: DARConfig, captions: list[str], warn: bool = True
) -> torch.Tensor:
    """The tokens that a language model begins with, ``(len(captions), max_text_tokens)``."""
    ids = encode_texts(tokenizer, captions, config.max_text_tokens, warn)
    return torch.tensor([config.text_token_ids(row) for row in ids])


def text_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a text tokenizer's tokens and their numbers."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode("utf-8", "surrogateescape")).hexdigest()
