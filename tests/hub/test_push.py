"""Pushing to a Hub on loopback and loading from it in fresh processes."""

import re

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from fakehub import HubError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from PIL import Image

from dar_hf import DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.data import load_images
from dar_hf.hub import model_card, push_card, push_folder
from dar_hf.hub.push import stale_weights
from dar_hf.training.codes import ExtractArguments, extract_codes, push_codes

LOAD = """
import sys, torch
from dar_hf import DARPipeline

repository, result, images = sys.argv[1], sys.argv[2], []
for options in eval(sys.argv[3]):
    pipeline = DARPipeline.from_pretrained(repository, **options)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is DARPipeline
    images.append(pipeline(["ray", 0], generator=torch.Generator().manual_seed(0), output_type="pt").images)
torch.save(torch.stack(images), result)
"""


def images(pipeline):
    return pipeline(["ray", 0], generator=torch.Generator().manual_seed(0), output_type="pt").images


def load(hub, path, *options, **changes):
    """Images of a pipeline that a fresh process loads from the Hub, once with each options."""
    done = hub.python(LOAD, "user/x", path / "images.pt", options or ({},), **changes)
    assert done.returncode == 0, done.stderr
    return torch.load(path / "images.pt", weights_only=True)


def files(hub, name="user/x", revision="main"):
    return set(hub.repositories["model", name].files(revision))


@pytest.mark.slow
def test_a_pushed_pipeline_gives_the_same_image_in_a_fresh_process_and_offline(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    commit = tiny_pipeline.push_to_hub("user/x")
    assert commit.oid == hub.repositories["model", "user/x"].refs["main"]
    assert torch.equal(load(hub, tmp_path)[0], images(tiny_pipeline))
    assert torch.equal(load(hub, tmp_path, HF_HUB_OFFLINE="1")[0], images(tiny_pipeline))


@pytest.mark.slow
def test_revisions_variants_and_shards(hub, tiny_pipeline, make_tokenizer, tmp_path):
    first = tiny_pipeline.push_to_hub("user/x", max_shard_size="200KB")
    assert any("-of-" in name for name in files(hub) if name.startswith("tokenizer/"))
    expected = images(tiny_pipeline)

    tiny_pipeline.tokenizer.token_embed.weight.data += 0.5
    tiny_pipeline.push_to_hub("user/x", revision="other", commit_message="Shift")
    repository = hub.repositories["model", "user/x"]
    assert repository.commits[repository.refs["other"]]["title"] == "Shift"
    shifted = images(tiny_pipeline)
    assert not torch.equal(shifted, expected)

    tiny_pipeline.push_to_hub("user/x", variant="shifted")
    loaded = load(hub, tmp_path, {}, {"revision": first.oid}, {"revision": "other"}, {"variant": "shifted"})
    assert torch.equal(loaded, torch.stack([expected, expected, shifted, shifted]))


@pytest.mark.slow
def test_with_xet_on(hub_without_lfs, tiny_pipeline, tmp_path):
    tiny_pipeline.push_to_hub("user/x")
    assert torch.equal(load(hub_without_lfs, tmp_path)[0], images(tiny_pipeline))


PARTS = {
    "tokenizer": ("config.json", "diffusion_pytorch_model.safetensors"),
    "transformer": ("config.json", "model.safetensors"),
    "scheduler": ("scheduler_config.json",),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_push_alone_with_a_card(hub, tiny_pipeline, name):
    part = getattr(tiny_pipeline, name)
    commit = part.push_to_hub("part", private=True, commit_message="First", commit_description="of all")
    assert files(hub, "user/part") >= {"README.md", *PARTS[name]}
    assert hub.repositories["model", "user/part"].private
    assert commit.repo_url.repo_id == "user/part"
    assert f'{type(part).__name__}.from_pretrained("user/part")' in hub.read("user/part", "README.md").decode()


def test_a_part_goes_into_a_subfolder_without_a_card(hub, tiny_pipeline):
    tiny_pipeline.tokenizer.push_to_hub("user/x", subfolder="tokenizer")
    assert files(hub) == {".gitattributes", "tokenizer/config.json", "tokenizer/diffusion_pytorch_model.safetensors"}


def test_a_pull_request_leaves_the_branch_alone(hub, tiny_pipeline):
    tiny_pipeline.scheduler.push_to_hub("user/x")
    before = hub.repositories["model", "user/x"].refs["main"]
    commit = FlowMatchAdamsBashforthScheduler(shift=3.0).push_to_hub("user/x", create_pr=True)
    assert commit.pr_num == 1
    assert hub.repositories["model", "user/x"].refs["main"] == before
    assert b'"shift": 3.0' in hub.read("user/x", "scheduler_config.json", "refs/pr/1")
    FlowMatchAdamsBashforthScheduler(shift=4.0).push_to_hub("user/x", revision="refs/pr/1")
    assert b'"shift": 4.0' in hub.read("user/x", "scheduler_config.json", "refs/pr/1")


def test_a_second_push_keeps_the_card_people_wrote(hub, tiny_tokenizer):
    tiny_tokenizer.push_to_hub("user/x")
    card = hub.read("user/x", "README.md").decode()
    card = card.replace("license: mit", "license: apache-2.0\nlanguage: en # mine")
    hub.write("user/x", "README.md", card + "\n## Limits\n\nOnly digits.\n")
    tiny_tokenizer.push_to_hub("user/x")
    after = hub.read("user/x", "README.md").decode()
    assert after == card + "\n## Limits\n\nOnly digits.\n"


def test_a_card_that_was_there_before_stays_whole(hub, tiny_tokenizer):
    tiny_tokenizer.push_to_hub("user/x", subfolder="vae")
    hub.write("user/x", "README.md", "---\nlicense: cc0-1.0\n---\n\n# My own words\n")
    tiny_tokenizer.push_to_hub("user/x")
    after = hub.read("user/x", "README.md").decode()
    assert "# My own words" in after and "license: cc0-1.0" in after
    assert 'DARTokenizer.from_pretrained("user/x")' in after and "library_name: diffusers" in after


def test_a_card_changed_during_the_push_is_not_overwritten(hub, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.push_to_hub("user/x")
    from dar_hf.hub import push

    def merge(existing, new):
        hub.write("user/x", "README.md", "changed meanwhile")
        return new

    monkeypatch.setattr(push, "merge_cards", merge)
    with pytest.raises(HfHubHTTPError) as caught:
        tiny_tokenizer.push_to_hub("user/x")
    assert "somebody changed the repository" in caught.value.__notes__[0]
    assert hub.read("user/x", "README.md") == b"changed meanwhile"


def test_shards_are_replaced_by_a_single_file_and_the_other_way_round(hub, make_tokenizer):
    make_tokenizer().push_to_hub("user/x", max_shard_size="200KB")
    make_tokenizer().push_to_hub("user/x", variant="bf16")
    sharded = {name for name in files(hub) if "-of-" in name or name.endswith("index.json")}
    assert len(sharded) > 2
    make_tokenizer().push_to_hub("user/x")
    assert {name for name in files(hub) if "safetensors" in name} == {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bf16.safetensors",
    }


def test_stale_weights():
    there = [
        "a/model.safetensors",
        "a/model-00001-of-00002.safetensors",
        "a/model.safetensors.index.json",
        "a/model.fp16.safetensors",
        "a/model.safetensors.index.fp16.json",
        "b/model.safetensors",
        "a/notes.safetensors",
    ]
    assert stale_weights(there, ["a/model.safetensors"]) == there[1:3]
    assert stale_weights(there, ["a/model.fp16-00001-of-00003.safetensors"]) == there[3:5]
    assert stale_weights(there, ["a/config.json"]) == []


def test_a_folder_goes_up_with_its_pictures_but_not_its_checkpoints(hub, tiny_pipeline, tmp_path):
    folder = tmp_path / "run"
    tiny_pipeline.save_pretrained(folder)
    Image.new("RGB", (4, 4)).save(folder / "samples.png")
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-1" / "model.safetensors").write_bytes(b"large")
    (folder / ".secret").write_text("x")
    card = model_card(tiny_pipeline, str(folder), summary="Mine.", pictures={"Samples": "samples.png"})
    card.save(folder / "README.md")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push_folder(folder, "user/x", "Upload")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "samples.png" in files(hub)
    assert not any("checkpoint" in name or "secret" in name for name in files(hub))
    card = hub.read("user/x", "README.md").decode()
    assert "Mine." in card and 'DARPipeline.from_pretrained("user/x")' in card and str(folder) not in card
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card)) == {"samples.png"} <= files(hub)


def test_codes_push_and_load_as_data_sets_with_a_card(hub, tmp_path):
    codes = Dataset.from_dict({"codes": torch.arange(32).reshape(2, 16).tolist(), "label": [0, 1]})
    codes.push_to_hub("user/codes")
    push_card(model_card(codes, "user/codes", facts={"tokenizer": "user/tokenizer"}), "user/codes")
    card = hub.read("user/codes", "README.md", kind="dataset").decode()
    assert "dataset_info" in card and 'load_dataset("user/codes"' in card and "| tokenizer | user/tokenizer |" in card
    code = "import sys, datasets; print(datasets.load_dataset('user/codes', split='train')[1]['codes'][15])"
    done = hub.python(code)
    assert done.stdout.strip() == "31", done.stderr


def test_stored_codes_replace_the_earlier_set_and_keep_its_card(hub, make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    load_images("digits").select(range(20)).to_parquet(tmp_path / "digits.parquet")
    options = {"crop": "center", "hub_dataset_id": "codes", "hub_private_repo": True}
    for number, shard_size in enumerate((5, 10)):
        args = ExtractArguments(
            str(tmp_path / "tokenizer"),
            str(tmp_path / "digits.parquet"),
            str(tmp_path / str(number)),
            shard_size=shard_size,
            **options,
        )
        extract_codes(args, Accelerator(cpu=True))
        assert push_codes(args).endswith("/datasets/user/codes")
        if number == 0:
            card = hub.read("user/codes", "README.md", kind="dataset").decode()
            card = card.replace("tags:", "license: cc0-1.0\ntags:") + "\nMine.\n"
            hub.write("user/codes", "README.md", card, kind="dataset")
    repository = hub.repositories["dataset", "user/codes"]
    assert repository.private and len([name for name in repository.files() if name.endswith(".parquet")]) == 2
    after = hub.read("user/codes", "README.md", kind="dataset").decode()
    assert after == card and after.count("# Image codes") == 1


# What can go wrong: the Hub's own exceptions, with a line of advice where they say too little, and nothing changed


def test_no_token(hub, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HfHubHTTPError) as caught:
        tiny_tokenizer.push_to_hub("user/x")
    assert "hf auth login" in caught.value.__notes__[0]
    assert not hub.repositories


def test_not_my_name(hub, tiny_tokenizer):
    with pytest.raises(HfHubHTTPError) as caught:
        tiny_tokenizer.push_to_hub("somebody/x")
    assert "Make sure your token has the correct permissions" in str(caught.value)


def test_no_network(hub, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(httpx.ConnectError) as caught:
        tiny_tokenizer.push_to_hub("user/x")
    assert "cannot be reached" in caught.value.__notes__[0]


def test_offline(hub, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled) as caught:
        tiny_tokenizer.push_to_hub("user/x")
    assert "HF_HUB_OFFLINE" in caught.value.__notes__[0]


def test_not_a_name(hub, tiny_tokenizer):
    with pytest.raises(HFValidationError) as caught:
        tiny_tokenizer.push_to_hub("a/b/c")
    assert "'repo_name' or 'namespace/repo_name'" in str(caught.value)


def test_a_failing_hub_gets_nothing_and_changes_no_local_file(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    hub.failure = HubError(507, "Full", "no space")
    with pytest.raises(HfHubHTTPError) as caught:
        push_folder(tmp_path / "run", "user/x")
    assert "problem of its own" in caught.value.__notes__[0]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_repository_of_another_model_is_refused(hub, tiny_pipeline):
    tiny_pipeline.tokenizer.push_to_hub("user/x")
    before = hub.repositories["model", "user/x"].refs["main"]
    for model in (tiny_pipeline, tiny_pipeline.transformer):
        with pytest.raises(ValueError, match="holds a DARTokenizer"):
            model.push_to_hub("user/x")
    assert hub.repositories["model", "user/x"].refs["main"] == before


def test_a_folder_without_a_model_is_refused(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        push_folder(tmp_path, "user/x")
    assert not hub.repositories


PULLS = """
import sys, time
from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer

time.sleep = lambda seconds: None  # the client waits between its tries
for attempt in sys.argv[1:]:
    try:
        eval(attempt)
        print("loaded")
    except Exception as error:
        print(type(error).__name__, "|", *getattr(error, "__notes__", str(error).split()))
"""


def pulls(hub, *attempts, **changes):
    done = hub.python(PULLS, *attempts, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_loading_what_is_not_there_says_what_to_do(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("user/x")
    tiny_pipeline.tokenizer.push_to_hub("user/tokenizer")
    tiny_pipeline.push_to_hub("user/half")
    hub.write("user/half", "transformer/model.safetensors", None)
    tiny_pipeline.push_to_hub("user/quarter")
    hub.write("user/quarter", "transformer/config.json", None)
    classes = ("DARPipeline", "DARTokenizer", "DARForCausalLM")
    missing = [f"{name}.from_pretrained('user/none')" for name in classes]
    no_revision = [f"{name}.from_pretrained('user/x', revision='nope')" for name in classes]
    unfit = [f"DARPipeline.from_pretrained('user/{name}')" for name in ("tokenizer", "half", "quarter")]
    unfit += ["DARForCausalLM.from_pretrained('user/tokenizer')"]
    *lines, other, half, quarter, unlike = pulls(hub, *missing, *no_revision, *unfit)
    assert len(lines) == 6
    for line in lines[:3]:
        assert line.startswith("RepositoryNotFoundError |") and "/user/none" in line
        assert "make sure you are authenticated" in line
    for line in lines[3:]:
        assert line.startswith("RevisionNotFoundError |") and "Revision Not Found for url" in line and "nope" in line
    incomplete = "the repository is incomplete, or holds another kind of model"
    assert other.startswith(f"RemoteEntryNotFoundError | user/tokenizer: {incomplete}")
    assert half.startswith(f"OSError | user/half: {incomplete}")
    assert quarter.startswith(f"OSError | user/quarter: {incomplete}")
    assert unlike == "ValueError | user/tokenizer holds a DARTokenizer, not a 'dar' language model."
    for line in pulls(hub, *missing, HF_HUB_OFFLINE="1"):
        assert re.match("(OfflineModeIsEnabled|LocalEntryNotFoundError) .* offline mode is on", line)
    for line in pulls(hub, *missing, HF_ENDPOINT="http://127.0.0.1:9"):
        assert "cannot be reached" in line


def test_another_model_of_diffusers_is_refused(tiny_pipeline, tmp_path):
    """diffusers' own loader would fill a tokenizer of the default size with random weights, and warn."""
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="describes a AutoencoderKL, not a DARTokenizer"):
        DARTokenizer.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="describes a DARForCausalLM, not a DARTokenizer"):
        DARTokenizer.from_pretrained(tmp_path / "transformer")
    with pytest.raises((ValueError, OSError)):
        DARPipeline.from_pretrained(tmp_path / "tokenizer")
