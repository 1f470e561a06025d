"""Every loss term of stage 1 reaches the parameters it should, and no others; missing weights are errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig
from transformers import Dinov2WithRegistersModel as Dinov2WithRegisters

from dar_hf.metrics.lpips import LPIPSNetwork
from dar_hf.metrics.weights import write_weights
from dar_hf.presets import get_preset
from dar_hf.training import make_accelerator, train
from dar_hf.training.adversary import Adversary, PatchDiscriminator, discriminator_sum, generator_sum
from dar_hf.training.loop import TrainingLoop
from dar_hf.training.losses import perceptual_sum
from dar_hf.training.repa import IMAGENET_MEAN, IMAGENET_STD, RepaTeacher, load_teacher, repa_grid, repa_sum

from .helpers import batch_of, fresh_process, tokenizer_stage

MODEL = {"sample_size": 32, "encoder_patch_size": 8, "diffusion_patch_size": 8, "diffusion_depth": 2}
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
ALL_TERMS = {
    "perceptual_weight": 0.5,
    "repa_weight": 0.5,
    "discriminator_weight": 0.1,
    "discriminator_layers": 2,
    "discriminator_width": 8,
    "max_train_samples": 12,
}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Random weights of LPIPS and a random encoder, as options of a run."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    write_weights(LPIPSNetwork().state_dict(), folder / "lpips.safetensors")
    Dinov2Model(Dinov2Config(**TINY_VIT)).save_pretrained(folder / "encoder")
    return {"lpips_weights": str(folder / "lpips.safetensors"), "repa_model": str(folder / "encoder")}


def full_stage(folder, judges, model=None, **changes):
    model = MODEL | {"repa_layer": 1, "repa_dim": 16} | (model or {})
    return tokenizer_stage(folder, model, **ALL_TERMS | judges | changes)


def reached(stage, name):
    """Parameters of the tokenizer and of the discriminator that a term gives a gradient to."""
    batch = batch_of(stage, [(index, 100 + index) for index in range(4)])
    output = stage.forward(stage.model, batch, 0)
    modules = {"": stage.model, "discriminator.": stage.adversary.network}
    for module in modules.values():
        module.zero_grad(set_to_none=True)
    (term,) = [term for term in stage.terms if term.name == name]
    value = term.function(output, batch, 0)
    assert value.dtype == torch.float32 and value.ndim == 0 and value > 0
    value.backward()
    return {
        prefix + name
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
        if p.grad is not None and p.grad.any()
    }


ENCODER = ("patch_embed", "query_", "encoder_blocks", "quant_proj")


def test_every_term_reaches_what_it_should_and_nothing_else(tmp_path, judges):
    stage, _ = full_stage(tmp_path, judges)
    everything = {name for name, _ in stage.model.named_parameters()}
    encoder = {name for name in everything if name.startswith(ENCODER)}
    head = {name for name in everything if ".repa_head." in name}
    after_head = {name for name in everything if name.startswith(("denoiser.blocks.1.", "denoiser.proj_out"))}
    codebook = {"quantizer.codebook.weight"}
    images = everything - codebook - head
    assert encoder and head and after_head
    assert reached(stage, "flow") == images
    assert reached(stage, "codebook") == codebook
    assert reached(stage, "commitment") == encoder
    assert reached(stage, "perceptual") == images
    assert reached(stage, "repa") == everything - codebook - after_head
    assert reached(stage, "adversarial") == images
    assert reached(stage, "discriminator") == {
        f"discriminator.{n}" for n, _ in stage.adversary.network.named_parameters()
    }


def test_terms_are_those_asked_for(tmp_path, judges):
    plain = ["flow", "codebook", "commitment"]
    assert [term.name for term in tokenizer_stage(tmp_path, MODEL)[0].terms] == plain
    names = [term.name for term in full_stage(tmp_path, judges)[0].terms]
    assert names == [*plain, "perceptual", "repa", "adversarial", "discriminator"]


def test_the_papers_weights():
    recipe = get_preset("v1").tokenizer_recipe
    assert (recipe["perceptual_weight"], recipe["repa_weight"]) == (0.5, 0.5)
    assert "discriminator_weight" not in recipe  # off, as in v1


def run(stage, args, steps):
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = iter(loop.batches)
    stage.model.train()
    count = args.gradient_accumulation_steps
    return loop, [loop._step(step, [next(batches) for _ in range(count)]) for step in range(steps)]


def test_every_term_is_logged_and_the_total_is_the_tokenizers(tmp_path, judges):
    stage, args = full_stage(tmp_path, judges)
    _, (line,) = run(stage, args, 1)
    logged = {term.name: line[f"loss/{term.name}"] for term in stage.terms}
    assert all(value > 0 for value in logged.values())
    total = sum(term.weight * logged[term.name] for term in stage.terms if term.name != "discriminator")
    assert line["loss/total"] == pytest.approx(total, rel=1e-5)


def test_every_term_compares_each_time_with_its_own_image(tmp_path, judges):
    stage, _ = full_stage(tmp_path, judges, times_per_image=2)
    batch = batch_of(stage, [(index, 100 + index) for index in range(4)])
    output = stage.forward(stage.model, batch, 0)
    again = {name: value.repeat_interleave(2, dim=0) for name, value in batch.items()}
    for term in stage.terms:
        if term.per == "images":
            together = term.function(output, batch, 0)
            stage.args.times_per_image = 1
            apart = term.function(output, again, 0)
            stage.args.times_per_image = 2
            assert together.item() == pytest.approx(apart.item()) and together > 0, term.name


def test_every_parameter_moves_and_the_judges_stand_still(tmp_path, judges):
    stage, args = full_stage(tmp_path, judges)
    networks = {"model": stage.model, "discriminator": stage.adversary.network}
    before = {k: [p.detach().clone() for p in network.parameters()] for k, network in networks.items()}
    frozen = [p for name in ("lpips", "repa") for p in stage._loss_networks[name].parameters()]
    copies = [p.clone() for p in frozen]
    run(stage, args, 2)
    for name, network in networks.items():
        assert not any(torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(copies, frozen, strict=True))
    assert not any(p.requires_grad for p in frozen)


def test_the_model_starts_the_same_whatever_judges_it(tmp_path, judges):
    one = full_stage(tmp_path, judges)[0]
    other = full_stage(tmp_path, judges, discriminator_weight=0.0, perceptual_weight=0.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_accumulation_changes_nothing(tmp_path, judges):
    def result(batch, accumulation):
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        stage, args = full_stage(tmp_path, judges, **options)
        loop, lines = run(stage, args, 3)
        return lines, stage.adversary.network.state_dict()

    (whole, network), (split, other) = result(4, 1), result(1, 4)
    for one, two in zip(whole, split, strict=True):
        assert two == pytest.approx(one, abs=1e-4, rel=1e-4)
    for name in network:
        torch.testing.assert_close(other[name], network[name], atol=2e-4, rtol=1e-3)


def test_the_discriminator_waits_for_its_start(tmp_path, judges):
    stage, args = full_stage(tmp_path, judges, discriminator_start=2)
    before = [p.detach().clone() for p in stage.adversary.network.parameters()]
    loop, lines = run(stage, args, 2)
    assert [line["loss/adversarial"] for line in lines] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, stage.adversary.network.parameters(), strict=True))
    batches = iter(loop.batches)
    line = loop._step(2, [next(batches)])
    assert line["loss/adversarial"] > 0 and line["loss/discriminator"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, stage.adversary.network.parameters(), strict=True))


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, judges):
    options = {"max_train_steps": 6, "checkpointing_steps": 3, "perceptual_weight": 0.0, "discriminator_start": 1}
    networks = []
    for resume in (None, "checkpoint-3"):
        with fresh_process():
            torch.manual_seed(9)
            stage, args = full_stage(tmp_path, judges, resume_from_checkpoint=resume, **options)
            train(stage, args, make_accelerator(args))
            networks.append(torch.cat([p.detach().flatten() for p in stage.adversary.network.parameters()]))
            networks.append(torch.cat([p.detach().flatten() for p in stage.model.parameters()]))
    assert torch.equal(networks[0], networks[2]) and torch.equal(networks[1], networks[3])


def test_half_precision(tmp_path, judges):
    found = []
    for precision in ("no", "bf16"):
        with fresh_process():
            stage, args = full_stage(tmp_path, judges, mixed_precision=precision)
            found.append(run(stage, args, 1)[1][0])
    for name in ("perceptual", "repa", "adversarial", "discriminator"):
        one, other = (line[f"loss/{name}"] for line in found)
        assert one != other and other == pytest.approx(one, rel=0.05)


# What is missing is an error


def test_missing_weights_say_how_to_get_them(tmp_path, judges):
    with pytest.raises(ValueError, match="convert_metric_weights.py lpips"):
        full_stage(tmp_path, judges, lpips_weights=None)
    with pytest.raises(ValueError, match="hf download facebook/dinov2-base.*--repa_weight 0"):
        full_stage(tmp_path, judges, repa_model=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "model, options, message",
    [
        ({"repa_layer": None}, {}, "repa_layer=N"),
        ({"repa_dim": 17}, {}, "--model_overrides repa_dim=16"),
        ({"sample_size": 8}, {"discriminator_weight": 0.0}, "LPIPS needs images of 16 pixels"),
        ({"sample_size": 8}, {"perceptual_weight": 0.0}, "needs images of 12 pixels"),
    ],
)
def test_terms_that_do_not_fit_the_model(tmp_path, judges, model, options, message):
    with pytest.raises(ValueError, match=message):
        full_stage(tmp_path, judges, model, **options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("repa_weight", -1.0),
        ("perceptual_weight", math.nan),
        ("discriminator_start", -1),
        ("discriminator_layers", 0),
        ("discriminator_learning_rate", 0.0),
    ],
)
def test_options_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        tokenizer_stage(tmp_path, **{name: value})


# The terms by themselves


def test_lpips_of_the_jump_estimate(tmp_path, judges):
    stage, _ = full_stage(tmp_path, judges)
    batch = batch_of(stage, [(0, 1), (1, 2)])
    output = stage.forward(stage.model, batch, 0)
    network = stage._loss_networks["lpips"]
    with torch.no_grad():
        each = [network(output.pred_original_sample[i : i + 1], batch["pixel_values"][i : i + 1]) for i in range(2)]
        assert float(perceptual_sum(network, output, batch["pixel_values"])) == pytest.approx(
            float(sum(each)), rel=1e-4
        )
    grey = DictLike(pred_original_sample=torch.rand(1, 1, 16, 16))
    assert perceptual_sum(network, grey, torch.rand(1, 1, 16, 16)) > 0


class DictLike:
    def __init__(self, **values):
        self.__dict__.update(values)


def test_repa_is_one_minus_the_cosine():
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]])
    targets = torch.tensor([[[5.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    expected = (0 + 2) / 2 + (1 - math.sqrt(0.5) + 0) / 2
    assert float(repa_sum(features, targets)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="REPA compares"):
        repa_sum(features, targets[:1])


def test_the_teacher_sees_imagenets_pixels_and_gives_patches_in_order():
    torch.manual_seed(0)
    encoder = Dinov2WithRegisters(Dinov2WithRegistersConfig(**TINY_VIT, num_register_tokens=4)).eval()
    teacher = RepaTeacher(encoder)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = F.interpolate(((images + 1) / 2 - mean) / std, (224, 224), mode="bicubic")
    with torch.no_grad():
        tokens = encoder(pixel_values=pixels).last_hidden_state
    assert tokens.shape[1] == 1 + 4 + 256
    torch.testing.assert_close(teacher(images, (16, 16)), tokens[:, 5:])
    quarter = tokens[:, 5:].unflatten(1, (4, 4, 4, 4)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(teacher(images, (4, 4)), quarter)
    assert teacher(images[:, :1], (16, 16)).shape == (2, 256, 16)


def test_the_teacher_takes_the_vision_part_of_clip(tmp_path):
    vision = TINY_VIT | {"intermediate_size": 16, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1, "hidden_size": 16}))
    clip.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), 16)
    assert teacher(torch.zeros(1, 3, 32, 32), (7, 7)).shape == (1, 49, 16)


def test_what_is_no_vision_transformer(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a vision transformer, got ResNetModel"):
        load_teacher(str(tmp_path), 16)


@pytest.mark.parametrize(
    "size, patch, grid", [((256, 256), 8, (16, 16)), ((32, 48), 8, (4, 6)), ((512, 256), 8, (16, 8))]
)
def test_the_grid_is_that_of_the_repa_head(tmp_path, size, patch, grid):
    assert repa_grid(*size, patch, 16) == grid
    rows = size[0] // patch
    pooled = F.avg_pool2d(torch.zeros(1, 1, rows, size[1] // patch), max(1, rows // 16))
    assert tuple(pooled.shape[2:]) == grid


# The discriminator


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_discriminator_judges_patches(layers):
    least = PatchDiscriminator.min_size(layers)
    network = PatchDiscriminator(3, layers, 8)
    assert network(torch.zeros(2, 3, least, least)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, least - 2**layers, least))
    assert PatchDiscriminator(1, 3, 128)(torch.zeros(1, 1, 64, 64)).shape == (1, 1, 6, 6)


def test_the_losses_of_the_discriminator():
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 1, 8)
    real, fake = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    probability = {name: torch.sigmoid(network(x)) for name, x in (("real", real), ("fake", fake))}
    expected = -probability["real"].log().mean() - (1 - probability["fake"]).log().mean()
    torch.testing.assert_close(discriminator_sum(network, real, fake), expected)  # two images, half of each
    torch.testing.assert_close(generator_sum(network, fake), -2 * probability["fake"].log().mean())


def test_it_learns_to_tell_images_apart():
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(3, 1, 8), 2e-3, (0.9, 0.95), 1e-8, 1.0)
    accelerator = DictLike(scaler=None, reduce=lambda gradient, reduction: gradient)
    losses = []
    for _ in range(40):
        real, fake = torch.randn(4, 3, 16, 16) + 1, torch.randn(4, 3, 16, 16) - 1
        loss = discriminator_sum(adversary.network, real, fake) / 4
        loss.backward()
        adversary.step(accelerator, 1.0)
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=0.15) and losses[-1] < 0.2


def test_non_finite_gradients_leave_the_discriminator_alone():
    adversary = Adversary(PatchDiscriminator(3, 1, 8), 1e-3, (0.9, 0.95), 1e-8, 1.0)
    before = [p.detach().clone() for p in adversary.network.parameters()]
    for p in adversary.network.parameters():
        p.grad = torch.full_like(p, math.inf)
    adversary.step(DictLike(scaler=None, reduce=lambda gradient, reduction: gradient), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.network.parameters(), strict=True))
