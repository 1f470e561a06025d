"""Weights of measuring networks: where they come from, and what identifies them. Nothing is downloaded unasked."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..utils.fingerprint import weights_fingerprint

DEFAULT_FILE = "model.safetensors"


def find_weights(source: str) -> Path:
    """The safetensors file that ``source`` stands for.

    Args:
        source: a file, a folder with a model.safetensors, or a Hub repository ``owner/name`` or ``owner/name:file``,
            which is downloaded, being asked for by name.

    Raises:
        ValueError: where there is no such file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / DEFAULT_FILE
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file: convert it with examples/convert_metric_weights.py.")
        return path
    repository, _, name = source.partition(":")
    if repository.endswith(".safetensors") or repository.count("/") != 1:
        raise ValueError(f"no such file: {path}.")
    try:
        return Path(hf_hub_download(repository, name or DEFAULT_FILE))
    except (OSError, HFValidationError) as error:  # every error of the Hub and of the network is an OSError
        raise ValueError(f"{source} is neither a file nor a repository that can be read: {error}") from error


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """Tensors of the file that ``source`` stands for, see `find_weights`.

    Raises:
        ValueError: where there is no such file, or it is damaged.
    """
    path = find_weights(source)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def read_original(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of somebody else's checkpoint, a safetensors file or a pickled state dict; no code of it is run.

    Raises:
        ValueError: if it is not a plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}.")
    if path.suffix == ".safetensors":
        return read_weights(str(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of another format mean to the unpickler
        raise ValueError(f"{path} is no state dict that can be read without running its code: {error}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} holds something else than tensors by name.")
    return dict(content)


def write_weights(state: Mapping[str, torch.Tensor], path: str | Path) -> str:
    """Save tensors under a temporary name, then rename; returns their `weights_fingerprint`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    os.replace(temporary, path)
    return weights_fingerprint(state)


def check_hash(actual: str, expected: str | None, source: str) -> None:
    """Raise a ValueError unless the hash starts with the expected one (8 or more characters)."""
    if expected is None:
        return
    if len(expected) < 8 or not actual.startswith(expected.lower()):
        raise ValueError(f"wrong weights: {source} has the hash {actual}, expected {expected} (8 characters or more).")


def load_exactly(network: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str, advice: str) -> None:
    """Load a state dict that must have exactly the network's names and shapes, and finite values.

    Raises:
        ValueError: that names what is missing, unknown or of another shape, and says how to get the right file.
    """
    wanted = network.state_dict()
    problems = []
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({missing[0]}, …)")
    if unknown:
        problems.append(f"{len(unknown)} are unknown ({unknown[0]}, …)")
    for name in sorted(wanted.keys() & state.keys()):
        if wanted[name].shape != state[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}")
            break
        if not torch.isfinite(state[name]).all():
            problems.append(f"{name} is not finite")
            break
    if problems:
        raise ValueError(f"wrong weights in {source}: {'; '.join(problems)}. {advice}")
    network.load_state_dict(dict(state))
