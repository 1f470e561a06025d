"""Runs that are asked to end: SIGTERM and Ctrl-C, and a second Ctrl-C."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from dar_hf.training import make_accelerator, train
from dar_hf.training.stopping import StoppedError, StopRequest
from dar_hf.utils.pictures import read_history

from .helpers import tokenizer_stage


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # the interpreter takes it here


def request(num_processes=1):
    return StopRequest(SimpleNamespace(is_main_process=True, num_processes=num_processes))


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_noted_and_named(number, name):
    before, stop = signal.getsignal(number), request()
    with stop.listening():
        assert not stop.is_made
        send(number)
        assert stop.is_made and stop.signal_number == number and stop.name == name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_another_ctrl_c_interrupts_at_once(first):
    stop = request()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        send(first)
        send(signal.SIGINT)


def test_a_ctrl_c_that_torchrun_passes_on_is_the_same_one():
    stop = request(num_processes=2)
    with stop.listening():
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop.is_made
        stop._made_at -= 10
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint(tmp_path, number, name, workers):
    stage, args = tokenizer_stage(tmp_path, max_train_steps=50, dataloader_num_workers=workers, validation_steps=3)
    after_step = stage.after_step

    def ask(step, *arguments):
        after_step(step, *arguments)
        if step == 2:
            send(number)

    stage.after_step = ask
    with pytest.raises(StoppedError, match=f"stopped by {name} after step 3 .*checkpoint-3 is saved") as caught:
        train(stage, args, make_accelerator(args))
    assert caught.value.signal_number == number
    assert (tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").is_file()
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == [1, 2, 3]
    assert not (tmp_path / ".run.lock").exists()
