"""From arguments to a stage: data sets, models and overrides."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from transformers import LlamaConfig

from ..acceleration_dar import SHORT_SEQUENCE
from ..configuration_dar import DARConfig
from ..data import ImageSamples, ImageTransform, StreamedImages, available_splits, load_images, stream_images
from ..data.classes import whole_number
from ..data.sources import first_rows
from ..modeling_dar import DARForCausalLM
from ..presets import get_preset, parse_options
from ..tokenizer_dar import DARTokenizer
from ..utils.loading import load
from .ar_stage import ARArguments, ARStage
from .arguments import LoopArguments
from .codes import CodeSamples, load_codes, stored_samples
from .fine_tuning import option_named, part, saved_transformer
from .tokenizer_stage import TokenizerArguments, TokenizerStage

logger = logging.getLogger(__name__)

NO_DATASET = "dataset_name is missing: digits, a folder, a parquet or tar file or a Hub id."
# of the language model's options, those that neither follow from others nor are about transformers' bookkeeping
MODEL_OPTIONS = {*DARConfig.__annotations__, *LlamaConfig.__annotations__} - {"vocab_size", "max_position_embeddings"}
HELD_OUT_PART = 20  # one in so many images is held out for validation where there is no split for it


def _image_samples(
    args: LoopArguments, tokenizer: DARTokenizer, with_labels: bool
) -> tuple[ImageSamples | StreamedImages, ImageSamples | None]:
    """Training and validation images in the tokenizer's size; validation is always the plain centre crop."""
    if args.streaming:
        return _streamed_images(args, tokenizer, with_labels)
    train, validation = _splits(args, with_labels)
    train = _subset(train, args.max_train_samples, args.seed)
    return ImageSamples(train, _train_transform(args, tokenizer)), _validation_samples(args, tokenizer, validation)


def _train_transform(args: LoopArguments, tokenizer: DARTokenizer) -> ImageTransform:
    return ImageTransform(tokenizer.image_size, tokenizer.config.in_channels, args.crop, args.flip, args.pixel_noise)


def _validation_samples(
    args: LoopArguments, tokenizer: DARTokenizer, validation: datasets.Dataset | None
) -> ImageSamples | None:
    if validation is None:
        return None
    validation = _subset(validation, args.max_validation_samples, args.seed)
    transform = ImageTransform(tokenizer.image_size, tokenizer.config.in_channels)
    samples = ImageSamples(validation, transform)
    readable = samples.readable()
    if not readable:
        logger.warning("not validating: none of the %d images to validate on can be read", len(samples))
        return None
    return samples if len(readable) == len(samples) else ImageSamples(validation.select(readable), transform)


def _streamed_images(
    args: LoopArguments, tokenizer: DARTokenizer, with_labels: bool
) -> tuple[StreamedImages, ImageSamples | None]:
    """A stream to train on, and the first images of the validation split, where there is one."""
    if not args.dataset_name:
        raise ValueError(NO_DATASET)
    load = _loader(args, with_labels, stream_images)
    stream = load(args.train_split)
    classes = _stream_classes(args, stream) if with_labels else None
    if args.max_train_samples is not None:
        stream = stream.take(args.max_train_samples)

    def load_first(split: str, class_names: list[str] | None = None) -> datasets.Dataset:
        part = load(split)
        rows = first_rows(part, args.max_validation_samples, args.dataset_name)
        if not rows:
            raise ValueError(f"split {split!r} of {args.dataset_name} holds no images.")
        features = {"image": datasets.Image()}
        if classes:
            features["label"] = classes
            names = part.features["label"].names if isinstance(part.features["label"], datasets.ClassLabel) else None
            for row in rows:
                row["label"] = _streamed_label(row["label"], names, classes)
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    samples = StreamedImages(
        stream, _train_transform(args, tokenizer), args.stream_block_size, classes.num_classes if classes else None
    )
    validation = _validation_split(args, load_first, None)
    if validation is None:
        logger.warning("no split to validate on: images of a stream cannot be held out")
    return samples, _validation_samples(args, tokenizer, validation)


def _streamed_label(label: Any, names: list[str] | None, classes: datasets.ClassLabel) -> int:
    """A label of the split to validate on, whose classes have these names, among the classes of training.

    Raises:
        ValueError: if it is none of them.
    """
    number = whole_number(label)
    if names is not None and number is not None and 0 <= number < len(names):
        number = classes.names.index(names[number]) if names[number] in classes.names else None
    if number is None or not 0 <= number < classes.num_classes:
        raise ValueError(f"it has the label {label}, which is none of the {classes.num_classes} classes of training.")
    return number


def _stream_classes(args: LoopArguments, stream: datasets.IterableDataset) -> datasets.ClassLabel:
    """Classes of a stream, from its labels' names or from ``--model_overrides num_classes=N``."""
    feature = stream.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return feature
    count = parse_options(args.model_overrides).get("num_classes")
    if not isinstance(count, int):
        raise ValueError("the stream's labels have no names to count: give --model_overrides num_classes=N.")
    return datasets.ClassLabel(names=[str(label) for label in range(count)])


def _code_samples(
    args: ARArguments, tokenizer: DARTokenizer
) -> tuple[CodeSamples, ImageSamples | None, datasets.ClassLabel]:
    """Stored training codes, validation images from a split of their own if the data set is named, and classes."""
    assert args.codes is not None
    transform = _train_transform(args, tokenizer)
    dataset = load_codes(args.codes, tokenizer, transform)
    classes = dataset.features["label"]
    validation = None
    if args.dataset_name:
        validation = _validation_split(args, _loader(args, with_labels=True), classes.names)
    dataset = _subset(dataset, args.max_train_samples, args.seed)
    return stored_samples(dataset, transform), _validation_samples(args, tokenizer, validation), classes


def _loader(args: LoopArguments, with_labels: bool, load: Callable = load_images) -> Callable:
    """Loads a split by name."""
    return partial(
        load,
        args.dataset_name,
        config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column if with_labels else None,
    )


def _validation_split(
    args: LoopArguments, load: Callable[..., datasets.Dataset], class_names: list[str] | None
) -> datasets.Dataset | None:
    """The split to validate on: the one named, or validation or test, where there is one that can be used."""
    if args.validation_split:
        return load(args.validation_split, class_names=class_names)
    available = available_splits(args.dataset_name, args.dataset_config_name)
    for split in ("validation", "test"):
        if split in available:
            try:
                return load(split, class_names=class_names)
            except ValueError as error:
                logger.warning("not validating on the split %s: %s", split, error)
    return None


def _splits(args: LoopArguments, with_labels: bool) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training split and one for validation, held out of the former where there is none that can be used."""
    if not args.dataset_name:
        raise ValueError(NO_DATASET)
    load = _loader(args, with_labels)
    train = load(args.train_split)
    class_names = train.features["label"].names if with_labels else None
    validation = _validation_split(args, load, class_names)
    if validation is not None:
        return train, validation
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
    overrides = parse_options(args.model_overrides)
    if args.init_from:
        model = _saved_tokenizer(args.init_from, overrides)
    else:
        model = _make(DARTokenizer, options | overrides)
    train, validation = _image_samples(args, model, with_labels=False)
    stage = TokenizerStage(model, train, args, validation)
    if not args.init_from:
        stage.start_fresh()
    return stage


def _saved_tokenizer(source: str, overrides: dict[str, Any]) -> DARTokenizer:
    """A saved tokenizer to fine-tune, in float32; options may change what has no weights, or add a REPA head.

    Raises:
        ValueError: if there is none, or its weights do not fit the options.
    """
    with option_named("init_from"):
        saved = load(DARTokenizer, part(source, "tokenizer"), "tokenizer")
    config = {name: value for name, value in dict(saved.config).items() if not name.startswith("_")}
    if "num_groups" in overrides:  # what follows from it, follows it
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


def _make(model_class: type, options: dict[str, Any]) -> Any:
    """A model or configuration from the options of a preset and of ``--model_overrides``."""
    try:
        return model_class(**options)
    except Exception as error:  # options from anywhere: the libraries raise all kinds for impossible ones
        reason = error.__cause__ or error
        text = reason if isinstance(reason, (TypeError, ValueError)) else f"{type(reason).__name__}: {reason}"
        raise ValueError(f"--model_overrides make no {model_class.__name__}: {text}") from error


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
    tokenizer = load(DARTokenizer, args.tokenizer, "tokenizer").to(device)
    overrides = parse_options(args.model_overrides)
    sizes = _sizes(tokenizer, overrides)
    train: ImageSamples | StreamedImages | CodeSamples
    if args.codes:
        train, validation, label_feature = _code_samples(args, tokenizer)
    else:
        train, validation = _image_samples(args, tokenizer, with_labels=True)
        label_feature = train.dataset.features["label"]
        if isinstance(train, StreamedImages):
            label_feature = _stream_classes(args, train.dataset)
    assert isinstance(label_feature, datasets.ClassLabel)  # load_images makes it one
    if args.init_from:
        model = saved_transformer(args, overrides, sizes, label_feature.names)
    else:
        model = _new_transformer(args, options | sizes, overrides, label_feature.num_classes)
    if torch.device(device).type == "cpu" and model.config.num_image_tokens <= SHORT_SEQUENCE:
        model.set_attn_implementation("eager")  # for training only: it is not saved
    return ARStage(model, tokenizer, train, args, validation, dict(enumerate(label_feature.names)))


def _sizes(tokenizer: DARTokenizer, overrides: dict[str, Any]) -> dict[str, int]:
    """Options of the language model that follow from the tokenizer.

    Raises:
        ValueError: for overrides that are no options, or that the pipeline would refuse at the end.
    """
    if unknown := set(overrides) - MODEL_OPTIONS:
        raise ValueError(f"DARConfig has no options {', '.join(sorted(unknown))}.")
    config = tokenizer.config
    sizes = {"codebook_size": config.codebook_size, "num_image_tokens": config.num_tokens}
    for name, value in sizes.items():
        if (given := overrides.get(name, value)) != value:
            raise ValueError(f"--model_overrides {name}={given}, but the tokenizer has {value}: leave it out.")
    return sizes | {"tokens_per_group": config.tokens_per_group}


def _new_transformer(
    args: ARArguments, options: dict[str, Any], overrides: dict[str, Any], num_classes: int
) -> DARForCausalLM:
    config = _make(DARConfig, options | {"num_classes": num_classes} | overrides)
    if config.num_classes < num_classes:
        raise ValueError(f"num_classes={config.num_classes}, but the data set has {num_classes} classes.")
    set_seed(args.seed)
    return _make(DARForCausalLM, {"config": config})
