"""Uploads beside the training."""

import threading

from dar_hf.training.pushing import BackgroundPush


def test_an_upload_runs_beside_and_leaves_nothing(tmp_path, caplog):
    begin, sent = threading.Event(), []

    def upload(folder, message):
        assert begin.wait(10)
        sent.append((message, (folder / "model").read_text()))

    def write(folder):
        folder.mkdir()
        (folder / "model").write_text("weights")

    background = BackgroundPush(tmp_path, upload)
    background.start("Step 1", write)
    background.start("Step 2", write)  # does not wait, and does not touch what is being sent
    assert "Step 2 is not pushed to the Hub: the last upload is still under way" in caplog.text
    begin.set()
    background.join()
    background.start("Step 3", write)
    background.join()
    assert sent == [("Step 1", "weights"), ("Step 3", "weights")]
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_is_a_warning(tmp_path, caplog):
    def full(folder):
        folder.mkdir()
        raise OSError("no space left on device")

    def offline(folder, message):
        raise ConnectionError("no route to the Hub")

    background = BackgroundPush(tmp_path, offline)
    background.start("Step 1", full)
    background.start("Step 2", lambda folder: folder.mkdir())
    background.join()
    assert "Step 1 is not pushed to the Hub: no space left on device" in caplog.text
    assert "Step 2 is not pushed to the Hub: no route to the Hub" in caplog.text
    assert not list(tmp_path.iterdir())
