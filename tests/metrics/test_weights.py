"""Files of weights: found, identified, and never run."""

import pickle

import pytest
import torch

from dar_hf.metrics.weights import check_hash, find_weights, read_original, read_weights, write_weights
from dar_hf.utils.fingerprint import weights_fingerprint

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}


def test_round_trip_by_file_and_by_folder(tmp_path):
    written = write_weights(STATE, tmp_path / "deep" / "model.safetensors")
    assert written == weights_fingerprint(STATE)
    for source in (tmp_path / "deep", tmp_path / "deep" / "model.safetensors"):
        found = read_weights(str(source))
        assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]  # nothing temporary is left


def test_the_hash_is_of_names_types_shapes_and_values(tmp_path):
    original = weights_fingerprint(STATE)
    assert weights_fingerprint(dict(reversed(STATE.items()))) == original
    for other in (
        {"a": STATE["a"] + 1e-6, "b": STATE["b"]},
        {"a": STATE["a"].reshape(3, 2), "b": STATE["b"]},
        {"a": STATE["a"].half(), "b": STATE["b"]},
        {"c": STATE["a"], "b": STATE["b"]},
        {"a": STATE["a"]},
    ):
        assert weights_fingerprint(other) != original
    torch.save(STATE, tmp_path / "file.pth")
    assert weights_fingerprint(read_original(tmp_path / "file.pth")) == original  # whatever the format


def test_a_wrong_hash_is_an_error():
    found = weights_fingerprint(STATE)
    check_hash(found, None, "x")
    check_hash(found, found[:8].upper(), "x")
    for expected in ("0" * 64, found[:7], found + "0"):
        with pytest.raises(ValueError, match=f"wrong weights: x has the hash {found}"):
            check_hash(found, expected, "x")


def test_missing_and_damaged_files(tmp_path):
    for source in ("no/such/place/file.safetensors", str(tmp_path), "file.safetensors", "name"):
        with pytest.raises(ValueError, match="no such file"):
            find_weights(source)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="damaged"):
        read_weights(str(tmp_path))
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="convert it with examples/convert_metric_weights.py"):
        find_weights(str(tmp_path / "weights.pth"))


def test_a_repository_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="some/where is neither a file nor a repository that can be read"):
        find_weights("some/where")


def test_a_repository_is_read_by_name(tmp_path, monkeypatch):
    calls = []

    def download(repository, name):
        calls.append((repository, name))
        return str(tmp_path / "found")

    monkeypatch.setattr("dar_hf.metrics.weights.hf_hub_download", download)
    assert find_weights("some/where") == find_weights("some/where:inception.safetensors") == tmp_path / "found"
    assert calls == [("some/where", "model.safetensors"), ("some/where", "inception.safetensors")]


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_of_a_file_is_run(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="without running its code"):
        read_original(tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out


def test_only_state_dicts_are_read(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="something else than tensors by name"):
        read_original(tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="no such file"):
        read_original(tmp_path / "none.pth")


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04 no zip", {1: torch.zeros(1)}])
def test_other_files_are_refused_whatever_the_unpickler_makes_of_them(content, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="other.pth"):
        read_original(path)
