"""Output folders: a run removes what a run of this package wrote there, asks first, and refuses what is in its way."""

import json
import shutil

import pytest

from dar_hf.training import ARArguments, LoopArguments
from dar_hf.training.folder_lock import unlock_folder
from dar_hf.training.run_folder import ASIDE, claim_output_dir, install_model, is_finished, read_kept_history


@pytest.fixture(autouse=True)
def unlocked(tmp_path):
    yield
    for folder in (tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())):
        unlock_folder(folder)


def claim(folder, saved_class="DARTokenizer", **options):
    arguments = ARArguments if saved_class == "DARPipeline" else LoopArguments
    return claim_output_dir(arguments(output_dir=str(folder), **options), saved_class)


def content(folder):
    """Every file with what it holds, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".run.lock")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


RUN = {
    "checkpoints/checkpoint-5/trainer_state.json": {"step": 5, "stage": "tokenizer"},
    "checkpoints/checkpoint-5/model.safetensors": "",
    "history.jsonl": '{"step": 1}\n',
    "training.json": {"arguments": {}, "stage": "tokenizer", "max_train_steps": 5, "trained_steps": 5},
}
MODEL = {"config.json": {"_class_name": "DARTokenizer"}, "diffusion_pytorch_model.safetensors": "weights"}
PIPELINE = {
    "model_index.json": {"_class_name": "DARPipeline", "tokenizer": [], "transformer": [], "scheduler": []},
    "tokenizer/config.json": "{}",
    "transformer/config.json": "{}",
    "scheduler/scheduler_config.json": "{}",
}
REPORT = {"mode": "reconstruction", "model": {}, "data": {}, "settings": {}, "metrics": []}


def earlier_run(folder):
    return write(folder, RUN | MODEL | {"notes.txt": "mine"})


def test_a_new_folder_is_made(tmp_path):
    assert claim(tmp_path / "a" / "b").is_dir()


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)
    assert content(tmp_path) == {"notes.txt": "mine"}


@pytest.mark.parametrize(
    "file, index, found",
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ("config.json", {"hidden_size": 8}, "another model"),
        ("config.json", {"_class_name": [["odd"]]}, r"\['odd'\]"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}])
def test_another_model_is_never_overwritten(tmp_path, file, index, found, options):
    write(tmp_path, {file: index})
    with pytest.raises(ValueError, match=f"holds a {found}, not a DARTokenizer"):
        claim(tmp_path, **options)
    assert content(tmp_path) == {file: json.dumps(index)} and len(list(tmp_path.iterdir())) == 1


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"config.json": "{"})
    with pytest.raises(ValueError, match="config.json cannot be read"):
        claim(tmp_path, overwrite_output_dir=True)


def test_a_pipeline_is_no_place_for_a_tokenizer(tmp_path):
    write(tmp_path, PIPELINE)
    with pytest.raises(ValueError, match="holds a DARPipeline"):
        claim(tmp_path, "DARTokenizer")


def test_a_self_contained_pipeline_is_a_pipeline(tmp_path):
    write(tmp_path, {"model_index.json": {"_class_name": ["pipeline_dar", "DARPipeline"]}})
    claim(tmp_path, "DARPipeline", overwrite_output_dir=True)


def test_a_finished_model_without_a_run_needs_a_decision(tmp_path):
    write(tmp_path, MODEL)
    with pytest.raises(ValueError, match="holds an earlier run or model"):
        claim(tmp_path)
    with pytest.raises(ValueError, match="no run to resume: pass --overwrite_output_dir"):
        claim(tmp_path, resume_from_checkpoint="latest")
    claim(tmp_path, overwrite_output_dir=True)
    assert set(content(tmp_path)) == set(MODEL)  # the old model stays until the new one is there


@pytest.mark.parametrize("trace", ["checkpoints", "history.jsonl", "training.json"])
def test_an_earlier_run_needs_a_decision(tmp_path, trace):
    write(tmp_path, {name: text for name, text in RUN.items() if name.startswith(trace)})
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest .*--overwrite_output_dir"):
        claim(tmp_path)
    assert (tmp_path / trace).exists()


def test_overwriting_clears_the_runs_traces_only(tmp_path):
    claim(earlier_run(tmp_path), overwrite_output_dir=True)
    assert set(content(tmp_path)) == {*MODEL, "notes.txt"} and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["latest", "checkpoint-5"])
def test_resuming_keeps_everything(tmp_path, name):
    before = content(earlier_run(tmp_path))
    claim(tmp_path, resume_from_checkpoint=name)
    assert content(tmp_path) == before


def test_overwriting_leaves_what_no_run_made(tmp_path):
    """Folders of the same names as a run's, with somebody's own files."""
    own = {"checkpoints/best.ckpt": "mine", "evaluation/table.csv": "mine", "evaluation/old/report.json": "{}"}
    measured = {"evaluation/reconstruction/report.json": REPORT, "evaluation/reconstruction/samples.png": ""}
    write(tmp_path, RUN | MODEL | own | measured | {"evaluation/reconstruction/mine.txt": "mine"})
    claim(tmp_path, overwrite_output_dir=True)
    assert set(content(tmp_path)) == {*MODEL, *own, "evaluation/reconstruction/mine.txt"}


IN_THE_WAY = [
    ("DARPipeline", "transformer/model.safetensors", "transformer"),
    ("DARPipeline", "transformer/config.json", "transformer"),
    ("DARPipeline", "scheduler/jobs.txt", "scheduler"),
    ("DARPipeline", "tokenizer/vocab.txt", "tokenizer"),
    ("DARPipeline", "scheduler", "scheduler"),
    ("DARPipeline", "checkpoints/checkpoint-2/mine.bin", "checkpoint-2"),
    ("DARTokenizer", "checkpoints/checkpoint-2/trainer_state.json", "checkpoint-2"),  # transformers' Trainer's
    ("DARTokenizer", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("DARTokenizer", "history.jsonl", "history.jsonl"),
    ("DARTokenizer", "training.json", "training.json"),
    ("DARTokenizer", "loss.png", "loss.png"),
    ("DARPipeline", "samples.png", "samples.png"),
    ("DARPipeline", "checkpoints", "checkpoints"),
    ("DARTokenizer", "checkpoints/checkpoint-2", "checkpoint-2"),
    ("DARTokenizer", ".saving/mine.txt", ".saving"),
    ("DARTokenizer", ".pushing/mine.txt", ".pushing"),
    ("DARTokenizer", "README.md/mine.txt", "README.md"),
]


@pytest.mark.parametrize("saved_class, file, named", IN_THE_WAY)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_run_would_write_over_and_no_run_wrote_is_refused(tmp_path, saved_class, file, named, overwrite):
    before = content(write(tmp_path, {file: '{"global_step": 2}\n'}))
    with pytest.raises(ValueError, match=f"no run of this package wrote.*{named}"):
        claim(tmp_path, saved_class, overwrite_output_dir=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "files",
    [
        {"checkpoint-6/mine.bin": ""},
        {"checkpoint-6": ""},
        {"checkpoint-6/trainer_state.json": {"global_step": 6}},  # transformers' Trainer's
        {"checkpoint-6/trainer_state.json": {"global_step": 6}, "checkpoint-6/rng_state.pth": ""},
    ],
)
def test_a_run_that_goes_on_would_not_replace_anybodys_checkpoint(tmp_path, files):
    own = {"checkpoints/checkpoint-7/random_states_0.pkl": ""}  # whose record is lost: passed over
    before = content(write(tmp_path, RUN | own | {f"checkpoints/{name}": text for name, text in files.items()}))
    with pytest.raises(ValueError, match="no run of this package wrote.*: checkpoints/checkpoint-6. Move"):
        claim(tmp_path, resume_from_checkpoint="latest")
    assert content(tmp_path) == before


def test_a_damaged_checkpoint_is_a_runs_own(tmp_path):
    damaged = {"checkpoints/checkpoint-6/trainer_state.json": "", "checkpoints/checkpoint-6/random_states_0.pkl": ""}
    before = content(write(tmp_path, RUN | damaged))
    claim(tmp_path, resume_from_checkpoint="latest")
    assert content(tmp_path) == before
    claim(tmp_path, overwrite_output_dir=True)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/checkpoint-5"])
def test_a_run_whose_checkpoints_lie_elsewhere_can_be_started_over(tmp_path, linked):
    folder = write(tmp_path / "run", RUN)
    shutil.move(folder / linked, tmp_path / "disk")
    (folder / linked).symlink_to(tmp_path / "disk")
    claim(folder, overwrite_output_dir=True)
    assert content(folder) == {}
    if linked == "checkpoints":  # the folder on the other disk stays in use
        assert (folder / "checkpoints").is_symlink() and not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("name", [*ASIDE, "loss.png", "config.json"])
def test_nothing_is_written_through_links_or_over_folders_of_a_strangers_run(tmp_path, name):
    write(tmp_path, RUN)
    if name in ASIDE:
        (tmp_path / name).symlink_to(tmp_path / "victim")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"would write over it: {name}"):
        claim(tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize("index", [{}, PIPELINE])
def test_a_run_of_stage_one_inside_is_never_written_over(tmp_path, index):
    """Also where a pipeline lies around it, whose own tokenizer that folder cannot be."""
    run = {f"tokenizer/{name}": text for name, text in (RUN | MODEL).items()}
    before = content(write(tmp_path, index | run))
    with pytest.raises(ValueError, match="no run of this package wrote.*tokenizer"):
        claim(tmp_path, "DARPipeline", overwrite_output_dir=True)
    with pytest.raises(ValueError, match="writes its own tokenizer/"):
        claim(tmp_path, "DARPipeline", overwrite_output_dir=True, tokenizer=str(tmp_path / "tokenizer"))
    assert content(tmp_path) == before


def test_a_linked_component_is_not_written_through(tmp_path):
    write(tmp_path / "elsewhere", {"config.json": "{}"})
    write(tmp_path / "run", RUN | {"model_index.json": PIPELINE["model_index.json"]})
    (tmp_path / "run" / "transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="transformer"):
        claim(tmp_path / "run", "DARPipeline", overwrite_output_dir=True)


@pytest.mark.parametrize("option", ["tokenizer", "init_from", "dataset_name", "codes"])
def test_the_output_is_not_what_is_read(tmp_path, option):
    before = content(write(tmp_path / "x", {"a.txt": "a"}))
    with pytest.raises(ValueError, match=f"what --{option} reads"):
        claim(tmp_path / "x", "DARPipeline", **{option: str(tmp_path / "x")})
    assert content(tmp_path / "x") == before and len(list((tmp_path / "x").iterdir())) == 1


def test_the_output_is_not_among_the_images(tmp_path):
    """Its pictures would become training images of the next start."""
    write(tmp_path / "images", {"0/a.png": ""})
    with pytest.raises(ValueError, match="lies in, what --dataset_name reads"):
        claim(tmp_path / "images" / "run", dataset_name=str(tmp_path / "images"))
    assert not (tmp_path / "images" / "run").exists()
    claim(tmp_path, dataset_name=str(tmp_path / "images"))  # which a run there leaves alone


def test_a_save_that_was_cut_off_is_not_in_the_way(tmp_path):
    """The index comes last; until then it lies in a hidden folder."""
    write(tmp_path, RUN | {"tokenizer/config.json": "{}", ".saving/model_index.json": PIPELINE["model_index.json"]})
    claim(tmp_path, "DARPipeline", resume_from_checkpoint="latest")


@pytest.mark.parametrize("name", ["training.json", "history.jsonl", "checkpoints/checkpoint-2/trainer_state.json"])
def test_files_of_endless_depth_are_no_runs(tmp_path, name):
    report = {"evaluation/reconstruction/report.json": "[" * 100_000}
    write(tmp_path, report | {name: "[" * 100_000 + "\n"})
    with pytest.raises(ValueError, match=f"no run of this package wrote.*{name.removesuffix('/trainer_state.json')}"):
        claim(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves it to the program in --output_dir=~/run and in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert claim("~/run") == tmp_path / "run"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file"):
        claim(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir .*file/run cannot be written: Not a directory"):
        claim(tmp_path / "file" / "run")


def test_a_checkpoint_from_elsewhere_does_not_continue_the_run_here(tmp_path):
    earlier_run(tmp_path / "one")
    earlier_run(tmp_path / "two")
    with pytest.raises(ValueError, match="holds an earlier run"):
        claim(tmp_path / "two", resume_from_checkpoint=str(tmp_path / "one/checkpoints/checkpoint-5"))


# Models and histories


def test_a_model_takes_an_earlier_ones_place_and_leaves_other_files(tmp_path):
    old = {"transformer/model-00001-of-00002.safetensors": "old", "transformer/model.safetensors.index.json": "old"}
    folder = write(tmp_path / "run", PIPELINE | old | {"transformer/notes.txt": "mine", "config.json": "mine"})
    saved = write(tmp_path / "saved", PIPELINE | {"transformer/model.safetensors": "new"})
    new = content(saved)
    install_model(saved, folder)
    assert content(folder) == new | {"transformer/notes.txt": "mine", "config.json": "mine"}
    assert not saved.exists()


def test_a_run_has_finished_where_record_and_model_say_so(tmp_path):
    folder = write(tmp_path / "run", RUN)
    assert not is_finished(folder)
    assert is_finished(write(folder, MODEL))
    write(folder, {"training.json": json.loads(json.dumps(RUN["training.json"])) | {"trained_steps": 4}})
    assert not is_finished(folder)
    shutil.rmtree(folder)
    assert not is_finished(folder)


def test_a_history_is_read_as_far_as_it_can_be(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n[]\n%s\n{"step": 2}\n{"step": 3}\n{"st' % (b"[" * 100_000))
    assert read_kept_history(path, 2) == [{"step": 1}, {"step": 2}]
    assert "4 lines of" in caplog.text
    assert read_kept_history(tmp_path / "none", 2) == []
