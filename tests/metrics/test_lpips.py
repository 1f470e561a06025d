"""LPIPS against its definition on random weights under the names of the usual files."""

import pytest
import torch
import torch.nn.functional as F

from dar_hf.metrics import LPIPSNetwork, convert_lpips, load_lpips
from dar_hf.metrics.weights import write_weights

# torchvision's VGG16 "features": output channels of convolutions, M for pooling; a ReLU follows every convolution
LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@pytest.fixture(scope="module")
def originals():
    generator = torch.Generator().manual_seed(0)
    vgg, channels, index = {"classifier.0.weight": torch.zeros(3, 3)}, 3, 0
    for entry in LAYOUT:
        if entry == "M":
            index += 1
            continue
        weight = torch.randn(entry, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        vgg |= {
            f"features.{index}.weight": weight,
            f"features.{index}.bias": 0.1 * torch.randn(entry, generator=generator),
        }
        channels, index = entry, index + 2
    widths = [64, 128, 256, 512, 512]
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(widths)}
    return vgg, heads


@pytest.fixture(scope="module")
def network(originals, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    write_weights(convert_lpips(*originals), path)
    return load_lpips(str(path))


def by_definition(originals, images, references):
    vgg, heads = originals
    total = 0
    features = []
    for x in (images, references):
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        taken, index = [], 0
        for entry in LAYOUT:
            if entry == "M":
                taken.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))  # relu1_2, 2_2, 3_3, 4_3, 5_3
                x, index = F.max_pool2d(x, 2, 2), index + 1
            else:
                x = F.conv2d(x, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1).relu()
                index += 2
        features.append(taken)
    for stage, (x, y) in enumerate(zip(*features, strict=True)):
        total = total + F.conv2d((x - y).square(), heads[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    return total


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(1)
    references = torch.rand(2, 3, 32, 40, generator=generator) * 2 - 1
    return (references + 0.3 * torch.randn(references.shape, generator=generator)).clamp(-1, 1), references


def test_distance_is_its_definition(network, originals, pair):
    torch.testing.assert_close(network(*pair), by_definition(originals, *pair), rtol=1e-5, atol=1e-6)


def test_equal_images_have_no_distance_and_order_does_not_matter(network, pair):
    assert network(pair[1], pair[1]).tolist() == [0, 0]
    torch.testing.assert_close(network(*pair), network(*reversed(pair)))


def test_it_is_a_loss(network, pair):
    images = pair[0].clone().requires_grad_()
    network(images, pair[1]).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    step = (images - 1e-2 * images.grad / images.grad.norm()).detach()
    assert network(step, pair[1]).sum() < network(pair[0], pair[1]).sum()


def test_its_gradient_is_finite_where_features_are_zero():
    network = LPIPSNetwork()
    for stage in network.stages:
        for conv in stage:
            torch.nn.init.constant_(conv.bias, -1e3)  # every ReLU is shut
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(images, torch.ones(1, 3, 16, 16)).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_unfitting_images_are_refused(network):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        network(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="16 pixels or more"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_wrong_files_are_refused(originals, tmp_path):
    vgg, heads = originals
    with pytest.raises(ValueError, match="no 'lin0.model.1.weight'.*convert_metric_weights.py lpips"):
        convert_lpips(vgg, {})
    with pytest.raises(ValueError, match="no 'features.0.weight'"):
        convert_lpips({}, heads)
    with pytest.raises(ValueError, match="wrong weights"):
        convert_lpips(vgg, heads | {"lin2.model.1.weight": torch.zeros(1, 7, 1, 1)})
    write_weights({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="31 tensors are missing"):
        load_lpips(str(tmp_path))
    with pytest.raises(ValueError, match="LPIPS needs weights. LPIPS weights: take torchvision's vgg16"):
        load_lpips(None)
