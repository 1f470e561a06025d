"""Results as people read them: settings, and tables for a card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult


def setting_text(value: Any) -> str:
    """A setting as people write it; the ends of a linear scale as "1.1 → 8"."""
    if isinstance(value, (list, tuple)):
        return " → ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Table:
    """A table of a card: a title, the headings of the columns and the cells of the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(results: Sequence[EvalResult]) -> list[Table]:
    """Results as tables, for each task and data set one for each kind of setting; one row per metric, one
    column per setting.

    Settings that all results of a task and data set share stand in the title.
    """
    subjects: dict[tuple[str, ...], list[EvalResult]] = {}
    for result in results:
        names = (result.task_name, result.dataset_name, result.dataset_config, result.dataset_split)
        subjects.setdefault(tuple(name for name in names if name), []).append(result)
    return [table for title, group in subjects.items() for table in _tables(", ".join(title), group)]


def _tables(title: str, results: list[EvalResult]) -> list[Table]:
    """Tables of one task and data set."""
    arguments = [
        {name: setting_text(value) for name, value in (result.metric_args or {}).items()} for result in results
    ]
    common = dict(set.intersection(*(set(settings.items()) for settings in arguments)))
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = {}
    for result, settings in zip(results, arguments, strict=True):
        own = {name: value for name, value in settings.items() if name not in common}
        cells = groups.setdefault(tuple(own), {}).setdefault(tuple(own.values()), {})
        cells[result.metric_name or result.metric_type] = f"{result.metric_value:.4g}"
    shared = [f"{name.replace('_', ' ')} {value}" for name, value in arguments[0].items() if name in common]
    title = f"{title} ({', '.join(shared)})" if shared else title
    return [_table(title, names, columns) for names, columns in groups.items()]


def _table(title: str, names: tuple[str, ...], columns: dict[tuple[str, ...], dict[str, str]]) -> Table:
    """A table of the settings ``names``: by their values, the cells of a column by metric."""
    headings = [" / ".join(names).replace("_", " ")]
    headings += [" / ".join(values) or "value" for values in columns]
    metrics = dict.fromkeys(metric for cells in columns.values() for metric in cells)
    rows = [[metric, *(cells.get(metric, "") for cells in columns.values())] for metric in metrics]
    return Table(title, headings, rows)
