"""What of a folder goes to the Hub: the files that belong to a model or a run, and nothing outside it."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from ..utils.files import INDICES, read_object, resolve_inside
from ..weights_dar import is_pointer

# Folders, and files in them, that the package or the libraries it saves with write. A repository takes nothing else:
# whatever else is in a folder was not meant for it
FOLDERS = (".", "tokenizer", "transformer", "scheduler", "text_tokenizer")
FILES = (
    *INDICES,
    *(
        "generation_config.json",
        "adapter_config.json",
        "*.safetensors",
        "*.safetensors.index*.json",
        "*.bin",
        "*.bin.index*.json",
    ),
    *("README.md", "LICENSE*", "training.json", "history.jsonl", "*_dar.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),  # of text
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja"),
)
IMAGE_FOLDERS = (".", "images", "evaluation")  # and the folders in evaluation, one for each kind
IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "report.json")
WEIGHTS = (".safetensors", ".bin")
# folders with weights, of models that have them elsewhere than at the root
WEIGHTS_IN: dict[str, tuple[str, ...]] = {
    "DARPipeline": ("tokenizer", "transformer"),
    "FlowMatchAdamsBashforthScheduler": (),
}
LEFT_OUT = ("checkpoints", "__pycache__")  # without a word, as are hidden files


def model_files(folder: str | Path) -> tuple[dict[str, Path], list[str]]:
    """Files of a model's or a run's folder that a repository takes, by their names in it, and the others' names.

    Checkpoints and hidden files are in neither.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if one of the files is behind a link that leads out of the folder or to a hidden file.
    """
    return _own_files(Path(folder), _is_of_a_model, _has_files_of_a_model)


def matching_files(folder: str | Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Files of a folder, without those of folders in it, whose names match one of the patterns.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if one of them is behind a link that leads out of the folder or to a hidden file.
    """
    return _own_files(Path(folder), lambda name: _matches(str(name), patterns), lambda name: False)[0]


def check_complete(files: Mapping[str, Path], class_name: str) -> None:
    """Refuse weights that nobody could load, which would take the place of good ones in the repository.

    Args:
        files: as `model_files` gives them.
        class_name: the model's class.

    Raises:
        FileNotFoundError: if a part of the model has no weights, or not all of its shards.
        OSError: for a safetensors file that is damaged, or a git-lfs pointer.
    """
    weights = [name for name in files if name.endswith(WEIGHTS)]
    for name in weights:
        if is_pointer(files[name]):
            raise OSError(f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder.")
        if name.endswith(".safetensors"):
            try:
                with safe_open(files[name], framework="pt"):
                    pass  # its header fits its size
            except SafetensorError as error:
                raise OSError(f"{name} is damaged or incomplete: {error}") from error
    folders = {str(PurePosixPath(name).parent) for name in weights}
    missing = [f"weights in {part}" for part in WEIGHTS_IN.get(class_name, (".",)) if part not in folders]
    for name in files:
        if ".index" in name and name.endswith(".json"):
            shards = read_object(files[name]).get("weight_map", {}).values()
            paths = {str(PurePosixPath(name).with_name(shard)) for shard in shards}
            missing += sorted(paths - files.keys())
    if missing:
        raise FileNotFoundError(f"the {class_name} is incomplete: it lacks {', '.join(missing)}.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_of_a_model(name: PurePosixPath) -> bool:
    if str(name.parent) in FOLDERS and _matches(name.name, FILES):
        return True
    return _has_images(name.parent) and _matches(name.name, IMAGES)


def _has_files_of_a_model(name: PurePosixPath) -> bool:
    return str(name) in FOLDERS or _has_images(name)


def _has_images(name: PurePosixPath) -> bool:
    return str(name) in IMAGE_FOLDERS or str(name.parent) == "evaluation"


def _own_files(
    root: Path, is_wanted: Callable[[PurePosixPath], bool], is_entered: Callable[[PurePosixPath], bool]
) -> tuple[dict[str, Path], list[str]]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}.")
    files: dict[str, Path] = {}
    left: list[str] = []

    def look(folder: PurePosixPath) -> None:
        for path in sorted((root / folder).iterdir()):
            name = folder / path.name
            if path.name.startswith(".") or path.name in LEFT_OUT:
                continue
            if not is_wanted(name) and not is_entered(name):  # by its name: no link is followed for nothing
                left.append(str(name))
                continue
            target = resolve_inside(path, root)
            if target.is_dir() and is_entered(name):
                look(name)
            elif target.is_file() and is_wanted(name):
                files[str(name)] = target
            else:
                left.append(str(name))

    look(PurePosixPath())
    return files, left
