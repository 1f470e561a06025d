"""Metrics of the library evaluate: no Hub, no cache, any batches, merged across processes."""

import importlib
import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import dar_hf
from dar_hf import metrics
from dar_hf.metrics import (
    FID,
    LPIPS,
    PSNR,
    SSIM,
    CodebookUsage,
    GaussianStatistics,
    InceptionScore,
    LabelAgreement,
    LPIPSNetwork,
    PrecisionRecall,
    SpatialFID,
    codebook_statistics,
)

CUTS = [[100], [1] * 100, [33, 60, 7]]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_images(count, size=8, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


FEATURES = {"predictions": normal(60, 5), "references": 0.5 * normal(60, 5, seed=1) + 1}
IMAGES = {"predictions": random_images(6), "references": random_images(6, seed=1)}
LOGITS = {"predictions": 2 * normal(60, 4)}
LABELLED = LOGITS | {"references": torch.arange(60) % 4}
CODES = {"predictions": torch.arange(60).reshape(20, 3) % 7}
CASES = [
    (FID, {}, FEATURES, {"fid"}),
    (SpatialFID, {}, FEATURES, {"sfid"}),
    (InceptionScore, {"split_size": 25}, LOGITS, {"inception_score"}),
    (PrecisionRecall, {}, FEATURES, {"precision", "recall"}),
    (PSNR, {}, IMAGES, {"psnr"}),
    (SSIM, {}, IMAGES, {"ssim"}),
    (CodebookUsage, {"codebook_size": 9}, CODES, {"usage", "perplexity", "position_usage_min", "position_usage_max"}),
    (LabelAgreement, {}, LABELLED, {"label_agreement"}),
]


def cut(inputs, sizes):
    parts = {name: tensor.split(sizes) for name, tensor in inputs.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


@pytest.mark.parametrize(("kind", "options", "inputs", "keys"), CASES)
def test_at_once_in_batches_and_merged_are_the_same(kind, options, inputs, keys):
    metric = kind(**options)
    assert isinstance(metric, evaluate.Metric)
    whole = metric.compute(**inputs)
    assert whole.keys() == keys and all(isinstance(value, float) for value in whole.values())

    count = len(inputs["predictions"])
    for part in cut(inputs, [1, count // 2, count - 1 - count // 2]):
        metric.add_batch(**part)
    assert metric.compute() == pytest.approx(whole, abs=1e-9)  # and nothing of the first set was left

    for index in range(count):
        metric.add(**{name[:-1]: tensor[index].numpy() for name, tensor in inputs.items()})
    assert metric.compute() == pytest.approx(whole, abs=1e-9)

    first, second = kind(**options), kind(**options)
    half = cut(inputs, [count // 2, count - count // 2])
    first.add_batch(**half[0])
    second.add_batch(**half[1] | ({"first_index": count // 2} if kind is InceptionScore else {}))
    first.merge(second)
    assert first.compute() == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(("kind", "options", "inputs", "keys"), CASES)
def test_empty_sets_and_missing_or_unknown_inputs(kind, options, inputs, keys):
    metric = kind(**options)
    with pytest.raises(ValueError):
        metric.compute()
    with pytest.raises(ValueError, match="empty"):
        metric.add_batch(**{name: tensor[:0] for name, tensor in inputs.items()})
    with pytest.raises(ValueError, match=r"unknown \['other'\]"):
        metric.add_batch(**inputs, other=inputs["predictions"])
    if "references" in inputs and kind not in (FID, SpatialFID, PrecisionRecall):
        with pytest.raises(ValueError, match=r"missing \['references'\]"):
            metric.add_batch(predictions=inputs["predictions"])


def test_fid_is_the_distance_of_the_two_sets():
    images, references = (GaussianStatistics().update(FEATURES[name]) for name in ("predictions", "references"))
    expected = metrics.frechet_distance(images.mean, images.covariance, references.mean, references.covariance)
    assert FID().compute(**FEATURES) == {"fid": expected}


def test_fid_against_known_statistics_and_sets_of_different_size():
    references = GaussianStatistics().update(FEATURES["references"])
    metric = FID(reference=(references.mean.numpy(), references.covariance))
    expected = FID().compute(**FEATURES)
    assert metric.compute(predictions=FEATURES["predictions"]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="predictions only"):
        metric.add_batch(**FEATURES)
    metric = FID()
    metric.add_batch(references=FEATURES["references"])
    metric.add_batch(predictions=FEATURES["predictions"][:30])
    assert metric.compute()["fid"] > 0


def test_8_bit_images_are_those_in_floating_point():
    pixels = {name: ((images + 1) * 127.5).round() for name, images in IMAGES.items()}
    as_bytes = {name: value.to(torch.uint8).numpy() for name, value in pixels.items()}
    as_float = {name: (value / 127.5 - 1).clamp(-1, 1) for name, value in pixels.items()}
    assert PSNR().compute(**as_bytes) == pytest.approx(PSNR().compute(**as_float))


@pytest.mark.parametrize("kind", [PSNR, SSIM])
def test_images_of_another_range_are_refused(kind):
    for images in (IMAGES["predictions"] * 255, IMAGES["predictions"] * torch.nan, torch.zeros(6, 3, 8, 8).long()):
        with pytest.raises(ValueError, match=r"must be uint8, or float in \[-1, 1\]"):
            kind().compute(predictions=images, references=IMAGES["references"])
    with pytest.raises(ValueError, match="no pairs"):
        kind().compute(predictions=IMAGES["predictions"][:3], references=IMAGES["references"])
    with pytest.raises(ValueError, match="differ in shape"):
        kind().compute(predictions=random_images(6, size=9), references=IMAGES["references"])


def test_images_of_two_ranges_are_not_compared():
    pixels = ((IMAGES["predictions"] + 1) * 127.5).round().to(torch.uint8)
    with pytest.raises(ValueError, match="both must be uint8, or both float"):
        PSNR().compute(predictions=pixels, references=IMAGES["references"])
    with pytest.warns(UserWarning, match=r"psnr: only one of the sets .* must be scaled to \[-1, 1\]"):
        PSNR().compute(predictions=(IMAGES["predictions"] + 1) / 2, references=IMAGES["references"])


def test_psnr_and_ssim_of_8_bit_images_are_scikit_images():
    rng = np.random.default_rng(0)
    references = rng.integers(0, 256, (20, 3, 9, 9), dtype=np.uint8)
    images = (references.astype(int) + rng.integers(-2, 3, references.shape)).clip(0, 255).astype(np.uint8)
    pairs = list(zip(references, images, strict=True))
    expected = np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs])
    assert PSNR().compute(predictions=images, references=references)["psnr"] == pytest.approx(expected, abs=1e-9)
    expected = np.mean([structural_similarity(*pair, data_range=255, channel_axis=0) for pair in pairs])
    assert SSIM().compute(predictions=images, references=references)["ssim"] == pytest.approx(expected, abs=1e-9)


def test_small_sets_are_warned_about():
    with pytest.warns(UserWarning, match="5 predictions do not span 5 features"):
        FID().compute(predictions=FEATURES["predictions"][:5], references=FEATURES["references"])
    with pytest.raises(ValueError, match="fid needs 2 references or more, got 0"):
        FID().compute(predictions=FEATURES["predictions"])


def test_parts_of_a_set_need_their_places():
    parts = [InceptionScore(split_size=10) for _ in range(2)]
    for part in parts:
        part.add_batch(predictions=LOGITS["predictions"][:10])
    with pytest.raises(ValueError, match="20 samples in a split of 10: .* first_index"):
        parts[0].merge(parts[1])
    metric = InceptionScore(split_size=10)
    for index, logits in enumerate(LOGITS["predictions"]):
        metric.add(prediction=logits, first_index=index)
    expected = InceptionScore(split_size=10).compute(**LOGITS)
    assert metric.compute() == pytest.approx(expected, abs=1e-9)


def test_label_agreement_of_classes_that_were_read():
    read = LOGITS["predictions"].argmax(dim=1)
    labels = LABELLED["references"]
    assert LabelAgreement().compute(predictions=read, references=labels) == LabelAgreement().compute(**LABELLED)
    with pytest.raises(ValueError, match="do not go with labels"):
        LabelAgreement().compute(predictions=read[:5], references=labels)


def test_processes_share_no_files():
    with pytest.raises(ValueError, match="make one a process, and merge"):
        FID(num_process=2, process_id=0, experiment_id="one")
    assert {"FID", "PSNR"} < set(dir(metrics))


def test_lpips_is_the_mean_of_the_network():
    torch.manual_seed(0)
    network = LPIPSNetwork()
    images = {"predictions": random_images(3, 16), "references": random_images(3, 16, seed=1)}
    expected = float(network(images["predictions"], images["references"]).double().mean())
    assert LPIPS(network).compute(**images) == pytest.approx({"lpips": expected})


def test_metrics_combine():
    result = evaluate.combine([PSNR(), SSIM()]).compute(**IMAGES)
    assert result == PSNR().compute(**IMAGES) | SSIM().compute(**IMAGES)


def test_metrics_of_different_kinds_do_not_merge():
    with pytest.raises(ValueError, match="cannot merge FID into SpatialFID"):
        SpatialFID().merge(FID())


def test_lists_and_arrays():
    lists = {name: tensor.tolist() for name, tensor in FEATURES.items()}
    assert FID().compute(**lists) == pytest.approx(FID().compute(**FEATURES), abs=1e-6)
    arrays = {name: np.asarray(tensor) for name, tensor in FEATURES.items()}
    assert FID().compute(**arrays) == FID().compute(**FEATURES)


# The Inception score


def by_definition(logits, split_size):
    scores = []
    for start in range(0, len(logits), split_size):
        p = np.exp(logits[start : start + split_size].numpy())
        p /= p.sum(axis=1, keepdims=True)
        kl = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return np.mean(scores)


def score(logits, **options):
    return InceptionScore(**options).compute(predictions=logits)["inception_score"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("split_size", [40, 100, 5000])
def test_inception_score_by_definition(cut, split_size):
    logits = 3 * normal(100, 7, dtype=torch.float64)
    metric = InceptionScore(split_size)
    for part in logits.split(cut):
        metric.add_batch(predictions=part)
    expected = by_definition(logits, split_size)
    assert metric.compute()["inception_score"] == pytest.approx(expected, abs=1e-9)


def test_splits_are_consecutive_across_processes():
    logits = 3 * normal(100, 7, dtype=torch.float64)
    first, second = InceptionScore(40), InceptionScore(40)
    for start in range(0, 100, 10):
        (first if start % 20 else second).add_batch(predictions=logits[start : start + 10], first_index=start)
    first.merge(second)
    assert first.count == 100
    assert first.compute()["inception_score"] == pytest.approx(by_definition(logits, 40), abs=1e-9)


def test_inception_score_of_certain_classes_is_their_number_and_of_one_class_is_one():
    certain = torch.eye(10).repeat(5, 1) * 1000  # probabilities of zero, whose logarithm is infinite
    assert score(certain) == pytest.approx(10)
    assert score(certain[:1].repeat(9, 1)) == pytest.approx(1)


def test_inception_score_refuses():
    with pytest.raises(ValueError, match="empty set"):
        InceptionScore().compute()
    with pytest.raises(ValueError, match="not finite"):
        score(torch.full((2, 3), math.nan))
    metric = InceptionScore()
    metric.add_batch(predictions=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 and 4 classes"):
        metric.add_batch(predictions=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="split_size must be at least 1"):
        InceptionScore(0)


# Means of a number per image


def test_means_of_values_merge():
    first, second = PSNR(), PSNR()
    first.add_values(torch.tensor([1.0, 2]))
    second.add_values(torch.tensor([6.0]))
    first.merge(second)
    assert first.count == 3 and first.compute() == {"psnr": 3}
    with pytest.raises(ValueError, match="empty set"):
        first.compute()
    with pytest.raises(ValueError, match="not finite"):
        first.add_values(torch.tensor([1.0, math.inf]))


@pytest.mark.parametrize("metric", [PSNR(), SSIM()])
def test_values_may_come_from_another_process(metric):
    whole = metric.compute(**IMAGES)
    values = metric.values(**IMAGES)
    assert values.shape == (6,)
    metric.add_values(values)
    assert metric.compute() == whole


# Codes


def test_one_code_everywhere():
    figures = codebook_statistics(torch.full((5, 4), 3), 8)
    assert figures == pytest.approx(
        {"usage": 1 / 8, "perplexity": 1.0, "position_usage_min": 1.0, "position_usage_max": 1.0}
    )


def test_all_codes_equally():
    figures = codebook_statistics(torch.arange(8).reshape(4, 2), 8)
    assert figures == pytest.approx(
        {"usage": 1.0, "perplexity": 8.0, "position_usage_min": 4.0, "position_usage_max": 4.0}
    )


def test_unequal_shares():
    # code 0 six times, codes 1 and 2 once each; first position always 0, second 0, 0, 1, 2
    codes = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 2]])
    figures = codebook_statistics(codes, 5)
    entropy = -(6 / 8 * math.log(6 / 8) + 2 * 1 / 8 * math.log(1 / 8))
    assert figures == pytest.approx(
        {"usage": 3 / 5, "perplexity": math.exp(entropy), "position_usage_min": 1.0, "position_usage_max": 3.0}
    )


def test_codebook_usage_does_not_depend_on_the_cut():
    codes = torch.randint(0, 20, (60, 4), generator=torch.Generator().manual_seed(0))
    codes[:, 1] %= 3
    whole = codebook_statistics(codes, 24)
    streamed, merged, part = CodebookUsage(24), CodebookUsage(24), CodebookUsage(24)
    for batch in codes.split([1, 40, 19]):
        streamed.add_batch(predictions=batch)
    part.add_batch(predictions=codes[:30])
    merged.merge(part)
    merged.merge(CodebookUsage(24))
    merged.add_batch(predictions=codes[30:].int())
    assert streamed.compute() == whole == merged.compute()
    assert whole["position_usage_min"] == 3


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4), r"shape \(B, N\)"),
        (torch.tensor([[0, 8]]), r"lie in \[0, 8\)"),
        (torch.tensor([[-1, 0]]), r"lie in \[0, 8\)"),
        (torch.zeros(1, 3, dtype=torch.long), "different kinds"),
        (torch.zeros(1, 2), "must be integers"),
    ],
)
def test_unfitting_codes_are_refused(codes, message):
    metric = CodebookUsage(8)
    metric.add_batch(predictions=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=codes)


def test_codebook_usage_of_no_codes():
    with pytest.raises(ValueError, match="empty set"):
        CodebookUsage(8).compute()
    with pytest.raises(ValueError, match="empty set"):
        codebook_statistics(torch.zeros(0, 2, dtype=torch.long), 8)


def test_sums_of_different_kinds_do_not_merge():
    codes, logits = CodebookUsage(4), InceptionScore(20)
    codes.add_batch(predictions=torch.zeros(1, 2, dtype=torch.long))
    logits.add_batch(predictions=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="different kinds"):
        CodebookUsage(8).merge(codes)
    with pytest.raises(ValueError, match="splits of different size: 10 and 20"):
        InceptionScore(10).merge(logits)


# Where it runs


def run_python(code, folder, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_no_file_is_written_and_no_network_needed(tmp_path):
    code = (
        "import torch; from dar_hf.metrics import PSNR; x = torch.zeros(1, 3, 8, 8); "
        "print(PSNR().compute(predictions=x, references=x))"
    )
    home = tmp_path / "home"
    result = run_python(code, tmp_path, HF_HOME=str(home), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert "{'psnr': 100.0}" in result.stdout, result.stderr
    assert not home.exists()


def test_a_script_called_evaluate_gets_a_clear_error_and_the_rest_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "evaluate.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dar_hf, "metrics", metrics)  # importing it anew changes this; it is put back at the end
    for name in list(sys.modules):
        if f"{name}.".startswith(("evaluate.", "dar_hf.metrics.")):
            monkeypatch.delitem(sys.modules, name)
    anew = importlib.import_module("dar_hf.metrics")
    assert anew.psnr and "dar_hf.metrics.modules" not in sys.modules
    with pytest.raises(ImportError, match="evaluate.py hides the library evaluate"):
        _ = anew.FID
