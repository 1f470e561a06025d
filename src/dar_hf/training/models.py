"""The models that training starts from: new ones of a preset, or saved ones to fine-tune."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from ..configuration_dar import DARConfig
from ..modeling_dar import DARForCausalLM
from ..pipeline_dar import names_by_id
from ..presets import PRESETS, get_preset, parse_options
from ..text_dar import encode_texts
from ..tokenizer_dar import DARTokenizer
from ..utils.files import read_object
from ..utils.loading import LoadError, load
from .arguments import ARArguments, TokenizerArguments
from .text import learn_text_tokenizer

logger = logging.getLogger(__name__)

# of the language model's options, those that neither follow from others nor are about transformers' bookkeeping
MODEL_OPTIONS = {*DARConfig.__annotations__, *LlamaConfig.__annotations__}
MODEL_OPTIONS -= {"vocab_size", "max_position_embeddings", "text_vocab_size", "max_text_tokens"}
FRESH_STD = 0.02  # of class embeddings in a new model
MAX_NAMED = 3  # classes that a warning names
MAX_TEXT_TOKENS = 128  # of a new model, where longer captions do not ask for another number


# The tokenizer


def build_tokenizer(args: TokenizerArguments) -> DARTokenizer:
    """The tokenizer that ``args`` ask for: a new one with the recipe's start values, or a saved one.

    Raises:
        ValueError: for an unknown preset or option, or a saved tokenizer that is not there or does not fit.
    """
    options = get_preset(args.preset).tokenizer
    names = [name for name, preset in PRESETS.items() if preset.tokenizer_recipe]
    if args.preset not in names:  # the options of v1 are empty: the tokenizer's defaults
        raise ValueError(f"preset {args.preset!r} has no tokenizer; there are {', '.join(names)}.")
    set_seed(args.seed)
    overrides = parse_options(args.model_overrides)
    if args.init_from:
        return _saved_tokenizer(args.init_from, overrides)
    model = _make(DARTokenizer, options | overrides)
    model.reset_parameters(
        gate=args.gate_start,
        modulation_std=args.modulation_std,
        output_std=args.output_std,
        post_quant_std=args.post_quant_std,
        rotary_bias_std=args.rotary_bias_std,
        token_embed_std=args.token_embed_std,
    )
    return model


def _saved_tokenizer(source: str, overrides: dict[str, Any]) -> DARTokenizer:
    """A saved tokenizer in float32. Options may change what has no weights, or add a REPA head.

    Raises:
        ValueError: if there is none, or its weights do not fit the options.
    """
    with _naming_init_from():
        saved = load(DARTokenizer, _component(source, "tokenizer"), "tokenizer")
    config = {name: value for name, value in dict(saved.config).items() if not name.startswith("_")}
    if "num_groups" in overrides:
        # both follow from the number of groups unless they are set
        config |= {"tokens_per_group": None, "num_inference_steps": None}
    model = _make(DARTokenizer, config | overrides)
    try:
        missing, unknown = model.load_state_dict(saved.state_dict(), strict=False)
    except RuntimeError as error:
        raise ValueError(f"init_from: {source} does not fit --model_overrides: {error}") from error
    wrong = [name for name in (*missing, *unknown) if not name.startswith("denoiser.repa_head.")]
    if wrong:
        raise ValueError(f"init_from: {source} does not fit --model_overrides: {', '.join(wrong[:3])}, …")
    return model.train()


# The language model


def build_text_tokenizer(args: ARArguments, captions: list[str]) -> PreTrainedTokenizerBase:
    """The text tokenizer that ``args`` ask for: a given one, that of a saved model, or one learned from captions.

    Raises:
        ValueError: if it is not there.
    """
    # worker processes that are forked after threads of a tokenizer ran could wait for them for ever
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.text_tokenizer and args.init_from and Path(args.init_from, "text_tokenizer").expanduser().is_dir():
        raise ValueError("init_from: the saved pipeline brings its own text tokenizer: leave out --text_tokenizer.")
    if args.text_tokenizer:
        return load(AutoTokenizer, _component(args.text_tokenizer, "text_tokenizer"), "text tokenizer")
    if args.init_from:
        transformer = Path(_component(args.init_from, "transformer"))
        folder = transformer.expanduser().resolve().parent / "text_tokenizer"
        if not folder.is_dir():
            raise ValueError(f"init_from: there is no text tokenizer next to {transformer}: give --text_tokenizer.")
        return load(AutoTokenizer, folder, "text tokenizer")
    return learn_text_tokenizer(captions, args.text_vocab_size)


def text_sizes(args: ARArguments, text_tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> dict[str, int]:
    """Options of a new language model that follow from its text tokenizer and the captions; none of a saved one."""
    if args.init_from:
        return {}
    most = args.max_text_tokens
    if most is None:
        most = max(1, *map(len, encode_texts(text_tokenizer, captions, MAX_TEXT_TOKENS)))
    return {"text_vocab_size": len(text_tokenizer), "max_text_tokens": most}


def sizes_of(tokenizer: DARTokenizer, overrides: dict[str, Any]) -> dict[str, int]:
    """Options of the language model that follow from the tokenizer.

    Raises:
        ValueError: for ``overrides`` that are no options, or that the pipeline would reject after the training.
    """
    if unknown := set(overrides) - MODEL_OPTIONS:
        raise ValueError(f"DARConfig has no options {', '.join(sorted(unknown))}.")
    config = tokenizer.config
    sizes = {"codebook_size": config.codebook_size, "num_image_tokens": config.num_tokens}
    for name, value in sizes.items():
        if (given := overrides.get(name, value)) != value:
            raise ValueError(f"--model_overrides {name}={given}, but the tokenizer has {value}: leave it out.")
    return sizes | {"tokens_per_group": config.tokens_per_group}


def build_transformer(args: ARArguments, sizes: dict[str, int], class_names: list[str]) -> DARForCausalLM:
    """The language model that ``args`` ask for: a new one, or a saved one in float32.

    Args:
        sizes: what follows from the tokenizer, see `sizes_of`, and from the text tokenizer, see `text_sizes`.
        class_names: classes of the data set by id; none where captions are read.

    Raises:
        ValueError: for impossible options, or a saved model that is not there or does not fit.
    """
    overrides = parse_options(args.model_overrides)
    if args.init_from:
        model = _saved_transformer(args, args.init_from, overrides, sizes, class_names)
        set_seed(args.seed)  # of adapters
        return model.train()
    num_classes = len(class_names)
    options = get_preset(args.preset).transformer | sizes | {"num_classes": num_classes}
    config = _make(DARConfig, options | overrides)
    if config.num_classes < num_classes:
        raise ValueError(f"num_classes={config.num_classes}, but the data set has {num_classes} classes.")
    set_seed(args.seed)
    return _make(DARForCausalLM, {"config": config})


def _saved_transformer(
    args: ARArguments, source: str, overrides: dict[str, Any], sizes: dict[str, int], names: list[str]
) -> DARForCausalLM:
    """A saved language model. Options may change its dropouts.

    With ``args.new_classes`` it gets one class for each name, or ``num_classes`` of ``overrides``.
    """
    num_classes = len(names)
    if args.new_classes:
        num_classes = overrides.pop("num_classes", num_classes)
        if type(num_classes) is not int or num_classes < len(names):
            raise ValueError(f"num_classes={num_classes}, but the data set has {len(names)} classes.")
    fixed = [name for name in overrides if not name.endswith("_dropout")]
    if fixed:
        raise ValueError(f"init_from: of a saved language model only dropouts can change, not {', '.join(fixed)}.")
    with _naming_init_from():
        place = _component(source, "transformer")
        config = load(DARConfig, place, "language model")
        try:
            for name, value in overrides.items():
                setattr(config, name, value)
            DARConfig.from_dict(config.to_dict())  # setting a value does not check its range
        except Exception as error:  # the libraries raise all kinds for impossible values
            raise ValueError(f"init_from: impossible --model_overrides: {error.__cause__ or error}") from error
        model = load(DARForCausalLM, place, "language model", config=config, dtype=torch.float32)
    for name, value in sizes.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(f"init_from: {source} has {name}={found}, the tokenizer and data have {value}.")
    if bool(config.text_vocab_size) != bool(args.caption_column):
        advice = "give --caption_column" if config.text_vocab_size else "leave out --caption_column"
        kind = "text" if config.text_vocab_size else "class labels"
        raise ValueError(f"init_from: {source} draws from {kind}: {advice}.")
    if args.new_classes:
        renew_classes(model, num_classes, args.new_classes, args.seed)
    elif config.num_classes < num_classes:
        raise ValueError(
            f"init_from: {source} has num_classes={config.num_classes}, the tokenizer and data have {num_classes}. "
            "To choose its table of classes anew, give --new_classes null, mean or fresh."
        )
    else:
        _warn_of_other_names(source, config.num_classes, names)
    return model


def renew_classes(model: DARForCausalLM, num_classes: int, start: str, seed: int = 0) -> None:
    """Give a model ``num_classes`` classes instead of those it has; its codes and null class stay.

    The rows of ``embed_tokens`` are the codes, then the classes, then the null class; what the configuration derives
    from their number follows.

    Args:
        start: what every class starts from: "null", the null class's embedding; "mean", the mean of the old classes;
            or "fresh", normal noise with standard deviation 0.02.
        seed: of the noise.
    """
    config = model.config
    old = model.model.embed_tokens
    codes, classes, null = old.weight.detach().split([config.codebook_size, config.num_classes, 1])
    if start == "null":
        rows = null.expand(num_classes, -1)
    elif start == "mean":
        rows = classes.mean(dim=0, keepdim=True).expand(num_classes, -1)
    else:
        generator = torch.Generator().manual_seed(seed)
        rows = FRESH_STD * torch.randn(num_classes, config.hidden_size, generator=generator)
    table = torch.cat([codes, rows.to(codes), null])
    config.num_classes = num_classes  # vocab_size follows
    model.model.embed_tokens = nn.Embedding(*table.shape, old.padding_idx, _weight=table)
    model.model.vocab_size = config.vocab_size


def _warn_of_other_names(source: str, num_classes: int, names: list[str]) -> None:
    """Warn of classes of the data set whose names differ from those whose embeddings they take over."""
    saved = _saved_names(source, num_classes)
    other = [
        f"{label}: {saved[label]!r} is now {name!r}"
        for label, name in enumerate(names)
        if label in saved and name not in {saved[label], *(part.strip() for part in saved[label].split(","))}
    ]
    if other:
        named = ", ".join(other[:MAX_NAMED])
        if len(other) > MAX_NAMED:
            named += ", …"
        logger.warning(
            "init_from: %d of %d classes have other names than in %s (%s), and start from the embeddings of those "
            "classes. If they are other things, give --new_classes.",
            len(other),
            len(names),
            source,
            named,
        )


def class_names(args: ARArguments, num_classes: int, names: list[str]) -> dict[int, str]:
    """Names of the model's classes by id: the data set's and, for classes that it lacks, those they were saved with.

    Args:
        num_classes: of the model.
        names: of the data set's classes.
    """
    saved = {}
    if args.init_from and not args.new_classes:
        saved = _saved_names(args.init_from, num_classes)
    return saved | dict(enumerate(names))


def _saved_names(source: str, num_classes: int) -> dict[int, str]:
    """Class names of the pipeline to which a saved language model belongs, empty where there is none."""
    transformer = Path(_component(source, "transformer"))
    index = transformer.expanduser().resolve().parent / "model_index.json"
    if not index.is_file():
        return {}
    try:
        return names_by_id(read_object(index).get("id2label") or {}, num_classes)
    except ValueError as error:
        raise LoadError(f"the class names next to the model cannot be read: {error}") from error


# Both


def _make(model_class: type, options: dict[str, Any]) -> Any:
    """A model or configuration from the options of a preset and of ``--model_overrides``."""
    try:
        return model_class(**options)
    except Exception as error:  # options from anywhere: the libraries raise all kinds for impossible ones
        reason = error.__cause__ or error
        text = f"{type(reason).__name__}: {reason}"
        if isinstance(reason, (TypeError, ValueError)):
            text = str(reason)
        raise ValueError(f"--model_overrides make no {model_class.__name__}: {text}") from error


@contextmanager
def _naming_init_from() -> Iterator[None]:
    """Inside, errors of loading name the option that named the model."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"init_from: {error}") from error


def _component(source: str, name: str) -> str:
    """The folder of a component where ``source`` is a pipeline's, else ``source``."""
    folder = Path(source).expanduser() / name
    return str(folder) if folder.is_dir() else source
