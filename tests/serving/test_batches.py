"""Requests that share a pipeline."""

import asyncio
import io
import threading
import time
from contextlib import aclosing

import PIL.Image
import pytest
from pipeline_helpers import same, seeded
from tiny_models import make_text_pipeline

from dar_hf.serving.batches import SharedPipeline, preview_steps
from dar_hf.serving.requests import ImageRequest


def opened(results):
    """The images of results, which are PNG files."""
    return [[PIL.Image.open(io.BytesIO(image)) for image in drawn.images] for drawn in results]


async def drawn(shared, request):
    return [result async for result in shared.draw(request)]


def draw_together(shared, *requests):
    async def together():
        return await asyncio.gather(*(drawn(shared, request) for request in requests))

    return asyncio.run(together())


@pytest.fixture
def batch_sizes(tiny_pipeline, monkeypatch):
    """The sizes of the batches that the tiny pipeline draws as streams."""
    sizes = []
    stream_codes = tiny_pipeline.transformer.stream_codes

    def counted(class_labels, **options):
        sizes.append(len(class_labels))
        return stream_codes(class_labels=class_labels, **options)

    monkeypatch.setattr(tiny_pipeline.transformer, "stream_codes", counted)
    return sizes


def test_requests_that_come_together_are_drawn_together(tiny_pipeline, batch_sizes):
    requests = [ImageRequest(label, seed=label + 10, n=1 + label % 2) for label in range(5)]
    results = draw_together(SharedPipeline(tiny_pipeline, "tiny"), *requests)
    assert batch_sizes == [7]
    for request, result in zip(requests, results, strict=True):
        (images,) = opened(result)
        alone = [
            tiny_pipeline(request.subject, generator=seeded(request.seed + index)).images[0]
            for index in range(request.n)
        ]
        assert result[0].final and same(images, alone)


def test_previews_are_those_of_the_stream(tiny_pipeline):
    request = ImageRequest(2, seed=5, stream=True, partial_images=9)
    other = ImageRequest(3, seed=6)
    results, others = draw_together(SharedPipeline(tiny_pipeline, "tiny"), request, other)
    stream = [output.images for output in tiny_pipeline.stream(2, generator=seeded(5))]
    assert len(stream) > 2 and [result.final for result in results] == [False] * (len(stream) - 1) + [True]
    assert all(same(one, two) for one, two in zip(opened(results), stream, strict=True))
    assert [result.final for result in others] == [True]


def test_texts(tiny_tokenizer):
    pipe = make_text_pipeline(tiny_tokenizer)
    prompts = ["a red apple", "a book"]
    results = draw_together(SharedPipeline(pipe, "tiny"), *(ImageRequest(text, seed=1) for text in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert same(opened(result)[0], pipe(prompt=prompt, generator=seeded(1)).images)


def test_each_scale_of_guidance_has_its_own_batch(tiny_pipeline, batch_sizes):
    scales = [None, 2.0, None, 3.0, 2.0]
    requests = [ImageRequest(1, seed=1, guidance_scale=scale) for scale in scales]
    results = draw_together(SharedPipeline(tiny_pipeline, "tiny"), *requests)
    assert batch_sizes == [2, 2, 1]
    for scale, result in zip(scales, results, strict=True):
        assert same(opened(result)[0], tiny_pipeline(1, guidance_scale=scale, generator=seeded(1)).images)


@pytest.mark.parametrize("scale", [1.0, (1.1, 30.0)], ids=["distilled", "linear"])
def test_the_default_scale_is_the_pipelines(tiny_pipeline, scale):
    tiny_pipeline.transformer.generation_config.guidance_scale = scale
    shared = SharedPipeline(tiny_pipeline, "tiny")
    own, one = draw_together(shared, ImageRequest(1, seed=3), ImageRequest(1, seed=3, guidance_scale=4.0))
    assert same(opened(own)[0], tiny_pipeline(1, guidance_scale=scale, generator=seeded(3)).images)
    assert same(opened(one)[0], tiny_pipeline(1, guidance_scale=4.0, generator=seeded(3)).images)
    assert not same(opened(own)[0], opened(one)[0])
    assert shared.info().max_guidance == (20.0 if scale == 1.0 else 30.0)


def test_the_default_scale_and_the_same_number_share_a_batch(tiny_pipeline, batch_sizes):
    tiny_pipeline.transformer.generation_config.guidance_scale = 2.0
    requests = [ImageRequest(1, seed=1, guidance_scale=scale) for scale in (None, 2.0, 3.0)]
    draw_together(SharedPipeline(tiny_pipeline, "tiny"), *requests)
    assert batch_sizes == [2, 1]


def test_a_full_batch_waits_for_no_more_requests(tiny_pipeline, batch_sizes):
    shared = SharedPipeline(tiny_pipeline, "tiny", max_batch_size=4, batch_wait_timeout_s=3600)

    async def together():
        requests = [ImageRequest(1, seed=seed, n=2) for seed in range(2)]
        return await asyncio.wait_for(asyncio.gather(*(drawn(shared, request) for request in requests)), 60)

    asyncio.run(together())
    assert batch_sizes == [4]


def test_a_batch_has_its_limit(tiny_pipeline, batch_sizes):
    requests = [ImageRequest(1, seed=seed, n=n) for seed, n in enumerate([2, 3, 2, 1])]
    results = draw_together(SharedPipeline(tiny_pipeline, "tiny", max_batch_size=4), *requests)
    assert batch_sizes == [4, 4]
    assert [len(result[0].images) for result in results] == [2, 3, 2, 1]


def test_a_batch_that_all_clients_left_ends(tiny_pipeline, monkeypatch):
    steps = []
    stream = tiny_pipeline.stream

    def counted(*args, **options):
        for output in stream(*args, **options):
            steps.append(output.step)
            yield output
            time.sleep(0.1)  # so that the event loop hears of the leaving in time

    monkeypatch.setattr(tiny_pipeline, "stream", counted)
    shared = SharedPipeline(tiny_pipeline, "tiny")
    request = ImageRequest(1, seed=1, stream=True, partial_images=9)

    async def leave_both():
        async with aclosing(shared.draw(request)) as one, aclosing(shared.draw(request)) as two:
            await asyncio.gather(anext(one), anext(two))
        await shared._worker

    async def leave_one():
        async with aclosing(shared.draw(request)) as one:
            other = shared.draw(request)
            _, first = await asyncio.gather(anext(one), anext(other))
        return [first, *[result async for result in other]]

    asyncio.run(leave_both())
    assert steps in ([1], [1, 2])
    results = asyncio.run(leave_one())
    assert results[-1].final and len(results) == shared.num_steps


def test_who_left_before_the_batch_is_not_drawn(tiny_pipeline, batch_sizes):
    shared = SharedPipeline(tiny_pipeline, "tiny", batch_wait_timeout_s=0.2)

    async def leave_while_waiting():
        rest = asyncio.create_task(drawn(shared, ImageRequest(1, seed=1)))
        leaving = asyncio.create_task(drawn(shared, ImageRequest(2, seed=1)))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert len(shared._waiting) == 1
        return await rest

    assert asyncio.run(leave_while_waiting())[-1].final
    assert batch_sizes == [1]


def test_a_batch_that_all_clients_left_as_it_began_is_not_drawn(tiny_pipeline, monkeypatch):
    """Without previews, there is one output only: the batch would run to its end."""
    shared = SharedPipeline(tiny_pipeline, "tiny", batch_wait_timeout_s=0.01)
    begun, left = threading.Event(), threading.Event()
    outputs = []
    output, stream = tiny_pipeline._output, tiny_pipeline.stream

    def begin(*args, **options):
        begun.set()
        assert left.wait(10)
        return stream(*args, **options)

    def counted(*args):
        outputs.append(args)
        return output(*args)

    monkeypatch.setattr(tiny_pipeline, "stream", begin)
    monkeypatch.setattr(tiny_pipeline, "_output", counted)

    async def leave():
        leaving = asyncio.create_task(drawn(shared, ImageRequest(1, seed=1)))
        await asyncio.to_thread(begun.wait, 10)
        leaving.cancel()
        await asyncio.wait([leaving])
        left.set()
        await shared._worker

    asyncio.run(leave())
    assert begun.is_set() and not outputs


def test_a_batch_that_fails_fails_its_requests_only(tiny_pipeline, monkeypatch, caplog):
    shared = SharedPipeline(tiny_pipeline, "tiny")
    with monkeypatch.context() as patch:
        patch.setattr(tiny_pipeline.transformer, "stream_codes", lambda **options: 1 / 0)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            draw_together(shared, ImageRequest(1, seed=1))
    assert "a batch of 1 requests failed" in caplog.text
    assert draw_together(shared, ImageRequest(1, seed=1))[0][-1].final


def test_the_info_of_a_pipeline(tiny_pipeline, tiny_tokenizer):
    info = SharedPipeline(tiny_pipeline, "tiny", max_batch_size=3).info()
    assert (info.size, info.max_images, info.num_classes, info.from_text) == ("8x8", 3, 5, False)
    assert info.labels["shark"] == 2 and info.labels["tench"] == 0 and info.prompt_tokens == 1
    texts = SharedPipeline(make_text_pipeline(tiny_tokenizer), "tiny").info()
    assert texts.from_text and texts.prompt_tokens == 6 and texts.image_tokens == 16


def test_a_pipeline_warms_up(tiny_pipeline, tiny_tokenizer, batch_sizes):
    SharedPipeline(tiny_pipeline, "tiny").warm_up()
    assert batch_sizes == [1]
    SharedPipeline(make_text_pipeline(tiny_tokenizer), "tiny").warm_up()


@pytest.mark.parametrize(
    ("count", "steps"),
    [(0, []), (1, [4]), (2, [2, 5]), (3, [2, 4, 6]), (7, [1, 2, 3, 4, 5, 6, 7]), (60, list(range(1, 8)))],
)
def test_previews_are_spread_evenly(count, steps):
    assert preview_steps(count, 8) == steps


def test_a_pipeline_of_one_step_has_no_previews():
    assert preview_steps(3, 1) == []
