"""Self-contained folders, loaded in processes that cannot import the package."""

import ast
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from dar_hf import DARPipeline, DARTokenizer
from dar_hf.hub import export_remote_code, push_folder, remote_code

PIPELINE = """
import importlib.util, sys, torch
from diffusers import DiffusionPipeline

assert importlib.util.find_spec("dar_hf") is None
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pipeline).__module__.startswith("diffusers_modules.")
pipeline.set_progress_bar_config(disable=True)
images = pipeline(["ray", 0], generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[2])
"""
SNAPSHOT = """
import sys
from huggingface_hub import snapshot_download

sys.argv[1] = snapshot_download(sys.argv[1])
"""
LANGUAGE_MODEL = """
import importlib.util, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM

assert importlib.util.find_spec("dar_hf") is None
options = {"subfolder": sys.argv[3]} if sys.argv[3:] else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options)
assert type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True, **options)) is type(model.config)
torch.save(model.generate(torch.tensor([[35]]), do_sample=False), sys.argv[2])
"""
TOKENIZER = """
import importlib.util, sys, torch
from diffusers import AutoModel

assert importlib.util.find_spec("dar_hf") is None
tokenizer = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
codes = torch.arange(16)[None]
torch.save(tokenizer.decode(codes, generator=torch.Generator().manual_seed(0)).sample, sys.argv[2])
"""
WITHOUT_CONSENT = """
import sys
import diffusers, transformers

for name in ("DiffusionPipeline", "AutoModel"):
    try:
        getattr(diffusers, name).from_pretrained(sys.argv[1] if name == "DiffusionPipeline" else sys.argv[2])
    except ValueError as error:
        print("refused" if "trust_remote_code=True" in str(error) else error)
for options in ({}, {"trust_remote_code": False}):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(sys.argv[3], **options)
    except ValueError as error:
        print("refused" if "trust_remote_code=True" in str(error) else error)
assert not any("_dar" in name for name in sys.modules)
"""


def run(hub, tmp_path, code, repository, *arguments, **changes):
    done = hub.python(code, repository, tmp_path / "result.pt", *arguments, package=False, **changes)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result.pt", weights_only=True)


@pytest.fixture
def pipeline(tiny_pipeline):
    tiny_pipeline.transformer.generation_config.guidance_scale = [1.1, 8.0]
    return tiny_pipeline


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("pipeline", "transformer", "tokenizer"):
        export_remote_code(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_a_pipeline_loads_without_the_package(hub, pipeline, folder, tmp_path):
    push_folder(folder / "pipeline", "user/x")
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(["ray", 0], generator=generator, output_type="pt").images
    assert torch.equal(run(hub, tmp_path, PIPELINE, folder / "pipeline"), expected)
    assert torch.equal(run(hub, tmp_path, PIPELINE, "user/x"), expected)
    snapshot_download("user/x", cache_dir=hub.home / "hub")
    assert torch.equal(run(hub, tmp_path, SNAPSHOT + PIPELINE, "user/x", HF_HUB_OFFLINE="1"), expected)


@pytest.mark.slow
def test_a_language_model_loads_without_the_package(hub, pipeline, folder, tmp_path):
    push_folder(folder / "transformer", "user/lm")
    push_folder(folder / "pipeline", "user/x")
    expected = pipeline.transformer.generate(torch.tensor([[35]]), do_sample=False)
    assert torch.equal(run(hub, tmp_path, LANGUAGE_MODEL, folder / "transformer"), expected)
    assert torch.equal(run(hub, tmp_path, LANGUAGE_MODEL, "user/lm"), expected)
    assert torch.equal(run(hub, tmp_path, LANGUAGE_MODEL, "user/x", "transformer"), expected)


@pytest.mark.slow
def test_a_tokenizer_loads_without_the_package(hub, pipeline, folder, tmp_path):
    pipeline.tokenizer.register_to_config(condition_scope="prefix")  # of the same weights
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    export_remote_code(folder / "tokenizer")
    push_folder(folder / "tokenizer", "user/tokenizer")
    expected = pipeline.tokenizer.decode(torch.arange(16)[None], generator=torch.Generator().manual_seed(0)).sample
    for place in (folder / "tokenizer", "user/tokenizer"):
        torch.testing.assert_close(run(hub, tmp_path, TOKENIZER, place), expected)


@pytest.mark.slow
def test_nothing_runs_a_repositorys_code_without_consent(hub, folder):
    names = ("pipeline", "tokenizer", "transformer")
    for name in names:
        push_folder(folder / name, f"user/{name}")
    for places in ([folder / name for name in names], [f"user/{name}" for name in names]):
        done = hub.python(WITHOUT_CONSENT, *places, package=False)
        assert done.returncode == 0, done.stderr
        assert len([line for line in done.stdout.splitlines() if line.endswith("refused")]) == 4, done.stdout


def test_where_the_package_is_installed_its_own_classes_load(pipeline, folder):
    for path in (folder / "pipeline").rglob("*.py"):
        path.write_text("raise RuntimeError('the folder ran its code')")
    loaded = DARPipeline.from_pretrained(folder / "pipeline")
    assert type(loaded) is DARPipeline
    for name, component in pipeline.components.items():
        assert type(getattr(loaded, name)) is type(component)
    assert loaded.transformer.generation_config.guidance_scale == [1.1, 8.0]
    loaded.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "model_index.json").read_text())["tokenizer"] == ["dar_hf", "DARTokenizer"]
    DARTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "alone")
    assert "auto_map" not in json.loads((folder / "alone" / "config.json").read_text())  # nor is the code there


def test_a_pipeline_saved_in_half_precision_loads_in_one_dtype(pipeline, tmp_path):
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    export_remote_code(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.transformer.dtype == loaded.tokenizer.dtype == torch.float32


def test_only_folders_that_name_their_code_are_said_to_hold_it(pipeline, folder):
    names = ("pipeline", "tokenizer", "transformer")
    assert [remote_code.is_self_contained(folder / name) for name in names] == [True] * 3
    pipeline.save_pretrained(folder / "pipeline")  # a newer model, which does not name the code that lies there
    assert (folder / "pipeline" / "pipeline_dar.py").is_file()
    assert not remote_code.is_self_contained(folder / "pipeline")
    assert not remote_code.is_self_contained(folder / "pipeline" / "scheduler")


def test_exporting_twice_writes_the_same(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    export_remote_code(folder / "pipeline")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("module", ["tokenizer_dar", "modeling_dar", "scheduling_dar"])
def test_a_standalone_file_imports_no_sibling_and_defines_what_both_did(module):
    source = remote_code.standalone_source(module)
    tree = ast.parse(source)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    own = ast.parse((remote_code.PACKAGE / f"{module}.py").read_text())
    classes = {node.name for node in own.body if isinstance(node, ast.ClassDef)}
    assert classes <= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_pipelines_siblings_are_all_written_beside_it(folder):
    tree = ast.parse((folder / "pipeline" / "pipeline_dar.py").read_text())
    siblings = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert siblings and all((folder / "pipeline" / f"{name}.py").is_file() for name in siblings)


@pytest.mark.parametrize(
    "files, problem",
    [
        ({"a": "from .b import x as y\n", "b": "x = 1\n"}, "a.py, line 1"),
        ({"a": "from ..b import x\n", "b": "x = 1\n"}, "a.py, line 1"),
        ({"a": "from .b import x\ndef f(): ...\n", "b": "x = 1\nf: int = 2\n"}, "both define f"),
    ],
)
def test_what_cannot_be_put_into_one_file_is_refused(tmp_path, monkeypatch, files, problem):
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(remote_code, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match=problem):
        remote_code.standalone_source("a")


def test_other_folders_are_refused_and_left_alone(pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved model"):
        export_remote_code(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="no loader"):
        export_remote_code(tmp_path / "scheduler")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        export_remote_code(tmp_path)
    pipeline.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        export_remote_code(tmp_path / "half")
    assert not list(tmp_path.rglob("*.py"))
