"""The rows of a teacher cache: a prompt and a response as the teacher reads them, and the name they are found by.

A causal model's states depend on what stands before them only, so the states of a response serve every response that
begins it. Names are made such that this shows: the name of the shorter row begins the name of the longer one, which
lets another student's truncation, or a smaller ``max_length``, find its rows in a cache that was written without it.

Axes: L tokens of a row, R supervised positions, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vocabridge.errors import UserError
from vocabridge.pairs import IGNORE_INDEX, PairBatch, TokenizedSide

PROMPT_BYTES = 16
"""Length of the hash of a prompt."""

_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRow:
    """One prompt and response of the teacher's side."""

    input_ids: np.ndarray
    """``[L]`` int64: the prompt, then the response, whose tokens are the labels."""
    spans: np.ndarray
    """``[R, 2]`` int64, byte span of each response token; ``(n, n)`` for the end token."""

    @property
    def num_supervised(self) -> int:
        """R."""
        return len(self.spans)

    @property
    def key(self) -> bytes:
        """The name of the row."""
        return row_key(self.input_ids, self.num_supervised)


def row_key(input_ids: np.ndarray, num_supervised: int) -> bytes:
    """Name of a row: a hash of its prompt, then the response's ids themselves, 4 bytes each.

    Args:
        input_ids: ``[L]``.
        num_supervised: R, the length of the response at the end.
    """
    prompt, response = np.split(input_ids, [len(input_ids) - num_supervised])
    digest = hashlib.blake2b(prompt.astype("<i8").tobytes(), digest_size=PROMPT_BYTES).digest()
    return join_key(digest, response)


def join_key(prompt: bytes, response_ids: np.ndarray) -> bytes:
    """Name of a row from the hash of its prompt and the ids of its response."""
    return prompt + response_ids.astype(">u4").tobytes()


def prompt_digest(key: bytes) -> bytes:
    """The hash of the prompt in a row's name."""
    return key[:PROMPT_BYTES]


def num_supervised(key: bytes) -> int:
    """R of the row with this name."""
    return (len(key) - PROMPT_BYTES) // _TOKEN_BYTES


def teacher_row(side: TokenizedSide) -> TeacherRow:
    """The row of a tokenized example.

    Raises:
        UserError: its supervised positions are not one piece at the end of the row.
    """
    check_labels(np.asarray(side.labels))
    return TeacherRow(np.asarray(side.input_ids, dtype=np.int64), side.spans)


def batch_keys(batch: PairBatch) -> Iterator[bytes]:
    """Names of the B rows of the teacher's side, whichever side is padded.

    Raises:
        UserError: a row's supervised positions are not one piece at its end.
    """
    input_ids, attention_mask, labels = (
        tensor.cpu().numpy()
        for tensor in (batch["teacher_input_ids"], batch["teacher_attention_mask"], batch["teacher_labels"])
    )
    for row, mask in enumerate(attention_mask.astype(bool)):
        yield row_key(input_ids[row, mask], check_labels(labels[row, mask]))


def check_labels(labels: np.ndarray) -> int:
    """R of ``labels [L]``.

    Raises:
        UserError: an unsupervised position follows a supervised one.
    """
    supervised = labels != IGNORE_INDEX
    count = int(supervised.sum())
    if not supervised[len(labels) - count :].all():
        raise UserError("the teacher cache takes rows whose response is one piece at the end; train without the cache.")
    return count
