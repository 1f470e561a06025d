"""The evaluated model: what is damaged is refused, before and while images are made."""

import diffusers
import pytest
import torch
from tiny_models import make_text_pipeline

from dar_hf import DARTokenizer
from dar_hf.evaluation import evaluate_generation
from dar_hf.evaluation.models import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["tokenizer", "pipeline"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"_class_name": "AutoencoderKL"}'])
def test_damaged_folders_are_refused_by_name(generation, workplace, part, content):
    index = workplace / part / ("config.json" if part == "tokenizer" else "model_index.json")
    index.write_text(content)
    with pytest.raises((OSError, ValueError), match=str(index)):
        load_model(generation(pipeline=str(workplace / part)), CPU)


def test_a_scheduler_of_diffusers_is_evaluated_as_the_solver_it_becomes(generation, workplace, tiny_pipeline):
    tiny_pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    tiny_pipeline.save_pretrained(workplace / "euler")
    model = load_model(generation(pipeline=str(workplace / "euler")), CPU)
    assert model.description["scheduler"] == {"shift": 3.0, "solver_order": 1, "variable_step": False}


def test_images_that_are_not_finite_end_the_run_and_leave_no_report(generation, process, workplace, monkeypatch):
    load = DARTokenizer._load_pretrained_model.__func__

    def overflowing(cls, model, *args, **kwargs):
        loaded = load(cls, model, *args, **kwargs)
        with torch.no_grad():
            model.denoiser.proj_in.weight.fill_(1e38)
        return loaded

    monkeypatch.setattr(DARTokenizer, "_load_pretrained_model", classmethod(overflowing))
    with pytest.raises(ValueError, match="decoded images are not finite"):
        evaluate_generation(generation(num_images=5), process())
    assert not (workplace / "out" / "report.json").exists()


def test_generation_is_measured_of_class_models_only(generation, process, workplace, tiny_tokenizer):
    make_text_pipeline(tiny_tokenizer).save_pretrained(workplace / "text")
    with pytest.raises(ValueError, match="draws from text: measuring generation supports class models only"):
        evaluate_generation(generation(pipeline=str(workplace / "text")), process())
