"""Dual-space distillation with the mean over the chunk (DSKD-CLP).

"Dual-Space Knowledge Distillation with Key-Query Matching for Large Language Models with Vocabulary Mismatch", ICASSP
2026, arXiv 2603.22056. As DSKD-CLA (see ``dskd_cla``) with uniform weights, hence without queries and keys: a position
gets the mean of the other side's projected states over its chunk, the smallest pair of token ranges that cover the same
bytes. P_ts, P_st learned affine maps, h, h' last hidden states, E'(y') embedding of the teacher's label, sd one scalar
standard deviation, W, W' heads, sg stop-gradient:

    z_ts = mean over j in chunk(i) of P_ts(h'_j/sd + E'(y'_j)/sd) sg(W)^T
    z_st = mean over i in chunk(j) of P_st(h_i) W'^T
    kd = CE(z_ts, y) + [argmax z_ts = y] D(z, sg(z_ts)) + KL(softmax z' || softmax z_st), over positions in a chunk
    L = (1 - kd_weight) CE(z, y) + kd_weight kd

What we do differently, and why:
- Chunks are those of the labels, the tokens that positions predict. The published chunks are those of the input tokens,
  which pairs "colo" (label "ur") with the teacher's "colour" (label ","): two predictions of different text.
- A position without a counterpart is left out of all terms but cross-entropy on the reference. The published form gives
  it zero logits, a constant ln V in the loss.
- ``statistics: example`` as in ``dskd_cma``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.cross_attention import ChunkMeans
from vocabridge.objectives._dual_space import DualSpace, teacher_values
from vocabridge.objectives.base import ForwardPair, LossTerm, coverage_ratio, require_teacher
from vocabridge.objectives.config import DualSpaceConfig
from vocabridge.pairs import PairBatch


class Config(DualSpaceConfig):
    """Settings of DSKD-CLP; the paper's values."""

    paper: ClassVar[str] = "DSKD-CLP, ICASSP 2026, arXiv 2603.22056 (DSKD: arXiv 2406.17328)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "chunks")
    use_when: ClassVar[str] = "the tokenizers differ and a dual-space method without attention to train is wanted"


class DskdClp(DualSpace):
    """Means of projected states over byte-exact chunks, in both directions."""

    config: Config

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """Terms ``student_space`` and ``teacher_space``, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        values = teacher_values(teacher, batch["input_ids"].shape[0], config=self.config)
        terms = self.terms(student, teacher, ChunkMeans(chunks), values=values)
        coverage = coverage_ratio("dskd_clp", chunks.covered, student.labels.shape[0])
        ours = terms["student_space"]
        return terms | {"student_space": replace(ours, metrics={**ours.metrics, "coverage": coverage})}
