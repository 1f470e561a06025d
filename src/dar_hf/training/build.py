"""From arguments to a stage: data sets, models and overrides."""

import logging
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError

from ..configuration_dar import DARConfig
from ..data import ImageSamples, ImageTransform, available_splits, load_images
from ..modeling_dar import DARForCausalLM
from ..presets import get_preset, parse_options
from ..tokenizer_dar import SHORT_SEQUENCE, DARTokenizer
from .ar_stage import ARArguments, ARStage
from .loop import LoopArguments
from .tokenizer_stage import TokenizerArguments, TokenizerStage

logger = logging.getLogger(__name__)

HELD_OUT_PART = 20  # one in so many images is held out for validation where there is no split for it


def _image_samples(
    args: LoopArguments, tokenizer: DARTokenizer, with_labels: bool
) -> tuple[ImageSamples, ImageSamples | None]:
    """Training and validation images in the tokenizer's size; validation is always the plain centre crop."""
    size, channels = tokenizer.image_size, tokenizer.config.in_channels
    train, validation = _splits(args, with_labels)
    train = _subset(train, args.max_train_samples, args.seed)
    transform = ImageTransform(size, channels, args.crop, args.flip, args.pixel_noise)
    if validation is None:
        return ImageSamples(train, transform), None
    validation = _subset(validation, args.max_validation_samples, args.seed)
    return ImageSamples(train, transform), ImageSamples(validation, ImageTransform(size, channels))


def _splits(args: LoopArguments, with_labels: bool) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training split and one for validation, held out of the former where there is none that can be used."""
    if not args.dataset_name:
        raise ValueError("dataset_name is missing: digits, a folder, a parquet file or a Hub id.")
    load = partial(
        load_images,
        args.dataset_name,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column if with_labels else None,
    )
    train = load(args.train_split)
    class_names = train.features["label"].names if with_labels else None
    if args.validation_split:
        return train, load(args.validation_split, class_names=class_names)
    available = available_splits(args.dataset_name, args.dataset_config_name)
    for split in ("validation", "test"):
        if split in available:
            try:
                return train, load(split, class_names=class_names)
            except ValueError as error:
                logger.warning("not validating on the split %s: %s", split, error)
    held_out = min(args.max_validation_samples, len(train) // HELD_OUT_PART)
    if held_out == 0:
        return train, None
    logger.warning("no split to validate on: holding out %d of %d training images", held_out, len(train))
    parts = train.train_test_split(test_size=held_out, seed=args.seed)
    return parts["train"], parts["test"]


def _subset(dataset: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """A random choice of ``limit`` rows in their order: the first ones of a folder would all be of one class."""
    if limit is None or limit >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.select(sorted(order[:limit].tolist()))


def build_tokenizer_stage(args: TokenizerArguments) -> TokenizerStage:
    """Stage 1 from its arguments.

    Raises:
        ValueError: for an unknown preset, option, data set or column.
    """
    options = get_preset(args.preset).tokenizer
    if not options and args.preset != "v1":
        raise ValueError(f"preset {args.preset!r} has no tokenizer; use v1 or digits.")
    set_seed(args.seed)
    model = _make(DARTokenizer, options | parse_options(args.model_overrides))
    train, validation = _image_samples(args, model, with_labels=False)
    stage = TokenizerStage(model, train, args, validation)
    stage.start_fresh()
    return stage


def _make(model_class: type, options: dict[str, Any]) -> Any:
    try:
        return model_class(**options)
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"{model_class.__name__}: {error.__cause__ or error}") from error


def build_ar_stage(args: ARArguments, device: torch.device | str = "cpu") -> ARStage:
    """Stage 2 from its arguments; ``device`` is where the frozen tokenizer encodes.

    Raises:
        ValueError: for an unknown preset, option, data set or column, a missing tokenizer, or data without labels.
    """
    options = get_preset(args.preset).transformer
    if not options:
        raise ValueError(f"preset {args.preset!r} has no language model; use B, L, XL, XXL, 3B or digits.")
    if not args.tokenizer:
        raise ValueError("stage 2 needs --tokenizer: the folder or Hub id of a trained tokenizer.")
    try:
        tokenizer = DARTokenizer.from_pretrained(args.tokenizer).to(device)
    except OSError as error:
        raise ValueError(f"no tokenizer at {args.tokenizer!r}, neither as a folder nor on the Hub.") from error
    train, validation = _image_samples(args, tokenizer, with_labels=True)
    label_feature = train.dataset.features["label"]
    assert isinstance(label_feature, datasets.ClassLabel)  # load_images makes it one
    overrides = parse_options(args.model_overrides)
    unknown = set(overrides) - set(DARConfig().to_dict())
    if unknown:
        raise ValueError(f"DARConfig has no options {', '.join(sorted(unknown))}.")
    config = _make(
        DARConfig,
        options
        | dict(
            codebook_size=tokenizer.config.codebook_size,
            num_image_tokens=tokenizer.config.num_tokens,
            tokens_per_group=tokenizer.config.tokens_per_group,
            num_classes=label_feature.num_classes,
        )
        | overrides,
    )
    set_seed(args.seed)
    model = DARForCausalLM(config)
    if torch.device(device).type == "cpu" and config.num_image_tokens <= SHORT_SEQUENCE:
        model.set_attn_implementation("eager")  # for training only: it is not saved
    return ARStage(model, tokenizer, train, args, validation, dict(enumerate(label_feature.names)))
