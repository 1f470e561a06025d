"""What other versions of the libraries must not change: `make test-versions` takes the newest and the lowest."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline
from pipeline_helpers import generated_codes, same, seeded
from training.helpers import ar_stage, fresh_process, tokenizer_stage
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.hub import export_remote_code, remote_code
from dar_hf.modeling_dar import CACHE
from dar_hf.training import make_accelerator
from dar_hf.training.loop import train

pytestmark = pytest.mark.versions
CLASSES = torch.tensor([[32], [35]])


@torch.no_grad()
def codes_without_cache(model, guidance_scale, codes=None):
    """Greedy codes of classes 0 and 3: one pass over the whole sequence for each, and for each of its two classes."""
    start, end = guidance_scale
    codes = torch.zeros(2, 0, dtype=torch.long) if codes is None else codes
    for position in range(codes.shape[1], 16):
        rows = [torch.cat([classes, codes], dim=1) for classes in (CLASSES, torch.full_like(CLASSES, 37))]
        conditional, unconditional = (model(row, use_cache=False).logits[:, -1] for row in rows)
        logits = unconditional + (start + (end - start) * position / 15) * (conditional - unconditional)
        codes = torch.cat([codes, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return codes


@pytest.mark.parametrize("guidance_scale", [(1.0, 1.0), (1.1, 8.0)])
def test_codes_with_a_cache_are_those_without(tiny_transformer, guidance_scale):
    expected = codes_without_cache(tiny_transformer, guidance_scale)
    prefix = expected[:, :5].flip(0)
    continued = codes_without_cache(tiny_transformer, guidance_scale, prefix)
    assert len(expected.unique()) > 4 and not torch.equal(expected, continued)

    def stream(**options):
        groups = tiny_transformer.stream_codes([0, 3], guidance_scale=guidance_scale, temperature=0, **options)
        return torch.cat(list(groups), dim=1)

    assert torch.equal(stream(), expected) and torch.equal(stream(prefix_codes=prefix), continued)
    hook = tiny_transformer.register_forward_hook(lambda *_: None)  # the model itself, no copy of it
    assert torch.equal(stream(), expected)
    hook.remove()
    options = {"do_sample": False, "guidance_scale": guidance_scale}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        assert torch.equal(tiny_transformer.generate(CLASSES, **options, **cache)[:, 1:], expected), cache
        given = torch.cat([CLASSES, prefix], dim=1)
        assert torch.equal(tiny_transformer.generate(given, **options, **cache)[:, 1:], continued), cache
    for cache in (DynamicCache(), StaticCache(config=tiny_transformer.config, max_cache_len=17)):
        codes = tiny_transformer.generate(CLASSES, past_key_values=cache, **options)[:, 1:]
        assert torch.equal(codes, expected), type(cache)


def test_samples_with_a_cache_are_those_without(tiny_transformer):
    options = {"do_sample": True, "guidance_scale": 2.0, "top_k": 8, "temperature": 1.5}
    expected = tiny_transformer.generate(CLASSES, use_cache=False, generator=seeded(), **options)
    assert torch.equal(tiny_transformer.generate(CLASSES, generator=seeded(), **options), expected)
    del options["do_sample"]
    streamed = torch.cat(list(tiny_transformer.stream_codes([0, 3], generator=seeded(), **options)), dim=1)
    assert torch.equal(streamed, expected[:, 1:])


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_a_cache_under_both_of_its_names(tiny_transformer, name):
    ids = torch.cat([CLASSES, torch.arange(10).reshape(2, 5)], dim=1)
    expected = tiny_transformer(ids).logits
    cache = DynamicCache()
    first = tiny_transformer(ids[:, :3], use_cache=True, **{name: cache})
    assert first[CACHE] is cache
    rest = tiny_transformer(ids[:, 3:], use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), expected, atol=1e-4, rtol=1e-4)


def test_generating_from_embeddings(tiny_transformer):
    expected = tiny_transformer.generate(CLASSES, do_sample=False, use_cache=False)[:, 1:]
    embeddings = tiny_transformer.get_input_embeddings()(CLASSES)
    assert torch.equal(tiny_transformer.generate(inputs_embeds=embeddings, do_sample=False), expected)


def test_a_pipeline_streams_what_it_returns(tiny_pipeline):
    call = {"class_labels": ["ray", 0], "guidance_scale": (1.1, 8.0), "output_type": "pt"}
    result = tiny_pipeline(generator=seeded(), **call).images
    outputs = list(tiny_pipeline.stream(generator=seeded(), **call))
    assert len(outputs) == 4 and torch.equal(outputs[-1].images, result)
    codes = generated_codes(tiny_pipeline, ["ray", 0], guidance_scale=(1.1, 8.0), temperature=0)
    assert torch.equal(codes, codes_without_cache(tiny_pipeline.transformer, (1.1, 8.0)).flip(0))


def test_every_part_is_saved_and_loaded(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = [1.1, 8.0]
    ids, images = torch.tensor([[35, 1, 2]]), torch.rand(1, 3, 8, 8) * 2 - 1
    tiny_pipeline.transformer.save_pretrained(tmp_path / "model")
    for loader in (DARForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(tmp_path / "model")
        assert type(model) is DARForCausalLM and torch.equal(model(ids).logits, tiny_pipeline.transformer(ids).logits)
        assert list(model.generation_config.guidance_scale) == [1.1, 8.0]
    tiny_pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = DARTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(tokenizer.encode(images).codes, tiny_pipeline.tokenizer.encode(images).codes)
    tiny_pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    scheduler = FlowMatchAdamsBashforthScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.shift == tiny_pipeline.scheduler.config.shift
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    expected = tiny_pipeline("ray", generator=seeded()).images
    for loader in (DARPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path / "pipeline")
        loaded.set_progress_bar_config(disable=True)
        assert same(loaded("ray", generator=seeded()).images, expected)


# the package itself must not be found, though it is installed
WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dar_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from diffusers import AutoModel, DiffusionPipeline
from transformers import AutoModelForCausalLM

root = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(root + "/pipeline", trust_remote_code=True)
assert type(pipeline).__module__.startswith("diffusers_modules.")
pipeline.set_progress_bar_config(disable=True)
model = AutoModelForCausalLM.from_pretrained(root + "/transformer", trust_remote_code=True)
tokenizer = AutoModel.from_pretrained(root + "/tokenizer", trust_remote_code=True)
result = {
    "images": pipeline(["ray", 0], generator=torch.Generator().manual_seed(0), output_type="pt").images,
    "generated": model.generate(torch.tensor([[35]]), do_sample=False, guidance_scale=2.0),
    "streamed": torch.cat(list(model.stream_codes(3, temperature=0, guidance_scale=2.0)), dim=1),
    "encoded": tokenizer.encode(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).codes,
}
torch.save(result, root + "/result.pt")
"""


def environment(folder):
    """Of a process that finds no Hub and leaves nothing in the user's cache."""
    return os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_self_contained_folders(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    tiny_pipeline.transformer.save_pretrained(tmp_path / "transformer")
    tiny_pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("pipeline", "transformer", "tokenizer"):
        export_remote_code(tmp_path / name)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    model = tiny_pipeline.transformer
    images = tiny_pipeline(["ray", 0], generator=seeded(), output_type="pt").images
    expected = codes_without_cache(model, (2.0, 2.0))[1:]
    assert torch.equal(result["images"], images)
    assert torch.equal(result["generated"][:, 1:], expected) and torch.equal(result["streamed"], expected)
    pixels = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    assert torch.equal(result["encoded"], tiny_pipeline.tokenizer.encode(pixels).codes)


@pytest.mark.parametrize("module", ["modeling_dar", "tokenizer_dar", "scheduling_dar", "pipeline_dar"])
def test_carried_code_refuses_versions_it_was_not_made_for(monkeypatch, tmp_path, module):
    source = remote_code.with_version_check((remote_code.PACKAGE / f"{module}.py").read_text())
    tree = ast.parse(source)
    assert ast.get_docstring(tree) and isinstance(tree.body[3], ast.For)  # above all other imports
    check = compile(ast.Module(tree.body[:4], []), module, "exec")
    exec(check, {})  # the installed ones
    allowed = ast.literal_eval(tree.body[3].iter.func.value)
    library = "transformers" if module == "modeling_dar" else "diffusers"
    assert re.search(r">=\d", allowed[library]) and re.search(r"<\d", allowed[library])
    installed = metadata.version
    for other in ("0.1.0", "99.0.0"):
        monkeypatch.setattr(
            metadata, "version", lambda name, other=other: other if name == library else installed(name)
        )
        with pytest.raises(ImportError, match=f"made for {library} .*but {other} is installed.*pip install"):
            exec(check, {})


def test_versions_are_unknown_where_the_package_is_not_installed(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(remote_code, "requires", nothing)
    with pytest.raises(RuntimeError, match="pip install -e"):
        remote_code.with_version_check("import torch")


def test_a_training_step_of_each_stage(tmp_path, monkeypatch):
    """Stage 1 leaves a tokenizer, and stage 2, made of it, a pipeline that draws."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"max_train_steps": 1, "validation_steps": 1, "max_train_samples": 8}
    with fresh_process():
        stage, args = tokenizer_stage(tmp_path / "tokenizer", **options)
        before = stage.model.denoiser.blocks[0].mlp[0].weight.clone()
        train(stage, args, make_accelerator(args))
        assert not torch.equal(stage.model.denoiser.blocks[0].mlp[0].weight.cpu(), before)
    with fresh_process():
        stage, args = ar_stage(tmp_path / "pipeline", tmp_path / "tokenizer", **options)
        train(stage, args, make_accelerator(args))
        assert stage.model.lm_head.weight.any()  # it starts from zeros
    pipeline = DARPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2], generator=seeded(), output_type="pt").images
    assert images.shape[0] == 2 and images.isfinite().all()
