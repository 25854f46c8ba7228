"""Heatmaps of cross-model attention: student tokens down, teacher tokens across, chunks outlined, in pages.

Attention inside the right chunk is blue, as strong as its weight; a chunk's outline shows where it should be. Attention
outside is red and sharpened: as strong as the root of its weight, so that 0.05 shows. The name of a row whose highest
weight is outside its chunk is red too. A long response is cut at chunk boundaries into pages. Each page has the teacher
tokens of its own chunks and, at either end, a column with what its rows give to the tokens of earlier and later pages,
so that no attention is hidden.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vocabridge.analysis.attention import AttentionName, ExampleAttention
from vocabridge.analysis.svg import INK, Box, Drawing
from vocabridge.analysis.token_names import shortened, token_names
from vocabridge.pairs import PairTokenizer

PAGE_TOKENS = 64
"""Most tokens of either side on a page, unless one chunk alone has more."""

LEAST_DRAWN = 0.005
"""Lighter cells look white; leaving them out keeps a page small."""

INSIDE, OUTSIDE = "#0b5cad", "#d1242f"

_CELL, _LETTER, _LABEL_CHARS = 14.0, 6.7, 18
_HEADER, _LEAST_WIDTH = 46.0, 680.0
_EARLIER, _LATER = "earlier", "later"


@dataclass(frozen=True, slots=True, eq=False)
class HeatmapData:
    """What a heatmap shows."""

    weights: np.ndarray
    """``[R_s, R_t]``"""
    student_names: Sequence[str]
    """``R_s`` labels of the rows."""
    teacher_names: Sequence[str]
    """``R_t`` labels of the columns."""
    student_chunks: np.ndarray
    """``[R_s]``, -1 in none."""
    teacher_chunks: np.ndarray
    """``[R_t]``"""
    student_spans: np.ndarray
    """``[R_s, 2]`` half-open byte ranges of the response."""
    teacher_spans: np.ndarray
    """``[R_t, 2]``"""


@dataclass(frozen=True, slots=True)
class Page:
    """Half-open ranges of student and teacher positions."""

    student: range
    teacher: range


def heatmap_data(example: ExampleAttention, attention: AttentionName, *, pair_tokenizer: PairTokenizer) -> HeatmapData:
    """One attention of an example, its tokens named by the tokens that the positions predict."""
    assert pair_tokenizer.teacher is not None
    return HeatmapData(
        weights=example.weights[attention],
        student_names=token_names(pair_tokenizer.student.tokenizer, example.student.labels),
        teacher_names=token_names(pair_tokenizer.teacher.tokenizer, example.teacher.labels),
        student_chunks=example.student.chunk_ids,
        teacher_chunks=example.teacher.chunk_ids,
        student_spans=example.student.spans,
        teacher_spans=example.teacher.spans,
    )


def heatmap_pages(data: HeatmapData, *, title: str, page_tokens: int = PAGE_TOKENS) -> list[str]:
    """SVG pictures of a heatmap, one per page."""
    pages = split_pages(data.student_chunks, data.teacher_chunks, page_tokens=page_tokens)
    titles = [f"{title}, page {number} of {len(pages)}" for number in range(1, len(pages) + 1)]
    return [_draw(data, page, words) for page, words in zip(pages, titles, strict=True)]


def split_pages(
    student_chunks: np.ndarray, teacher_chunks: np.ndarray, *, page_tokens: int = PAGE_TOKENS
) -> list[Page]:
    """Cut both sides at the same chunk boundaries, each page as long as it may be.

    Positions in no chunk go to the page of the next chunk; those behind the last chunk to the last page.

    Args:
        student_chunks: ``[R_s]`` chunk of each position, -1 in none.
        teacher_chunks: ``[R_t]``.
        page_tokens: most positions of either side on a page, where chunks let it be.
    """
    ends = np.stack([_chunk_ends(student_chunks), _chunk_ends(teacher_chunks)], axis=1)  # [C, 2]
    if len(ends):
        ends[-1] = len(student_chunks), len(teacher_chunks)
    else:
        ends = np.array([[len(student_chunks), len(teacher_chunks)]])
    cuts = [np.zeros(2, dtype=np.int64)]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or (following - cuts[-1]).max() > page_tokens:
            cuts.append(end)
    return [Page(range(int(start[0]), int(end[0])), range(int(start[1]), int(end[1]))) for start, end in pairwise(cuts)]


def _chunk_ends(chunks: np.ndarray) -> np.ndarray:
    ends = np.zeros(int(chunks.max(initial=-1)) + 1, dtype=np.int64)
    (positions,) = np.nonzero(chunks >= 0)
    np.maximum.at(ends, chunks[positions], positions + 1)
    return ends


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the cell of the page's first student and first teacher token stands, in pixels."""

    left: float
    top: float

    def cell(self, row: int, column: int, *, rows: int = 1, columns: int = 1) -> Box:
        """A block of cells; column -1 holds what earlier pages get."""
        return Box(self.left + column * _CELL, self.top + row * _CELL, columns * _CELL, rows * _CELL)


def _draw(data: HeatmapData, page: Page, title: str) -> str:
    rows = [shortened(data.student_names[position], _LABEL_CHARS) for position in page.student]
    columns = [shortened(data.teacher_names[position], _LABEL_CHARS) for position in page.teacher]
    if page.teacher.start > 0:
        columns.insert(0, _EARLIER)
    if page.teacher.stop < len(data.teacher_names):
        columns.append(_LATER)
    longest = [max(map(_letters, names)) * _LETTER for names in (rows, columns)]
    first_column = -1 if page.teacher.start > 0 else 0
    layout = _Layout(longest[0] + 16 - first_column * _CELL, _HEADER + longest[1] + 10)
    width = layout.left + len(columns) * _CELL + longest[1] / 2 + 10
    drawing = Drawing(max(width, _LEAST_WIDTH), layout.top + len(rows) * _CELL + 12)
    drawing.describe(title)
    drawing.text(10, 18, title, size=13)
    _draw_legend(drawing)
    for row, (position, name) in enumerate(zip(page.student, rows, strict=True)):
        fill = OUTSIDE if _strays(data, position) else INK
        drawing.text(longest[0] + 10, layout.top + row * _CELL + 11, name, anchor="end", fill=fill)
    for column, name in enumerate(columns, start=first_column):
        fill = INK if 0 <= column < len(page.teacher) else "#6e7781"
        drawing.text(layout.left + column * _CELL + 11, layout.top - 6, name, angle=-60, fill=fill)
    for row, position in enumerate(page.student):
        _draw_row(drawing, data, page, layout, position=position, row=row)
    drawing.rectangle(layout.cell(0, 0, rows=len(rows), columns=len(page.teacher)), stroke="#d0d7de")
    _draw_chunks(drawing, data, page, layout)
    return drawing.to_svg()


def _strays(data: HeatmapData, position: int) -> bool:
    """Whether a position is in a chunk and its highest weight outside."""
    weights, chunk = data.weights[position], data.student_chunks[position]
    return bool(chunk >= 0 and weights.any() and data.teacher_chunks[weights.argmax()] != chunk)


def _letters(name: str) -> int:
    """How wide a name is, in Latin letters."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in name)


def _draw_legend(drawing: Drawing) -> None:
    entries = ((INSIDE, "in chunk"), (OUTSIDE, "outside (sharpened)"), ("none", "chunk"))
    x = 10.0
    for colour, words in entries:
        drawing.rectangle(Box(x, 26, 12, 12), fill=colour, stroke=INK if colour == "none" else None)
        drawing.text(x + 17, 36, words)
        x += 34 + len(words) * _LETTER
    drawing.text(x, 36, "rows: student, columns: teacher; red name: strays")


def _draw_row(drawing: Drawing, data: HeatmapData, page: Page, layout: _Layout, *, position: int, row: int) -> None:
    weights, chunk = data.weights[position], data.student_chunks[position]
    here = [
        (column, weights[other], chunk >= 0 and data.teacher_chunks[other] == chunk, data.teacher_names[other])
        for column, other in enumerate(page.teacher)
    ]
    earlier = (-1, weights[: page.teacher.start].sum(), False, "earlier pages")
    later = (len(page.teacher), weights[page.teacher.stop :].sum(), False, "later pages")
    for column, weight, is_inside, name in (earlier, *here, later):
        if weight >= LEAST_DRAWN:
            drawing.rectangle(
                layout.cell(row, column),
                fill=INSIDE if is_inside else OUTSIDE,
                opacity=min(float(weight) ** (1.0 if is_inside else 0.5), 1.0),
                tooltip=f"{data.student_names[position]} \u2192 {name}: {weight:.3f}",
            )


def _draw_chunks(drawing: Drawing, data: HeatmapData, page: Page, layout: _Layout) -> None:
    student, teacher = data.student_chunks[page.student.start : page.student.stop], data.teacher_chunks
    for chunk in np.unique(student[student >= 0]):
        (rows,), (columns,) = np.nonzero(student == chunk), np.nonzero(teacher == chunk)
        first_row, first_column = int(rows[0]), int(columns[0]) - page.teacher.start
        size = int(rows[-1]) - first_row + 1, int(columns[-1] - columns[0]) + 1
        drawing.rectangle(layout.cell(first_row, first_column, rows=size[0], columns=size[1]), stroke=INK)
