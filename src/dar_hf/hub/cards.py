"""Model cards: one template, filled with what a model's configuration and a run's reports say."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers import AutoTokenizer, GenerationConfig

from ..configuration_dar import DARConfig
from ..modeling_dar import DARForCausalLM
from ..pipeline_dar import DARPipeline
from ..scheduling_dar import FlowMatchAdamsBashforthScheduler
from ..tokenizer_dar import DARTokenizer
from ..utils.files import INDICES, read_object, saved_class
from .blocks import sign
from .tables import setting_text, tables

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "card.md"
PAPER_TAG = "arxiv:2505.23660"


@dataclass(frozen=True)
class _Kind:
    """What differs between the cards of different things."""

    usage: str
    remote_usage: str = ""
    library_name: str | None = None
    pipeline_tag: str | None = None
    describe: Callable[[Any], dict[str, str]] = lambda model: {}
    card: Any = ModelCard
    data: Any = ModelCardData


def _count(number: float) -> str:
    """A number of parameters as people write it: 774.7 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(round(number))


def _describe_tokenizer(model: DARTokenizer) -> dict[str, str]:
    config = model.config
    height, width = model.image_size
    # the head that REPA trains with takes no part in encoding or decoding
    parameters = sum(p.numel() for name, p in model.named_parameters() if "repa_head" not in name)
    steps = f"{config.num_inference_steps} denoising steps"
    if config.condition_scope == "prefix":
        steps += ", each with the conditions of all groups so far"
    return {
        "images": f"{height} × {width} pixels",
        "tokenizer": f"{_count(parameters)} parameters, {config.num_tokens} tokens in {config.num_groups} groups, "
        f"codebook {config.codebook_size} × {config.codebook_dim}, {steps}",
    }


def _describe_transformer(model: DARForCausalLM) -> dict[str, str]:
    config = model.config
    scale = model.generation_config.guidance_scale
    conditions = f"{config.num_classes} classes"
    if config.text_vocab_size:
        conditions = f"text of up to {config.max_text_tokens} of {config.text_vocab_size} tokens"
    return {
        "language model": f"Llama, {_count(model.num_parameters())} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, width {config.hidden_size}, {conditions}",
        "default guidance": "none" if scale is None else setting_text(scale),
    }


def _describe_scheduler(scheduler: FlowMatchAdamsBashforthScheduler) -> dict[str, str]:
    config = scheduler.config
    weights = "exact for unequal steps" if config.variable_step else "fixed, as in the original code"
    solver = "Euler" if config.solver_order == 1 else f"Adams-Bashforth of order 2, weights {weights}"
    return {"solver": f"{solver}; time shift {config.shift:g}"}


def _describe_pipeline(pipeline: DARPipeline) -> dict[str, str]:
    return {
        **_describe_tokenizer(pipeline.tokenizer),
        **_describe_transformer(pipeline.transformer),
        **_describe_scheduler(pipeline.scheduler),
    }


def _describe_dataset(dataset: Any) -> dict[str, str]:
    return {"rows": f"{len(dataset):,}", "columns": ", ".join(f"`{name}`" for name in dataset.column_names)}


_USE_PIPELINE = """
images = pipe(0).images  # a class by number or name
for output in pipe.stream(0):  # a preview as soon as each group of tokens exists
    output.images[0].save(f"step_{output.step}.png")"""
_USE_TRANSFORMER = """
codes = model.generate(torch.tensor([[model.config.class_token_id(0)]]))[:, 1:]  # tokens of one image of class 0"""
_USE_TEXT_PIPELINE = """
images = pipe(prompt="a red apple").images
for output in pipe.stream(prompt="a red apple"):  # a preview as soon as each group of tokens exists
    output.images[0].save(f"step_{output.step}.png")"""
_USE_TEXT_TRANSFORMER = """
prompt = model.config.text_token_ids([5, 3, 8])  # what the text tokenizer makes of a text
codes = model.generate(torch.tensor([prompt]))[:, len(prompt) :]  # tokens of one image"""
_USE_TOKENIZER = """
codes = tokenizer.encode(pixel_values).codes  # images (B, 3, H, W) in [-1, 1]
images = tokenizer.decode(codes).sample"""
_LOAD_PIPELINE = 'from dar_hf import DARPipeline\n\npipe = DARPipeline.from_pretrained("{id}")'
_LOAD_TRANSFORMER = 'import torch\nfrom dar_hf import DARForCausalLM\n\nmodel = DARForCausalLM.from_pretrained("{id}")'

_KINDS = {
    "DARPipeline": _Kind(
        _LOAD_PIPELINE + _USE_PIPELINE,
        "from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("{id}", trust_remote_code=True)',
        "diffusers",
        "unconditional-image-generation",
        _describe_pipeline,
    ),
    "DARTokenizer": _Kind(
        'from dar_hf import DARTokenizer\n\ntokenizer = DARTokenizer.from_pretrained("{id}")' + _USE_TOKENIZER,
        'from diffusers import AutoModel\n\ntokenizer = AutoModel.from_pretrained("{id}", trust_remote_code=True)',
        "diffusers",
        "image-to-image",
        _describe_tokenizer,
    ),
    "DARForCausalLM": _Kind(
        _LOAD_TRANSFORMER + _USE_TRANSFORMER,
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{id}", trust_remote_code=True)',
        "transformers",
        None,
        _describe_transformer,
    ),
    "FlowMatchAdamsBashforthScheduler": _Kind(
        "from dar_hf import FlowMatchAdamsBashforthScheduler\n\n"
        'scheduler = FlowMatchAdamsBashforthScheduler.from_pretrained("{id}")',
        library_name="diffusers",
        describe=_describe_scheduler,
    ),
    "Dataset": _Kind(
        'from datasets import load_dataset\n\ncodes = load_dataset("{id}", split="train").with_format("torch")',
        describe=_describe_dataset,
        card=DatasetCard,
        data=DatasetCardData,
    ),
}


# what is different about those that draw from text
_TEXT_KINDS = {
    "DARPipeline": replace(
        _KINDS["DARPipeline"],
        usage=_LOAD_PIPELINE + _USE_TEXT_PIPELINE,
        pipeline_tag="text-to-image",
    ),
    "DARForCausalLM": replace(
        _KINDS["DARForCausalLM"],
        usage=_LOAD_TRANSFORMER + _USE_TEXT_TRANSFORMER,
    ),
}


def _kind_of(model: Any) -> _Kind:
    name = type(model).__name__
    transformer = getattr(model, "transformer", model)
    if name in _TEXT_KINDS and transformer.config.text_vocab_size:
        return _TEXT_KINDS[name]
    return _KINDS[name]


def describe(model: Any) -> dict[str, str]:
    """Size and settings of a pipeline or one of its parts, as people write them: rows of its card's table."""
    return _kind_of(model).describe(model)


def model_card(
    model: Any,
    repo_id: str,
    *,
    title: str | None = None,
    summary: str = "",
    facts: Mapping[str, str] | None = None,
    results: Sequence[EvalResult] = (),
    results_note: str = "",
    pictures: Mapping[str, str] | None = None,
    recipe: Mapping[str, Mapping[str, Any]] | None = None,
    sections: Mapping[str, str] | None = None,
    self_contained: bool = False,
    **metadata: Any,
) -> ModelCard | DatasetCard:
    """The card of a model or of a data set of codes.

    Args:
        model: a `DARPipeline`, `DARTokenizer`, `DARForCausalLM`, scheduler or ``datasets.Dataset``; its size and
            settings are described. One without weights will do, see `empty_model`.
        repo_id: what the shown lines load: an id on the Hub or a folder.
        title: default the last part of ``repo_id``.
        summary: a paragraph below the title.
        facts: further rows of the table about the model, such as {"converted from": "…"}.
        results: metrics, for the text and the metadata's model-index; see
            `dar_hf.evaluation.eval_results`.
        results_note: who measured them, and how.
        pictures: captions and files of images, relative to the card.
        recipe: options of each stage of training, by the stage's title.
        sections: further headings and their Markdown.
        self_contained: say how to load the repository's own code.
        metadata: further metadata, such as ``base_model``, ``datasets``, ``license`` (default mit) and ``tags``.

    Returns:
        The card; ``str(card)`` is its text, ``card.save(path)`` writes it.
    """
    kind = _kind_of(model)
    title = title or os.path.basename(os.path.abspath(repo_id))  # the folder one is in has a name, too
    tags = ["d-ar", PAPER_TAG, *metadata.pop("tags", [])]
    common: dict[str, Any] = {"license": "mit", "tags": tags} | metadata
    if kind.card is ModelCard:
        common = {"library_name": kind.library_name, "pipeline_tag": kind.pipeline_tag} | common
        if results:
            common |= {"eval_results": list(results), "model_name": title}
    card = kind.card.from_template(
        kind.data(**common),
        template_path=str(TEMPLATE),
        title=title,
        summary=summary,
        pictures=pictures or {},
        facts=describe(model) | dict(facts or {}),
        usage=kind.usage.replace("{id}", repo_id),
        remote_usage=kind.remote_usage.replace("{id}", repo_id) if self_contained else "",
        tables=tables(results),
        results_note=results_note,
        recipe=recipe or {},
        sections=sections or {},
    )
    card.text = sign(card.text).rstrip() + "\n"
    return card


def empty_model(folder: str | Path) -> Any:
    """The model that a folder holds, without its weights: enough for a card, whatever its size.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds a model of another kind.
    """
    folder = Path(folder)
    for name in INDICES:
        if (folder / name).is_file():
            held = saved_class(read_object(folder / name))
            if held not in _EMPTY:
                raise ValueError(f"{folder} holds a {held}, which is no model of this package.")
            with torch.device("meta"):
                return _EMPTY[held](folder)
    raise FileNotFoundError(f"{folder} holds no model: it has neither model_index.json nor config.json.")


def _empty_tokenizer(folder: Path) -> DARTokenizer:
    return DARTokenizer.from_config(DARTokenizer.load_config(folder))


def _empty_transformer(folder: Path) -> DARForCausalLM:
    model = DARForCausalLM(DARConfig.from_pretrained(folder))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _empty_pipeline(folder: Path) -> DARPipeline:
    text_tokenizer = None
    if (folder / "text_tokenizer").is_dir():
        text_tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    return DARPipeline(
        _empty_tokenizer(folder / "tokenizer"),
        _empty_transformer(folder / "transformer"),
        FlowMatchAdamsBashforthScheduler.from_pretrained(folder / "scheduler"),
        text_tokenizer=text_tokenizer,
    )


_EMPTY: dict[str, Callable[[Path], Any]] = {
    "DARPipeline": _empty_pipeline,
    "DARTokenizer": _empty_tokenizer,
    "DARForCausalLM": _empty_transformer,
    "FlowMatchAdamsBashforthScheduler": FlowMatchAdamsBashforthScheduler.from_pretrained,
}
