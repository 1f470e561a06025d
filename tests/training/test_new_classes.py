"""Fine-tuning a language model on other classes than those it knows."""

import json

import pytest
import torch
from PIL import Image

from dar_hf import DARPipeline
from dar_hf.training import ARStage, make_accelerator, train
from dar_hf.training.models import renew_classes

from .helpers import ar_args, ar_stage, fresh_process

STARTS = ("null", "mean", "fresh")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tokenizer):
    """A pipeline of the ten digits, with a head that passes gradients on."""
    folder = tmp_path_factory.mktemp("pipeline")
    with fresh_process():
        stage, _ = ar_stage(folder, tokenizer, cache_codes=False)
        torch.nn.init.normal_(stage.model.lm_head.weight, std=0.3)
        stage.save(folder)
    return str(folder)


def images(folder, count):
    """A data set with ``count`` classes, c00, c01, ..."""
    for label in range(count):
        (folder / f"c{label:02d}").mkdir(parents=True)
        for index in range(2):
            Image.new("L", (8, 8), 8 * label + index).save(folder / f"c{label:02d}" / f"{index}.png")
    return str(folder)


def tuned(folder, tokenizer, pipeline, overrides=None, **options):
    options = {"cache_codes": False, "init_from": pipeline} | options
    args = ar_args(folder, tokenizer, model_overrides=overrides, **options)
    return ARStage.build(args), args


def table(model):
    return model.model.embed_tokens.weight.detach()


@pytest.mark.parametrize("count", [3, 10, 14])
@pytest.mark.parametrize("start", STARTS)
def test_the_table_of_classes_is_chosen_anew(make_transformer, start, count):
    model = make_transformer(num_classes=10)
    before, others = table(model).clone(), {n: p.clone() for n, p in model.named_parameters() if "embed" not in n}
    renew_classes(model, count, start, seed=3)
    config, after = model.config, table(model)
    assert (config.num_classes, config.vocab_size, config.null_token_id) == (count, 32 + count + 1, 32 + count)
    assert after.shape == (config.vocab_size, config.hidden_size) and model.get_input_embeddings().weight.requires_grad
    assert torch.equal(after[:32], before[:32]) and torch.equal(after[-1], before[-1])
    rows = after[32:-1]
    if start == "fresh":
        assert 0.015 < float(rows.std()) < 0.025 and len(rows.unique(dim=0)) == count
    else:
        expected = before[-1] if start == "null" else before[32:-1].mean(dim=0)
        torch.testing.assert_close(rows, expected.expand_as(rows), atol=0, rtol=0)
    assert all(torch.equal(parameter, others[n]) for n, parameter in model.named_parameters() if "embed" not in n)
    model(input_ids=torch.tensor([[config.class_token_id(count - 1), 0], [config.null_token_id, 1]]))
    assert len(list(model.stream_codes([count - 1], guidance_scale=2.0))) == 4


def test_new_classes_take_the_seed_of_the_run(make_transformer):
    tables = []
    for seed in (1, 1, 2):
        model = make_transformer()
        renew_classes(model, 5, "fresh", seed)
        tables.append(table(model))
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("count", [3, 14])
def test_ids_and_names_follow_the_data(tmp_path, tokenizer, pipeline, count):
    data = images(tmp_path / "data", count)
    stage, args = tuned(
        tmp_path / "run", tokenizer, pipeline, dataset_name=data, new_classes="mean", max_train_steps=2
    )
    assert stage.model.training and stage.model.config.num_classes == count
    train(stage, args, make_accelerator(args))
    loaded = DARPipeline.from_pretrained(tmp_path / "run")
    assert loaded.get_label_ids(f"c{count - 1:02d}") == [count - 1]
    assert loaded.transformer.config.num_classes == count and len(loaded.config.id2label) == count
    assert len(table(loaded.transformer)) == 16 + count + 1
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["arguments"]["new_classes"] == "mean" and record["model"]["num_classes"] == count
    assert "new_classes" in (tmp_path / "run" / "README.md").read_text()


def test_saved_names_stay_for_classes_that_the_data_do_not_name(tmp_path, tokenizer, pipeline):
    data = images(tmp_path / "data", 3)
    for source in (pipeline, f"{pipeline}/transformer"):
        stage, _ = tuned(tmp_path / "run", tokenizer, source, dataset_name=data)
        assert stage.id2label == {0: "c00", 1: "c01", 2: "c02"} | {label: str(label) for label in range(3, 10)}


def test_a_run_with_new_classes_resumes_exactly(tmp_path, tokenizer, pipeline):
    data, weights = images(tmp_path / "data", 12), []
    for resume in (None, "checkpoint-2"):
        with fresh_process():
            options = {"new_classes": "fresh", "max_train_steps": 4, "checkpointing_steps": 2}
            options |= {"resume_from_checkpoint": resume, "dataset_name": data}
            stage, args = tuned(tmp_path / "run", tokenizer, pipeline, **options)
            train(stage, args, make_accelerator(args))
            weights.append(stage.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_adapters_train_the_new_classes_too(tmp_path, tokenizer, pipeline):
    data = images(tmp_path / "data", 12)
    options = {"dataset_name": data, "new_classes": "null", "lora_rank": 2, "learning_rate": 1e-2, "ema_decay": None}
    stage, args = tuned(tmp_path / "run", tokenizer, pipeline, max_train_steps=4, **options)
    before = table(DARPipeline.from_pretrained(pipeline).transformer)
    train(stage, args, make_accelerator(args))
    model = DARPipeline.from_pretrained(tmp_path / "run").transformer
    after = table(model)
    assert len(after) == 16 + 12 + 1 and torch.equal(after[:16], before[:16])
    assert not torch.equal(after[16:-1], before[-1].expand(12, -1)) and len(after[16:-1].unique(dim=0)) > 1
    plain = DARPipeline.from_pretrained(pipeline).transformer
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_more_classes_than_the_model_has_are_refused_by_name_of_the_option(tmp_path, tokenizer, pipeline):
    with pytest.raises(ValueError, match="has num_classes=10, the tokenizer and data have 12.*--new_classes null"):
        tuned(tmp_path / "run", tokenizer, pipeline, dataset_name=images(tmp_path / "data", 12))
    for options in ({"new_classes": "mean", "init_from": None}, {"new_classes": "median"}):
        with pytest.raises(ValueError, match="give --init_from with|must be null, mean or fresh, got 'median'"):
            tuned(tmp_path / "run", tokenizer, pipeline, **options)


def test_room_for_further_classes(tmp_path, tokenizer, pipeline):
    data = images(tmp_path / "data", 3)
    options = {"dataset_name": data, "new_classes": "mean"}
    stage, _ = tuned(tmp_path / "run", tokenizer, pipeline, ["num_classes=5", "token_dropout=0.2"], **options)
    assert stage.model.config.num_classes == 5 and stage.model.config.token_dropout == 0.2
    with pytest.raises(ValueError, match="num_classes=2, but the data set has 3"):
        tuned(tmp_path / "run", tokenizer, pipeline, ["num_classes=2"], **options)
    with pytest.raises(ValueError, match="num_classes=True, but the data set has 3"):
        tuned(tmp_path / "run", tokenizer, pipeline, ["num_classes=True"], **options)
    with pytest.raises(ValueError, match="impossible --model_overrides.*token_dropout"):
        tuned(tmp_path / "run", tokenizer, pipeline, ["token_dropout=2.0"], **options)


def test_other_names_on_the_old_embeddings_are_said(tmp_path, tokenizer, pipeline, caplog):
    tuned(tmp_path / "run", tokenizer, pipeline)
    assert "other names" not in caplog.text
    data = images(tmp_path / "data", 10)
    for source in (pipeline, f"{pipeline}/transformer"):
        caplog.clear()
        tuned(tmp_path / "run", tokenizer, source, dataset_name=data)
        assert "10 of 10 classes have other names" in caplog.text and "0: '0' is now 'c00'" in caplog.text
    caplog.clear()
    tuned(tmp_path / "run", tokenizer, pipeline, dataset_name=data, new_classes="null")
    assert "other names" not in caplog.text


def test_one_of_several_names_of_a_class_is_its_name(tmp_path, tokenizer, pipeline, caplog):
    stage, _ = ar_stage(tmp_path / "x", tokenizer, cache_codes=False)
    stage.id2label = {label: f"c{label:02d}, class {label}" for label in range(10)}
    stage.save(tmp_path / "named")
    tuned(tmp_path / "run", tokenizer, str(tmp_path / "named"), dataset_name=images(tmp_path / "data", 10))
    assert "other names" not in caplog.text


@pytest.mark.parametrize("item", ["codebook_size=8", "num_image_tokens=8", "vocab_size=99", "return_dict=False"])
def test_overrides_that_fit_no_tokenizer_are_refused_before_training(tmp_path, tokenizer, item):
    with pytest.raises(ValueError, match=item.split("=")[0]):
        ar_stage(tmp_path, tokenizer, model_overrides=[item])


def test_what_could_not_be_saved_is_refused_before_training(tmp_path, tokenizer, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("disagree")

    monkeypatch.setattr(DARPipeline, "__init__", refuse)
    with pytest.raises(ValueError, match="disagree"):
        ar_stage(tmp_path, tokenizer)
