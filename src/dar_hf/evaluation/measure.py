"""Metrics of the sets in shards, computed shard by shard, in order, on one process."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from ..metrics import GaussianStatistics
from ..metrics.features import INCEPTION
from ..metrics.modules import FID, LabelAgreement, SpatialFID
from ..metrics.names import metric_name
from .report import metric
from .shards import ShardFolder


@dataclass
class MetricResults:
    """What goes into the report."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, value: float, name: str | None = None, **which: Any) -> None:
        """Add a metric; arguments as for `metric`."""
        self.metrics.append(metric(kind, value, name, **which))

    def warn(self, text: str) -> None:
        """Add a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass
class References:
    """What samples are compared with.

    Attributes:
        statistics: ``pool`` and ``spatial`` to (mean, covariance).
        shards: features of the references, or None where only statistics are known.
        count: of the references, or None where it is not known.
    """

    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    shards: ShardFolder | None
    count: int | None


def set_statistics(shards: ShardFolder, prefix: str = "") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and covariance of a set's features, as far as there are any; ``prefix`` is that of their names."""
    found = {}
    for kind in ("pool", "spatial"):
        if shards.has(prefix + kind):
            statistics = GaussianStatistics()
            for part in shards.parts(prefix + kind):
                statistics.update(part)
            found[kind] = (statistics.mean, statistics.covariance)
    return found


def distance_type(features: str, extractor: str) -> str:
    """Type of a Frechet distance of pool or spatial features: FID and sFID are names for Inception's alone."""
    if extractor == INCEPTION:
        return "fid" if features == "pool" else "sfid"
    return "frechet_distance" if features == "pool" else "spatial_frechet_distance"


def measure_distances(
    results: MetricResults, shards: ShardFolder, references: References, extractor: str, mode: str, tokens: int
) -> None:
    """Frechet distances of the samples after ``tokens`` tokens."""
    network = "" if extractor == INCEPTION else extractor
    for features, metric_class in (("pool", FID), ("spatial", SpatialFID)):
        key = f"{tokens}/{features}"
        kind = distance_type(features, extractor)
        if not shards.has(key):
            continue
        if features not in references.statistics:
            results.not_measured[kind] = f"the reference holds no {features} statistics"
            continue
        distance = metric_class(references.statistics[features])
        for part in shards.parts(key):
            distance.add_batch(predictions=part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of small sets, which the report has in its own words
            (value,) = distance.compute().values()
        results.add(kind, value, metric_name(kind, mode, network), num_tokens=tokens)
        size = len(references.statistics[features][0])
        for what, count in (("samples", shards.count), ("references", references.count)):
            if count is not None and count <= size:
                results.warn(
                    f"{count} {what} do not span the {size} {features} features: their covariance is singular and "
                    "the distance is biased upwards."
                )
    if references.count is not None and references.count != shards.count:
        results.warn(f"the sets differ in size: {shards.count} samples, {references.count} references.")


def measure_agreement(
    results: MetricResults,
    shards: ShardFolder,
    logits: str,
    num_classes: int | None,
    extractor: str,
    kind: str = "label_agreement",
    **which: Any,
) -> None:
    """Share of images read as their label, where logits are over the model's classes and labels are known."""
    if not (shards.has(logits) and shards.has("labels")):
        return
    agreement = LabelAgreement()
    for part, labels in zip(shards.parts(logits), shards.parts("labels"), strict=True):
        if part.shape[1] != num_classes:
            results.not_measured["label_agreement"] = (
                f"the feature network's {part.shape[1]} classes are not the model's {num_classes}"
            )
            return
        agreement.add_batch(predictions=part, references=labels)
    results.add(kind, agreement.compute()["label_agreement"], metric_name(kind, network=extractor), **which)


def table(metrics: list[dict[str, Any]]) -> str:
    """Metrics over prefix lengths as text, one column per length."""
    lengths = sorted({entry["num_tokens"] for entry in metrics if "num_tokens" in entry})
    rows: dict[str, dict[int | None, float]] = {}
    for entry in metrics:
        rows.setdefault(entry["name"], {})[entry.get("num_tokens")] = entry["value"]
    width = max(map(len, rows), default=0)
    lines = [f"{'tokens':{width}}" + "".join(f"{length:>10}" for length in lengths)]
    for name, values in rows.items():
        cells = [f"{values[n]:10.4f}" if n in values else " " * 10 for n in lengths]
        alone = f"  {values[None]:.4f}" if None in values else ""
        lines.append(f"{name:{width}}" + "".join(cells) + alone)
    return "\n".join(lines)
