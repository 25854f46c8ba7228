"""Heatmaps: pages cut at chunks, every cell that should be drawn and no other, nothing unescaped."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from random_example import random_example

from vocabridge.analysis.heatmap import INSIDE, OUTSIDE, HeatmapData, heatmap_pages, split_pages

SVG = "{http://www.w3.org/2000/svg}"


def data_of(seed: int, *, num_segments: int = 9) -> HeatmapData:
    example = random_example(seed, num_segments=num_segments)
    return HeatmapData(
        weights=example.weights["after"],
        student_names=[f"s{index}" for index in range(len(example.student.labels))],
        teacher_names=[f"t{index}" for index in range(len(example.teacher.labels))],
        student_chunks=example.student.chunk_ids,
        teacher_chunks=example.teacher.chunk_ids,
        student_spans=example.student.spans,
        teacher_spans=example.teacher.spans,
    )


def cells(svg: str) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Fill, opacity and the weight in the tooltip of each drawn cell."""
    found = {}
    for shape in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if (title := shape.find(f"{SVG}title")) is not None:
            names, _, weight = title.text.rpartition(": ")
            student, _, teacher = names.partition(" \u2192 ")
            found[student, teacher] = (shape.get("fill"), float(shape.get("fill-opacity", 1)), float(weight))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_one_page_shows_every_visible_weight(seed: int) -> None:
    data = data_of(seed)
    (svg,) = heatmap_pages(data, title="example 1")
    drawn = cells(svg)
    fills = set()
    for i, student in enumerate(data.student_names):
        for j, teacher in enumerate(data.teacher_names):
            weight = data.weights[i, j]
            if weight < 0.005:
                assert (student, teacher) not in drawn
                continue
            fill, opacity, told = drawn.pop((student, teacher))
            same = data.student_chunks[i] == data.teacher_chunks[j] >= 0
            assert fill == (INSIDE if same else OUTSIDE)
            assert told == pytest.approx(weight, abs=0.0006)
            assert opacity == pytest.approx(weight if same else math.sqrt(weight), abs=0.006)
            fills.add(fill)
    assert not drawn
    assert fills == {INSIDE, OUTSIDE}


def test_outlines_are_the_chunks() -> None:
    data = data_of(2)
    (svg,) = heatmap_pages(data, title="example 1")
    outlines = [
        shape for shape in ElementTree.fromstring(svg).iter(f"{SVG}rect") if shape.get("stroke") and shape.get("x")
    ][1:]  # the first one explains the outline
    sizes = sorted((round(float(s.get("height")) / 14), round(float(s.get("width")) / 14)) for s in outlines)
    counts = [
        (int((data.student_chunks == chunk).sum()), int((data.teacher_chunks == chunk).sum()))
        for chunk in range(data.student_chunks.max() + 1)
    ]
    assert sizes == sorted([*counts, (len(data.student_names), len(data.teacher_names))])  # and the frame


@pytest.mark.parametrize("seed", range(6))
def test_pages_cut_both_sides_at_chunks(seed: int) -> None:
    data = data_of(seed, num_segments=40)
    pages = split_pages(data.student_chunks, data.teacher_chunks, page_tokens=16)
    assert len(pages) > 3
    for side, chunks in (("student", data.student_chunks), ("teacher", data.teacher_chunks)):
        ranges = [getattr(page, side) for page in pages]
        assert [position for part in ranges for position in part] == list(range(len(chunks)))
        homes = [{chunk for chunk in chunks[list(part)].tolist() if chunk >= 0} for part in ranges]
        assert sum(map(len, homes)) == len(set().union(*homes)), "a chunk lies on two pages"
    # A page breaks the limit only by one chunk with the chunkless positions before it, and is never needlessly short.
    for page, following in pairwise(pages):
        assert max(len(page.student), len(page.teacher)) <= 16 + 4
        first = data.student_chunks[following.student.start :]
        next_chunk = first[first >= 0][0]
        student_end = np.nonzero(data.student_chunks == next_chunk)[0][-1] + 1
        teacher_end = np.nonzero(data.teacher_chunks == next_chunk)[0][-1] + 1
        assert max(student_end - page.student.start, teacher_end - page.teacher.start) > 16


def test_pages_hide_no_attention() -> None:
    data = data_of(3, num_segments=40)
    weights = np.where(data.weights < 0.01, 0, data.weights)
    pages = heatmap_pages(replace(data, weights=weights), title="", page_tokens=16)
    assert len(pages) > 3
    told = dict.fromkeys(data.student_names, 0.0)
    for number, svg in enumerate(pages):
        assert f"page {number + 1} of {len(pages)}" in svg
        drawn = cells(svg)
        for (student, _), (_, _, weight) in drawn.items():
            told[student] += weight
        assert ("earlier" in svg, "later" in svg) == (number > 0, number < len(pages) - 1)
    for index, name in enumerate(data.student_names):
        assert told[name] == pytest.approx(weights[index].sum(), abs=0.03)


def test_everything_from_data_is_escaped() -> None:
    data = data_of(1)
    nasty = '<script>alert("1")</script>&'
    named = replace(data, student_names=[nasty] * len(data.student_names))
    (svg,) = heatmap_pages(named, title=nasty)
    root = ElementTree.fromstring(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert "<script" not in svg
    assert root.get("aria-label").startswith(nasty)
    assert any(nasty in (title.text or "") for title in root.iter(f"{SVG}title"))


def test_responses_without_any_chunk_are_one_page() -> None:
    data = data_of(1)
    none = np.full(len(data.student_names), -1), np.full(len(data.teacher_names), -1)
    (svg,) = heatmap_pages(replace(data, student_chunks=none[0], teacher_chunks=none[1]), title="")
    assert {fill for fill, _, _ in cells(svg).values()} == {OUTSIDE}


def test_long_names_are_cut_and_the_picture_has_room_for_them() -> None:
    data = data_of(1)
    long = replace(data, student_names=["漢" * 40] * len(data.student_names))
    (svg,) = heatmap_pages(long, title="")
    assert "漢" * 17 + "\u2026" in svg
    words = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if (text.text or "").startswith("漢")]
    assert all(float(text.get("x")) >= 17 * 2 * 6.5 for text in words)


def test_names_of_rows_that_stray_are_red() -> None:
    data = data_of(4)
    (svg,) = heatmap_pages(data, title="")
    fills = {
        text.text: text.get("fill")
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if text.text in data.student_names
    }
    strays = []
    for index, name in enumerate(data.student_names):
        best = max(range(len(data.teacher_names)), key=lambda column: data.weights[index, column])
        chunk = data.student_chunks[index]
        strays.append(chunk >= 0 and data.teacher_chunks[best] != chunk)
        assert (fills[name] == OUTSIDE) == strays[-1]
    assert 0 < sum(strays) < len(strays)


def test_the_legend_fits() -> None:
    (svg,) = heatmap_pages(data_of(1), title="")
    root = ElementTree.fromstring(svg)
    (words,) = (text for text in root.iter(f"{SVG}text") if "columns: teacher" in (text.text or ""))
    assert float(words.get("x")) + 6.7 * len(words.text) < float(root.get("width"))
