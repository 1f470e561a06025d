"""Saved language models to fine-tune, on the classes they know or on others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from ..configuration_dar import DARConfig
from ..modeling_dar import DARForCausalLM
from ..pipeline_dar import names_by_id
from ..utils.files import read_object
from ..utils.loading import LoadError, load
from .ar_stage import ARArguments

logger = logging.getLogger(__name__)

FRESH_STD = 0.02  # of class embeddings in a new model
MAX_NAMED = 3  # classes that a warning names


def saved_transformer(
    args: ARArguments, overrides: dict[str, Any], sizes: dict[str, int], names: list[str]
) -> DARForCausalLM:
    """The language model that ``args.init_from`` names, in float32; options may change its dropouts.

    Args:
        args: with ``new_classes``, the model gets one class for each name, or ``num_classes`` of ``overrides``.
        sizes: what the model must have in common with the tokenizer.
        names: classes of the data set by id.

    Raises:
        ValueError: if there is none, or it is of other codes or fewer classes.
    """
    source, overrides, num_classes = args.init_from or "", dict(overrides), len(names)
    if args.new_classes:
        num_classes = overrides.pop("num_classes", num_classes)
        if type(num_classes) is not int or num_classes < len(names):
            raise ValueError(f"num_classes={num_classes}, but the data set has {len(names)} classes.")
    fixed = [name for name in overrides if not name.endswith("_dropout")]
    if fixed:
        raise ValueError(f"init_from: of a saved language model only dropouts can change, not {', '.join(fixed)}.")
    with option_named("init_from"):
        place = part(source, "transformer")
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
    if args.new_classes:
        renew_classes(model, num_classes, args.new_classes, args.seed)
    elif config.num_classes < num_classes:
        raise ValueError(
            f"init_from: {source} has num_classes={config.num_classes}, the tokenizer and data have {num_classes}. "
            "To choose its table of classes anew, give --new_classes null, mean or fresh."
        )
    else:
        _warn_of_other_names(source, place, config.num_classes, names)
    set_seed(args.seed)  # of adapters
    return model.train()


def renew_classes(model: DARForCausalLM, num_classes: int, start: str, seed: int = 0) -> None:
    """Give a model ``num_classes`` classes in the place of those it has; its codes and null class stay.

    The rows of ``embed_tokens`` are the codes, then the classes, then the null class; what the configuration derives
    from their number follows.

    Args:
        start: what every class starts from: "null", the null class's embedding; "mean", the mean of the old classes;
            or "fresh", normal noise with standard deviation 0.02.
        seed: of the noise.
    """
    config, old = model.config, model.model.embed_tokens
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


def _warn_of_other_names(source: str, place: str, num_classes: int, names: list[str]) -> None:
    """Say where the data set's classes are called otherwise than those whose embeddings they take over."""
    saved = _saved_names(Path(place), num_classes)
    other = [
        f"{label}: {saved[label]!r} is now {name!r}"
        for label, name in enumerate(names)
        if label in saved and name not in {saved[label], *(part.strip() for part in saved[label].split(","))}
    ]
    if other:
        shown = ", ".join([*other[:MAX_NAMED], *(["…"] if len(other) > MAX_NAMED else [])])
        logger.warning(
            "init_from: %d of %d classes have other names than in %s (%s), and start from the embeddings of those "
            "classes. If they are other things, give --new_classes.",
            len(other),
            len(names),
            source,
            shown,
        )


def _saved_names(transformer: Path, num_classes: int) -> dict[int, str]:
    """Class names of the pipeline to which a folder with a language model belongs, empty where there is none."""
    index = transformer.expanduser().resolve().parent / "model_index.json"
    if not index.is_file():
        return {}
    try:
        return names_by_id(read_object(index).get("id2label") or {}, num_classes)
    except ValueError as error:
        raise LoadError(f"the class names next to the model cannot be read: {error}") from error


@contextmanager
def option_named(option: str) -> Iterator[None]:
    """Inside, errors of loading say which option named the model."""
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{option}: {error}") from error


def part(source: str, name: str) -> str:
    """A component's folder, where ``source`` is a pipeline's."""
    folder = Path(source).expanduser() / name
    return str(folder) if folder.is_dir() else source
