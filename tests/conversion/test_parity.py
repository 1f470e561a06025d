"""Values of the original implementation (small random models, CPU, float32), trimmed copies of its files."""

import lzma
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dar_hf.conversion import convert_tokenizer, convert_transformer, to_llama
from dar_hf.conversion.tokenizer import original_name

REFERENCE = Path(__file__).parent.parent / "reference"
TOLERANCE = 2e-6  # relative; seen: 3.1e-7. A wrong LayerNorm epsilon shows at 9e-5


def values(name):
    with safe_open(REFERENCE / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def unpack(name, folder):
    path = folder / name
    path.write_bytes(lzma.decompress((REFERENCE / f"{name}.xz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return convert_tokenizer(unpack("tokenizer_official.pt", tmp_path_factory.mktemp("original")))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return convert_transformer(unpack("ar_official.pt", tmp_path_factory.mktemp("original")))


@pytest.fixture(scope="module")
def tokenizer_io():
    return values("tokenizer_io.safetensors")


@pytest.fixture(scope="module")
def ar_io():
    return values("ar_io.safetensors")


def difference(ours, reference):
    assert ours.shape == reference.shape
    return float(((ours - reference).norm() / reference.norm()).detach())


def test_codes(tokenizer, tokenizer_io):
    assert torch.equal(tokenizer.encode(tokenizer_io["images"]).codes, tokenizer_io["codes"])


@torch.no_grad()
def test_condition(tokenizer, tokenizer_io):
    assert difference(tokenizer.condition(tokenizer_io["codes"]), tokenizer_io["condition"]) < TOLERANCE


@torch.no_grad()
def test_velocity(tokenizer, tokenizer_io):
    inputs = tokenizer_io["velocity_xt"], tokenizer_io["velocity_t"], tokenizer_io["condition"][:, :4]
    assert difference(tokenizer.velocity(*inputs), tokenizer_io["velocity"]) < TOLERANCE


@pytest.mark.parametrize("groups, name", [(4, "full"), (1, "preview_1"), (3, "preview_3")])
def test_decode(tokenizer, tokenizer_io, groups, name):
    codes = tokenizer_io["codes"][:, : 4 * groups]
    decoded = tokenizer.decode(codes, noise=tokenizer_io["noise"]).sample
    assert difference(decoded, tokenizer_io[f"decoded_{name}"]) < TOLERANCE


@torch.no_grad()
def test_repa_features(tokenizer, tokenizer_io):
    inputs = tokenizer_io["velocity_xt"], tokenizer_io["velocity_t"], tokenizer_io["condition"][:, :4]
    features = tokenizer._velocity(*inputs, output_repa=True)[1][:, ::16]
    assert difference(features, tokenizer_io["repa_features"]) < TOLERANCE


def test_training_step(tokenizer, tokenizer_io):
    output = tokenizer(tokenizer_io["images"], timesteps=tokenizer_io["train_u"], noise=tokenizer_io["train_noise"])
    flow = (output.velocity - output.target).square().mean() / tokenizer.config.data_std**2

    def to_codes(x, y):
        return ((x - y).square().mean(-1) * output.token_mask).sum() / output.token_mask.sum()

    vq = to_codes(output.latents.detach(), output.quantized)
    commitment = 0.25 * to_codes(output.latents, output.quantized.detach())
    for ours, name in (
        (output.timesteps, "t_shifted"),
        (output.pred_original_sample, "pred_x1"),
        (flow, "flow_loss"),
        (vq, "vq_loss"),
        (commitment, "commit_loss"),
    ):
        assert difference(ours, tokenizer_io[f"train_{name}"]) < TOLERANCE, name

    tokenizer.zero_grad()
    (flow + vq + commitment).backward()
    gradients = {original_name(name): parameter.grad for name, parameter in tokenizer.named_parameters()}
    norms = [name for name in tokenizer_io if name.startswith("grad_norm.")]
    assert len(norms) == 6
    for name in norms:
        assert difference(gradients[name.removeprefix("grad_norm.")].norm(), tokenizer_io[name]) < TOLERANCE, name


@torch.no_grad()
def test_logits_and_loss(transformer, ar_io):
    config = transformer.config
    ids = torch.cat([ar_io["labels"][:, None] + config.codebook_size, ar_io["codes"]], dim=1)
    output = transformer(ids, labels=ids)
    assert difference(output.logits[:, :-1], ar_io["logits"]) < TOLERANCE
    assert difference(output.loss, ar_io["loss"]) < TOLERANCE
    ids[:, 0] = config.null_token_id
    assert difference(transformer(ids).logits[:, :-1], ar_io["logits_null_class"]) < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name, scale", [("greedy_no_cfg", None), ("greedy_cfg_4", 4.0), ("greedy_cfg_1.2_to_8", (1.2, 8.0))]
)
def test_greedy_sequences(transformer, ar_io, name, scale, cache):
    streamed = torch.cat(list(transformer.stream_codes(ar_io["labels"], guidance_scale=scale, temperature=0)), dim=1)
    assert torch.equal(streamed, ar_io[name])
    prompt = ar_io["labels"][:, None] + transformer.config.codebook_size
    generated = transformer.generate(prompt, do_sample=False, guidance_scale=scale, cache_implementation=cache)
    assert torch.equal(generated[:, 1:], ar_io[name])


def test_llama(transformer, ar_io):
    prompt = ar_io["labels"][:, None] + transformer.config.codebook_size
    assert torch.equal(to_llama(transformer).generate(prompt, do_sample=False)[:, 1:], ar_io["greedy_no_cfg"])
