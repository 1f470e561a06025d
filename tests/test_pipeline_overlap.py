"""Denoising on a CUDA stream of its own. Without a GPU, the order of work and waits is checked on made-up streams."""

from contextlib import contextmanager

import pytest
import torch
from pipeline_helpers import picture, same, seeded

from dar_hf import acceleration_dar, pipeline_dar
from dar_hf.acceleration_dar import SideStream


class Streams:
    """Stands in for torch.cuda's streams: a log of the waits, the hand-overs and the work, each on its stream."""

    def __init__(self, monkeypatch):
        self.log = []
        self.main = self.current = self.new("main")
        acceleration_dar._side_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: self.new("side"))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        recorder = lambda tensor, stream: self.log.append(f"recorded on {stream.name}")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", recorder)

    def new(self, name):
        streams = self

        class Stream:
            def wait_stream(self, other):
                streams.log.append(f"{self.name} waits for {other.name}")

        stream = Stream()
        stream.name = name
        return stream

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def watch(self, module, work):
        module.register_forward_hook(lambda *_: self.log.append(f"{work} on {self.current.name}"))


@pytest.fixture
def streams(monkeypatch, tiny_pipeline):
    monkeypatch.setattr(pipeline_dar, "can_overlap", lambda transformer, tokenizer: True)
    streams = Streams(monkeypatch)
    streams.watch(tiny_pipeline.transformer.model, "code")
    streams.watch(tiny_pipeline.tokenizer.denoiser, "step")
    return streams


def test_order_of_work(tiny_pipeline, streams):
    expected = [output.images for output in tiny_pipeline.stream([0, 3], generator=seeded(), output_type="pt")][-1]
    streams.log.clear()
    result = tiny_pipeline([0, 3], generator=seeded(), output_type="pt")
    assert torch.equal(result.images, expected)

    config = tiny_pipeline.tokenizer.config
    group = ["code on main"] * (config.num_tokens // config.num_groups)
    group += ["side waits for main", "recorded on side", "step on side"]
    end = ["main waits for side", "recorded on main", "recorded on main"]
    assert streams.log == ["side waits for main", *group * config.num_groups, *end]
    assert streams.current is streams.main


def test_the_streams_come_together_after_an_error(tiny_pipeline, streams):
    def fail(*_):
        raise RuntimeError("in a step")

    tiny_pipeline.tokenizer.denoiser.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in a step"):
        tiny_pipeline(0)
    assert streams.log[-1] == "main waits for side" and streams.current is streams.main


def test_an_error_ends_the_language_model_too(streams):
    closed = []

    def codes():
        try:
            yield torch.zeros(1, 1)
        finally:
            closed.append(True)

    handed = SideStream(torch.device("cpu")).hand_over(codes())
    next(handed)
    handed.close()
    assert closed


def test_no_overlap_without_cuda(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: pytest.fail("a CUDA stream on a CPU"))
    tiny_pipeline(0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_overlapped_equals_streamed(tiny_pipeline, compiled):
    tiny_pipeline.to("cuda").transformer.compile_decoding = compiled
    for options in ({}, {"num_inference_steps": 9}, {"layout_image": picture(), "layout_tokens": 5}):
        for output_type in ("pt", "pil", "latent"):
            call = {"class_labels": [0, 3, 1], "output_type": output_type, **options}
            *_, last = tiny_pipeline.stream(generator=seeded(), **call)
            for _ in range(3):
                result = tiny_pipeline(generator=seeded(), **call).images
                result, expected = (x.cpu() if output_type != "pil" else x for x in (result, last.images))
                assert same(result, expected)
