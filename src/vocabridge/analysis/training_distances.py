"""Distances between queries and keys over training, as the trainer has measured and logged them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vocabridge.errors import UserError
from vocabridge.trainer import METRICS_FILE

_PREFIX = "probe/"


@dataclass(frozen=True, slots=True)
class DistanceRow:
    """The measurements after ``step`` optimizer steps."""

    step: int
    values: dict[str, float]
    """By name, as :meth:`vocabridge.objectives.base.Objective.probe` calls them."""


@dataclass(frozen=True, slots=True)
class DistanceTable:
    """All measurements of a run, by ascending step; empty where none was made or no log is left."""

    names: tuple[str, ...]
    """Of all measures, in the order of the log."""
    rows: tuple[DistanceRow, ...]

    def to_json(self) -> str:
        """``[{"step": 0, "mmd_squared": ...}, ...]``, indented."""
        return json.dumps([{"step": row.step, **row.values} for row in self.rows], indent=2)


def training_distances(folder: Path) -> DistanceTable:
    """Read the ``probe/...`` entries of a run folder's log; of a step that was measured twice, the later one.

    Raises:
        UserError: a line of the log is broken.
    """
    path = folder / METRICS_FILE
    rows: dict[int, dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            measured = {name.removeprefix(_PREFIX): entry[name] for name in entry if name.startswith(_PREFIX)}
            if measured:
                rows[int(entry["step"])] = measured
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number}: is no log entry of a run; remove the line.") from error
    names = dict.fromkeys(name for values in rows.values() for name in values)
    return DistanceTable(tuple(names), tuple(DistanceRow(step, rows[step]) for step in sorted(rows)))


def render_distances(table: DistanceTable, *, most_rows: int = 12) -> Table:
    """First, last and evenly spaced rows between them, for a terminal."""
    shown = Table("step", title="Queries and keys over training (fixed probe set)", title_justify="left")
    for name in table.names:
        shown.add_column(name.replace("_", " "), justify="right")
    count = len(table.rows)
    few = min(count, most_rows)
    for index in sorted({round(k * (count - 1) / max(few - 1, 1)) for k in range(few)}):
        row = table.rows[index]
        cells = [f"{row.values[name]:.4g}" if name in row.values else "-" for name in table.names]
        shown.add_row(str(row.step), *cells)
    return shown
