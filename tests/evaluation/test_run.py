"""Both evaluations from start to report: figures are right, and do not depend on how the work was done."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripts import load_script

from dar_hf.data import SeedFor, draw_seed, normal_noise
from dar_hf.evaluation import base, evaluate_generation, evaluate_reconstruction, read_report
from dar_hf.evaluation.generation import Generation
from dar_hf.evaluation.images import to_uint8
from dar_hf.metrics import (
    GaussianStatistics,
    LPIPSNetwork,
    codebook_statistics,
    frechet_distance,
    load_feature_extractor,
    precision_recall,
    psnr,
    ssim,
)
from dar_hf.metrics.weights import write_weights

EXAMPLES = Path(__file__).parents[2] / "examples"


def figures(report):
    """Values by name and number of tokens."""
    return {(entry["name"].split(" (")[0], entry.get("num_tokens")): entry["value"] for entry in report["metrics"]}


def same_figures(first, second):
    assert first["metrics"] == second["metrics"]
    assert first["data"] == second["data"] and first["warnings"] == second["warnings"]


def distance(first, second):
    sets = [GaussianStatistics().update(features) for features in (first, second)]
    return frechet_distance(sets[0].mean, sets[0].covariance, sets[1].mean, sets[1].covariance)


def load(path, name="arr_0"):
    with np.load(path) as file:
        return file[name]


# Images that cannot be read


@pytest.fixture
def photos(tmp_path):
    """A folder with the split test: nine images, of which 2 and 6 are damaged, and a class."""
    folder = tmp_path / "photos" / "test" / "cat"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(9):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    for index in (2, 6):
        (folder / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes()[:60])
    return folder


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
def test_images_that_cannot_be_read_are_left_out_and_named(mode, request, process, photos, tmp_path):
    evaluate = evaluate_generation if mode == "generation" else evaluate_reconstruction
    options = {"dataset_name": str(photos.parents[1]), "num_images": None, "shard_size": 2, "label_column": "label"}
    if mode == "generation":
        options["num_images"] = 7
    args = request.getfixturevalue(mode)(**options)
    report = evaluate(args, process())
    assert report["data"]["count"] == 7 and report["data"]["left_out"] == ["2 (2.png)", "6 (6.png)"]
    assert "2 images cannot be read and are left out: 2 (2.png), 6 (6.png)." in report["warnings"]
    assert str(tmp_path) not in json.dumps(report["warnings"])
    for path in (photos / "2.png", photos / "6.png"):
        path.unlink()
    clean = evaluate(request.getfixturevalue(mode)(**options, output_dir=str(tmp_path / "clean")), process())
    assert figures(clean) == figures(report) and "left_out" not in clean["data"]


def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(reconstruction, process, photos):
    report = evaluate_reconstruction(reconstruction(dataset_name=str(photos.parents[1]), num_images=5), process())
    assert report["data"]["count"] == 5 and report["data"]["left_out"] == ["2 (2.png)"]


def test_too_many_images_that_cannot_be_read(reconstruction, generation, process, photos):
    name = str(photos.parents[1])
    for make, evaluate in ((reconstruction, evaluate_reconstruction), (generation, evaluate_generation)):
        args = make(dataset_name=name, num_images=None, max_corrupt_images=1)
        with pytest.raises(ValueError, match=r"2 images cannot be read, more than max_corrupt_images=1: 2 .2.png"):
            evaluate(args, process())
    with pytest.raises(ValueError, match="num_images=8, but only 7 images of split test can be read"):
        evaluate_reconstruction(reconstruction(dataset_name=name, num_images=8), process())
    for path in photos.iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="none of the 9 images can be read"):
        evaluate_reconstruction(reconstruction(dataset_name=name, num_images=None), process())


def test_a_single_file_is_compared_with_as_a_whole(reconstruction, process, image_sets):
    name = str(image_sets["parquet"] / "train.parquet")
    report = evaluate_reconstruction(reconstruction(dataset_name=name, num_images=4), process())
    assert report["data"]["split"] == "train"
    with pytest.raises(ValueError, match="is a single file"):
        evaluate_reconstruction(reconstruction(dataset_name=name, split="test"), process())


# Reconstruction


def test_reconstruction_measures_what_the_tokenizer_does(reconstruction, process, tiny_pipeline):
    args = reconstruction(label_column="label")
    report = evaluate_reconstruction(args, process())
    folder = Path(args.output_dir)
    references = torch.from_numpy(load(folder / "references.npz")).permute(0, 3, 1, 2)
    assert references.shape == (30, 3, 8, 8)

    pixels = references.float() / 127.5 - 1
    codes = tiny_pipeline.tokenizer.encode(pixels).codes
    seeds = torch.tensor([draw_seed(0, SeedFor.SAMPLE, i) for i in range(30)])
    noise = normal_noise(seeds, (3, 8, 8), torch.device("cpu"))
    shown = {p.num_tokens: to_uint8(p.sample) for p in tiny_pipeline.tokenizer.decode_stream([codes], noise=noise)}
    assert list(shown) == [4, 8, 12, 16]
    saved = torch.from_numpy(load(folder / "reconstructions.npz")).permute(0, 3, 1, 2)
    assert torch.equal(saved, shown[16])

    extractor, found = load_feature_extractor(args.features), figures(report)
    real = extractor(references)
    for tokens, images in shown.items():
        features, floats = extractor(images), images.float() / 127.5 - 1
        assert found["rFD", tokens] == pytest.approx(distance(features.pool, real.pool), abs=1e-6)
        assert found["spatial FD", tokens] == pytest.approx(distance(features.spatial, real.spatial), abs=1e-6)
        assert found["PSNR", tokens] == pytest.approx(float(psnr(floats, pixels).double().mean()), abs=1e-5)
    assert found["SSIM", 16] == pytest.approx(float(ssim(shown[16] / 127.5 - 1, pixels).mean()), abs=1e-6)
    usage = codebook_statistics(codes, 32)
    assert found["codebook usage", None] == usage["usage"]
    assert found["codebook perplexity", None] == usage["perplexity"]
    # digits have ten classes, the feature network five
    assert "not the model's 10" in report["not_measured"]["label_agreement"]
    assert [step["num_tokens"] for step in report["steps"]] == [4, 8, 12, 16]
    assert report["steps"][3]["psnr"] == found["PSNR", 16]
    assert read_report(folder) == json.loads(json.dumps(report))


def test_a_tokenizer_alone_and_fewer_steps(reconstruction, process, workplace):
    args = reconstruction(pipeline=str(workplace / "tokenizer"), num_inference_steps=2, save_images=False)
    report = evaluate_reconstruction(args, process())
    assert {tokens for name, tokens in figures(report) if name == "rFD"} == {4, 12}
    assert report["settings"]["num_tokens"] == 12 and len(report["steps"]) == 2
    folder = Path(args.output_dir)
    names = ["reconstruction_statistics.npz", "reference_statistics.npz"]  # no images
    assert sorted(path.name for path in folder.glob("*.npz")) == names
    moments = [torch.from_numpy(load(folder / name, part)) for name in reversed(names) for part in ("mu", "sigma")]
    assert moments[0].shape == (6,)
    assert frechet_distance(*moments) == pytest.approx(figures(report)["rFD", 12], abs=1e-9)


def test_more_steps_than_groups_measure_the_last_step_of_each_prefix(reconstruction, process):
    report = evaluate_reconstruction(reconstruction(num_inference_steps=8, prefixes=[8]), process())
    found = figures(report)
    assert {tokens for name, tokens in found if name == "rFD"} == {8, 16}
    assert len(report["steps"]) == 8
    last = max(step["step"] for step in report["steps"] if step["num_tokens"] == 8)
    assert found["PSNR", 8] == report["steps"][last - 1]["psnr"]


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
def test_another_solver_is_used_and_recorded(mode, request, process, tmp_path):
    make = request.getfixturevalue(mode)
    evaluate = {"generation": evaluate_generation, "reconstruction": evaluate_reconstruction}[mode]
    reports = [
        evaluate(make(solver_order=order, output_dir=str(tmp_path / str(order))), process()) for order in (None, 2, 1)
    ]
    assert [report["model"]["scheduler"]["solver_order"] for report in reports] == [2, 2, 1]
    default, adams, euler = map(figures, reports)
    name = "gFD" if mode == "generation" else "rFD"
    assert default == adams
    assert euler[name, 4] == adams[name, 4] and euler[name, 16] != adams[name, 16]  # the first step is Euler's


def test_lpips_is_left_out_with_a_reason(reconstruction, process, tmp_path):
    report = evaluate_reconstruction(reconstruction(), process())
    assert report["not_measured"] == {"lpips": "no lpips_weights given"}
    found = write_weights(LPIPSNetwork().state_dict(), tmp_path / "lpips.safetensors")
    weights = str(tmp_path / "lpips.safetensors")
    args = reconstruction(lpips_weights=weights, lpips_hash=found[:10], output_dir=str(tmp_path / "other"))
    report = evaluate_reconstruction(args, process())
    assert "smaller than 16 pixels" in report["not_measured"]["lpips"]
    with pytest.raises(ValueError, match="wrong weights"):
        evaluate_reconstruction(reconstruction(lpips_weights=weights, lpips_hash="0" * 64), process())


def test_lpips_and_grey_tokenizers(reconstruction, process, make_tokenizer, workplace):
    (workplace / "blocks.py").write_text(
        "import torch\nclass Blocks(torch.nn.Module):\n"
        "    def __init__(self, weights): super().__init__()\n"
        "    def forward(self, x): return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2)[:, 0].flatten(1)\n"
    )
    torch.manual_seed(0)
    network = LPIPSNetwork()
    found = write_weights(network.state_dict(), workplace / "lpips.safetensors")
    options = {"sample_size": 16, "encoder_patch_size": 4, "diffusion_patch_size": 4, "in_channels": 1}
    make_tokenizer(**options).save_pretrained(workplace / "grey")
    args = reconstruction(
        pipeline=str(workplace / "grey"),
        features=f"{workplace / 'blocks.py'}:Blocks",
        lpips_weights=str(workplace / "lpips.safetensors"),
    )
    report = evaluate_reconstruction(args, process())
    pairs = []
    for name in ("reconstructions.npz", "references.npz"):
        images = torch.from_numpy(load(Path(args.output_dir) / name)).permute(0, 3, 1, 2)
        assert images.shape == (30, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])
        pairs.append(images / 127.5 - 1)
    expected = float(network(*pairs).double().mean())
    assert figures(report)["LPIPS", 16] == pytest.approx(expected, rel=1e-5)
    assert report["settings"]["lpips_hash"] == found and report["not_measured"] == {}


# Generation


def test_generation_measures_what_the_pipeline_does(generation, process, tiny_pipeline):
    args = generation(guidance_scale=[1.5, 3.0], temperature=0.9, top_k=20, seed=3)
    report = evaluate_generation(args, process())
    folder, found = Path(args.output_dir), figures(report)
    assert load(folder / "samples.npz", "arr_1").tolist() == [i % 5 for i in range(30)]
    samples = torch.from_numpy(load(folder / "samples.npz")).permute(0, 3, 1, 2)

    outputs = tiny_pipeline.stream(
        [i % 5 for i in range(30)],
        guidance_scale=(1.5, 3.0),
        temperature=0.9,
        top_k=20,
        generator=[torch.Generator().manual_seed(draw_seed(3, SeedFor.SAMPLE, i)) for i in range(30)],
        output_type="pt",
    )
    shown = {output.num_tokens: (output.images * 255).round().to(torch.uint8) for output in outputs}
    changed = (samples != shown[16]).flatten(1).any(dim=1)
    assert changed.sum() <= 1  # a batch of 30 against batches of 4

    extractor = load_feature_extractor(args.features)
    references = extractor(torch.from_numpy(load(folder / "references.npz")).permute(0, 3, 1, 2)).pool
    features = extractor(samples)
    assert found["gFD", 16] == pytest.approx(distance(features.pool, references), abs=1e-6)
    expected = precision_recall(references, features.pool)
    assert (found["precision", 16], found["recall", 16]) == (expected["precision"], expected["recall"])
    agreement = (features.logits.argmax(1) == torch.arange(30) % 5).double().mean()
    assert found["label agreement", 16] == pytest.approx(float(agreement))
    p = features.logits.double().softmax(1)
    score = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert found["Inception score", 16] == pytest.approx(float(score), abs=1e-6)
    assert {tokens for name, tokens in found if name == "gFD"} == {4, 8, 12, 16}
    assert len(references) == 360
    assert "the sets differ in size: 30 samples, 360 references." in report["warnings"]
    assert report["settings"]["guidance_scale"] == (1.5, 3.0) and report["settings"]["seed"] == 3


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
def test_two_processes_give_the_same_as_one(mode, request, process, tmp_path):
    make = request.getfixturevalue(mode)
    evaluate = {"generation": evaluate_generation, "reconstruction": evaluate_reconstruction}[mode]
    alone = evaluate(make(output_dir=str(tmp_path / "one")), process())
    args = make(output_dir=str(tmp_path / "two"))
    assert evaluate(args, process(1, 2)) is None  # one after the other instead of at once
    halves = len(list((tmp_path / "two").rglob("*.safetensors")))
    shared = evaluate(args, process(0, 2))
    assert 0 < halves < len(list((tmp_path / "two").rglob("*.safetensors")))
    same_figures(alone, shared)
    assert shared["settings"]["num_processes"] == 2


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(50, marks=pytest.mark.slow)]
)
def test_any_batch_size_gives_the_same_codes_and_figures(mode, batch_size, request, process, tmp_path):
    make = request.getfixturevalue(mode)
    evaluate = {"generation": evaluate_generation, "reconstruction": evaluate_reconstruction}[mode]
    reports = []
    for index, size in enumerate((4, batch_size)):
        reports.append(evaluate(make(output_dir=str(tmp_path / str(index)), batch_size=size), process()))
    name = "samples.npz" if mode == "generation" else "reconstructions.npz"
    first, second = (load(tmp_path / str(i) / name).astype(int) for i in range(2))
    assert np.abs(first - second).max() <= 1  # rounding may tip a pixel over
    assert (first != second).mean() < 1e-3
    found, other = map(figures, reports)
    assert found.keys() == other.keys()
    assert all(found[key] == pytest.approx(other[key], rel=1e-3, abs=1e-3) for key in found)
    assert found["codebook perplexity", None] == other["codebook perplexity", None]


def test_an_interrupted_run_goes_on_and_gives_the_same(generation, process, tmp_path, monkeypatch):
    alone = evaluate_generation(generation(output_dir=str(tmp_path / "one")), process())
    generate, calls = Generation.generate, []

    def failing(self, indices):
        calls.append(indices)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, indices)

    monkeypatch.setattr(Generation, "generate", failing)
    args = generation(output_dir=str(tmp_path / "two"))
    with pytest.raises(KeyboardInterrupt):
        evaluate_generation(args, process())
    assert not (tmp_path / "two" / "report.json").exists()
    done = sorted((tmp_path / "two" / "shards" / "samples").glob("*.safetensors"))
    assert len(done) == 2
    done[1].write_bytes(done[1].read_bytes()[:100])  # damaged by whatever stopped the run
    same_figures(alone, evaluate_generation(args, process()))
    assert calls[5] == range(7, 11)  # the first shard was kept
    before = len(calls)
    same_figures(alone, evaluate_generation(args, process()))
    assert len(calls) == before


def test_samples_do_not_depend_on_the_number_of_samples(generation, process, tmp_path):
    evaluate_generation(generation(output_dir=str(tmp_path / "few"), num_images=10), process())
    args = generation(output_dir=str(tmp_path / "few"), num_images=15)
    evaluate_generation(args, process())  # goes on where the first run ended
    evaluate_generation(generation(output_dir=str(tmp_path / "many"), num_images=15, shard_size=15), process())
    assert np.array_equal(load(tmp_path / "few" / "samples.npz"), load(tmp_path / "many" / "samples.npz"))


def test_another_evaluation_in_the_same_folder_is_refused(generation, process):
    evaluate_generation(generation(num_images=10), process())
    with pytest.raises(ValueError, match="seed was 0, now 1.*--overwrite_output_dir"):
        evaluate_generation(generation(num_images=10, seed=1), process())
    report = evaluate_generation(generation(num_images=10, seed=1, overwrite_output_dir=True), process())
    assert report["settings"]["seed"] == 1


def test_other_references_in_the_same_folder_are_refused(generation, reconstruction, process, tmp_path):
    """Shards are kept of the images they were made of, whatever their file or column is called."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 20, 8, 8, 3), dtype=np.uint8)
    options = {"dataset_name": None, "num_images": 10}
    for name, images in zip("ab", noise, strict=True):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "reference.npz", arr_0=images)
    first, second = (str(tmp_path / name / "reference.npz") for name in "ab")
    report = evaluate_generation(generation(reference=first, **options), process())
    assert report["data"]["reference_sha256"] == hashlib.sha256(Path(first).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="holds another evaluation: data was"):
        evaluate_generation(generation(reference=second, **options), process())

    columns = {name: [Image.fromarray(image) for image in images] for name, images in zip("ab", noise, strict=True)}
    features = {"a": datasets.Image(), "b": datasets.Image(), "kind": datasets.Value("int64")}
    data = datasets.Dataset.from_dict(columns | {"kind": [0] * 20}, features=datasets.Features(features))
    data.to_parquet(tmp_path / "data.parquet")
    options = {"dataset_name": str(tmp_path / "data.parquet"), "split": "train", "output_dir": str(tmp_path / "other")}
    evaluate_reconstruction(reconstruction(num_images=10, image_column="a", **options), process())
    for change in ({"image_column": "b"}, {"image_column": "a", "label_column": "kind"}):
        with pytest.raises(ValueError, match="holds another evaluation: data was"):
            evaluate_reconstruction(reconstruction(num_images=10, **options, **change), process())


def test_only_one_network_is_called_inception(generation, process, workplace):
    extractor = load_feature_extractor(generation().features)
    extractor.name = str(workplace / "inception")  # a local model of transformers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_feature_extractor", lambda *args: extractor)
        report = evaluate_generation(generation(num_images=10), process())
    names = {entry["name"] for entry in report["metrics"]}
    assert "gFD (local inception)" in names and not any("FID" in name for name in names)


def test_sets_too_small_for_the_features_are_said_to_be(generation, process):
    report = evaluate_generation(generation(num_images=6), process())
    assert any("6 samples do not span the 6 pool features" in warning for warning in report["warnings"])
    assert any("not equally many of each of 5 classes" in warning for warning in report["warnings"])


# References


def test_references_by_images_and_by_statistics_are_those_of_the_data_set(generation, process, tmp_path):
    data = evaluate_generation(generation(output_dir=str(tmp_path / "data")), process())
    options = {"dataset_name": None, "num_images": 30}
    by_images = evaluate_generation(
        generation(reference=str(tmp_path / "data/references.npz"), output_dir=str(tmp_path / "a"), **options),
        process(),
    )
    assert by_images["metrics"] == data["metrics"]
    assert by_images["data"]["reference"] == "references.npz"
    by_statistics = evaluate_generation(
        generation(
            reference=str(tmp_path / "data/reference_statistics.npz"), output_dir=str(tmp_path / "b"), **options
        ),
        process(),
    )
    assert by_statistics["not_measured"].keys() == {"precision", "recall"}
    expected = [entry for entry in data["metrics"] if entry["type"] not in ("precision", "recall")]
    assert by_statistics["metrics"] == expected

    with np.load(tmp_path / "data/reference_statistics.npz") as file:
        np.savez(tmp_path / "pool.npz", **{name: file[name] for name in ("mu", "sigma", "feature_extractor")})
    args = generation(reference=str(tmp_path / "pool.npz"), output_dir=str(tmp_path / "b"), **options)
    by_statistics = evaluate_generation(args, process())
    assert by_statistics["not_measured"]["spatial_frechet_distance"] == "the reference holds no spatial statistics"
    assert by_statistics["metrics"] == [entry for entry in expected if "spatial" not in entry["type"]]


def test_unfitting_references_are_refused_before_anything_is_made(generation, process, tmp_path):
    def refused(message, **arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            evaluate_generation(generation(reference=str(tmp_path / "reference.npz"), dataset_name=None), process())
        assert not (tmp_path / "out").exists()

    images = np.zeros((20, 8, 8, 3), np.uint8)
    eye, identity = np.eye(6), load_feature_extractor(generation().features).identity
    refused(r"images of \(9, 8\), the model's are \(8, 8\)", arr_0=np.zeros((20, 9, 8, 3), np.uint8))
    refused("holds no images", arr_0=images[:0])
    refused("uint8 images .* got float64", arr_0=images / 255)
    refused("uint8 images", arr_0=images[..., 0])
    refused("neither images .arr_0. nor statistics", arr_1=images)
    refused("are of another network .Inception", mu=eye[0], sigma=eye)
    refused("are of another network .other 00", mu=eye[0], sigma=eye, feature_extractor=np.array("other 00"))
    refused(
        "pool features of size 5, the network's are 6", mu=np.zeros(5), sigma=np.eye(5), feature_extractor=identity
    )
    refused(r"must be \(D,\) and \(D, D\)", mu=eye[0], sigma=eye[:5], feature_extractor=identity)
    refused("mu or sigma is not finite", mu=eye[0] * np.nan, sigma=eye, feature_extractor=identity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": [4, 5]}, r"prefixes must be among \[4, 8, 12, 16\].*got \[5\]"),
        ({"pipeline": "no/where"}, "neither a folder nor a repository"),
        ({"revision": "main"}, "is a folder here"),
        ({"reference": "none.npz", "dataset_name": None}, "no such reference file"),
        ({"dataset_name": "./no/where"}, "no such file or folder"),
        ({"split": "validation"}, "splits train and test"),
        ({"features_hash": "12345678"}, "wrong weights"),
        ({"features": "inception"}, "need weights"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "one number or two"),
        ({"guidance_scale": [-1.0]}, "guidance scales must be finite"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"reference": "some.npz"}, "either reference"),
        ({"pipeline": ""}, "pipeline is missing"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"num_images": 1}, "need 2 samples or more, got 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"solver_order": 3}, "solver_order must be 1 or 2"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_bad_arguments(changes, message, generation, process, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_generation(generation(**changes), process())
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_named_with_its_commit(generation, process, workplace, monkeypatch):
    commit, calls = workplace / "snapshots" / "1234abcd", []
    commit.parent.mkdir()
    (workplace / "pipeline").rename(commit)

    def download(repository, revision, allow_patterns):
        calls.append((repository, revision))
        return str(commit)

    monkeypatch.setattr("dar_hf.evaluation.models.snapshot_download", download)
    report = evaluate_generation(generation(pipeline="user/model", revision="main", num_images=5), process())
    assert calls == [("user/model", "main")]
    assert (report["model"]["name"], report["model"]["revision"]) == ("user/model", "1234abcd")


def test_a_tokenizer_cannot_generate(generation, process, workplace):
    with pytest.raises(ValueError, match="holds a tokenizer only"):
        evaluate_generation(generation(pipeline=str(workplace / "tokenizer")), process())
    with pytest.raises(ValueError, match="neither a pipeline"):
        evaluate_generation(generation(pipeline=str(workplace)), process())


def test_features_that_are_not_finite_stop_the_run(generation, process, workplace):
    (workplace / "bad.py").write_text(
        "import torch\nclass Bad(torch.nn.Module):\n"
        "    def __init__(self, weights): super().__init__()\n"
        "    def forward(self, x): return 1 / (x.float() - 128).mean((2, 3))\n"
    )
    with pytest.raises(ValueError, match="features that are not finite"):
        evaluate_generation(generation(features=f"{workplace / 'bad.py'}:Bad"), process())


# Pictures


def test_pictures_of_reconstruction(reconstruction, process):
    args = reconstruction()
    evaluate_reconstruction(args, process())
    sizes = {path.name: Image.open(path).size for path in Path(args.output_dir).glob("*.png")}
    assert sizes.keys() == {"reconstructions.png", "previews.png", "fid_over_prefix.png", "error_over_steps.png"}
    assert sizes["previews.png"] == (5 * 50 + 2, 10 * 50 + 2)  # the reference and four steps of ten images
    assert sizes["reconstructions.png"] == (8 * 50 + 2, 8 * 50 + 2)  # 30 pairs in rows of 8
    shown = np.asarray(Image.open(Path(args.output_dir) / "reconstructions.png"))[2:50:6, 2:50:6]
    assert np.array_equal(shown, load(Path(args.output_dir) / "references.npz")[0])


def test_pictures_of_generation(generation, process):
    args = generation(save_images=False)
    evaluate_generation(args, process())
    sizes = {path.name: Image.open(path).size for path in Path(args.output_dir).glob("*.png")}
    assert sizes.keys() == {"samples.png", "previews.png", "fid_over_prefix.png"}
    assert sizes["samples.png"] == (10 * 50 + 2, 3 * 50 + 2) and sizes["previews.png"] == (4 * 50 + 2, 10 * 50 + 2)


# The command


def command(arguments, *launcher, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    line = [sys.executable, *launcher, str(EXAMPLES / "measure.py"), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def options(args, *names):
    return [part for name in names for part in (f"--{name}", str(getattr(args, name)))]


@pytest.mark.slow
def test_the_command_with_one_and_two_processes(generation, tmp_path):
    names = ("pipeline", "features", "dataset_name", "num_images", "shard_size")
    arguments = ["generation", *options(generation(), *names)]
    one = command([*arguments, "--output_dir", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    assert "gFD" in one.stdout and "tokens" in one.stdout and "warning:" in one.stdout
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = command([*arguments, "--output_dir", str(tmp_path / "two")], *launcher, CUDA_VISIBLE_DEVICES="")
    assert two.returncode == 0, two.stderr
    reports = [read_report(tmp_path / name) for name in ("one", "two")]
    assert [report["settings"]["num_processes"] for report in reports] == [1, 2]
    same_figures(*reports)


@pytest.mark.parametrize("arguments", [["generation", "--pipeline", "x"], ["measure"], []])
def test_the_command_says_what_is_wrong_in_one_line(arguments, monkeypatch, capsys):
    command = load_script("examples/measure.py")
    monkeypatch.setattr(sys, "argv", ["measure.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("measure.py: ")
