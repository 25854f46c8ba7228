"""Analyses as tables for a terminal of 80 columns; print them with a ``rich`` console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vocabridge.analysis.attention import AttentionName
from vocabridge.analysis.measures import MEASURES
from vocabridge.analysis.probe import ALL, Estimate, ProbeReport, RepetitionEffect
from vocabridge.analysis.training_distances import StageDistances

_TITLES: Mapping[AttentionName, str] = {
    "uniform": "uniform",
    "before": "before",
    "after": "after",
    "cla": "CLA bound",
    "clp": "CLP bound",
    "eta": "ETA bound",
}
_HEADINGS = dict(
    zip(MEASURES, ("mass in chunk", "top-1 in chunk", "distance", "top-1 distance", "entropy"), strict=True)
)


def render_probe(report: ProbeReport) -> RenderableType:
    """All attentions, and the mass in chunk by kind of position."""
    share = report.positions_in_chunk / report.supervised_positions
    summary = Text(
        f"{report.run} ({report.objective}) on {report.data}: {report.examples} examples, "
        f"{report.positions_in_chunk:,} of {report.supervised_positions:,} student positions in a chunk ({share:.1%}); "
        f"{report.confidence:.0%} intervals over examples. Distances in bytes, entropy in nats. uniform knows nothing; "
        "CLA: after, in the chunk only; CLP: uniform in the chunk; ETA: exact pairs."
    )
    return Group(summary, _overall_table(report), _groups_table(report))


def render_comparison(found: Sequence[tuple[ProbeReport, StageDistances]]) -> Table:
    """A line for each of several runs."""
    title = "Mass in chunk, and MMD^2 between queries and keys on the analysed data"
    headings = ("before", "after", "after - before", "MMD^2 before", "MMD^2 after")
    table = Table("run", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for report, distances in found:
        (change,) = (each for each in report.changes if each.grouping == ALL)
        masses = [report.result(name).measures["mass_in_chunk"] for name in ("before", "after")]
        mmd = [f"{stage['mmd_squared']:.4f}" for stage in (distances.before, distances.after)]
        difference = _cell(change.measures["mass_in_chunk"], sign=True)
        table.add_row(Text(f"{report.run} ({report.objective})"), *map(_cell, masses), difference, *mmd)
    return table


def _overall_table(report: ProbeReport) -> Table:
    table = Table(title="Attention of student positions", title_justify="left")
    for heading in ("attention", "count", *_HEADINGS.values()):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for result in report.results:
        if result.grouping == ALL:
            cells = [_cell(result.measures[name]) for name in MEASURES]
            table.add_row(_TITLES[result.attention], f"{result.positions:,}", *cells)
    for change in report.changes:
        if change.grouping == ALL:
            table.add_row("after - before", "", *(_cell(change.measures[name], sign=True) for name in MEASURES))
    return table


def _groups_table(report: ProbeReport) -> Table:
    names: tuple[AttentionName, ...] = ("uniform", "before", "after", "clp")
    table = Table("positions", "count", title="Mass in chunk by kind of position", title_justify="left")
    for name in names:
        table.add_column(_TITLES[name], justify="right")
    table.add_column("after - before", justify="right")
    for change in report.changes:
        found = [report.result(name, change.grouping, change.group) for name in names]
        cells = [_cell(each.measures["mass_in_chunk"]) for each in found]
        title = change.group if change.grouping == ALL else f"{change.grouping} {change.group}"
        difference = _cell(change.measures["mass_in_chunk"], sign=True)
        table.add_row(title, f"{found[0].positions:,}", *cells, difference)
    for grouping, effects in _effects_by_grouping(report).items():
        cells = [_cell(effects[name].measures["mass_in_chunk"], sign=True) for name in names]
        table.add_row(f"{grouping}: repeated - unique", "", *cells, "")
    return table


def _effects_by_grouping(report: ProbeReport) -> dict[str, dict[AttentionName, RepetitionEffect]]:
    found: dict[str, dict[AttentionName, RepetitionEffect]] = {}
    for effect in report.repetition:
        found.setdefault(effect.grouping, {})[effect.attention] = effect
    return found


def _cell(estimate: Estimate, *, sign: bool = False) -> Text:
    def number(value: float) -> str:
        # Three digits are enough where one does not stand for bytes.
        return f"{value:{'+' if sign else ''}.{3 if abs(value) < 10 else 1}f}"

    if estimate.low is None or estimate.high is None:
        return Text(number(estimate.mean))
    return Text(f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]")
