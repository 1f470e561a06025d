"""The package in layers: a file imports from its own layer and from those below; no imports go in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dar_hf

PACKAGE = Path(dar_hf.__file__).parent
# from the lowest to the highest: the flat model files, then one folder each, then what puts all of it together
LAYERS = ("models", "utils", "data", "metrics", "evaluation", "hub", "conversion", "training", "serving", "package")
TOP = ("__init__", "__main__", "registration")


def layer_of(module: str) -> str:
    first = module.split(".")[0]
    if first in TOP:
        return "package"
    return first if first in LAYERS else "models"


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Modules of this package that a file imports, by their names below it."""
    folder = path.relative_to(PACKAGE).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    at_import = [inner for node in tree.body for inner in getattr(node, "body", []) if isinstance(node, ast.With)]
    for node in [*tree.body, *at_import] if top_level_only else ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = folder[: len(folder) - node.level + 1]
        for alias in node.names:
            parts = (*base, *(node.module or "").split(".")) if node.module else base
            deeper = PACKAGE.joinpath(*parts, f"{alias.name}.py")
            name = ".".join((*parts, alias.name) if deeper.is_file() else parts)
            if name:  # the package itself: its version
                found.add(name)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    own = LAYERS.index(layer_of(module))
    upward = {name for name in imports(FILES[module], False) if LAYERS.index(layer_of(name)) > own}
    assert not upward, f"{module} ({LAYERS[own]}) imports from above: {upward}"


def test_no_imports_go_in_a_circle():
    graph = {module: imports(path, True) & FILES.keys() - {module} for module, path in FILES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")
    assert len(order) == len(FILES) > 50


def test_the_model_files_stand_flat():
    """Self-contained repositories carry them alone."""
    models = [module for module in FILES if module.endswith("_dar")]
    assert {"modeling_dar", "tokenizer_dar", "scheduling_dar", "pipeline_dar"} <= set(models)
    for module in models:
        assert all(name.endswith("_dar") for name in imports(FILES[module], False)), module
