"""What ``vocabridge analyze`` leaves in a run folder, as the report reads it; unknown fields are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vocabridge.report.reading import Reader


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Estimate(_Record):
    """A mean and its interval over examples."""

    mean: float
    low: float | None = None
    high: float | None = None


class GroupResult(_Record):
    """One attention on one group of positions."""

    attention: str
    grouping: str
    group: str
    positions: int
    coverage: float
    measures: dict[str, Estimate]


class GroupChange(_Record):
    """After training less before."""

    grouping: str
    group: str
    measures: dict[str, Estimate]


class RepetitionEffect(_Record):
    """Positions with a repeated token less those with a unique one."""

    attention: str
    grouping: str
    measures: dict[str, Estimate]


class Probe(_Record):
    """The file ``probe.json``."""

    data: str
    examples: int
    confidence: float
    results: tuple[GroupResult, ...]
    changes: tuple[GroupChange, ...]
    repetition: tuple[RepetitionEffect, ...] = ()


class HeatmapExample(_Record):
    """One response: tokens of both sides, the chunk of each (-1 in none), and attention as (row, column, weight)."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    student_chunks: tuple[int, ...]
    teacher_chunks: tuple[int, ...]
    attentions: dict[str, tuple[tuple[int, int, float], ...]]
    chosen: str = ""
    """Why this one."""
    mass_in_chunk: dict[str, float | None] = {}
    """Of each attention over the whole response."""
    student_tokens: int | None = None
    """Of the whole response, where only its beginning is here."""


class Heatmaps(_Record):
    """The file ``heatmaps.json``."""

    examples: tuple[HeatmapExample, ...]


class Cloud(_Record):
    """Queries and keys of one stage in the plane."""

    queries: tuple[tuple[float, float], ...]
    keys: tuple[tuple[float, float], ...]


class PointCloud(_Record):
    """The file ``points.json``: stages on common axes, the token of each point."""

    explained: tuple[float, float]
    stages: dict[str, Cloud]
    query_names: tuple[str, ...]
    key_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnalysisFiles:
    """What one run has of them."""

    probe: Probe | None = None
    heatmaps: Sequence[HeatmapExample] = ()
    points: PointCloud | None = None


def read_analysis(folder: Path, reader: Reader) -> AnalysisFiles:
    """Read the ``analysis`` folder of a run, as far as it is there."""
    heatmaps = reader.model(folder / "heatmaps.json", Heatmaps)
    return AnalysisFiles(
        probe=reader.model(folder / "probe.json", Probe),
        heatmaps=() if heatmaps is None else heatmaps.examples,
        points=reader.model(folder / "points.json", PointCloud),
    )
