"""Reads checkpoints of the original code as plain data: no code in the file is ever run.

torch's restricted unpickler (``weights_only=True``) takes tensors and plain containers; the two other classes that
the original's files hold, ``argparse.Namespace`` and ``config_util.Config``, are read as bags of attributes. Weights
stay in the file, mapped into memory, until each is converted.
"""

import argparse
import logging
import pickletools
import re
import reprlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

logger = logging.getLogger(__name__)

WEIGHT_KEYS = ("ema", "model", "module", "state_dict")  # where the weights are, in order of preference
PREFIXES = ("module.", "_orig_mod.")  # left by DDP and torch.compile
UNUSED_BUFFERS = ("codebook_used", "wavelets", "_arange")
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint cannot be read or converted; the message says what is wrong with which file."""


class _Config:
    """Stands in for the original's ``config_util.Config``, whose one attribute ``_data`` is a dictionary."""


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        weights: tensors by their original names, without prefixes; memory-mapped where the format allows.
        config: the tokenizer's configuration in the original's names, empty where the file has none.
        args: numbers and words among the training arguments, empty where the file has none.
        dropped: names of what is in the file and not used.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    args: dict[str, Any]
    dropped: list[str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of the original code: ``.pt`` in all its variants, or bare weights in safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a damaged file, a file that is no checkpoint, or one that holds anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    pickled = path.suffix != ".safetensors"
    if pickled:
        content = _unpickle(path)
    else:
        content = _read_safetensors(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    found, dropped = _find_weights(content)
    weights: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        name = _plain_name(text(key))
        if not isinstance(value, torch.Tensor) or name.rpartition(".")[2] in UNUSED_BUFFERS:
            dropped.append(name)
            continue
        if name in weights:
            raise CheckpointError(f"{path} has two tensors for {name}, with and without a prefix.")
        _check_tensor(path, name, value)
        weights[name] = value
    if not weights:
        raise CheckpointError(f"{path} holds no weights; its entries: {_listing(content)}.")
    if pickled and zipfile.is_zipfile(path):
        _check_sizes(path, weights)
    args = {text(name): value for name, value in _attributes(content.get("args")).items() if _is_plain(value)}
    return Checkpoint(path, weights, _config(content, path), args, dropped)


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Reject what is not a dense tensor of floats, and a tensor that is larger than its stored data."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    if not dense or tensor.dtype not in FLOAT_TYPES:
        raise CheckpointError(f"{path}: {name} is not a dense floating-point tensor ({tensor.dtype}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name} of shape {tuple(tensor.shape)} repeats a smaller tensor.")


def _check_sizes(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare the storages of mapped tensors with the archive's entries: torch would read past the end of an entry."""
    storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in weights.values() if tensor.numel()}
    storages = {storage.data_ptr(): storage for storage in storages.values()}
    with zipfile.ZipFile(path) as archive:
        stored = Counter(entry.file_size for entry in archive.infolist())
    if Counter(storage.nbytes() for storage in storages.values()) - stored:
        raise CheckpointError(f"{path} is damaged: the sizes of its tensors and of the stored data disagree.")


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or damaged: {error}") from error


# what the pickles of plain checkpoints name. Only for messages: what is allowed is decided by torch's own list
_PLAIN = ("torch.", "collections.OrderedDict", "_codecs.encode", "argparse.Namespace", "config_util.Config")
_NO_CHECKSUMS = "%s was written without checksums: whether it is intact cannot be known."


def _unpickle(path: Path) -> Any:
    # a torch file is a zip archive; those from before torch 1.6 are not, and can neither be mapped nor checked
    archive = zipfile.is_zipfile(path)
    mappable = archive and _check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (_Config, "config_util.Config")]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # untrusted bytes: the unpickler and the archive reader raise all kinds
        raise CheckpointError(f"{path} is refused: {_refusal(error, path)}.") from error
    if not archive:
        logger.warning(_NO_CHECKSUMS, path)
    return content


def _refusal(error: Exception, path: Path) -> str:
    """What torch found wrong with a file."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    foreign = [named[1]] if named else _foreign_names(path)
    if foreign:
        return (
            f"it wants to run or build {foreign[0]}, and a checkpoint holds only tensors, plain containers, "
            "argparse.Namespace and config_util.Config"
        )
    reason = type(error).__name__
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.search(r"(.+)", text)
    if detail:
        reason += f": {detail[1].strip()[:200]}"
    if "operand" in reason:  # pickle protocols other than 2 and 3
        reason += "; if it is whole, load it where it was made and save it with torch.save's defaults"
    return f"not a torch checkpoint of plain data, or damaged ({reason})"


def _foreign_names(path: Path) -> list[str]:
    """Functions and classes that a pickle names and a checkpoint does not need, read without running it.

    torch names them in its error, but only for protocols 2 and 3: it stops at the first byte of others.
    """
    names: list[str] = []
    texts: list[str] = [""]  # strings pushed so far
    memo: list[str] = []  # protocol 4 and later: the last string when something was memoized
    try:
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                file = stack.enter_context(archive.open(entry))
            for _ in range(5):  # files from before torch 1.6 are five pickles, then data
                argument: Any
                for operation, argument, _ in pickletools.genops(file):
                    match operation.name:
                        case "GLOBAL" | "INST":
                            names.append(argument.replace(" ", "."))
                        case "STACK_GLOBAL":
                            names.append(".".join(texts[-2:]))
                        case "MEMOIZE":
                            memo.append(texts[-1])
                        case "BINGET" | "LONG_BINGET" if argument < len(memo):
                            texts.append(memo[argument])
                        case _ if isinstance(argument, str):
                            texts.append(argument)
    except Exception as error:  # the end, or untrusted bytes; what was found before counts
        logger.debug("%s: %s", path, error)
    readable = (text(name) for name in names if name.replace(".", "_").isidentifier())
    return [name for name in readable if not name.startswith(_PLAIN)]


def _check_archive(path: Path) -> bool:
    """Compare every entry with its checksum: torch does not, and a flipped bit in a weight would go unnoticed.

    Returns:
        Whether its data can be memory-mapped: it can if nothing is compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            has_checksums = any(entry.CRC for entry in entries)
            damaged = None
            if has_checksums:
                damaged = archive.testzip()
    except Exception as error:  # zipfile raises several kinds for a damaged directory
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} in it does not match its checksum.")
    names = Counter(entry.filename for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:  # readers differ in which of them they use
        raise CheckpointError(f"{path} is damaged: it holds {twice[0]} more than once.")
    if not has_checksums:
        logger.warning(_NO_CHECKSUMS, path)
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _find_weights(content: dict) -> tuple[dict, list[str]]:
    """The dictionary of weights, wherever it is in the file, and the names of the other entries."""
    others: list[str] = []
    for _ in WEIGHT_KEYS:  # wrappers may be nested, each kind once
        inner = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict) and content[key]), None)
        if inner is None:
            break
        others += [text(name) for name in content if name not in (inner, "args", "config")]
        content = content[inner]
    return content, others


def text(name: Any) -> str:
    """A name as text of bounded length: a file can hold keys of any type."""
    if isinstance(name, str):
        return name[:200]
    return reprlib.repr(name)


def _plain_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return dict(getattr(value, "__dict__", {}))


def _config(content: dict, path: Path) -> dict[str, Any]:
    config = _attributes(content.get("config"))
    config = config.get("_data", config)
    if isinstance(config, dict):
        config = config.get("model", config)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its configuration is a {type(config).__name__}, not a dictionary.")
    return config


def _listing(names: Iterable, limit: int = 8) -> str:
    names = [text(name) for name in names]
    if not names:
        return "none"
    listing = ", ".join(names[:limit])
    if len(names) > limit:
        listing += f" and {len(names) - limit} more"
    return listing


def layer_count(weights: Mapping[str, torch.Tensor], stem: str) -> int:
    """How many layers ``stem.N`` have weights; if they do not count up from 0, `check_weights` says so."""
    pattern = re.compile(re.escape(stem) + r"\.(\d+)\.")
    return len({match[1] for name in weights if (match := pattern.match(name))})


def require(checkpoint: Checkpoint, kind: str, shapes: Mapping[str, int]) -> None:
    """Check that tensors from whose shapes the configuration is read are there, with that many axes.

    Raises:
        CheckpointError: that names those missing.
    """
    missing = [name for name in shapes if name not in checkpoint.weights]
    if missing:
        has = _listing(checkpoint.weights)
        raise CheckpointError(f"{checkpoint.path} is no {kind}: it lacks {_listing(missing)}. It has {has}.")
    for name, axes in shapes.items():
        if checkpoint.weights[name].ndim != axes:
            shape = tuple(checkpoint.weights[name].shape)
            raise CheckpointError(f"{checkpoint.path}: {name} must have {axes} axes, got shape {shape}.")


def convert(
    checkpoint: Checkpoint,
    build: Callable[[], Model],
    to_original: Callable[[Model], Mapping[str, torch.Tensor]],
    from_original: Callable[[Model], Iterable[tuple[str, torch.Tensor]]],
) -> Model:
    """Build a model from its options, compare it with the checkpoint, and give it the weights.

    Args:
        build: makes the model; called in a context in which parameters get no memory.
        to_original: names and shapes that a model needs from a checkpoint.
        from_original: the model's tensors from the checkpoint's, by our names.

    Raises:
        CheckpointError: for options that make no model and weights that do not fit it.
    """
    try:
        model = without_weights(build)
        expected = to_original(model)
    except Exception as error:  # untrusted options: the libraries raise all kinds of errors for impossible ones
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    check_weights(checkpoint, expected)
    fill(model, from_original(model))
    if checkpoint.dropped:
        logger.info("%s: dropped %s", checkpoint.path, ", ".join(checkpoint.dropped))
    return model


def check_weights(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes with those of a model in the original's form.

    Raises:
        CheckpointError: that names missing and unknown tensors, or shapes that disagree with the configuration.
    """
    missing = [name for name in expected if name not in checkpoint.weights]
    unknown = [name for name in checkpoint.weights if name not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its configuration; missing: {_listing(missing)}; "
            f"unknown: {_listing(unknown)}."
        )
    for name, tensor in expected.items():
        found = checkpoint.weights[name]
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has the shape {tuple(found.shape)}, "
                f"the configuration asks for {tuple(tensor.shape)}."
            )
        if not torch.isfinite(found.float()).all():
            raise CheckpointError(f"{checkpoint.path}: {name} holds values that are not finite.")


def without_weights(build: Callable[[], Model]) -> Model:
    """A model whose parameters have shapes but no memory yet; its buffers are allocated."""
    with init_empty_weights(include_buffers=False):
        return build()


def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give a model of `without_weights` its parameters, one at a time, in float32."""
    for name, tensor in tensors:
        value = tensor.to(torch.float32, copy=True).contiguous()
        set_module_tensor_to_device(model, name, "cpu", value=value, clear_cache=False)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"no weights for {_listing(left)}")
    model.eval()
