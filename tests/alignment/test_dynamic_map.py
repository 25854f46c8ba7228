"""Pairs of likely tokens against loops over sets."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

import tokenizer_zoo
from vocabridge.alignment import shared_vocabulary
from vocabridge.alignment.dynamic_map import DynamicMap, TokenPairs
from warping_oracle import edit_distance, texts

BOTH_WAYS = [("byte_level_bpe", "sentencepiece_bpe"), ("sentencepiece_bpe", "byte_level_bpe")]


def both(names: tuple[str, str]) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    student, teacher = (getattr(tokenizer_zoo, name)() for name in names)
    return student, teacher


def dynamic_map(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, max_distance: float
) -> DynamicMap:
    return DynamicMap(
        student, teacher, end_token_ids=(student.eos_token_id, teacher.eos_token_id), max_distance=max_distance
    )


def pairs_by_loops(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_top: list[int],
    teacher_top: list[int],
    *,
    max_distance: float,
) -> set[tuple[int, int]]:
    """From the description, for one row."""
    shared = shared_vocabulary(student, teacher)
    partner = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    partner[student.eos_token_id] = teacher.eos_token_id
    pairs = {(s, t) for s, t in partner.items() if s in student_top or t in teacher_top}
    student_texts, teacher_texts = texts(student), texts(teacher)
    candidates = []
    for s_rank, s in enumerate(student_top):
        for t_rank, t in enumerate(teacher_top):
            left, right = student_texts[s], teacher_texts[t]
            if s in partner or t in partner.values() or not left or not right:
                continue
            distance = edit_distance(left, right) / (len(left) + len(right))
            if distance < max_distance:
                candidates.append((distance, t_rank, s_rank, s, t))
    for _, _, _, s, t in sorted(candidates):
        if all(s != mine and t != theirs for mine, theirs in pairs):
            pairs.add((s, t))
    return pairs


def row_pairs(found: TokenPairs, row: int) -> list[tuple[int, int]]:
    count = int(found.counts[row])
    assert (found.student_ids[row, count:] == -1).all()
    assert (found.teacher_ids[row, count:] == -1).all()
    return list(zip(found.student_ids[row, :count].tolist(), found.teacher_ids[row, :count].tolist(), strict=True))


def random_top(tokenizer: PreTrainedTokenizerBase, *, num_rows: int, k: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(len(tokenizer))[:k] for _ in range(num_rows)])


@pytest.mark.parametrize("names", BOTH_WAYS)
@pytest.mark.parametrize("max_distance", [0.0, 0.3, 0.5])
def test_pairs_by_loops(names: tuple[str, str], max_distance: float) -> None:
    student, teacher = both(names)
    tops = [random_top(side, num_rows=9, k=80, seed=seed) for seed, side in enumerate((student, teacher))]
    found = dynamic_map(student, teacher, max_distance=max_distance).pairs(*tops)
    num_dynamic = 0
    for row in range(9):
        expected = pairs_by_loops(
            student, teacher, tops[0][row].tolist(), tops[1][row].tolist(), max_distance=max_distance
        )
        pairs = row_pairs(found, row)
        assert set(pairs) == expected
        assert len(pairs) == len(expected), "a pair is counted twice"
        assert len({s for s, _ in pairs}) == len({t for _, t in pairs}) == len(pairs)
        num_dynamic += sum(texts(student)[s] != texts(teacher)[t] for s, t in pairs if texts(student)[s])
    assert found.num_dynamic == num_dynamic
    assert (num_dynamic > 5) == (max_distance > 0)


def test_id_0_is_a_token() -> None:
    """In the released code it means: unmapped."""
    plain = tokenizer_zoo.byte_level_bpe()
    tokenizer = tokenizer_zoo.raw_bytes()  # its ids begin with ordinary bytes
    assert texts(tokenizer)[0] == "!"
    partner = texts(plain).index("!")
    mapped = DynamicMap(tokenizer, plain, end_token_ids=(tokenizer.eos_token_id, plain.eos_token_id), max_distance=0.3)
    found = mapped.pairs(np.array([[0]]), np.array([[partner]]))
    assert row_pairs(found, 0) == [(0, partner)]
    mapped = DynamicMap(plain, tokenizer, end_token_ids=(plain.eos_token_id, tokenizer.eos_token_id), max_distance=0.3)
    found = mapped.pairs(np.array([[partner]]), np.array([[0]]))
    assert row_pairs(found, 0) == [(partner, 0)]


def test_end_tokens_pair_by_role() -> None:
    student, teacher = both(BOTH_WAYS[0])
    assert student.eos_token != teacher.eos_token
    found = dynamic_map(student, teacher, max_distance=0.3).pairs(
        np.array([[student.eos_token_id]]), np.array([[teacher.bos_token_id]])
    )
    assert row_pairs(found, 0) == [(student.eos_token_id, teacher.eos_token_id)]


def test_no_rows_and_rows_without_pairs() -> None:
    student, teacher = both(BOTH_WAYS[0])
    mapped = dynamic_map(student, teacher, max_distance=0.3)
    assert mapped.pairs(np.empty((0, 5), dtype=int), np.empty((0, 5), dtype=int)).counts.shape == (0,)
    found = mapped.pairs(np.array([[student.pad_token_id]]), np.array([[teacher.pad_token_id]]))
    assert found.counts.tolist() == [0]
    assert found.student_ids.shape == (1, 0)
