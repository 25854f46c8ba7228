"""Names of rows: equal for equal reading, a beginning for a beginning, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from vocabridge.errors import UserError
from vocabridge.models.teacher_rows import batch_keys, num_supervised, row_key, teacher_row
from vocabridge.pairs import PairCollator, TokenizedPair, TokenizedSide


def side(prompt: list[int], response: list[int]) -> TokenizedSide:
    spans = np.stack([np.arange(len(response)), np.arange(len(response)) + 1], axis=1)
    labels = [-100] * len(prompt) + response
    return TokenizedSide(prompt + response, labels, spans, np.arange(len(response)))


def key(prompt: list[int], response: list[int]) -> bytes:
    return row_key(np.array(prompt + response), len(response))


def test_a_shorter_response_begins_the_name_of_a_longer_one() -> None:
    whole = key([1, 2, 3], [4, 500, 70000])
    assert whole.startswith(key([1, 2, 3], [4]))
    assert whole.startswith(key([1, 2, 3], [4, 500]))
    assert num_supervised(whole) == 3
    for prompt, response in [
        ([1, 2], [4]),  # another prompt
        ([1, 2, 3], [5]),
        ([1, 2], [3, 4]),  # the same ids, another border
        ([1, 2, 3, 4], [500]),
        ([1, 2, 3], [4, 500, 70000, 1]),
    ]:
        assert not whole.startswith(key(prompt, response)), (prompt, response)


def test_no_prompt_is_a_prompt_too() -> None:
    assert key([], [1, 2]).startswith(key([], [1]))
    assert key([], [1]) != key([0], [1])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_and_rows_agree_on_names(padding_side: str) -> None:
    sides = [side([1, 2, 3], [0, 9]), side([7], [8, 0, 0, 5]), side([4], [0])]
    pairs = [TokenizedPair(student=side([1], [2]), teacher=each, truncated=False) for each in sides]
    collator = PairCollator(0, 0, pad_to_multiple_of=8, padding_side=padding_side)  # type: ignore[arg-type]
    assert list(batch_keys(collator(pairs))) == [teacher_row(each).key for each in sides]


def test_rows_whose_response_is_no_piece_at_the_end_are_refused() -> None:
    broken = side([1, 2], [3, 4])
    broken.labels[3] = -100
    with pytest.raises(UserError, match="one piece at the end"):
        teacher_row(broken)
