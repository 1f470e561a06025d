"""What of a folder goes to a Hub: the files of a model, and nothing that lies outside the folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
from fakehub import FakeHub
from huggingface_hub import snapshot_download

from dar_hf.hub import matching_files, model_files, push_folder
from dar_hf.hub.run_cards import take_report, write_run_card
from dar_hf.training.codes import ExtractArguments, push_codes
from dar_hf.training.loop import PushError, claim_repository

REPORTS = Path(__file__).resolve().parents[2] / "model_cards" / "reports"
SECRET = "hf_of_somebody"


@pytest.fixture
def outside(tmp_path):
    """A file and a folder next to the pushed one, which must not get onto the Hub."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("token", "config.json", "samples.png", "report.json", "model.safetensors"):
        (folder / name).write_text(SECRET)
    return folder


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    folder = tmp_path / "saved"
    tiny_pipeline.save_pretrained(folder)
    return folder


def nothing_leaked(hub: FakeHub) -> bool:
    return not any(SECRET.encode() in content for content in hub.contents.values())


LINKS = {
    "a picture": ("samples.png", "token"),
    "the card": ("README.md", "token"),
    "weights": ("transformer/model.safetensors", "model.safetensors"),
    "a configuration": ("transformer/generation_config.json", "config.json"),
    "records": ("training.json", "token"),
    "history": ("history.jsonl", "token"),
    "a report": ("evaluation/generation/report.json", "report.json"),
    "a folder of pictures": ("images", "."),
    "all evaluations": ("evaluation", "."),
    "an evaluation": ("evaluation/reconstruction", "."),
    "a text tokenizer": ("text_tokenizer", "."),
    "the parent": ("images", ".."),
    "nothing": ("samples.png", "none"),
}


@pytest.mark.parametrize("name, target", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_link_out_of_the_folder_is_refused(hub, saved, outside, name, target, absolute):
    path = saved / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / target if absolute else os.path.relpath(outside / target, path.parent))
    with pytest.raises(ValueError, match=f"{path} is a link that leads .*cp -rL"):
        push_folder(saved, "user/x")
    assert not hub.repositories and nothing_leaked(hub)


@pytest.mark.parametrize("component", ["tokenizer", "transformer", "scheduler"])
def test_a_component_that_lies_elsewhere_is_refused(hub, saved, tmp_path, component):
    shutil.move(saved / component, tmp_path / "elsewhere")
    (saved / component).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{component} is a link that leads out of the folder"):
        push_folder(saved, "user/x")
    assert not hub.repositories


@pytest.mark.parametrize(
    "name", ["token", "notes.txt", "data", "key.pem", "x.tmp", ".secret", ".cache", "checkpoints"]
)
@pytest.mark.parametrize("target", ["token", "."])
def test_a_link_by_another_name_stays_where_it_is(hub, saved, outside, name, target):
    (saved / name).symlink_to(outside / target)
    push_folder(saved, "user/x")
    files = hub.repositories["model", "user/x"].files()
    assert nothing_leaked(hub) and not any(path.split("/")[0] == name for path in files)


def test_links_that_stay_inside_are_followed(hub, saved):
    (saved / "weights").mkdir()
    shutil.move(saved / "transformer", saved / "weights" / "ar")
    (saved / "transformer").symlink_to("weights/ar")
    (saved / "weights" / "ar" / "model.safetensors").rename(saved / "weights" / "blob")
    (saved / "weights" / "ar" / "model.safetensors").symlink_to("../blob")
    (saved / "images").symlink_to(".")  # a circle
    (saved / "evaluation").mkdir()
    (saved / "evaluation" / "x").symlink_to("..")
    (saved / "samples.png").write_bytes(b"png")
    push_folder(saved, "user/x")
    files = hub.repositories["model", "user/x"].files()
    assert hub.read("user/x", "transformer/model.safetensors") == (saved / "weights" / "blob").read_bytes()
    assert "transformer/config.json" in files and not any(name.startswith("weights") for name in files)
    assert {name for name in files if name.endswith(".png")} == {
        "samples.png",
        "images/samples.png",
        "evaluation/x/samples.png",
    }


@pytest.mark.parametrize("name, target", [("samples.png", ".git/config"), ("README.md", ".env"), ("images", ".git")])
def test_a_link_to_what_is_hidden_is_refused(hub, saved, name, target):
    """Which holds passwords, and would not go up by its own name."""
    (saved / ".git").mkdir()
    (saved / ".git" / "config").write_text(SECRET)
    (saved / ".env").write_text(SECRET)
    (saved / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name} is a link that leads to a hidden file"):
        push_folder(saved, "user/x")
    assert not hub.repositories


def test_a_folder_behind_a_link_is_pushed(hub, saved, tmp_path):
    (tmp_path / "link").symlink_to("saved")
    push_folder(tmp_path / "link", "user/x")
    assert "model_index.json" in hub.repositories["model", "user/x"].files()


def test_a_cached_snapshot_says_to_copy_it(hub, saved, tmp_path):
    push_folder(saved, "user/x")
    snapshot = Path(snapshot_download("user/x"))
    assert (snapshot / "model_index.json").is_symlink()
    with pytest.raises(ValueError, match=r"leads out of the folder.*cp -rL \S+ COPY"):
        push_folder(snapshot, "user/y")
    shutil.copytree(snapshot, tmp_path / "copy")  # follows links, as cp -rL
    push_folder(tmp_path / "copy", "user/y")
    assert set(hub.repositories["model", "user/y"].files()) == set(hub.repositories["model", "user/x"].files())


STRANGERS = (
    ".env", ".git/config", ".netrc", "token", "id_rsa", "key.pem", "credentials.json", "secrets.yaml", "notes.txt",
    "notes.md", "nohup.out", "events.out.tfevents.1", "model.safetensors.tmp", "README.md.tmp", "train.log",
    "data.csv", "optimizer.pt", "run.ipynb", "core", "wandb/run/config.yaml", "data/0/photo.png", "data/train.parquet",
    "old/config.json", "old/model.safetensors", "venv/lib/os.py", "tokenizer/notes.txt", "tokenizer/.env",
    "checkpoints/checkpoint-1/model.safetensors", "evaluation/generation/shards/0.npz",
    "evaluation/generation/samples.npz", "__pycache__/pipeline_dar.cpython-311.pyc",
)  # fmt: skip


def test_only_what_belongs_to_a_model_goes_up(hub, saved, caplog):
    own = ("LICENSE", "samples.png", "images/a.webp", "evaluation/generation/report.json", "evaluation/x/strip.png")
    own += ("training.json", "history.jsonl", "report.json", "tokenizer_dar.py", "tokenizer/tokenizer_dar.py")
    before = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    for name in (*STRANGERS, *own):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_text(SECRET if name in STRANGERS else "{}")
    push_folder(saved, "user/x")
    files = set(hub.repositories["model", "user/x"].files())
    assert files == before | set(own) | {".gitattributes", "README.md"}
    assert nothing_leaked(hub)
    assert "not uploaded from" in caplog.text and "and 15 more" in caplog.text
    for name in ("core", "credentials.json", "data", "data.csv"):
        assert name in caplog.text
    assert "checkpoints" not in caplog.text and ".env" not in caplog.text


def test_pipes_and_folders_by_a_files_name_are_left_out(saved):
    os.mkfifo(saved / "samples.png")
    (saved / "loss.png").mkdir()
    files, left = model_files(saved)
    assert "model_index.json" in files and left == ["loss.png", "samples.png"]


def test_variants_and_shards_of_weights_are_files_of_a_model(tmp_path):
    names = [
        "config.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.bf16.safetensors",
        "diffusion_pytorch_model.safetensors.index.bf16.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(model_files(tmp_path)[0]) == sorted(names) and model_files(tmp_path)[1] == []


# Other ways onto the Hub


@pytest.fixture
def codes(tmp_path):
    folder = tmp_path / "codes"
    folder.mkdir()
    for name in ("codes.json", "README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        (folder / name).write_text("{}")
    return folder


def pushed_codes(folder):
    return push_codes(ExtractArguments("t", "d", str(folder), hub_dataset_id="codes"))


@pytest.mark.parametrize("name", ["codes.json", "README.md", "train-00001-of-00002.parquet", "train-extra.parquet"])
def test_links_out_of_a_set_of_codes_are_refused(hub, codes, outside, name):
    (codes / name).unlink(missing_ok=True)
    (codes / name).symlink_to(outside / "token")
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder"):
        pushed_codes(codes)
    assert not hub.repositories and nothing_leaked(hub)


def test_a_set_of_codes_goes_up_and_nothing_else(hub, codes, outside):
    (codes / "train-more.parquet").mkdir()
    (codes / "train-more.parquet" / "x.parquet").symlink_to(outside / "token")
    (codes / "train-link").symlink_to(outside)
    (codes / "token").symlink_to(outside / "token")
    (codes / "train-1.parquet.tmp").write_text(SECRET)
    pushed_codes(codes)
    files = {"codes.json", "README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}
    assert set(hub.repositories["dataset", "user/codes"].files()) == files | {".gitattributes"}
    assert nothing_leaked(hub)


@pytest.mark.parametrize("name", ["codes.json", "README.md"])
def test_an_unfinished_set_of_codes_is_refused(hub, codes, name):
    (codes / name).unlink()
    with pytest.raises(ValueError, match=f"holds no finished set of codes: it lacks {name}"):
        pushed_codes(codes)
    assert not hub.repositories


@pytest.mark.parametrize("name", ["report.json", "samples.png"])
def test_a_report_takes_in_nothing_from_outside_its_folder(saved, tmp_path, outside, name):
    report = tmp_path / "report"
    report.mkdir()
    shutil.copy(REPORTS / "digits.json", report / "report.json")
    if name == "report.json":
        (report / name).rename(tmp_path / "elsewhere.json")
        (report / name).symlink_to(tmp_path / "elsewhere.json")
    else:
        (report / name).symlink_to(outside / "token")
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder"):
        take_report(report, saved)
    assert not (saved / "evaluation").exists()


def test_a_card_that_is_a_link_is_not_copied_into_the_folder(saved, outside):
    (saved / "README.md").symlink_to(outside / "token")
    with pytest.raises(ValueError, match="README.md is a link that leads out of the folder"):
        write_run_card(saved, "user/x")
    assert (saved / "README.md").is_symlink() and (outside / "token").read_text() == SECRET


class Arguments:
    hub_model_id = "user/x"
    hub_private_repo = False

    def __init__(self, folder):
        self.output_dir = str(folder)


def test_a_run_that_would_publish_a_link_does_not_start(hub, tmp_path, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").symlink_to(outside / "token")
    with pytest.raises(PushError, match="history.jsonl is a link that leads out of the folder"):
        claim_repository(Arguments(tmp_path / "run"), "DARTokenizer")
    assert not hub.repositories


def test_matching_files(tmp_path):
    for name in ("a.txt", "b.txt", "c.png"):
        (tmp_path / name).touch()
    assert list(matching_files(tmp_path, ["*.txt"])) == ["a.txt", "b.txt"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def shorten(path):
    path.write_bytes(path.read_bytes()[:-20])


def leave_an_index(path):
    path.rename(path.with_name("model-00001-of-00002.safetensors"))
    index = {"weight_map": {f"tensor{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(POINTER), "transformer/model.safetensors is a git-lfs pointer"),
        (shorten, "transformer/model.safetensors is damaged or incomplete"),
        (Path.unlink, "incomplete: it lacks weights in transformer"),
        (leave_an_index, "incomplete: it lacks transformer/model-00002-of-00002.safetensors"),
    ],
    ids=["a pointer", "cut off", "none", "a shard"],
)
def test_weights_that_nobody_could_load_do_not_replace_good_ones(hub, saved, change, message):
    push_folder(saved, "user/x")
    before = hub.repositories["model", "user/x"].refs["main"]
    change(saved / "transformer" / "model.safetensors")
    with pytest.raises(OSError, match=message):
        push_folder(saved, "user/x")
    assert hub.repositories["model", "user/x"].refs["main"] == before
