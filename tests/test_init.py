import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel as DiffusersAutoModel
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dar_hf

LOAD = """
import gc, sys
import dar_hf

needless = {"datasets", "evaluate", "gradio", "matplotlib", "pandas", "pyarrow", "sklearn"} & sys.modules.keys()
assert not needless, f"import dar_hf takes longer than it must: it imports {needless}"
assert gc.isenabled() and gc.get_freeze_count() > 100_000  # of what torch, transformers and diffusers made

import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder = sys.argv[1]
pipeline = dar_hf.DARPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
result = pipeline(["ray", 0], generator=torch.Generator().manual_seed(0), output_type="pt")
model = AutoModelForCausalLM.from_pretrained(folder + "/transformer")
assert type(model) is dar_hf.DARForCausalLM
assert type(AutoConfig.from_pretrained(folder + "/transformer")) is dar_hf.DARConfig
codes = model.generate(torch.tensor([[35]]), do_sample=False)
torch.save({"images": result.images, "codes": codes}, folder + "/result.pt")
"""


def test_public_names():
    names = {
        "DARConfig",
        "DARForCausalLM",
        "DARTokenizer",
        "FlowMatchAdamsBashforthScheduler",
        "DARPipeline",
        "DARPipelineOutput",
    }
    assert names <= set(dar_hf.__all__)
    for name in dar_hf.__all__:
        assert getattr(dar_hf, name).__name__ == name
    assert isinstance(dar_hf.__version__, str)


def test_registered_with_the_auto_classes(tiny_transformer):
    assert type(AutoConfig.for_model("dar")) is dar_hf.DARConfig
    assert type(AutoModel.from_config(tiny_transformer.config)) is dar_hf.DARModel
    assert type(AutoModelForCausalLM.from_config(tiny_transformer.config)) is dar_hf.DARForCausalLM


def test_registered_with_the_loader_of_diffusers():
    for name in ("DARTokenizer", "DARForCausalLM", "FlowMatchAdamsBashforthScheduler", "DARPipeline"):
        methods = ["save_pretrained", "from_pretrained"]
        assert pipeline_loading_utils.LOADABLE_CLASSES["dar_hf"][name] == methods
        assert pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[name] == methods


def test_the_base_classes_of_diffusers_find_the_classes(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is dar_hf.DARPipeline
    assert type(DiffusersAutoModel.from_pretrained(str(tmp_path / "tokenizer"))) is dar_hf.DARTokenizer


def test_index_of_a_saved_pipeline_names_the_package(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DARPipeline"
    assert index["tokenizer"] == ["dar_hf", "DARTokenizer"]
    assert index["transformer"] == ["dar_hf", "DARForCausalLM"]
    assert index["scheduler"] == ["dar_hf", "FlowMatchAdamsBashforthScheduler"]
    assert index["id2label"]["3"] == "ray"


@pytest.mark.slow
def test_saved_pipeline_works_in_a_fresh_process(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    tiny_pipeline.save_pretrained(tmp_path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, env=environment, timeout=300)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(result["images"], tiny_pipeline(["ray", 0], generator=generator, output_type="pt").images)
    codes = tiny_pipeline.transformer.generate(torch.tensor([[35]]), do_sample=False)
    assert torch.equal(result["codes"], codes)
