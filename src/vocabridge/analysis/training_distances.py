"""Distances between queries and keys: over training, as the trainer has logged them, and on the analysed data.

``distances.json``::

    {"bandwidth_factors": [0.25, 0.5, 1, 2, 4],
     "training": [{"step": 0, "mmd_squared": 0.05, ...}, ...],    fixed probe set of training examples
     "data": {"before": {"mmd_squared": 0.06, ...}, "after": {...}}}    first of the analysed examples

Names and definitions are those of :func:`vocabridge.losses.distances.distribution_report`; ``mmd_squared_x0.25`` is at
0.25 times the median distance between two keys. ``training`` has what the objective adds, too (``coverage``,
``attention_in_chunk``...). A measurement that was not possible is absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from vocabridge.analysis.attention import Points
from vocabridge.errors import UserError
from vocabridge.losses.distances import BANDWIDTH_FACTORS
from vocabridge.metrics_log import METRICS_FILE, parse_log
from vocabridge.objectives._cross_model_attention import distances

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


@dataclass(frozen=True, slots=True)
class StageDistances:
    """Distances on the same examples before and after training, by name."""

    before: dict[str, float]
    after: dict[str, float]


def training_distances(folder: Path, *, part: str = "") -> DistanceTable:
    """Read the ``probe/...`` entries of a run folder's log; of a step that was measured twice, the later one.

    Args:
        folder: run folder.
        part: of a composition, the part whose entries are wanted.

    Raises:
        UserError: a line of the log is broken.
    """
    path = folder / METRICS_FILE
    prefix = f"{_PREFIX}{part}/" if part else _PREFIX
    log = parse_log(path.read_text(encoding="utf-8") if path.is_file() else "")
    if log.broken:
        raise UserError(f"{path}:{log.broken[0]}: is no log entry of a run; remove the line.")
    measured = {name.removeprefix(prefix): log.values[name] for name in log.values if name.startswith(prefix)}
    steps = sorted({step for values in measured.values() for step in values})
    rows = (
        DistanceRow(step, {name: values[step] for name, values in measured.items() if step in values}) for step in steps
    )
    return DistanceTable(tuple(measured), tuple(rows))


def data_distances(points: Points) -> StageDistances:
    """Measure queries and keys of some examples before and after training."""

    def finite(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if math.isfinite(value)}

    return StageDistances(finite(distances(points.before)), finite(distances(points.after)))


def distances_json(training: DistanceTable, data: StageDistances) -> str:
    """``distances.json``, see the module."""
    values = {
        "bandwidth_factors": BANDWIDTH_FACTORS,
        "training": [{"step": row.step, **row.values} for row in training.rows],
        "data": {"before": data.before, "after": data.after},
    }
    return json.dumps(values, indent=2, allow_nan=False)


def render_distances(training: DistanceTable, data: StageDistances, *, most_steps: int = 4) -> Table:
    """A measure per line, for a terminal: first, last and evenly spaced steps between them, and the analysed data."""
    title = "Queries and keys: over training (fixed probe set of training examples), and on the analysed data"
    shown = Table(title=title, title_justify="left", show_edge=False, padding=(0, 0))
    shown.add_column("measure", min_width=11)
    count = len(training.rows)
    few = min(count, most_steps)
    chosen = [training.rows[k] for k in sorted({round(k * (count - 1) / max(few - 1, 1)) for k in range(few)})]
    for row in chosen:
        shown.add_column(f"step {row.step}", justify="right")
    for heading in ("data: before", "data: after"):
        shown.add_column(heading, justify="right")
    columns = [*(row.values for row in chosen), data.before, data.after]
    for name in dict.fromkeys([*data.before, *training.names]):
        cells = [f"{values[name]:.3g}" if name in values else "-" for values in columns]
        shown.add_row(Text(name.replace("_", " ")), *cells)
    return shown
