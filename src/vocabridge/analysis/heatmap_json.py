"""``heatmaps.json``: a few examples with their attention, for pages that draw heatmaps themselves.

::

    {"digits": 3,                           weights are rounded to this many decimals
     "least_weight": 0.005,                 smaller ones are left out
     "most_tokens": 256, "most_in_row": 32,
     "examples": [
       {"name": "example 12",               the 12th response that was analysed
        "chosen": "first",                  or "least in chunk": see ``analyze``
        "student": ["a", ...],              R_s labels of the supervised positions, as ``token_names`` spells them
        "teacher": [...],                   R_t
        "student_spans": [[0, 1], ...],     bytes of the response, half-open; the end token's is empty
        "teacher_spans": [...],
        "student_chunks": [0, 1, 1, ...],   chunk of each position, -1 in none
        "teacher_chunks": [...],
        "student_tokens": 300,              of the whole example: more than R_s where it is cut
        "teacher_tokens": 290,
        "pages": [[0, 60, 0, 57], ...],     first and end student position, first and end teacher position
        "mass_in_chunk": {"before": 0.93, "after": 0.97},      over the whole example, null without a chunk
        "attentions": {"before": [[row, column, weight], ...], "after": [...]}}]}

A row sums to 1. What its listed weights lack lies on teacher positions beyond the cut, or is too little or too even to
show. An example is cut at the last chunk boundary that leaves at most ``most_tokens`` positions on either side (later,
where the first chunk alone has more). Of a row the ``most_in_row`` largest weights stay, less those that are no larger
than the next one: a row that attends evenly to a hundred tokens is empty and not a third full.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vocabridge.analysis.attention import AttentionName
from vocabridge.analysis.heatmap import LEAST_DRAWN, PAGE_TOKENS, HeatmapData, split_pages

MOST_TOKENS = 256
MOST_IN_ROW = 32
DIGITS = 3

Chosen = Literal["first", "least in chunk"]


@dataclass(frozen=True, slots=True, eq=False)
class HeatmapRecord:
    """One example of ``heatmaps.json``."""

    name: str
    chosen: Chosen
    heatmaps: dict[AttentionName, HeatmapData]
    """One per stage, alike but for the weights."""
    mass_in_chunk: dict[AttentionName, float]
    """NaN without a chunk."""


def heatmaps_json(records: Sequence[HeatmapRecord]) -> str:
    """The file, without white space."""
    values = {
        "digits": DIGITS,
        "least_weight": LEAST_DRAWN,
        "most_tokens": MOST_TOKENS,
        "most_in_row": MOST_IN_ROW,
        "examples": [_example(record) for record in records],
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _example(record: HeatmapRecord) -> dict[str, Any]:
    data = next(iter(record.heatmaps.values()))
    cut = split_pages(data.student_chunks, data.teacher_chunks, page_tokens=MOST_TOKENS)[0]
    rows, columns = cut.student.stop, cut.teacher.stop
    pages = split_pages(data.student_chunks[:rows], data.teacher_chunks[:columns], page_tokens=PAGE_TOKENS)
    return {
        "name": record.name,
        "chosen": record.chosen,
        "student": list(data.student_names[:rows]),
        "teacher": list(data.teacher_names[:columns]),
        "student_spans": data.student_spans[:rows].tolist(),
        "teacher_spans": data.teacher_spans[:columns].tolist(),
        "student_chunks": data.student_chunks[:rows].tolist(),
        "teacher_chunks": data.teacher_chunks[:columns].tolist(),
        "student_tokens": len(data.student_names),
        "teacher_tokens": len(data.teacher_names),
        "pages": [[page.student.start, page.student.stop, page.teacher.start, page.teacher.stop] for page in pages],
        "mass_in_chunk": {
            name: None if np.isnan(mass) else round(mass, DIGITS) for name, mass in record.mass_in_chunk.items()
        },
        "attentions": {
            name: sparse_weights(heatmap.weights[:rows, :columns]) for name, heatmap in record.heatmaps.items()
        },
    }


def sparse_weights(weights: np.ndarray) -> list[list[float]]:
    """``[row, column, weight]`` of the weights of ``[R_s, R_t]`` that are kept, by row and column."""
    kept = []
    for row, values in enumerate(weights.round(DIGITS)):
        shown = values[values >= LEAST_DRAWN]
        # The largest weight that is left out: weights as small are left out too.
        limit = np.sort(shown)[-MOST_IN_ROW - 1] if len(shown) > MOST_IN_ROW else 0.0
        (columns,) = np.nonzero((values >= LEAST_DRAWN) & (values > limit))
        kept += [[row, int(column), float(values[column])] for column in columns]
    return kept
