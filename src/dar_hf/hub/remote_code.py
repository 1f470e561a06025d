"""Self-contained folders: a saved model with the code that loads it, for machines where this package is not installed.

diffusers 0.42 and transformers 5.23 find such code differently:

- diffusers downloads one file for each component (``transformer/modeling_dar.py``, by the name that
  ``model_index.json`` gives) and nothing that it imports from its own folder; the pipeline's file brings the files it
  names itself, but not theirs. All of them meet in one flat folder before they are imported.
- transformers reads ``auto_map`` in ``config.json`` and follows relative imports.

So every exported file is a model file of this package with the siblings it imports put in place of the import
statement, except the pipeline's, which keeps its imports and has its siblings next to it. Each first refuses
versions of the libraries that the package does not allow. Nothing else is changed.
"""

import ast
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from .. import __version__
from ..utils.files import read_object, saved_class, write_json, write_text

PACKAGE = Path(__file__).resolve().parent.parent

COMPONENT_INDICES = ("config.json", "scheduler_config.json")

# file and class of each component
PIPELINE = ("pipeline_dar", "DARPipeline")
COMPONENTS = {
    "tokenizer": ("tokenizer_dar", "DARTokenizer"),
    "transformer": ("modeling_dar", "DARForCausalLM"),
    "scheduler": ("scheduling_dar", "FlowMatchAdamsBashforthScheduler"),
}
# where an Auto class of transformers or diffusers looks
AUTO_MAPS = {
    "DARForCausalLM": {
        "AutoConfig": "modeling_dar.DARConfig",
        "AutoModel": "modeling_dar.DARModel",
        "AutoModelForCausalLM": "modeling_dar.DARForCausalLM",
    },
    "DARTokenizer": {"AutoModel": "tokenizer_dar.DARTokenizer"},
}


def standalone_source(module: str, included: set[str] | None = None) -> str:
    """Source of a model file of this package with the siblings it imports put where the import statement stood.

    Args:
        module: its name, such as "tokenizer_dar".
        included: siblings that stand further up already, to which those of this module are added.

    Raises:
        ValueError: if two of the files define the same name, or an import is not ``from .sibling import name``.
    """
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    included = set() if included is None else included
    names = _defined(source)
    parts = []
    end = 0
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level != 1 or not node.module or any(alias.asname for alias in node.names):
            raise ValueError(f"{module}.py, line {node.lineno}: only `from .sibling import name` can be exported.")
        parts += lines[end : node.lineno - 1]
        end = node.end_lineno or node.lineno
        if node.module in included:
            continue
        included.add(node.module)
        sibling = standalone_source(node.module, included)
        if twice := names & _defined(sibling):
            raise ValueError(f"{module}.py and {node.module}.py both define {', '.join(sorted(twice))}.")
        names |= _defined(sibling)
        heading = f"# {node.module}.py of the package, in the place of its import\n"
        parts += [heading, sibling, f"\n# {module}.py again\n"]
    return "".join(parts + lines[end:])


def _siblings(source: str) -> list[str]:
    """Files of this package that a file imports at the top level, as ``from .sibling import name``."""
    nodes = ast.parse(source).body
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]


def _defined(source: str) -> set[str]:
    """Names that a file's own classes, functions and assignments have at the top level."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def export_remote_code(folder: str | Path) -> list[Path]:
    """Make a saved pipeline, tokenizer or language model load without this package.

    Writes the code next to the weights and names it in ``model_index.json`` and ``config.json``. With the code's
    consent, ``trust_remote_code=True``, these then load from the folder or from the Hub:
    ``diffusers.DiffusionPipeline`` (pipelines), ``diffusers.AutoModel`` (tokenizers) and
    ``transformers.AutoModelForCausalLM`` (language models). Where this package is imported its own classes load,
    and no consent is needed. Exporting again refreshes the code.

    Returns:
        The code files written.

    Raises:
        FileNotFoundError: if the folder holds no saved model, or a pipeline's component is missing.
        ValueError: if the folder holds another model than this package's.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        module, class_name = _saved_component(folder)
        if class_name not in AUTO_MAPS:
            raise ValueError(f"a {class_name} alone has no loader that takes its code: export the pipeline.")
        written = [_write_source(folder, module, standalone_source(module))]
        _name_code(folder, class_name)
        return written
    content = read_object(index)
    if saved_class(content) != PIPELINE[1]:
        raise ValueError(f"{folder} holds a {saved_class(content)}, not a {PIPELINE[1]}.")
    for name, component in COMPONENTS.items():  # all are looked at before anything is written
        if (held := _saved_component(folder / name)) != component:
            raise ValueError(f"{folder / name} holds a {held[1]}, not a {component[1]}.")
    pipeline_source = (PACKAGE / f"{PIPELINE[0]}.py").read_text(encoding="utf-8")
    sources = {PIPELINE[0]: pipeline_source}
    for module in _siblings(pipeline_source):
        sources[module] = standalone_source(module)
    written = [_write_source(folder, module, source) for module, source in sources.items()]
    written += [_write_source(folder / name, module, sources[module]) for name, (module, _) in COMPONENTS.items()]
    _name_code(folder / "transformer", "DARForCausalLM", dtype="float32")  # as the pipeline's other parts load
    entries = {name: list(component) for name, component in COMPONENTS.items()}
    write_json(index, content | entries | {"_class_name": list(PIPELINE)})  # last: it points to the files
    return written


def is_self_contained(folder: str | Path) -> bool:
    """Whether a saved model names its own code and has it; one saved over such a one may do only half."""
    for name in ("model_index.json", "config.json"):
        path = Path(folder, name)
        if path.is_file():
            index = read_object(path)
            named = isinstance(index.get("_class_name"), list) or "auto_map" in index
            return named and any(path.parent.glob("*_dar.py"))
    return False


def _saved_component(folder: Path) -> tuple[str, str]:
    """File and class of the component that a folder holds."""
    for name in COMPONENT_INDICES:
        if (folder / name).is_file():
            held = saved_class(read_object(folder / name))
            for component in COMPONENTS.values():
                if component[1] == held:
                    return component
            raise ValueError(f"{folder} holds a {held}, which is no model of this package.")
    raise FileNotFoundError(f"no saved model in {folder}: it has none of {', '.join(COMPONENT_INDICES)}.")


def _name_code(folder: Path, class_name: str, **options: str) -> None:
    """Name the code in ``config.json``, where the Auto classes look for it.

    The generation configuration goes there, too: diffusers does not download the file of its own, and transformers
    takes what is in ``config.json`` then. ``options`` are further entries.
    """
    path = folder / "config.json"
    generation = folder / "generation_config.json"
    config = read_object(path)
    if generation.is_file():
        config |= read_object(generation)
    write_json(path, config | options | {"auto_map": AUTO_MAPS[class_name]})


def _write_source(folder: Path, module: str, source: str) -> Path:
    path = folder / f"{module}.py"
    source = with_version_check(source)
    write_text(path, f"# Generated from {module}.py of dar_hf {__version__}.\n{source}")
    return path


# below the docstring and above all other imports, which other versions may not have
_VERSION_CHECK = """
from importlib.metadata import version as _installed_version
from packaging.specifiers import SpecifierSet as _SpecifierSet

for _library, _allowed in {allowed!r}.items():
    if not _SpecifierSet(_allowed).contains(_installed_version(_library), prereleases=True):
        raise ImportError(
            f"this model's code was made for {{_library}} {{_allowed}}, but {{_installed_version(_library)}} is "
            f"installed, with which it might give other images: pip install '{{_library}}{{_allowed}}'"
        )

"""


def with_version_check(source: str) -> str:
    """The source of a model file that, when imported, first refuses versions of its libraries it was not made for.

    Raises:
        RuntimeError: if this package is not installed, whose metadata holds the versions.
    """
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    roots = {name.partition(".")[0] for name in imported}
    allowed = {name: versions for name, versions in _requirements().items() if name.replace("-", "_") in roots}
    start = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:start], _VERSION_CHECK.format(allowed=allowed), *lines[start:]])


def _requirements() -> dict[str, str]:
    """Allowed versions of the libraries that this package always needs, by name."""
    try:
        requirements = [Requirement(text) for text in requires("dar-hf") or []]
    except PackageNotFoundError as error:
        raise RuntimeError(
            "the versions that exported code is for are in the metadata of this package, which is not installed: "
            "pip install -e . in its folder."
        ) from error
    return {one.name: str(one.specifier) for one in requirements if one.marker is None}
