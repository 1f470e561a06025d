"""A small classifier, whose inner features measure pipelines of small images, which Inception has never seen.

    python examples/small_features.py --output_dir outputs/digits/features     # digits of 8x8: about ten seconds
    python examples/small_features.py --dataset_name path/to/mnist --size 32 --output_dir outputs/mnist/features
    python examples/measure.py generation --features examples/small_features.py:load \\
        --features_weights outputs/digits/features ...

It is trained on the labels of the split train, and reads those of the split test to say how good it is.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dar_hf.data import ImageSamples, ImageTransform, load_images
from dar_hf.evaluation import to_uint8
from dar_hf.metrics import ImageFeatures, label_agreement
from dar_hf.metrics.weights import load_exactly, read_weights, write_weights
from dar_hf.utils.commands import check_output, command, path_option, positive_option, seed_option, writing

WIDTH = 64
FEATURES = 32
ADVICE = "Train it by `python examples/small_features.py`."


class SmallClassifier(nn.Module):
    """uint8 images ``(B, 3, size, size)`` to 32 features and logits of the classes: a convolution for each halving of
    the size down to 4, one before them, and a hidden layer.

    Args:
        size: pixels per side, 8 or more.
        channels: 1 to look at the mean of the colours.
    """

    def __init__(self, size: int, channels: int, num_classes: int):
        super().__init__()
        halvings = (size // 4).bit_length() - 1
        if size != 4 << halvings or halvings < 1:
            raise ValueError(f"the classifier sees images of 8, 16, 32, … pixels per side, not {size}.")
        self.size = size
        self.channels = channels
        self.first = nn.Conv2d(channels, 32, 3, padding=1)
        widths = [32] + [WIDTH] * halvings
        self.halving = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.hidden = nn.Linear(WIDTH * 16, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(f"the classifier sees {self.size}x{self.size} images, not {tuple(images.shape[-2:])}.")
        x = images.float() / 127.5 - 1
        if self.channels == 1:
            x = x.mean(dim=1, keepdim=True)
        x = F.silu(self.first(x))
        for convolution in self.halving:
            x = F.max_pool2d(F.silu(convolution(x)), 2)
        pool = F.silu(self.hidden(x.flatten(1)))
        return ImageFeatures(pool=pool, spatial=x[:, :4].flatten(1), logits=self.head(pool))


def load(weights: str | None) -> SmallClassifier:
    """The trained classifier, for ``--features examples/small_features.py:load``."""
    if weights is None:
        raise ValueError(f"the small classifier needs features_weights. {ADVICE}")
    state = read_weights(weights)
    try:
        size = 4 << sum(name.startswith("halving.") and name.endswith(".bias") for name in state)
        network = SmallClassifier(size, state["first.weight"].shape[1], len(state["head.bias"]))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{weights} holds no small classifier. {ADVICE}") from error
    load_exactly(network, state, weights, ADVICE)
    return network


def load_split(name: str, split: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images ``(n, 3, size, size)`` and labels."""
    samples = ImageSamples(load_images(name, split), ImageTransform((size, size)))
    return to_uint8(samples.stack(range(len(samples)))), torch.tensor(samples.labels)


def train(network: SmallClassifier, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(network(images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@command("small_features.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="digits", help="digits, a folder, a parquet file or a Hub id")
    parser.add_argument("--size", type=positive_option, default=8, help="pixels per side: 8, 16, 32, …")
    parser.add_argument("--output_dir", type=path_option, default="outputs/digits/features")
    parser.add_argument("--steps", type=positive_option, default=1_500)
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    images, labels = load_split(args.dataset_name, "train", args.size)
    test_images, test_labels = load_split(args.dataset_name, "test", args.size)
    channels = 3
    if (images == images[:, :1]).all():  # grey
        channels = 1
    torch.manual_seed(args.seed)
    network = SmallClassifier(args.size, channels, int(labels.max()) + 1)
    train(network, images, labels, args.steps)
    with torch.no_grad():
        logits = torch.cat([network(batch).logits for batch in test_images.split(1_000)])
    accuracy = label_agreement(logits, test_labels)
    path = args.output_dir / "model.safetensors"
    with writing(path):
        digest = write_weights(network.state_dict(), path)
    print(f"{path}: accuracy on the test images {accuracy:.3f}, hash {digest}")


if __name__ == "__main__":
    main()
