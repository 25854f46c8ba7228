"""The log of a run, ``metrics.jsonl``: a JSON object a line, which holds a step and quantities by name."""

from __future__ import annotations

import json
from dataclasses import dataclass

METRICS_FILE = "metrics.jsonl"

Log = dict[str, dict[int, float]]
"""Name -> step -> value."""


@dataclass(frozen=True, slots=True)
class ReadLog:
    """What a log holds.

    Attributes:
        values: of a step logged twice the later value; NaN and infinity as they are.
        broken: lines that are no entry, counted from 1. A last line without its end is being written and does not
            count.
    """

    values: Log
    broken: tuple[int, ...]


def parse_log(text: str) -> ReadLog:
    """Read the text of a log."""
    values: Log = {}
    broken = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
            numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if number < len(lines) or line.endswith("\n"):
                broken.append(number)
            continue
        for name, value in numbers.items():
            values.setdefault(name, {})[step] = value
    return ReadLog(values, tuple(broken))
