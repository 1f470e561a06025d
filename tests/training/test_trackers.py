"""What trackers are shown."""

from types import SimpleNamespace

import pytest
from PIL import Image

from dar_hf.training import LoopArguments, make_accelerator, train
from dar_hf.training.trackers import track_images

from .helpers import fresh_process, tokenizer_stage


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "all"])
def test_a_tracker_that_is_not_installed_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    args = LoopArguments(report_to=name, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"report_to: the package of {name} is not installed"):
        make_accelerator(args)


def test_tensorboard_has_figures_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage, args = tokenizer_stage(tmp_path, report_to="tensorboard", validation_steps=2, max_train_steps=4)
    train(stage, args, make_accelerator(args))
    folder = next(path.parent for path in tmp_path.rglob("*tfevents*"))
    events = EventAccumulator(str(folder)).Reload()
    assert {"loss/total", "loss/flow", "lr", "grad_norm", "images_per_second", "validation/psnr"} <= set(
        events.Tags()["scalars"]
    )
    shown = events.Images("validation/reconstructions")
    assert [event.step for event in shown] == [2, 4] and shown[0].width > 8


def test_a_run_that_has_finished_opens_no_tracker(tmp_path, monkeypatch):
    opened = []
    for _ in range(2):
        with fresh_process():
            stage, args = tokenizer_stage(
                tmp_path, max_train_steps=1, checkpointing_steps=1, resume_from_checkpoint="latest"
            )
            accelerator = make_accelerator(args)
            args.report_to = "tensorboard"
            monkeypatch.setattr(accelerator, "init_trackers", lambda *given, **options: opened.append(given))
            train(stage, args, accelerator)
    assert len(opened) == 1


def test_each_tracker_is_given_what_it_takes():
    given = []
    names = ("tensorboard", "wandb", "comet_ml")

    def tracker(name):
        return SimpleNamespace(name=name, log_images=lambda values, **options: given.append((name, values, options)))

    trackers = [tracker(name) for name in names]
    track_images(trackers, {"samples": Image.new("L", (3, 2))}, 7)
    (first, pixels, options), (second, pictures, others) = given
    assert (first, second) == ("tensorboard", "wandb") and options == {"step": 7, "dataformats": "NHWC"}
    assert pixels["validation/samples"].shape == (1, 2, 3, 3)
    assert pictures["validation/samples"][0].size == (3, 2) and others == {"step": 7}
