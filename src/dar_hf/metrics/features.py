"""Networks that turn images into the features that sets are compared by: Inception, transformers models, any module.

A distance means nothing without its network: every extractor knows its name and the hash of its weights, and the
report holds both.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..utils.fingerprint import weights_fingerprint
from .image_features import ImageFeatures
from .inception import load_inception
from .weights import check_hash

INCEPTION = "inception"


class FeatureExtractor:
    """A frozen network with a name, the hash of its weights, and checks on what it returns.

    Args:
        network: takes uint8 images ``(B, 3, H, W)``; returns `ImageFeatures`, a tensor ``(B, D)``, or a mapping with
            ``pool`` and perhaps ``spatial`` and ``logits``.
        name: how reports call it.
        source: where its weights came from, for the report.
        expected_hash: first 8 or more characters that the hash of its weights must have.
        device: where it runs.

    Raises:
        ValueError: for other weights than expected.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        source: str | None = None,
        expected_hash: str | None = None,
        device: torch.device | str = "cpu",
    ):
        self.name = name
        self.source = source
        self.weights_hash = weights_fingerprint(network.state_dict())
        named = f"{name} ({source})" if source else name
        check_hash(self.weights_hash, expected_hash, named)
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @property
    def identity(self) -> str:
        """Name and weights in one line: statistics of different identities must not be compared."""
        return f"{self.name} {self.weights_hash}"

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"name": self.name, "weights": self.source, "weights_hash": self.weights_hash}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> ImageFeatures:
        """Features of uint8 images ``(B, 3, H, W)``, float32 on the host.

        Raises:
            ValueError: for other images, or features that are not finite or not one row per image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(
                f"features are of uint8 images (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}."
            )
        output = self.network(images.to(self.device))
        if isinstance(output, torch.Tensor):
            output = ImageFeatures(output)
        elif isinstance(output, Mapping):
            output = ImageFeatures(output["pool"], output.get("spatial"), output.get("logits"))
        elif not isinstance(output, ImageFeatures):
            raise ValueError(f"{self.name} returned a {type(output).__name__}, not features.")
        for name, tensor in output.items():
            if tensor.ndim != 2 or len(tensor) != len(images):
                raise ValueError(
                    f"{self.name}: {name} must have the shape ({len(images)}, D), got {tuple(tensor.shape)}."
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.name} returned {name} features that are not finite.")
        return ImageFeatures(**{name: tensor.float().cpu() for name, tensor in output.items()})


class TransformersFeatures(nn.Module):
    """A vision model of transformers on images prepared by its own image processor.

    The features are its pooled output where it has one, else the mean over its last hidden states.

    Args:
        name: Hub id or folder.
    """

    def __init__(self, name: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.model = AutoModel.from_pretrained(name)
        self.model = getattr(self.model, "vision_model", self.model)  # CLIP and its like have a text model too
        self.processor = AutoImageProcessor.from_pretrained(name, backend="pil")

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        arrays: list[np.ndarray] = list(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")
        output = self.model(inputs["pixel_values"].to(images.device, self.model.dtype))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            hidden = output.last_hidden_state
            pooled = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
        return ImageFeatures(pooled.flatten(1))


def load_feature_extractor(
    features: str,
    weights: str | None = None,
    expected_hash: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """The extractor that a name stands for.

    Args:
        features: "inception"; ``path/to/file.py:name`` or ``package.module:name`` for something that, called with
            ``weights``, gives a module as `FeatureExtractor` takes it; or a transformers id or folder.
        weights: safetensors file, folder or Hub repository; needed for "inception", passed on to a module.
        expected_hash: see `FeatureExtractor`.
        device: where it runs.

    Raises:
        ValueError: for an unknown name, missing or wrong weights.
    """
    if features == INCEPTION:
        return FeatureExtractor(load_inception(weights), INCEPTION, weights, expected_hash, device)
    if ":" in features:
        network = _find_callable(features)(weights)
        if not isinstance(network, nn.Module):
            raise ValueError(f"{features} gave a {type(network).__name__}, not a torch module.")
        return FeatureExtractor(network, features, weights, expected_hash, device)
    if weights is not None:
        raise ValueError(f"{features} brings its own weights: leave features_weights out.")
    try:
        network = TransformersFeatures(features)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"features {features!r} are neither inception, nor path/to/file.py:name, nor a transformers model with an "
            f"image processor: {error}"
        ) from error
    return FeatureExtractor(network, features, features, expected_hash, device)


def _find_callable(reference: str) -> Callable[[str | None], Any]:
    """What ``path/to/file.py:name`` or ``package.module:name`` names."""
    place, _, name = reference.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"cannot import features {reference!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"features {reference!r} are not callable.")
    return found


def _import_file(path: Path) -> ModuleType:
    name = f"dar_hf_features_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OSError(f"no such Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
