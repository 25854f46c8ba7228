"""Chunks against a brute force over every byte position."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tokenizer_zoo
from adversarial_text import adversarial_texts
from vocabridge.alignment import byte_spans, chunk_ids

Spans = list[tuple[int, int]]


def brute_force(student: Spans, teacher: Spans, num_bytes: int) -> tuple[list[int], list[int]]:
    """Cut at each byte position that no token of either side lies across, then keep segments with tokens of both."""

    def crossed(position: int) -> bool:
        return any(start < position < end for start, end in (*student, *teacher))

    cuts = [position for position in range(num_bytes + 1) if not crossed(position)]
    segments = list(itertools.pairwise(cuts))

    def inside(spans: Spans, low: int, high: int) -> list[int]:
        return [index for index, (start, end) in enumerate(spans) if start < end and low <= start and end <= high]

    chunks = [pair for low, high in segments if all(pair := (inside(student, low, high), inside(teacher, low, high)))]
    results = []
    for side, spans in enumerate((student, teacher)):
        numbers = [-1] * len(spans)
        for number, pair in enumerate(chunks):
            for index in pair[side]:
                numbers[index] = number
        for index in reversed(range(len(spans) - 1)):
            if spans[index][0] == spans[index][1]:
                numbers[index] = numbers[index + 1]
        results.append(numbers)
    return results[0], results[1]


def random_spans(generator: random.Random, num_bytes: int, *, disorder: float) -> Spans:
    """A random tokenization; with ``disorder`` also gaps, empty tokens and tokens that share bytes."""
    spans: Spans = []
    position = 0
    while position < num_bytes:
        end = min(num_bytes, position + generator.choice((1, 1, 2, 3, 5)))
        if generator.random() > disorder:
            spans.append((position, end))
        elif generator.random() < 0.4:
            spans.extend([(position, position), (position, end)])
        elif generator.random() < 0.5:
            spans.extend([(position, end)] * 2)
        position = end
    if generator.random() < disorder:
        spans.append((num_bytes, num_bytes))
    return spans


def _as_array(spans: Spans) -> np.ndarray:
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


@pytest.mark.parametrize("disorder", [0.0, 0.2, 0.6])
def test_chunks_equal_a_brute_force(disorder: float) -> None:
    generator = random.Random(8)
    num_chunks = 0
    for _ in range(1500):
        num_bytes = generator.randint(0, 14)
        student, teacher = (random_spans(generator, num_bytes, disorder=disorder) for _ in range(2))
        found = chunk_ids(_as_array(student), _as_array(teacher))
        expected = brute_force(student, teacher, num_bytes)
        assert tuple(side.tolist() for side in found) == expected, (student, teacher)
        num_chunks += max(expected[0], default=-1) + 1
    assert num_chunks > 1500


def test_a_brute_force_notices_a_boundary_moved_by_one_byte() -> None:
    student, teacher = [(0, 2), (2, 4), (4, 6)], [(0, 2), (2, 6)]
    moved = [(0, 1), (1, 4), (4, 6)]
    assert brute_force(student, teacher, 6) != brute_force(moved, teacher, 6)


def test_identical_tokenizations_give_the_identity(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in adversarial_texts(200, seed=9):
        spans = byte_spans(tiny_bpe_tokenizer, text).spans
        student, teacher = chunk_ids(spans, spans)
        assert student.tolist() == teacher.tolist() == list(range(len(spans)))


@settings(max_examples=300, deadline=None)
@given(
    ends=st.tuples(*[st.sets(st.integers(1, 39), max_size=20)] * 2),
)
def test_chunks_of_partitions_end_at_the_common_ends(ends: tuple[set[int], set[int]]) -> None:
    bounds = [[0, *sorted(side), 40] for side in ends]
    spans = [np.stack((side[:-1], side[1:]), axis=1) for side in map(np.array, bounds)]
    common = sorted((ends[0] & ends[1]) | {40})
    for side, numbers in zip(spans, chunk_ids(spans[0], spans[1]), strict=True):
        assert numbers.dtype == np.int64
        assert [int(side[numbers == number, 1].max()) for number in range(len(common))] == common
        assert (np.diff(numbers) >= 0).all()


def test_tokens_that_the_other_side_does_not_cover_are_in_no_chunk() -> None:
    student, teacher = chunk_ids(_as_array([(0, 1), (1, 2), (2, 3)]), _as_array([(0, 1), (2, 3)]))
    assert student.tolist() == [0, -1, 1]
    assert teacher.tolist() == [0, 1]


def test_empty_sides() -> None:
    nothing = np.empty((0, 2), dtype=np.int64)
    student, teacher = chunk_ids(_as_array([(0, 1), (1, 2)]), nothing)
    assert student.tolist() == [-1, -1]
    assert teacher.shape == (0,)


def test_chunks_of_two_real_tokenizers_cover_the_same_bytes(
    smollm2_tokenizer: PreTrainedTokenizerFast, gemma_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = one_to_one = 0
    for line in tokenizer_zoo.CORPUS:
        data = line.encode()
        spans = [byte_spans(tokenizer, line).spans for tokenizer in (smollm2_tokenizer, gemma_tokenizer)]
        numbers = chunk_ids(spans[0], spans[1])
        assert all((side >= 0).all() for side in numbers)
        for number in range(int(numbers[0].max()) + 1):
            covered = [
                b"".join(data[start:end] for start, end in side[ids == number])
                for side, ids in zip(spans, numbers, strict=True)
            ]
            assert covered[0] == covered[1]
            pairs += 1
            one_to_one += all((ids == number).sum() == 1 for ids in numbers)
    assert pairs > 150
    assert one_to_one / pairs > 0.6
