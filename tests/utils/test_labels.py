import json

import pytest

from dar_hf import DARPipeline
from dar_hf.utils.labels import imagenet_labels, read_labels


def test_imagenet():
    labels = imagenet_labels()
    assert list(labels) == list(range(1000))
    known = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 207: "golden retriever", 999: "toilet tissue"}
    assert all(labels[label].startswith(name) for label, name in known.items())
    assert all(name == name.strip() and name for name in labels.values())
    labels[0] = "changed"
    assert imagenet_labels()[0] == "tench, Tinca tinca"


def test_imagenet_names_in_a_pipeline(tiny_tokenizer, make_transformer, tiny_pipeline):
    model = make_transformer(num_classes=1000)
    pipeline = DARPipeline(tiny_tokenizer, model, tiny_pipeline.scheduler, id2label=imagenet_labels())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["golden retriever", "toilet tissue"]) == [207, 999]
    by_name, by_id = (
        pipeline(label, temperature=0, output_type="codes").images for label in ("golden retriever", 207)
    )
    assert (by_name == by_id).all()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(["cat", "dog"])),
        ("a.json", json.dumps({"1": "dog", "0": "cat"})),
        ("a.txt", "cat\ndog\n"),
    ],
)
def test_read_labels(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    labels = read_labels(tmp_path / name, 2)
    assert labels == {0: "cat", 1: "dog"} and list(labels) == [0, 1]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[", "holds no class names by id"),
        ("a.json", "3", "holds no class names by id"),
        ("a.json", json.dumps({"cat": 0}), "holds no class names by id"),
        ("a.json", json.dumps([1, 2]), "names that are not empty"),
        ("a.txt", "cat\n\n", "names that are not empty"),
        ("a.txt", "cat\n", "must name the classes 0 to 1, each once; it has 1 names"),
        ("a.txt", "cat\ndog\ncow\n", "it has 3 names"),
        ("a.json", json.dumps({"0": "cat", "2": "dog"}), "classes 0 to 1"),
    ],
)
def test_files_without_labels(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name, 2)
