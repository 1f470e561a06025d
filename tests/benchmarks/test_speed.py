"""The benchmark runs, with tiny models in the place of the paper's, and its plain reference computes the same."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dar_hf.presets import PRESETS, Preset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELS = [1, 3]
SIZES = (
    "codebook_size", "num_classes", "num_image_tokens", "tokens_per_group", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
OPTIONS = ["--preset", "B", "--batch_sizes", "2", "--repeats", "1", "--slow_repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Its files import each other, as they do when `speed.py` is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_the_plain_language_model_computes_the_same(make_transformer):
    from plain_reference import PlainLanguageModel, stock_llama

    model = make_transformer()
    ids = torch.tensor([[33, 4, 9, 17, 2], [35, 0, 31, 8, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = PlainLanguageModel(model, len(ids))
        logits = [plain(ids[:, [index]], torch.tensor([index])) for index in range(ids.shape[1])]
        assert torch.allclose(torch.stack(logits, dim=1), expected, atol=1e-4)
        stock = stock_llama(model)(input_ids=ids).logits
    assert torch.allclose(stock[..., : model.config.codebook_size], expected, atol=1e-4)


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_the_plain_language_model_generates(tiny_transformer, guidance):
    from plain_reference import PlainLanguageModel

    config = tiny_transformer.config
    plain = PlainLanguageModel(tiny_transformer, len(LABELS) * (2 if guidance else 1))
    codes = plain.generate(LABELS, 0, config.num_image_tokens, guidance)
    assert codes.shape == (2, config.num_image_tokens) and 0 <= codes.min() <= codes.max() < config.codebook_size


def test_the_plain_tokenizer_computes_the_same(tiny_tokenizer):
    from plain_reference import PlainTokenizer

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    plain = PlainTokenizer(tiny_tokenizer)
    codes = tiny_tokenizer.encode(images).codes
    assert torch.equal(plain.encode(images), codes)
    assert torch.allclose(plain.decode(codes, noise), tiny_tokenizer.decode(codes, noise=noise).sample, atol=1e-4)


class SameProcess:
    """Stands in for a pool of one new process, which would not know the tiny models."""

    def __init__(self, *args, **kwargs):
        pass

    Pool = __enter__ = lambda self, *args, **kwargs: self
    __exit__ = lambda self, *args: None  # noqa: E731

    def apply(self, function, arguments):
        return function(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_every_part_runs(tiny_tokenizer, tiny_transformer, monkeypatch, tmp_path, capsys):
    import speed
    import timing

    monkeypatch.setattr(timing, "PROBE_ROWS", 16)
    decoder = {name: value for name, value in tiny_tokenizer.config.items() if not name.startswith("_")}
    llama = {name: getattr(tiny_transformer.config, name) for name in SIZES}
    small = Preset(decoder, llama, tokenizer_recipe={"preset": "digits"}, ar_recipe={"preset": "digits"})
    for name, preset in {
        "v1": Preset(decoder),
        "B": Preset(transformer=llama),
        "digits": small,
        "mnist": small,
    }.items():
        monkeypatch.setitem(PRESETS, name, preset)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # which takes minutes
    monkeypatch.setattr(speed.multiprocessing, "get_context", SameProcess)
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: True)  # of the tests' own process
    parts = list(speed.PARTS)
    if importlib.util.find_spec("torchao"):
        parts += speed.OPTIONAL_PARTS
    speed.main([*OPTIONS, "--json", str(tmp_path / "speed.json"), "--parts", *parts])
    results = json.loads((tmp_path / "speed.json").read_text())
    counts = {part: len(results[part]) for part in parts}
    expected = {"memory": 1, "tokenizer": 4, "model": 4, "image": 2, "training": 12, "int8": 1}
    assert counts == {part: expected[part] for part in parts}
    rows = [row for part in parts if part != "memory" for row in results[part]]
    assert all(row["ours"] > 0 and row["plain"] > 0 for row in rows)
    assert all("stock" in row and "limit" in row for row in results["model"])
    for guided, alone in zip(results["model"][::2], results["model"][1::2], strict=True):
        assert alone["two passes / one"] == guided["ours"] / alone["ours"]
    assert all("limit" in row for row in results["training"] if "float32" in row["what"])
    decoded = {row["what"]: row["difference"] for row in results["tokenizer"][1:]}
    assert decoded["decode, float32"] < 1e-5 < decoded["decode, bf16"] < 0.1
    table = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"| {row['what']} |") for line in table) for row in rows)
