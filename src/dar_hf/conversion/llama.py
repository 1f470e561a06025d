"""The language model as a plain ``LlamaForCausalLM``, for servers that know Llama and nothing else."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..configuration_dar import DARConfig
from ..labels_dar import index_names, names_by_id
from ..modeling_dar import DARForCausalLM
from ..utils.files import write_json
from .reading import fill, without_weights

# not in Llama's configuration; everything else in ours is Llama's own
_NOT_LLAMA = ("resid_dropout", "ffn_dropout", "token_dropout", "class_dropout")
_WRITTEN_ANEW = ("architectures", "model_type", "dtype", "auto_map", "transformers_version", "_from_model_config")


def to_llama(model: DARForCausalLM) -> LlamaForCausalLM:
    """A copy of the model with one vocabulary for input and output: codes, then classes or text, then the null token.

    A prompt is one class token, ``[codebook_size + class]``, or the ``max_text_tokens`` tokens of
    `DARConfig.text_token_ids`; ``codebook_size``, ``num_classes``, ``num_image_tokens``, ``tokens_per_group`` and the
    options of text stay in the configuration for clients. The generation configuration suppresses classes and text as
    output and stops after one image. It has no guidance: a server that wants it runs the prompt of null tokens next to
    the prompt.

    The head's rows of classes and text hold the mean of its rows of the codes: their score is then the mean score of
    the codes and never the largest, so that a server that ignores ``suppress_tokens`` decodes greedily all the same.

    Returns:
        float32 on the CPU, whatever the model was.
    """
    config = model.config
    dropped = _NOT_LLAMA + _WRITTEN_ANEW
    options = {name: value for name, value in config.to_dict().items() if name not in dropped}
    llama = without_weights(lambda: LlamaForCausalLM(LlamaConfig(**options)))
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    head = tensors["lm_head.weight"].float()
    others = head.mean(dim=0, keepdim=True).expand(config.vocab_size - config.codebook_size, -1)
    tensors["lm_head.weight"] = torch.cat([head, others])
    fill(llama, tensors.items())
    sampling = model.generation_config
    options = {"do_sample": sampling.do_sample, "temperature": sampling.temperature}
    if sampling.do_sample:  # an unset top_k means no limit here, and 50 codes in stock `generate`
        options["top_k"] = sampling.top_k or 0
        options["top_p"] = 1.0
        if sampling.top_p is not None:
            options["top_p"] = sampling.top_p
    llama.generation_config = GenerationConfig(
        **options,
        suppress_tokens=list(range(config.codebook_size, config.vocab_size)),
        max_new_tokens=config.num_image_tokens,
    )
    return llama


def save_llama(model: DARForCausalLM, folder: str | Path, id2label: Mapping[int, str] | None = None) -> None:
    """Save the model of `to_llama` and its `codes_tokenizer` into a folder that stock transformers and servers open.

    Raises:
        ValueError: for class ids that the model does not have, or what is no name.
    """
    tokenizer = codes_tokenizer(model.config, id2label)
    to_llama(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    # the class's name in transformers 4 and 5; the one that 5 writes is unknown to 4, which servers still run on
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def codes_tokenizer(config: DARConfig, id2label: Mapping[int, str] | None = None) -> PreTrainedTokenizerFast:
    """A text tokenizer for the model of `to_llama`: one token per code and class, nothing added.

    ``<class_3>`` is a prompt, ``<class_null>`` that of the null class; ``<c0><c17>…`` is what the model answers, and
    the ids of its tokens are the codes. The prompt of a text model is ``max_text_tokens`` tokens: ``<text_null>`` as
    far as the text is short, then ``<text_5>…``, numbered as the text tokenizer does. Whitespace between tokens is
    ignored. Any other text raises an error in the tokenizer, because there is no unknown token.

    Args:
        config: of the language model.
        id2label: class names by id. A prompt that is one of the names that `DARPipeline.get_label_ids` takes then
            means that class; names that several classes share, or that are a token's, mean none.

    Raises:
        ValueError: for class ids that the model does not have, or what is no name.
    """
    labels, _ = index_names(names_by_id(id2label or {}, config.num_classes))
    words = {f"<c{code}>": code for code in range(config.codebook_size)}
    words |= {f"<class_{label}>": config.class_token_id(label) for label in range(config.num_classes)}
    words |= {f"<text_{number}>": config.codebook_size + number for number in range(config.text_vocab_size)}
    kind = "text" if config.text_vocab_size else "class"
    words[f"<{kind}_null>"] = config.null_token_id
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [
            normalizers.Replace(Regex(rf"\A\s*{_quoted(name)}\s*\z"), f"<class_{label}>")
            for name, label in labels.items()
            if name not in words
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("<[^<>]*>"), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _quoted(text: str) -> str:
    """A text as the pattern that matches it alone."""
    return re.sub(r"([^\w\s])", r"\\\1", text)
