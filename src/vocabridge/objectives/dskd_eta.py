"""Dual-space distillation over exactly aligned tokens (DSKDv2 with exact token alignment, ETA).

Zhang et al. 2025, "A Dual-Space Framework for General Knowledge Distillation of Large Language Models", arXiv
2504.11426. A pair (i, j) is a student and a teacher position whose labels stand for the same bytes at the same place of
the text; t_j is the student's id of the bytes of argmax z'_j, and a pair without it is left out:

    z_ts = P_ts(h'_j) sg(W)^T     z_st = P_st(h_i) W'^T
    kd = CE(z_ts, t_j) + [argmax z_ts = t_j] D(z_i, sg(z_ts)) + D(z_st, z'_j)
    L = (1 - kd_weight) CE(z, y) + kd_weight kd

with CE(z, y) on all student positions. Over the tokens O that both vocabularies hold, P_ts starts as the least-squares
map W'_O -> W_O and P_st is that of W_O -> W'_O, recomputed as the student's head moves. Needs both tokenizers' bytes.

What we do differently, and why:
- Pairs come from byte-exact chunks and identical bytes, and the end tokens by role. The published walk strips space
  markers and compares what the vocabularies write: a byte-level line break never equals a SentencePiece one, so no
  token behind the first line break or accent of a response finds its partner, and " a" passes for "a".
- All sums are divided by the student tokens of the whole optimizer step. Published: each term by its own number of
  rows in the micro-batch, which gives few agreeing rows as much weight as many and depends on how batches are split.
- A teacher's prediction is looked up by its bytes; published: by its string in the student's vocabulary, markers
  included, so that the unknown token becomes a target where there is one.
- P_st is recomputed every 10 steps; published: every step. At a learning rate of 5e-5 no weight of the head moves by
  more than 5e-4 in between, and the product of both heads' shared rows takes a second of a CPU core at 46,000 x 640.
- The least-squares maps know the biases and logit scales of the two heads.
- The published threshold ``t2s_agreement`` is left out: its default never switches the mask off. The published
  on-policy texts are a matter of the data, not of this loss.

Measured on SmolLM2-135M <- Gemma-3-270M (46,146 shared tokens): 89 % of the student's positions are pairs, 1 % of them
have no target. P_ts agrees with the teacher's prediction at 29 % of held-out pairs before training (random start: 0 %)
and after 60 steps of its own cross-entropy at 56 % (random start: 47 %; trained on the label instead: 40 %).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vocabridge.objectives._columns import ColumnPairs, byte_keys, shared_columns
from vocabridge.objectives._divergence import row_divergence
from vocabridge.objectives._paired_space import NO_ID, PairedSpace
from vocabridge.objectives._row_pairs import same_token_pairs
from vocabridge.objectives.base import ForwardPair, LossTerm, ObjectiveSetup, require_teacher
from vocabridge.objectives.config import PairedSpaceConfig
from vocabridge.pairs import PairBatch


class Config(PairedSpaceConfig):
    """Settings of DSKDv2 with exact token alignment; the paper's values, but for ``recompute_every``."""

    paper: ClassVar[str] = "DSKDv2 with exact token alignment, arXiv 2504.11426"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    use_when: ClassVar[str] = "the tokenizers differ but cut most of the text alike; no attention to learn"


class DskdEta(PairedSpace):
    """The three dual-space losses over positions whose labels are the same bytes."""

    student_bytes: Tensor
    teacher_bytes: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        student_bytes, teacher_bytes = byte_keys(setup)
        super().__init__(
            config,
            setup,
            name="dskd_eta",
            targets=student_ids_of(teacher_bytes, student_bytes, shared_columns(setup)),
            teacher_divergence=row_divergence(config),
        )
        self.register_buffer("student_bytes", student_bytes, persistent=False)
        self.register_buffer("teacher_bytes", teacher_bytes, persistent=False)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``dual_space``, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        pairs = same_token_pairs(
            student,
            teacher,
            batch,
            student_keys=self.student_bytes[student.labels],
            teacher_keys=self.teacher_bytes[teacher.labels],
        )
        return self.paired_terms(pair, pairs)


def student_ids_of(teacher_bytes: Tensor, student_bytes: Tensor, shared: ColumnPairs) -> Tensor:
    """``[V_t]``: the student's id of the bytes of each teacher id, or -1; an id of ``shared`` has its partner.

    Args:
        teacher_bytes: ``[V_t]`` of :func:`~vocabridge.objectives._columns.byte_keys`; several ids may have the
            same bytes.
        student_bytes: ``[V_s]``.
        shared: one pair of ids for all bytes that both sides have, then the end tokens.
    """
    by_number = student_bytes.new_full((int(torch.cat([student_bytes, teacher_bytes]).max()) + 2,), NO_ID)
    by_number[student_bytes[shared.student]] = shared.student
    by_number[-1] = NO_ID  # read by the number of control tokens
    targets = by_number[teacher_bytes]
    targets[shared.teacher] = shared.student
    return targets
