"""Saved weights: a save replaces an earlier one as a whole, and weights that do not fit their model are refused.

Shared by both models, whose files stand alone in self-contained repositories; so this imports no sibling.
"""

import errno
import functools
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open

# one component's weights by file name: a single file or shards with their index, of one variant, in either format
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model|adapter_model)"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?(?:\.(?P<older_variant>[^.]+))?"
    r"\.(?:safetensors|bin)(?:\.index(?:\.(?P<index_variant>[^.]+))?\.json)?"
)
_OWNERS = {"diffusion_pytorch_model": "diffusers", "adapter_model": "peft"}  # the other stems are transformers'
_NAMED = 4  # tensors that a message names


def stale_weights(there: Iterable[str], written: Collection[str]) -> list[str]:
    """Weights among the files ``there`` that the ``written`` ones replace, though under other names.

    A model has one set of weights for each variant: safetensors or .bin, one file or shards with their index. Loaders
    prefer one form to another whatever their age, and load an adapter on top of the model next to it.

    Args:
        there, written: paths below one folder, with forward slashes.
    """
    sets = {_weights_set(path) for path in written} - {None}
    folders_of_models = {folder for folder, owner, _ in filter(None, sets) if owner == "transformers"}
    return [
        path
        for path in there
        if path not in written and (_weights_set(path) in sets or _adapter_folder(path) in folders_of_models)
    ]


def _weights_set(path: str) -> tuple[str, str, str] | None:
    """Folder, library and variant of a weights file; None for another file."""
    pure = PurePosixPath(path)
    found = _WEIGHTS.fullmatch(pure.name)
    if found is None:
        return None
    variant = found["variant"] or found["older_variant"] or found["index_variant"] or ""
    return str(pure.parent), _OWNERS.get(found["stem"], "transformers"), variant


def _adapter_folder(path: str) -> str | None:
    """Folder of an adapter's file; None for another file."""
    pure = PurePosixPath(path)
    return str(pure.parent) if pure.name.startswith(("adapter_model.", "adapter_config.json")) else None


def replacing_earlier_save(save: Callable[..., Any]) -> Callable[..., Any]:
    """A library's ``save_pretrained`` for folders that may hold an earlier save, of any form.

    Everything is written next to the earlier files, and then takes their place; what the new weights replace under
    other names goes last. A save that fails changes nothing, and a model whose weights are read from the earlier
    file where they are needed (memory-mapped) keeps them. A file in the folder's place is a FileExistsError.
    """
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        folder = Path(save_directory)
        bound = signature.bind(self, save_directory, *args, **kwargs)
        # all processes write distributed checkpoints together, into one folder that they know by its name
        if bound.arguments.get("distributed_checkpoint"):
            return save(self, save_directory, *args, **kwargs)
        if bound.arguments.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            result = save(self, str(temporary), *args, **kwargs)
            _put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return result

    return save_pretrained


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Move all files of one folder into another, then delete the weights there that they replace."""
    paths = [path for path in temporary.rglob("*") if path.is_file()]
    written = {path.relative_to(temporary).as_posix() for path in paths}
    # an index comes after the shards that it names, a pipeline's after its components
    for name in sorted(written, key=lambda name: (name.endswith(".json"), -name.count("/"), name)):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(temporary / name, target)
    places = {(folder / name).parent for name in written}
    files = [path for place in places for path in place.iterdir() if path.is_file() or path.is_symlink()]
    there = [path.relative_to(folder).as_posix() for path in files]
    for name in stale_weights(there, written):
        (folder / name).unlink(missing_ok=True)  # of two processes that save, one is first


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy(source, target)  # a component's folder may be a link to another disk


def saved_tensors(path: str | os.PathLike) -> dict[str, tuple[torch.Size, bool]]:
    """Shape of every tensor in a file of weights, and whether it is floating point; no values are read.

    Raises:
        OSError: for a damaged file, or one that neither safetensors nor torch can read.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
                return {name: (torch.Size(s.get_shape()), "F" in s.get_dtype()) for name, s in slices.items()}
        return shapes_of(torch.load(path, map_location="meta", weights_only=True))
    except Exception as error:  # safetensors, pickle and zip files have exceptions of their own
        advice = "It is damaged or incomplete: copy or download it again."
        if is_pointer(path):
            advice = "It is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder."
        raise OSError(f"{path} cannot be read: {error}. {advice}") from error


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[torch.Size, bool]]:
    """`saved_tensors` of what is loaded already.

    Raises:
        ValueError: for anything but tensors by name.
    """
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError("it holds no tensors by name")
    return {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in state.items()}


def saved_weights(state: Mapping[str, Any] | None, files: Iterable[str]) -> dict[str, tuple[torch.Size, bool]]:
    """Shapes of saved weights: one file's, which was read already, or those of shards.

    Raises:
        OSError: for a shard that cannot be read.
        ValueError: for shards of which two hold the same tensor: they are of different saves.
    """
    if state is not None:
        return shapes_of(state)
    found: dict[str, tuple[torch.Size, bool]] = {}
    for file in files:
        shard = saved_tensors(file)
        if twice := set(shard) & set(found):
            raise ValueError(f"{file} and another shard both hold {some_of(sorted(twice))}.")
        found |= shard
    return found


def is_pointer(path: str | os.PathLike) -> bool:
    """Whether git put a pointer in the place of a large file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(32).startswith(b"version https://git-lfs")


def check_weights(
    source: Any, expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[torch.Size, bool]], sizes: bool = True
) -> None:
    """Refuse saved weights that are not those of a model.

    Args:
        source: where they are from, for the message.
        expected: the model's tensors.
        found: the saved ones.
        sizes: False takes tensors of other sizes.

    Raises:
        ValueError: naming what is missing, unknown, of another shape or no floating-point numbers.
    """
    problems = {
        "lack": [name for name in expected if name not in found],
        "hold unknown": [name for name in found if name not in expected],
        "have other shapes of": [
            f"{name} ({tuple(found[name][0])} for {tuple(tensor.shape)})"
            for name, tensor in expected.items()
            if sizes and name in found and found[name][0] != tensor.shape
        ],
        "have no floating-point numbers in": [
            name
            for name, tensor in expected.items()
            if name in found and tensor.is_floating_point() and not found[name][1]
        ],
    }
    texts = [f"{verb} {some_of(names)}" for verb, names in problems.items() if names]
    if texts:
        raise ValueError(
            f"the weights in {source} are not those of its configuration: they {'; they '.join(texts)}. "
            "They are incomplete, or of another model."
        )


def some_of(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def check_finite_weights(source: Any, model: torch.nn.Module) -> None:
    """Refuse a loaded model that holds NaN or infinity: not all of its results would.

    Torch's attention on CPUs gives zeros for NaN where there are fewer than 16 keys.

    Raises:
        ValueError: naming the tensors.
    """
    if names := weights_not_finite(model):
        raise ValueError(
            f"the weights in {source} are not finite (NaN or infinity): {some_of(names)}. The file is damaged, or the "
            "training went wrong: load another one, or an earlier checkpoint."
        )


def weights_not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the weights that hold NaN or infinity; those offloaded to a disk are left out."""
    names = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        tensor = parameter.detach()
        if tensor.dtype.itemsize == 1:  # 8-bit floating point knows no sums
            tensor = tensor.float()
        # as fast as memory is read, unlike isfinite, but may be infinite for large finite weights
        total = tensor.sum(dtype=torch.float32)
        if not total.isfinite() and not tensor.isfinite().all():
            names.append(name)
    return names


def not_finite(what: str, model: torch.nn.Module) -> ValueError:
    """An error for values that are NaN or infinite, with the likely cause.

    Args:
        what: which values.
        model: that computed them.
    """
    names = weights_not_finite(model)
    if names:
        return ValueError(
            f"{what} are not finite, since weights are not: {some_of(names)}. The model is damaged, or its training "
            "went wrong: load another one, or an earlier checkpoint."
        )
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()})
    return ValueError(
        f"{what} are not finite (NaN or infinity), though all weights are ({', '.join(kinds)}): values overflowed on "
        "the way. Load the model with dtype=torch.float32, or torch.bfloat16 instead of torch.float16."
    )
