"""A small classifier of digits, whose inner features measure digits pipelines: Inception has never seen 8x8 pixels.

    python examples/digits_features.py --output_dir outputs/digits/features     # about ten seconds
    python examples/measure.py generation --features examples/digits_features.py:load \\
        --features_weights outputs/digits/features ...
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dar_hf.data import ImageSamples, ImageTransform, load_images
from dar_hf.metrics import ImageFeatures, label_agreement
from dar_hf.metrics.weights import load_exactly, read_weights, write_weights
from dar_hf.utils.commands import check_output, command, path_option, positive_option, seed_option, writing

SIZE = 8
ADVICE = "Train it by `python examples/digits_features.py`."


class DigitsClassifier(nn.Module):
    """Two convolutions and a hidden layer; uint8 images ``(B, 3, 8, 8)`` to 32 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        x = F.silu(self.conv1(x))
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        pool = F.silu(self.hidden(x.flatten(1)))
        return ImageFeatures(pool=pool, spatial=x[:, :4].flatten(1), logits=self.head(pool))


def load(weights: str | None) -> DigitsClassifier:
    """The trained classifier, for ``--features examples/digits_features.py:load``."""
    if weights is None:
        raise ValueError(f"the digits classifier needs features_weights. {ADVICE}")
    network = DigitsClassifier()
    load_exactly(network, read_weights(weights), weights, ADVICE)
    return network


def load_split(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images ``(n, 3, 8, 8)`` and labels."""
    samples = ImageSamples(load_images("digits", split), ImageTransform((SIZE, SIZE)))
    pixels = samples.stack(range(len(samples)))
    return ((pixels + 1) * 127.5).round().to(torch.uint8), torch.tensor(samples.labels)


def train(steps: int, seed: int) -> tuple[DigitsClassifier, float]:
    """A classifier of the training digits, and its accuracy on the test digits."""
    torch.manual_seed(seed)
    network = DigitsClassifier()
    images, labels = load_split("train")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(network(images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    test_images, test_labels = load_split("test")
    with torch.no_grad():
        return network, label_agreement(network(test_images).logits, test_labels)


@command("digits_features.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=path_option, default="outputs/digits/features")
    parser.add_argument("--steps", type=positive_option, default=1_500)
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    network, accuracy = train(args.steps, args.seed)
    path = args.output_dir / "model.safetensors"
    with writing(path):
        digest = write_weights(network.state_dict(), path)
    print(f"{path}: accuracy on the test digits {accuracy:.3f}, hash {digest}")


if __name__ == "__main__":
    main()
