"""What ``vocabridge analyze`` found: tables of the probe, point clouds, and the data of the heatmap browser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .analysis_files import Estimate, GroupChange, GroupResult, HeatmapExample, Probe
from .collect import Report, Run
from .figures import cloud_figure
from .view import MISSING, Cell, Chart, Table, number, with_interval, words

MAX_HEATMAP_CHARS = 1_200_000
"""Of all heatmaps together as JSON, so that a page stays below a few megabytes."""
MAX_CLOUDS = 12

_ALL = "all"
_MEASURES = {
    "mass_in_chunk": "attention in chunk",
    "top1_in_chunk": "top-1 in chunk",
    "distance_bytes": "distance, bytes",
    "top1_distance_bytes": "top-1 distance, bytes",
    "entropy": "entropy, nats",
}
_ATTENTIONS = {
    "uniform": "uniform: knows nothing",
    "before": "before training",
    "after": "after training",
    "cla": "CLA: after, in chunk only",
    "clp": "CLP: uniform in chunk",
    "eta": "ETA: exact pairs",
}


@dataclass(frozen=True, slots=True)
class ProbeTables:
    """One run's tables: all positions, and for folding out every group of positions."""

    title: str
    overall: Table
    groups: Table


@dataclass(frozen=True, slots=True)
class HeatmapBrowser:
    """Heatmaps as the page's script reads them, and the runs that had no room."""

    data: list[dict[str, Any]]
    left_out: tuple[str, ...]


def probe_tables(report: Report) -> list[ProbeTables]:
    """The probe's tables of every run that was analysed."""
    return [_tables(run.title, run.analysis.probe) for run in report.runs if run.analysis.probe is not None]


def _tables(title: str, probe: Probe) -> ProbeTables:
    overall = [(_attention(each.attention), each) for each in probe.results if each.grouping == _ALL]
    about = f"{probe.examples} responses of {probe.data}; {probe.confidence:.0%} intervals over responses"
    names = _measure_names(probe)
    rows = [(words(words_for), *_cells(each, names)) for words_for, each in overall]
    rows += [
        (words("change (after less before)"), MISSING, MISSING, *_estimates(each, names, signed=True))
        for each in probe.changes
        if each.grouping == _ALL
    ]
    headings = ("attention", "positions", "coverage", *(_measure(name) for name in names))
    groups = [
        (words(each.grouping), words(each.group), words(_attention(each.attention)), *_cells(each, names))
        for each in probe.results
        if each.grouping != _ALL
    ]
    group_headings = ("by", "group", "attention", "positions", "coverage", *(_measure(name) for name in names))
    return ProbeTables(
        title=title,
        overall=Table(f"{title}: all positions. {about}.", headings, tuple(rows)),
        groups=Table(f"{title}: by kind of position", group_headings, tuple(groups)),
    )


def _measure_names(probe: Probe) -> list[str]:
    return list(dict.fromkeys(name for each in probe.results for name in each.measures))


def _measure(name: str) -> str:
    return _MEASURES.get(name, name.replace("_", " "))


def _attention(name: str) -> str:
    return _ATTENTIONS.get(name, name)


def _cells(result: GroupResult, names: Sequence[str]) -> tuple[Cell, ...]:
    first = (number(result.positions, "{:,}"), number(result.coverage, "{:.2f}"))
    return (*first, *_estimates(result, names, signed=False))


def _estimates(part: GroupResult | GroupChange, names: Sequence[str], *, signed: bool) -> tuple[Cell, ...]:
    pattern = "{:+.3f}" if signed else "{:.3f}"
    return tuple(_estimate(part.measures.get(name), pattern) for name in names)


def _estimate(estimate: Estimate | None, pattern: str) -> Cell:
    if estimate is None:
        return MISSING
    return with_interval(estimate.mean, estimate.low, estimate.high, pattern=pattern)


# --- pictures --------------------------------------------------------------------------------------------------------


def cloud_charts(report: Report) -> list[Chart]:
    """Queries and keys in the plane, of the first runs that have them, every variant's first seed before any second."""
    charts: list[Chart] = []
    for run in _by_turns(report):
        if run.analysis.points is not None and len(charts) < MAX_CLOUDS:
            caption = (
                "First two principal axes of all points together. Circles: queries (student); diamonds: keys (teacher)."
            )
            charts.append(Chart(f"cloud-{run.title}", run.title, caption, cloud_figure(run.analysis.points)))
    return charts


def heatmap_browser(report: Report, *, max_chars: int = MAX_HEATMAP_CHARS) -> HeatmapBrowser:
    """Heatmaps of as many runs as there is room for, every variant's first seed before any second."""
    data: list[dict[str, Any]] = []
    left_out = []
    room = max_chars
    for run in _by_turns(report):
        if not run.analysis.heatmaps:
            continue
        entry = {"run": run.title, "examples": [_example(example) for example in run.analysis.heatmaps]}
        size = len(json.dumps(entry, ensure_ascii=False))
        if size > room:
            left_out.append(run.title)
            continue
        room -= size
        data.append(entry)
    return HeatmapBrowser(data, tuple(left_out))


def _by_turns(report: Report) -> Iterator[Run]:
    runs = {variant: report.runs_of(variant) for variant in report.variants}
    for turn in range(max(map(len, runs.values()), default=0)):
        yield from (own[turn] for own in runs.values() if turn < len(own))


def _example(example: HeatmapExample) -> dict[str, Any]:
    return {
        "name": example.name,
        "student": example.student,
        "teacher": example.teacher,
        "studentChunks": example.student_chunks,
        "teacherChunks": example.teacher_chunks,
        "attentions": [
            {"name": _attention(name), "cells": list(_flat(cells))} for name, cells in example.attentions.items()
        ],
    }


def _flat(cells: Iterable[tuple[int, int, float]]) -> Iterator[int]:
    """Row, column and weight in thousandths, one after the other: short as JSON."""
    for row, column, weight in cells:
        yield from (row, column, round(1000 * weight))
