"""What ``heatmaps.json`` keeps of long responses and of even attention."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from random_example import random_example

from vocabridge.analysis.attention import ExampleAttention
from vocabridge.analysis.heatmap import HeatmapData
from vocabridge.analysis.heatmap_json import MOST_IN_ROW, MOST_TOKENS, HeatmapRecord, heatmaps_json, sparse_weights


def slow_sparse(weights: np.ndarray) -> list[list[float]]:
    kept = []
    for row, values in enumerate(weights.tolist()):
        shown = sorted(
            ((round(weight, 3), column) for column, weight in enumerate(values) if round(weight, 3) >= 0.005),
            key=lambda pair: -pair[0],
        )
        limit = shown[MOST_IN_ROW][0] if len(shown) > MOST_IN_ROW else 0
        kept += sorted([row, column, weight] for weight, column in shown if weight > limit)
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_weights_of_a_row_stay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(90, 0.5 + seed), size=12)
    kept = sparse_weights(weights)
    assert kept == slow_sparse(weights)
    counts = np.bincount([row for row, _, _ in kept], minlength=12)
    assert 10 < counts.min() <= counts.max() <= MOST_IN_ROW


def test_even_attention_is_empty_and_not_cut_somewhere() -> None:
    assert sparse_weights(np.full((2, 100), 0.01)) == []
    few = np.full((1, MOST_IN_ROW), 1 / MOST_IN_ROW)
    assert len(sparse_weights(few)) == MOST_IN_ROW


def heatmap(example: ExampleAttention, stage: str) -> HeatmapData:
    return HeatmapData(
        weights=example.weights[stage],
        student_names=[f"s{index}" for index in range(len(example.student.labels))],
        teacher_names=[f"\u6f22{index}" for index in range(len(example.teacher.labels))],
        student_chunks=example.student.chunk_ids,
        teacher_chunks=example.teacher.chunk_ids,
        student_spans=example.student.spans,
        teacher_spans=example.teacher.spans,
    )


def written(example: ExampleAttention, mass: float = 0.12345) -> dict:
    heatmaps = {stage: heatmap(example, stage) for stage in ("before", "after")}
    record = HeatmapRecord("example 1", "first", heatmaps, dict.fromkeys(("before", "after"), mass))
    text = heatmaps_json([record])
    assert "\u6f22" in text, "names are readable in the file"
    (found,) = json.loads(text)["examples"]
    return found


def test_a_long_response_is_cut_at_a_chunk_and_says_so() -> None:
    example = random_example(3, num_segments=300)
    found = written(example)
    rows, columns = len(found["student"]), len(found["teacher"])
    assert MOST_TOKENS - 8 < max(rows, columns) <= MOST_TOKENS
    assert (found["student_tokens"], found["teacher_tokens"]) == (
        len(example.student.labels),
        len(example.teacher.labels),
    )
    assert found["student_tokens"] > MOST_TOKENS
    homes = [set(side) - {-1} for side in (found["student_chunks"], found["teacher_chunks"])]
    assert homes[0] == homes[1], "a chunk is cut in two"
    assert len(found["student_spans"]) == len(found["student_chunks"]) == rows
    pages = found["pages"]
    assert (pages[0][0], pages[0][2], pages[-1][1], pages[-1][3]) == (0, 0, rows, columns)
    assert all(page[1] == following[0] for page, following in pairwise(pages))
    for stage in ("before", "after"):
        assert found["attentions"][stage] == slow_sparse(example.weights[stage][:rows, :columns])
    assert found["mass_in_chunk"]["after"] == 0.123
    assert len(json.dumps(found)) < 400_000


def test_without_a_chunk_there_is_no_mass() -> None:
    example = random_example(0)
    for side in (example.student, example.teacher):
        side.chunk_ids[:] = -1
    found = written(example, mass=float("nan"))
    assert found["mass_in_chunk"] == {"before": None, "after": None}
    assert len(found["pages"]) == 1
