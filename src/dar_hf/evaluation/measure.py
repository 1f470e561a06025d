"""Figures from shards: statistics accumulate shard by shard, in order, on one process."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..hub import metric_name
from ..metrics import (
    GaussianStatistics,
    InceptionScoreStatistics,
    MeanStatistics,
    frechet_distance,
    label_agreement,
    precision_recall,
)
from ..metrics.accumulate import SPLIT_SIZE
from ..metrics.features import INCEPTION
from .report import metric
from .shards import ShardFolder

NUM_NEIGHBOURS = 3


@dataclass
class Findings:
    """What goes into the report."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)

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


def gaussian(shards: ShardFolder, name: str) -> GaussianStatistics:
    """Statistics of a tensor of all shards."""
    statistics = GaussianStatistics()
    for part in shards.parts(name):
        statistics.update(part)
    return statistics


def set_statistics(shards: ShardFolder, prefix: str = "") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and covariance of a set's features, as far as there are any; ``prefix`` is that of their names."""
    found = {}
    for kind in ("pool", "spatial"):
        if shards.has(prefix + kind):
            statistics = gaussian(shards, prefix + kind)
            found[kind] = (statistics.mean, statistics.covariance)
    return found


def distance_type(features: str, extractor: str) -> str:
    """Type of a Frechet distance of pool or spatial features: FID and sFID are names for Inception's alone."""
    if extractor == INCEPTION:
        return "fid" if features == "pool" else "sfid"
    return "frechet_distance" if features == "pool" else "spatial_frechet_distance"


def measure_distances(
    findings: Findings, shards: ShardFolder, references: References, extractor: str, mode: str, tokens: int
) -> None:
    """Frechet distances of the samples after ``tokens`` tokens."""
    for kind in ("pool", "spatial"):
        if kind not in references.statistics and shards.has(f"{tokens}/{kind}"):
            findings.not_measured[distance_type(kind, extractor)] = f"the reference holds no {kind} statistics"
    for kind, (mean, covariance) in references.statistics.items():
        key = f"{tokens}/{kind}"
        if not shards.has(key):
            continue
        statistics = gaussian(shards, key)
        distance = distance_type(kind, extractor)
        name = metric_name(distance, mode, "" if extractor == INCEPTION else extractor)
        value = frechet_distance(statistics.mean, statistics.covariance, mean, covariance)
        findings.metrics.append(metric(distance, value, name, num_tokens=tokens))
        for what, count in (("samples", statistics.count), ("references", references.count)):
            if count is not None and count < len(mean) + 1:
                findings.warn(
                    f"{count} {what} do not span the {len(mean)} {kind} features: their covariance is singular and "
                    "the distance is biased upwards."
                )
    if references.count is not None and references.count != shards.count:
        findings.warn(f"the sets differ in size: {shards.count} samples, {references.count} references.")


def measure_generation(
    findings: Findings,
    shards: ShardFolder,
    references: References,
    extractor: str,
    tokens: int,
    num_classes: int,
    device: torch.device,
) -> None:
    """All figures of generated samples after ``tokens`` tokens."""
    measure_distances(findings, shards, references, extractor, "generation", tokens)
    network = "" if extractor == INCEPTION else extractor
    logits = f"{tokens}/logits"
    if shards.has(logits):
        score, kind = InceptionScoreStatistics(), "inception_score"
        for part in shards.parts(logits):
            score.update(part)
        findings.metrics.append(metric(kind, score.score(), metric_name(kind, network=network), num_tokens=tokens))
        if shards.count % SPLIT_SIZE:
            findings.warn(
                f"{shards.count} samples are no whole number of the Inception score's splits of {SPLIT_SIZE}."
            )
        measure_agreement(findings, shards, logits, num_classes, extractor, num_tokens=tokens)
    else:
        findings.not_measured["inception_score"] = f"{extractor} gives no logits"
    if references.shards is None:
        reason = "the reference holds statistics, no images"
        findings.not_measured |= {"precision": reason, "recall": reason}
    elif min(shards.count, references.shards.count) <= NUM_NEIGHBOURS:
        reason = f"a set has {NUM_NEIGHBOURS} images or fewer"
        findings.not_measured |= {"precision": reason, "recall": reason}
    else:
        figures = precision_recall(
            references.shards.rows("pool").to(device), shards.rows(f"{tokens}/pool").to(device), NUM_NEIGHBOURS
        )
        for kind, value in figures.items():
            findings.metrics.append(metric(kind, value, metric_name(kind, network=network), num_tokens=tokens))


def measure_agreement(
    findings: Findings,
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
    agreement = MeanStatistics()
    for part, labels in zip(shards.parts(logits), shards.parts("labels"), strict=True):
        if part.shape[1] != num_classes:
            findings.not_measured["label_agreement"] = (
                f"the feature network's {part.shape[1]} classes are not the model's {num_classes}"
            )
            return
        batch = MeanStatistics()
        batch.count, batch.total = len(labels), label_agreement(part, labels) * len(labels)
        agreement.merge(batch)
    findings.metrics.append(metric(kind, agreement.mean(), metric_name(kind, network=extractor), **which))


def mean_of(parts: Iterable[torch.Tensor]) -> float:
    """Mean of one number an image."""
    statistics = MeanStatistics()
    for part in parts:
        statistics.update(part)
    return statistics.mean()


def table(metrics: list[dict[str, Any]]) -> str:
    """The figures over prefix lengths as text, a column a length."""
    lengths = sorted({entry["num_tokens"] for entry in metrics if "num_tokens" in entry})
    rows: dict[str, dict[int | None, float]] = {}
    for entry in metrics:
        rows.setdefault(entry["name"], {})[entry.get("num_tokens")] = entry["value"]
    width = max(map(len, rows), default=0)
    lines = [f"{'tokens':{width}}" + "".join(f"{length:>10}" for length in lengths)]
    for name, values in rows.items():
        cells = [f"{values[n]:10.4f}" if n in values else " " * 10 for n in lengths]
        lines.append(f"{name:{width}}" + "".join(cells) + (f"  {values[None]:.4f}" if None in values else ""))
    return "\n".join(lines)
