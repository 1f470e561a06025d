"""A judge of drawn emoji: a small network that learns, from real drawings alone, which images are of the same drawing.

    python examples/emoji_judge.py --dataset_name outputs/emoji/data --output_dir outputs/emoji/judge    # ten minutes

Each training drawing is seen twice, shifted, scaled, recoloured, blurred and with noise in two random ways; the two
must be closer to each other than to all other drawings of the batch (the contrastive loss of SimCLR, arXiv
2002.05709). A second output names the style. Generated images are never seen. Prints, for the validation drawings, how
often the judge finds the drawing that a changed copy was made of, and how often it names their style.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dar_hf.data import ImageSamples, ImageTransform, load_images
from dar_hf.metrics.weights import load_exactly, read_weights, write_weights
from dar_hf.utils.commands import check_output, command, path_option, positive_option, seed_option, writing

SIZE = 32  # pixels per side that the judge sees
EMBEDDING = 128
TEMPERATURE = 0.1
BATCH = 128


class Judge(nn.Module):
    """Images ``(B, 3, H, W)`` in [-1, 1] to embeddings ``(B, 128)`` of length one, and logits of their styles."""

    def __init__(self, num_styles: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 128, 256):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.MaxPool2d(2)]
            channels = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = channels * (SIZE // 16) ** 2
        self.embed = nn.Linear(features, EMBEDDING)
        self.style = nn.Linear(features, num_styles)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(F.adaptive_avg_pool2d(images.clamp(-1, 1), SIZE))
        return F.normalize(self.embed(features), dim=-1), self.style(features)

    @torch.no_grad()
    def judge(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``(n, 128)`` and styles ``(n,)`` of any number of images."""
        outputs = [self(batch) for batch in images.split(BATCH)]
        embeddings, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return embeddings, logits.argmax(-1)


class Split(NamedTuple):
    """Drawings ``(n, 3, H, W)`` in [-1, 1], their captions and the numbers ``(n,)`` of their styles."""

    images: torch.Tensor
    captions: list[str]
    styles: torch.Tensor

    def take(self, indices: torch.Tensor) -> "Split":
        return Split(self.images[indices], [self.captions[index] for index in indices], self.styles[indices])


def load_split(name: str, split: str, size: int) -> Split:
    """A split of the data set that emoji_dataset.py makes, of ``size`` pixels per side."""
    samples = ImageSamples(load_images(name, split, label_column="style"), ImageTransform((size, size)))
    captions = load_images(name, split, caption_column="caption")["caption"]
    return Split(samples.stack(range(len(samples))), list(captions), torch.tensor(samples.labels))


def change(images: torch.Tensor) -> torch.Tensor:
    """Each image a little moved, scaled, recoloured and blurred, with a little noise."""
    count = len(images)
    scale = torch.empty(count, 1).uniform_(0.85, 1.2)
    move = torch.zeros(count, 2, 3)
    move[:, 0, 0:1] = scale
    move[:, 1, 1:2] = scale
    move[:, :, 2].uniform_(-0.12, 0.12)
    grid = F.affine_grid(move, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in from outside is white
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(count, 1, 1, 1)
    gain = torch.empty(count, 3, 1, 1).uniform_(0.8, 1.2)
    noise = torch.randn_like(moved) * torch.rand(count, 1, 1, 1) * 0.2
    return moved.lerp(blurred, share) * gain + noise


def contrastive_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Each embedding must be closest to that of the same drawing's other copy, among all copies of the batch."""
    embeddings = torch.cat([first, second])
    similarity = embeddings @ embeddings.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    count = len(first)
    other = torch.arange(2 * count).roll(count)
    return F.cross_entropy(similarity, other)


def train(images: torch.Tensor, styles: torch.Tensor, steps: int, seed: int) -> Judge:
    """A judge of the images ``(n, 3, 32, 32)``."""
    torch.manual_seed(seed)
    judge = Judge(int(styles.max()) + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(1, steps + 1):
        batch = torch.randperm(len(images))[:BATCH]
        first, first_style = judge(change(images[batch]))
        second, second_style = judge(change(images[batch]))
        loss = contrastive_loss(first, second)
        loss += F.cross_entropy(torch.cat([first_style, second_style]), styles[batch].repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return judge.eval()


def ranks(queries: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
    """How many drawings are nearer to query i than drawing i, ``(n,)``; 0 where the right one is the nearest."""
    similarity = queries @ drawings.T
    return (similarity > similarity.diagonal()[:, None]).sum(-1)


def save(judge: Judge, folder: Path) -> str:
    """Write model.safetensors; returns its hash."""
    return write_weights(judge.state_dict(), folder / "model.safetensors")


def load(folder: Path) -> Judge:
    """A judge that `save` wrote.

    Raises:
        OSError, ValueError: if there is none.
    """
    weights = read_weights(str(folder))
    judge = Judge(len(weights["style.bias"]))
    load_exactly(judge, weights, str(folder), "Train it by `python examples/emoji_judge.py`.")
    return judge.eval()


@command("emoji_judge.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="outputs/emoji/data", help="made by emoji_dataset.py")
    parser.add_argument("--output_dir", type=path_option, default="outputs/emoji/judge")
    parser.add_argument("--steps", type=positive_option, default=2_000)
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    drawings = load_split(args.dataset_name, "train", SIZE)
    judge = train(drawings.images, drawings.styles, args.steps, args.seed)
    held_out = load_split(args.dataset_name, "validation", SIZE)
    embeddings, styles = judge.judge(held_out.images)
    copies, _ = judge.judge(change(held_out.images))
    found = (ranks(copies, embeddings) == 0).double().mean()
    right = (styles == held_out.styles).double().mean()
    with writing(args.output_dir):
        digest = save(judge, args.output_dir)
    print(f"{args.output_dir}: changed copies found among {len(styles)}: {found:.3f}, styles right: {right:.3f}")
    print(f"hash {digest}")


if __name__ == "__main__":
    main()
