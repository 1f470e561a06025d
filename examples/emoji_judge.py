"""A judge of drawn emoji: two small networks that learn from real drawings which one an image is of, and its style.

    python examples/emoji_judge.py --dataset_name outputs/emoji/data --output_dir outputs/emoji/judge    # 20 minutes

For the first, each training drawing is seen twice, shifted, scaled, recoloured, blurred and with noise in two random
ways; the two must be closer to each other than to all other drawings of the batch (the contrastive loss of SimCLR,
arXiv 2002.05709). The second looks at colours and edges, wherever they are, since styles differ in these. Generated
images are never seen. Prints, for the validation drawings, how often the judge finds the drawing that a changed copy
was made of, and how often it names their style.
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

SIZE = 48  # pixels per side that the judge sees
SMALL = 32  # and that are enough to tell drawings apart
EMBEDDING = 128
TEMPERATURE = 0.1
BATCH = 128
ADVICE = "Train it by `python examples/emoji_judge.py`."


def halving(channels: int, width: int) -> list[nn.Module]:
    """A convolution, at half the size."""
    return [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.MaxPool2d(2)]


def trunk(*widths: int) -> nn.Sequential:
    """Images ``(B, 3, H, W)`` to features ``(B, widths[-1], H / 2**n, W / 2**n)``."""
    layers = [halving(channels, width) for channels, width in zip((3, *widths), widths, strict=False)]
    return nn.Sequential(*(layer for part in layers for layer in part))


class Judge(nn.Module):
    """Images ``(B, 3, H, W)`` in [-1, 1] to embeddings ``(B, 128)`` of length one, and to logits of their styles."""

    def __init__(self, num_styles: int):
        super().__init__()
        self.embed = nn.Sequential(
            trunk(32, 64, 128, 256), nn.Flatten(), nn.Linear(256 * (SMALL // 16) ** 2, EMBEDDING)
        )
        self.style = nn.Sequential(
            trunk(24, 48, 96, 128), nn.Conv2d(128, 128, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.style_head = nn.Linear(128, num_styles)

    def embeddings(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.embed(F.adaptive_avg_pool2d(images.clamp(-1, 1), SMALL)), dim=-1)

    def style_logits(self, images: torch.Tensor) -> torch.Tensor:
        features = self.style(F.adaptive_avg_pool2d(images.clamp(-1, 1), SIZE))
        return self.style_head(F.dropout(features, 0.3, self.training))

    @torch.no_grad()
    def judge(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``(n, 128)`` and styles ``(n,)`` of any number of images."""
        batches = images.split(BATCH)
        embeddings = torch.cat([self.embeddings(batch) for batch in batches])
        styles = torch.cat([self.style_logits(batch).argmax(-1) for batch in batches])
        return embeddings, styles


class Split(NamedTuple):
    """Drawings ``(n, 3, H, W)`` in [-1, 1], the numbers ``(n,)`` of their styles, captions and names."""

    images: torch.Tensor
    styles: torch.Tensor
    captions: list[str]
    names: list[str]

    def take(self, indices: torch.Tensor) -> "Split":
        captions, names = ([texts[index] for index in indices] for texts in (self.captions, self.names))
        return Split(self.images[indices], self.styles[indices], captions, names)


def load_split(name: str, split: str, size: int) -> Split:
    """A split of the data set that emoji_dataset.py makes, of ``size`` pixels per side."""
    samples = ImageSamples(load_images(name, split, label_column="style"), ImageTransform((size, size)))
    captions, names = (
        list(load_images(name, split, caption_column=column)["caption"]) for column in ("caption", "name")
    )
    return Split(samples.stack(range(len(samples))), torch.tensor(samples.labels), captions, names)


def move(images: torch.Tensor, scale: tuple[float, float], shift: float, mirror: bool = False) -> torch.Tensor:
    """Each image a little moved and scaled, and half of them mirrored; what comes in from outside is white."""
    count = len(images)
    scales = torch.empty(count, 1).uniform_(*scale)
    sides = torch.ones(count, 1)
    if mirror:
        sides = torch.randint(2, (count, 1)) * 2.0 - 1
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0:1] = scales * sides
    matrix[:, 1, 1:2] = scales
    matrix[:, :, 2].uniform_(-shift, shift)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def blur(images: torch.Tensor, most: float) -> torch.Tensor:
    """Each image a little blurred."""
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images.lerp(blurred, torch.rand(len(images), 1, 1, 1) * most)


def augment_drawing(images: torch.Tensor) -> torch.Tensor:
    """Other images of the same drawings."""
    count = len(images)
    moved = blur(move(images, (0.85, 1.2), 0.12), 1.0)
    gain = torch.empty(count, 3, 1, 1).uniform_(0.8, 1.2)
    return moved * gain + torch.randn_like(moved) * torch.rand(count, 1, 1, 1) * 0.2


def augment_style(images: torch.Tensor) -> torch.Tensor:
    """Other images of the same styles, which keep their colours almost."""
    count = len(images)
    moved = blur(move(images, (0.9, 1.1), 0.1, mirror=True), 0.7)
    tint = torch.randn(count, 3, 1, 1) * 0.02
    return moved + tint + torch.randn_like(moved) * torch.rand(count, 1, 1, 1) * 0.05


def contrastive_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Each embedding must be closest to that of the same drawing's other copy, among all copies of the batch."""
    embeddings = torch.cat([first, second])
    similarity = embeddings @ embeddings.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    count = len(first)
    other = torch.arange(2 * count).roll(count)
    return F.cross_entropy(similarity, other)


def drawing_loss(judge: Judge, batch: Split) -> torch.Tensor:
    small = F.adaptive_avg_pool2d(batch.images, SMALL)
    return contrastive_loss(judge.embeddings(augment_drawing(small)), judge.embeddings(augment_drawing(small)))


def style_loss(judge: Judge, batch: Split) -> torch.Tensor:
    return F.cross_entropy(judge.style_logits(augment_style(batch.images)), batch.styles)


def train(drawings: Split, steps: int, seed: int) -> Judge:
    """A judge of drawings of 48×48 pixels; each of its two networks is trained for ``steps`` steps."""
    torch.manual_seed(seed)
    judge = Judge(int(drawings.styles.max()) + 1)
    for name, loss_of in (("drawings", drawing_loss), ("styles", style_loss)):
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for step in range(1, steps + 1):
            batch = drawings.take(torch.randperm(len(drawings.captions))[:BATCH])
            loss = loss_of(judge, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(f"{name}, step {step} of {steps}: loss {loss.item():.3f}", flush=True)
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
    if "style_head.bias" not in weights:
        raise ValueError(f"{folder} holds no judge. {ADVICE}")
    judge = Judge(len(weights["style_head.bias"]))
    load_exactly(judge, weights, str(folder), ADVICE)
    return judge.eval()


@command("emoji_judge.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="outputs/emoji/data", help="made by emoji_dataset.py")
    parser.add_argument("--output_dir", type=path_option, default="outputs/emoji/judge")
    parser.add_argument("--steps", type=positive_option, default=1_500, help="of each network")
    parser.add_argument("--seed", type=seed_option, default=0)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    drawings = load_split(args.dataset_name, "train", SIZE)
    judge = train(drawings, args.steps, args.seed)
    held_out = load_split(args.dataset_name, "validation", SIZE)
    embeddings, styles = judge.judge(held_out.images)
    copies, _ = judge.judge(augment_drawing(held_out.images))
    found = (ranks(copies, embeddings) == 0).double().mean()
    right = (styles == held_out.styles).double().mean()
    with writing(args.output_dir):
        digest = save(judge, args.output_dir)
    print(f"{args.output_dir}: changed copies found among {len(styles)}: {found:.3f}, styles right: {right:.3f}")
    print(f"hash {digest}")


if __name__ == "__main__":
    main()
