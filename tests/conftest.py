"""Fixtures of all tests.

Libraries are imported inside: pytest-xdist's main process, which only hands out the tests, need not wait for them.
"""

import functools
import gc
import io
import tarfile

import pytest


@pytest.hookimpl(tryfirst=True)  # xdist reads its groups afterwards
def pytest_collection_modifyitems(config, items):
    import torch

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


@pytest.fixture(scope="session")
def digits():
    """`load_digits`, which makes the digits once in a process."""
    from dar_hf.data import sources

    return functools.cache(sources.load_digits)


@pytest.fixture(autouse=True)
def shared_digits(digits, monkeypatch):
    """Making the digits anew takes longer than most tests, and nobody changes them."""
    monkeypatch.setattr("dar_hf.data.sources.load_digits", digits)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that builds a tiny tokenizer, with other options where given."""
    from tiny_models import make_tokenizer

    return make_tokenizer


@pytest.fixture(scope="session")
def make_transformer():
    """A function that builds a tiny language model, with other options where given."""
    from tiny_models import make_transformer

    return make_transformer


@pytest.fixture
def tiny_tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def tiny_transformer(make_transformer):
    return make_transformer()


@pytest.fixture
def tiny_pipeline(tiny_tokenizer, tiny_transformer):
    from tiny_models import make_pipeline

    return make_pipeline(tiny_tokenizer, tiny_transformer)


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory):
    """The same 200 labelled images, 8x8, as a folder of images, a parquet file and three webdataset tars."""
    import datasets
    import torch
    from PIL import Image

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
