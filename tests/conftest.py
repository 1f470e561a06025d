"""Tiny models with random weights: every part takes part in the result, and everything runs in milliseconds."""

import functools
import gc
import io
import tarfile

import datasets
import pytest
import torch
from PIL import Image
from torch import nn

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.data import sources

TOKENIZER = {
    "sample_size": 8,
    "encoder_patch_size": 2,
    "encoder_dim": 64,
    "num_encoder_layers": 2,
    "decoder_dim": 64,
    "num_decoder_layers": 2,
    "codebook_size": 32,
    "num_tokens": 16,
    "num_groups": 4,
    "diffusion_dim": 64,
    "diffusion_patch_size": 2,
    "diffusion_depth": 2,
    "attention_head_dim": 32,
    "repa_layer": None,
    "max_num_tokens": 16,
}
TRANSFORMER = {
    "codebook_size": 32,
    "num_classes": 5,
    "num_image_tokens": 16,
    "tokens_per_group": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.hookimpl(tryfirst=True)  # xdist reads its groups afterwards
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # trainings that tests share are fixtures of their module: each is to happen in one process only
        if "slow" in item.keywords and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    if hasattr(config, "workerinput"):  # of equally many tests, the long ones first: no process is to wait at the end
        items.sort(key=lambda item: not {"slow", "end_to_end"} & {mark.name for mark in item.iter_markers()})


def pytest_collection_finish():
    """Training collects garbage at its end: quick only if it need not look at every library and test."""
    gc.collect()
    gc.freeze()


digits = functools.cache(sources.load_digits)


@pytest.fixture(autouse=True)
def shared_digits(monkeypatch):
    """The digits are made once in a process: nobody changes them, and making them takes longer than most tests."""
    monkeypatch.setattr(sources, "load_digits", digits)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that builds a tiny tokenizer, with other options where given."""

    def make(**options) -> DARTokenizer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = DARTokenizer(**TOKENIZER | options)
            model.reset_parameters(gate=1.0, modulation_std=0.1, output_std=0.1, post_quant_std=0.35)
            # nothing at a start value that hides a part: norms are not the identity, biases are not zero
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    nn.init.normal_(module.weight, mean=1.0, std=0.2)
                    nn.init.normal_(module.bias, std=0.2)
            for name, parameter in model.named_parameters():
                if name.endswith((".gate1", ".gate2")):
                    nn.init.normal_(parameter, mean=1.0, std=0.2)
                elif name.endswith(("modulation.bias", "proj_out.bias")):
                    nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_transformer():
    """A function that builds a tiny language model, with other options where given."""

    def make(**options) -> DARForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = DARForCausalLM(DARConfig(**TRANSFORMER | options))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    nn.init.normal_(parameter, mean=1.0, std=0.2)
                elif "embed_tokens" in name:
                    nn.init.normal_(parameter, std=1.0)
                else:
                    nn.init.normal_(parameter, std=0.3 if "lm_head" in name else 0.2)
        return model.eval()

    return make


@pytest.fixture
def tiny_tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def tiny_transformer(make_transformer):
    return make_transformer()


@pytest.fixture(scope="session")
def make_pipeline(make_tokenizer, make_transformer):
    """A function that builds a pipeline of a tiny tokenizer and a tiny language model, or of those given."""

    def make(tokenizer=None, transformer=None) -> DARPipeline:
        labels = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark", 3: "ray", 4: "cock"}
        parts = (tokenizer or make_tokenizer(), transformer or make_transformer())
        pipeline = DARPipeline(*parts, FlowMatchAdamsBashforthScheduler(), id2label=labels)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def tiny_pipeline(make_pipeline, tiny_tokenizer, tiny_transformer):
    return make_pipeline(tiny_tokenizer, tiny_transformer)


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory):
    """The same 200 labelled images, 8x8, as a folder of images, a parquet file and three webdataset tars."""
    root, generator = tmp_path_factory.mktemp("sets"), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (200, 8, 8, 3), generator=generator, dtype=torch.uint8)
    for name in ("imagefolder", "parquet", "webdataset"):
        (root / name).mkdir()
    rows: dict[str, list] = {"image": [], "label": []}
    tars = [tarfile.open(root / "webdataset" / f"train-{shard}.tar", "w") for shard in range(3)]  # noqa: SIM115
    for index, array in enumerate(pixels):
        label = index // 20
        buffer = io.BytesIO()
        Image.fromarray(array.numpy()).save(buffer, "PNG")
        file = root / "imagefolder" / str(label) / f"{index:03d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(buffer.getvalue())
        rows["image"].append({"bytes": buffer.getvalue(), "path": file.name})
        rows["label"].append(label)
        for ending, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
            entry = tarfile.TarInfo(f"{index:03d}.{ending}")
            entry.size = len(content)
            tars[index // 70].addfile(entry, io.BytesIO(content))
    for tar in tars:
        tar.close()
    names = [str(label) for label in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(root / "parquet" / "train.parquet")
    return {name: root / name for name in ("imagefolder", "parquet", "webdataset")}
