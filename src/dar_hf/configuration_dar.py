"""Configuration of the D-AR language model: a Llama over image codes, tokens of classes or text, and a null token."""

import operator
import os
from collections.abc import Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

POSITIVE = (
    "codebook_size", "num_image_tokens", "tokens_per_group", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads",
)  # fmt: skip

# options from which vocabulary and length follow
_SIZES = ("codebook_size", "num_classes", "num_image_tokens", "text_vocab_size", "max_text_tokens")


@strict
class DARConfig(LlamaConfig):
    """Llama's own options and those of D-AR (arXiv 2505.23660, section 3.3; sizes as in LlamaGen).

    Input vocabulary: ``codebook_size`` image codes, then ``num_classes`` class tokens, then one null class token.
    Output vocabulary: the image codes. A sequence is ``[codebook_size + class, code, code, ...]``.

    With ``text_vocab_size`` the model draws what a text says. It has ``text_vocab_size`` text tokens in place of the
    classes, and a sequence begins with ``max_text_tokens`` of them; null tokens in front fill up a shorter text. So
    all texts have one length, and an image does not depend on the length of others in its batch. The text of null
    tokens alone is the unconditional half of guidance.

    Args:
        codebook_size: number of image codes.
        num_classes: number of classes, without the null class; 0 in text models, whatever is given.
        text_vocab_size: number of tokens of the text tokenizer; 0 for classes instead of text.
        max_text_tokens: tokens of the longest text; of text models only.
        num_image_tokens: codes of one image (N).
        tokens_per_group: codes of one group, the unit in which `DARForCausalLM.stream_codes` yields.
        token_dropout: dropout on the input embeddings, those of class and text included.
        resid_dropout: dropout after every attention's output projection.
        ffn_dropout: dropout after every mlp.
        class_dropout: how often training replaces the class or the text by null tokens.

    Raises:
        ValueError: for sizes below 1, rates outside [0, 1), or tied embeddings (the vocabularies differ).
    """

    model_type = "dar"

    codebook_size: int = 16384
    num_classes: int = 1000
    text_vocab_size: int = 0
    max_text_tokens: int = 32
    num_image_tokens: int = 256
    tokens_per_group: int = 32
    resid_dropout: float | int = 0.1
    ffn_dropout: float | int = 0.1
    token_dropout: float | int = 0.1
    class_dropout: float | int = 0.1

    # Llama's fields that are different here; LlamaGen's L size
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int | None = None  # type: ignore[assignment]
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' own, which takes the defaults for a missing file, and another model's file for this one's.

        Raises:
            OSError: if there is no ``config.json``.
            ValueError: if it describes another kind of model.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json of a language model.")
        if config.get("model_type") != cls.model_type:
            held = config.get("model_type") or config.get("_class_name") or "model without a model_type"
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {held}, not a {cls.model_type!r} language model."
            )
        return config, kwargs

    def __post_init__(self, **kwargs):
        self._check()
        self._derive()
        super().__post_init__(**kwargs)
        self._check_heads()

    def __setattr__(self, name, value):
        # from_pretrained(..., num_classes=3) sets options one by one after the file's
        super().__setattr__(name, value)
        if name in _SIZES and "vocab_size" in vars(self):
            self._derive()

    def to_dict(self) -> dict[str, Any]:
        """transformers' own; those of class models stay without the options of text, which older versions lack."""
        options = super().to_dict()
        if not self.text_vocab_size:
            for name in ("text_vocab_size", "max_text_tokens"):
                options.pop(name, None)
        return options

    def _derive(self) -> None:
        if self.text_vocab_size and self.num_classes:
            self.num_classes = 0
        self.vocab_size = self.null_token_id + 1
        self.max_position_embeddings = self.num_image_tokens + self.prompt_length

    def _check(self) -> None:
        if self.text_vocab_size < 0:
            raise ValueError(f"text_vocab_size must not be negative, got {self.text_vocab_size}.")
        condition = "max_text_tokens" if self.text_vocab_size else "num_classes"
        for name in (*POSITIVE, condition):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("resid_dropout", "ffn_dropout", "token_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout must lie in [0, 1], got {self.class_dropout}.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is impossible: input and output vocabularies differ.")

    def _check_heads(self) -> None:
        """Refuse heads that Llama's attention only fails on when it runs; they are known once defaults are put in."""
        heads = self.num_attention_heads
        shared = self.num_key_value_heads
        if shared < 1 or heads % shared:
            raise ValueError(f"num_key_value_heads={shared} must divide num_attention_heads={heads}.")
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: its rotary embedding turns pairs.")

    @property
    def null_token_id(self) -> int:
        """Input token of the null class, for guidance, and of what fills up a text."""
        return self.codebook_size + (self.text_vocab_size or self.num_classes)

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the codes: one of a class, or those of a text."""
        return self.max_text_tokens if self.text_vocab_size else 1

    def class_token_id(self, label: int) -> int:
        """Input token of class ``label``.

        Raises:
            ValueError: for a label outside [0, num_classes), or a text model.
        """
        if self.text_vocab_size:
            raise ValueError("this model draws from text and has no classes.")
        try:
            number = -1 if isinstance(label, bool) else operator.index(label)  # any integer type, numpy's and torch's
        except TypeError:
            number = -1
        if not 0 <= number < self.num_classes:
            raise ValueError(f"class label must be an integer in [0, {self.num_classes}), got {label!r}.")
        return self.codebook_size + number

    def text_token_ids(self, ids: Iterable[int]) -> list[int]:
        """Input tokens of a text: null tokens as far as it is short, then its tokens; ``max_text_tokens`` in all.

        Args:
            ids: what the text tokenizer makes of it.

        Raises:
            ValueError: for more than ``max_text_tokens``, ids outside [0, text_vocab_size), or a class model.
        """
        if not self.text_vocab_size:
            raise ValueError("this model draws from class labels and knows no text.")
        try:
            numbers = [operator.index(number) for number in ids]
        except TypeError as error:
            raise ValueError(f"the ids of a text must be a list of integers, got {ids!r}.") from error
        if len(numbers) > self.max_text_tokens:
            raise ValueError(f"a text of {len(numbers)} tokens is longer than max_text_tokens={self.max_text_tokens}.")
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.text_vocab_size:
            raise ValueError(f"the ids of a text must lie in [0, {self.text_vocab_size}), got {numbers}.")
        padding = [self.null_token_id] * (self.max_text_tokens - len(numbers))
        return padding + [self.codebook_size + number for number in numbers]
