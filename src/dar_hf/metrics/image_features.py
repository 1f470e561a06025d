"""What feature networks return."""

from dataclasses import dataclass

import torch


@dataclass
class ImageFeatures:
    """What a network says about images.

    Attributes:
        pool: ``(B, D)``, for FID, precision and recall.
        spatial: ``(B, S)`` with places kept, for sFID, or None.
        logits: ``(B, classes)`` of a classifier, for the Inception score and label agreement, or None.
    """

    pool: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """Names and tensors of what there is."""
        found = (("pool", self.pool), ("spatial", self.spatial), ("logits", self.logits))
        return [(name, tensor) for name, tensor in found if tensor is not None]
