"""REPA: the denoiser's features are pulled towards those of a frozen image encoder (Yu et al., arXiv 2410.06940)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

IMAGE_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RepaTeacher(nn.Module):
    """Patch features of a frozen vision transformer, for images in [-1, 1].

    Args:
        encoder: a vision transformer of transformers, with ``pixel_values`` in and ``last_hidden_state`` out, whose
            patch tokens come last (DINOv2 with or without registers, ViT, SigLIP; of CLIP the vision part).

    Raises:
        ValueError: if the encoder is no vision transformer.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = getattr(encoder, "vision_model", encoder)
        patch = getattr(self.encoder.config, "patch_size", None)
        if not isinstance(patch, int):
            raise ValueError(f"REPA needs a vision transformer, got {type(encoder).__name__} without a patch_size.")
        self.rows = IMAGE_SIZE // patch
        self.dim: int = self.encoder.config.hidden_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Features ``(B, rows * columns, dim)`` on the given grid; the encoder's own is averaged or repeated to fit.

        Args:
            images: ``(B, 1 or 3, H, W)`` in [-1, 1]; resized bicubically to 224 pixels and
                normalized as for ImageNet.
            grid: (rows, columns).
        """
        images = (images.expand(-1, 3, -1, -1) * 0.5 + 0.5 - self.mean) / self.std
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
        patches = self.encoder(pixel_values=images).last_hidden_state[:, -(self.rows**2) :].float()
        if grid == (self.rows, self.rows):
            return patches
        square = patches.transpose(1, 2).unflatten(2, (self.rows, self.rows))
        return F.adaptive_avg_pool2d(square, grid).flatten(2).transpose(1, 2)


def load_teacher(source: str, dim: int | None) -> RepaTeacher:
    """The frozen encoder from a folder or Hub id.

    Args:
        source: the folder or Hub id.
        dim: width of the features that the tokenizer's REPA head gives; None where it has no head.

    Raises:
        ValueError: if it is not there, no vision transformer or of another width; says what to do.
    """
    if dim is None:
        raise ValueError("REPA needs a head: --model_overrides repa_layer=N (8 in v1), or --repa_weight 0.")
    try:
        encoder = AutoModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"REPA needs the image encoder {source!r}, which is neither a folder nor can be downloaded. Fetch it with "
            f"`hf download facebook/dinov2-base`, name a folder with --repa_model, or train without it: "
            f"--repa_weight 0. ({error})"
        ) from error
    teacher = RepaTeacher(encoder)
    if teacher.dim != dim:
        raise ValueError(
            f"{source} has features of width {teacher.dim}, the REPA head of {dim}: --model_overrides "
            f"repa_dim={teacher.dim}."
        )
    return teacher


def repa_sum(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``1 - cos`` of every row of ``(B, tokens, dim)``, averaged over rows, summed over images, in float32."""
    if features.shape != targets.shape:
        raise ValueError(f"REPA compares {tuple(features.shape)} with {tuple(targets.shape)}.")
    return (1 - F.cosine_similarity(features.float(), targets.float(), dim=-1)).mean(dim=1).sum()


def repa_grid(height: int, width: int, patch_size: int, num_rows: int) -> tuple[int, int]:
    """Rows and columns of the tokenizer's pooled features, as its REPA head has them."""
    stride = max(1, height // patch_size // num_rows)
    return height // patch_size // stride, width // patch_size // stride
