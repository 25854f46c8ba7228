"""The attention of each example: before and after training, and what it is measured against.

Axis letters: B examples, R_s / R_t supervised positions of one example (or of the longest), n a chunk's positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vocabridge.analysis.finished_run import FinishedRun, Stage
from vocabridge.losses.cross_attention import CrossAttention, Padding, attention_weights, same_chunk
from vocabridge.models.forward import SupervisedTokens, supervised_tokens
from vocabridge.objectives._columns import tokenizer_byte_keys
from vocabridge.objectives._cross_model_attention import QueryKeys
from vocabridge.objectives._row_pairs import same_token_pairs
from vocabridge.pairs import PairBatch, PairCollator, TokenizedPair, pad_token_id

AttentionName = Literal["uniform", "before", "after", "cla", "clp", "eta"]
"""``uniform``: over all teacher positions, what knows nothing; ``before`` and ``after`` training, over all teacher
positions also where the objective sees its chunk alone; ``cla``: ``after``, restricted to the chunk; ``clp``: uniform
inside the chunk; ``eta``: the one teacher position with the same token, where there is one."""

ATTENTION_NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True, eq=False)
class SideTokens:
    """The R supervised positions of one side of an example."""

    input_ids: np.ndarray
    """``[R]`` the token read."""
    labels: np.ndarray
    """``[R]`` the token predicted; spans and chunks are its."""
    spans: np.ndarray
    """``[R, 2]`` half-open byte ranges of the response."""
    chunk_ids: np.ndarray
    """``[R]``, -1 in no chunk."""


@dataclass(frozen=True, slots=True, eq=False)
class ExampleAttention:
    """One example: its tokens, and how its student positions attend to its teacher positions."""

    student: SideTokens
    teacher: SideTokens
    weights: dict[AttentionName, np.ndarray]
    """``[R_s, R_t]`` float64 each; a row sums to 1, or to 0 where that attention has nothing to attend to."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Queries and keys of one example at both moments."""

    before: QueryKeys
    after: QueryKeys


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A micro-batch with its packed tokens."""

    tensors: PairBatch
    student: SupervisedTokens
    teacher: SupervisedTokens

    @property
    def size(self) -> int:
        """B."""
        return self.tensors["input_ids"].shape[0]


class AttentionReader:
    """Computes the attentions of tokenized pairs under one run, a few examples at a time."""

    def __init__(self, run: FinishedRun):
        self.run = run
        student, teacher = run.pair_tokenizer.student.tokenizer, run.pair_tokenizer.teacher
        assert teacher is not None
        self._collate = PairCollator(pad_token_id(student), pad_token_id(teacher.tokenizer))
        self._byte_keys = tokenizer_byte_keys(student, teacher.tokenizer)

    def examples(self, pairs: Sequence[TokenizedPair]) -> Iterator[ExampleAttention]:
        """The attention of each pair, in order."""
        for start in range(0, len(pairs), _BATCH_SIZE):
            batch = self._batch(pairs[start : start + _BATCH_SIZE])
            yield from _unpadded(batch, self._weights(batch))

    @torch.no_grad()
    def points(self, pairs: Sequence[TokenizedPair]) -> Points:
        """Queries and keys of a few pairs, before and after training."""
        batch = self._batch(pairs)
        return Points(self._sides(batch, self.run.before), self._sides(batch, self.run.after))

    def _batch(self, pairs: Sequence[TokenizedPair]) -> _Batch:
        tensors = self._collate(pairs)
        student = supervised_tokens(tensors["input_ids"], tensors["labels"])
        return _Batch(tensors, student, supervised_tokens(tensors["teacher_input_ids"], tensors["teacher_labels"]))

    def _sides(self, batch: _Batch, stage: Stage) -> QueryKeys:
        return stage.attention.probed(batch.tensors, stage.student_embedding, self.run.teacher_embedding)

    def _attention(self, batch: _Batch, stage: Stage) -> CrossAttention:
        # Only dskd_cma can weigh positions.
        position_weight = getattr(stage.attention.config, "position_weight", 0.0)
        return stage.attention.attend(self._sides(batch, stage), position_weight=position_weight)

    @torch.no_grad()
    def _weights(self, batch: _Batch) -> dict[AttentionName, Tensor]:
        """``[B, R_s, R_t]`` each."""
        before, after = self._attention(batch, self.run.before), self._attention(batch, self.run.after)
        chunk = same_chunk(batch.tensors["chunk_ids"], batch.tensors["teacher_chunk_ids"])
        flat = torch.zeros_like(after.scores)
        exact = self._exact_pairs(batch, after)
        return {
            "uniform": attention_weights(flat, after.allowed),
            "before": before.student_weights,
            "after": after.student_weights,
            "cla": attention_weights(after.scores, chunk),
            "clp": attention_weights(flat, chunk),
            "eta": exact,
        }

    def _exact_pairs(self, batch: _Batch, attention: CrossAttention) -> Tensor:
        pairs = same_token_pairs(
            batch.student,
            batch.teacher,
            batch.tensors,
            student_keys=self._byte_keys[0][batch.student.labels],
            teacher_keys=self._byte_keys[1][batch.teacher.labels],
        )
        student, teacher = _columns(attention.student, pairs.student), _columns(attention.teacher, pairs.teacher)
        weights = torch.zeros_like(attention.student_weights)
        return weights.index_put((batch.student.rows[pairs.student], student, teacher), weights.new_ones(()))


def _columns(padding: Padding, positions: Tensor) -> Tensor:
    return padding.columns[positions]


def _unpadded(batch: _Batch, weights: dict[AttentionName, Tensor]) -> Iterator[ExampleAttention]:
    arrays = {name: values.double().numpy() for name, values in weights.items()}
    for row in range(batch.size):
        student, teacher = (
            _side(tokens, batch.tensors[spans][row], batch.tensors[chunks][row], row)  # type: ignore[literal-required]
            for tokens, spans, chunks in (
                (batch.student, "spans", "chunk_ids"),
                (batch.teacher, "teacher_spans", "teacher_chunk_ids"),
            )
        )
        num_student, num_teacher = len(student.labels), len(teacher.labels)
        yield ExampleAttention(
            student, teacher, {name: values[row, :num_student, :num_teacher] for name, values in arrays.items()}
        )


def _side(tokens: SupervisedTokens, spans: Tensor, chunk_ids: Tensor, row: int) -> SideTokens:
    of_row = tokens.rows == row
    count = int(of_row.sum())
    return SideTokens(
        input_ids=tokens.input_ids[of_row].numpy(),
        labels=tokens.labels[of_row].numpy(),
        spans=spans[:count].numpy(),
        chunk_ids=chunk_ids[:count].numpy(),
    )
