"""What templates are given: tables of cells and charts; numbers are words by then, escaping is the template's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell.

    Attributes:
        text: what is shown.
        order: what sorting goes by; None sorts last. Text cells go by their text.
        emphasis: shown strongly, as a significant p-value.
        is_number: right-aligned.
    """

    text: str
    order: float | None = None
    emphasis: bool = False
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A table that sorts by a click on a heading; ``headings`` beyond the first are right-aligned like their cells."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A plotly figure with its words."""

    key: str
    title: str
    caption: str
    figure: dict[str, Any] = field(repr=False)


def words(text: str, *, emphasis: bool = False) -> Cell:
    """A cell of text."""
    return Cell(text, emphasis=emphasis, is_number=False)


def number(value: float | None, pattern: str = "{:.2f}", *, emphasis: bool = False) -> Cell:
    """A cell of one number, a dash without."""
    return MISSING if value is None else Cell(pattern.format(value), value, emphasis)


MISSING = Cell("\u2013")


def with_interval(value: float | None, low: float | None, high: float | None, *, pattern: str) -> Cell:
    """A number and its interval, sorted by the number."""
    if value is None:
        return MISSING
    interval = "" if low is None or high is None else f" [{pattern.format(low)}, {pattern.format(high)}]"
    return Cell(pattern.format(value) + interval, value)


def listed(names: Sequence[str], *, last: str = "and") -> str:
    """Names in a row as a sentence has them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return f" {last} ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
