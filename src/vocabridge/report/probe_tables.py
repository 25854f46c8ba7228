"""What ``vocabridge analyze`` found: tables of the probe, point clouds, and the data of the heatmap browser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vocabridge.report.analysis_files import Estimate, GroupChange, GroupResult, HeatmapExample, Probe, RepetitionEffect
from vocabridge.report.collect import Report, Run
from vocabridge.report.figures import cloud_figure
from vocabridge.report.view import MISSING, Cell, Chart, Table, number, with_interval, words

MAX_HEATMAP_CHARS = 2_000_000
"""Of all heatmaps together as JSON, which is packed to about a fifth; so that a page stays below a few megabytes."""
MAX_CLOUDS = 12

_CLOUD_CAPTION = (
    "First two principal axes of all points together. Blue circles: queries (student); orange diamonds: keys (teacher)."
)

_ALL = "all"
_MEASURES = {
    "mass_in_chunk": "attention in chunk",
    "top1_in_chunk": "top-1 in chunk",
    "distance_bytes": "distance, bytes",
    "top1_distance_bytes": "top-1 distance, bytes",
    "entropy": "entropy, nats",
}
_MAIN_MEASURES = ("mass_in_chunk", "top1_in_chunk")
_ATTENTIONS = {
    "uniform": "uniform: knows nothing",
    "before": "before training",
    "after": "after training",
    "cla": "CLA: after, in chunk only",
    "clp": "CLP: uniform in chunk",
    "eta": "ETA: exact pairs",
}


@dataclass(frozen=True, slots=True)
class ProbeDetails:
    """One run: every attention on all positions, and on every group of positions."""

    title: str
    overall: Table
    groups: Table


@dataclass(frozen=True, slots=True)
class ProbeTables:
    """A line a run, and the details of each."""

    runs: Table
    details: tuple[ProbeDetails, ...]


@dataclass(frozen=True, slots=True)
class HeatmapBrowser:
    """Heatmaps as the page's script reads them, and the runs that had no room."""

    data: list[dict[str, Any]]
    left_out: tuple[str, ...]


def probe_tables(report: Report) -> ProbeTables | None:
    """Tables of all runs that were analysed; None without one."""
    probes = {run.title: run.analysis.probe for run in report.runs if run.analysis.probe is not None}
    if not probes:
        return None
    headings = ["run"]
    for measure in _MAIN_MEASURES:
        headings += [f"{_measure(measure)}: before", "after", "change"]
    rows = [
        (words(title), *(cell for measure in _MAIN_MEASURES for cell in _before_after(probe, measure)))
        for title, probe in probes.items()
    ]
    first = next(iter(probes.values()))
    caption = f"All positions, before and after training; {first.confidence:.0%} intervals over responses"
    details = tuple(_details(title, probe) for title, probe in probes.items())
    return ProbeTables(Table(caption, tuple(headings), tuple(rows)), details)


def _before_after(probe: Probe, measure: str) -> tuple[Cell, Cell, Cell]:
    overall = {each.attention: each.measures.get(measure) for each in probe.results if each.grouping == _ALL}
    change = next((each.measures.get(measure) for each in probe.changes if each.grouping == _ALL), None)
    before, after = (_estimate(overall.get(attention), "{:.3f}") for attention in ("before", "after"))
    return before, after, _estimate(change, "{:+.3f}")


def _details(title: str, probe: Probe) -> ProbeDetails:
    names = _measure_names(probe)
    measures = tuple(_measure(name) for name in names)
    overall = [
        (words(_attention(each.attention)), *_cells(each, names)) for each in probe.results if each.grouping == _ALL
    ]
    overall += [
        (words("change: after less before"), MISSING, MISSING, *_estimates(each, names, signed=True))
        for each in probe.changes
        if each.grouping == _ALL
    ]
    about = f"All positions of {probe.examples} responses from {probe.data}"
    return ProbeDetails(
        title=title,
        overall=Table(about, ("attention", "positions", "coverage", *measures), tuple(overall)),
        groups=Table(
            "By kind of position",
            ("by", "group", "attention", "positions", "coverage", *measures),
            _group_rows(probe, names),
        ),
    )


def _group_rows(probe: Probe, names: Sequence[str]) -> tuple[tuple[Cell, ...], ...]:
    """Every group under every attention, and at the end what repeated tokens cost."""
    groups = [
        (words(each.grouping), words(each.group), words(_attention(each.attention)), *_cells(each, names))
        for each in probe.results
        if each.grouping != _ALL
    ]
    effects = [
        (
            *map(words, (each.grouping, "repeated less unique", _attention(each.attention))),
            MISSING,
            MISSING,
            *_estimates(each, names, signed=True),
        )
        for each in probe.repetition
    ]
    return (*groups, *effects)


def _measure_names(probe: Probe) -> list[str]:
    return list(dict.fromkeys(name for each in probe.results for name in each.measures))


def _measure(name: str) -> str:
    return _MEASURES.get(name, name.replace("_", " "))


def _attention(name: str) -> str:
    return _ATTENTIONS.get(name, name)


def _cells(result: GroupResult, names: Sequence[str]) -> tuple[Cell, ...]:
    first = (number(result.positions, "{:,}"), number(result.coverage, "{:.2f}"))
    return (*first, *_estimates(result, names, signed=False))


def _estimates(
    part: GroupResult | GroupChange | RepetitionEffect, names: Sequence[str], *, signed: bool
) -> tuple[Cell, ...]:
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
            charts.append(Chart(f"cloud-{run.title}", run.title, _CLOUD_CAPTION, cloud_figure(run.analysis.points)))
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
    chosen = f" ({example.chosen})" if example.chosen else ""
    return {
        "name": example.name + chosen,
        "note": _cut_note(example),
        "student": example.student,
        "teacher": example.teacher,
        "studentChunks": example.student_chunks,
        "teacherChunks": example.teacher_chunks,
        "attentions": [
            {"name": _with_mass(name, example), "cells": list(_flat(cells))}
            for name, cells in example.attentions.items()
        ],
    }


def _with_mass(attention: str, example: HeatmapExample) -> str:
    mass = example.mass_in_chunk.get(attention)
    return _attention(attention) + ("" if mass is None else f", {mass:.2f} in chunk")


def _cut_note(example: HeatmapExample) -> str:
    """Says so where a response is longer than what is shown."""
    shown, all_tokens = len(example.student), example.student_tokens
    if all_tokens is None or all_tokens <= shown:
        return ""
    return f"The first {shown} of the response's {all_tokens} student tokens; the pictures in the run folder have all."


def _flat(cells: Iterable[tuple[int, int, float]]) -> Iterator[int]:
    """Row, column and weight in thousandths, one after the other: short as JSON."""
    for row, column, weight in cells:
        yield from (row, column, round(1000 * weight))
