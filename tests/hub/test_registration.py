"""What is given to the package's classes: saving that pushes, and clear exceptions in loading."""

import pytest
import torch

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def files(hub, name):
    return hub.repositories["model", name].files()


@pytest.mark.parametrize("name", ["tokenizer", "transformer"])
def test_saving_with_a_push_replaces_what_is_on_the_hub(hub, tiny_pipeline, tmp_path, name):
    model = tiny_pipeline.components[name]
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB", push_to_hub=True, repo_id="user/x")
    assert len([path for path in files(hub, "user/x") if path.endswith(".safetensors")]) > 1
    changed(model).save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="user/x", commit_message="again")
    (weights,) = [path for path in files(hub, "user/x") if "safetensors" in path]
    assert hub.read("user/x", weights) == (tmp_path / "model" / weights).read_bytes()
    assert "README.md" in files(hub, "user/x") and not [path for path in files(hub, "user/x") if ".saving" in path]
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_repository_is_named_after_its_folder(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "digits", push_to_hub=True, private=True)
    assert {"model_index.json", "README.md"} <= set(files(hub, "user/digits"))
    tiny_pipeline.scheduler.save_pretrained(str(tmp_path / "solver"), True)  # by position, as the libraries allow it
    assert "scheduler_config.json" in files(hub, "user/solver")


def test_a_process_that_is_not_the_main_one_pushes_nothing(hub, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "x", is_main_process=False, push_to_hub=True, repo_id="user/x")
    assert not (tmp_path / "x" / "config.json").exists()
    assert ("model", "user/x") not in hub.repositories


def test_errors_of_the_environment_pass_as_they_are(tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path)

    def fail(error):
        def load(*args, **kwargs):
            raise error

        return load

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), ImportError("no torchao"), PermissionError(13, "no")):
        monkeypatch.setattr(DARTokenizer, "_load_pretrained_model", fail(error))
        with pytest.raises(type(error)) as caught:
            DARTokenizer.from_pretrained(tmp_path / "tokenizer")
        assert caught.value is error


def test_a_pointer_is_named(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    pointer = tmp_path / "transformer" / "model.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    expected = f"{pointer} is a git-lfs pointer, not the file itself: run `git lfs pull`"
    for model_class, place in ((DARForCausalLM, tmp_path / "transformer"), (DARPipeline, tmp_path)):
        with pytest.raises(ValueError, match=expected):
            model_class.from_pretrained(place)
