"""Dual-space distillation with cross-model attention restricted to the chunk (DSKD-CLA).

"Dual-Space Knowledge Distillation with Key-Query Matching for Large Language Models with Vocabulary Mismatch", ICASSP
2026, arXiv 2603.22056. As DSKD-CMA (see ``dskd_cma``), but a position sees only the other side's positions of its
chunk, the smallest pair of token ranges that cover the same bytes:

    A = softmax_j(scale Q K^T) over j in chunk(i)      A' = softmax_i((scale Q K^T)^T) over i in chunk(j)
    kd = CE(z_ts, y) + [argmax z_ts = y] D(z, sg(z_ts)) + KL(softmax z' || softmax z_st), over positions in a chunk
    L = (1 - kd_weight) CE(z, y) + kd_weight kd

What we do differently, and why:
- Chunks are those of the labels, the tokens that positions predict. The published chunks are those of the input tokens,
  which pairs "colo" (label "ur") with the teacher's "colour" (label ","): two predictions of different text.
- A position without a counterpart is left out of all terms but cross-entropy on the reference. The published form
  attends to every position there, prompt and padding included.
- ``query_start: closed_form`` and ``statistics: example`` as in ``dskd_cma``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from vocabridge.losses.cross_attention import same_chunk
from vocabridge.objectives._cross_model_attention import CrossModelAttention
from vocabridge.objectives._dual_space import teacher_values
from vocabridge.objectives.base import ForwardPair, LossTerm, coverage_ratio, require_teacher
from vocabridge.objectives.config import CrossAttentionConfig
from vocabridge.pairs import PairBatch


class Config(CrossAttentionConfig):
    """Settings of DSKD-CLA; the paper's values except for the query start."""

    paper: ClassVar[str] = "DSKD-CLA, ICASSP 2026, arXiv 2603.22056 (DSKD: arXiv 2406.17328)"
    use_when: ClassVar[str] = "as dskd_cma, where attention must not stray from the bytes that a position predicts"


class DskdCla(CrossModelAttention):
    """Cross-model attention in both directions within byte-exact chunks."""

    config: Config

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """Terms ``student_space`` and ``teacher_space``, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        num_examples = batch["input_ids"].shape[0]
        sides = self.query_keys(
            student.tokens,
            teacher.tokens,
            student_embedding=student.embedding,
            teacher_embedding=teacher.embedding,
            num_examples=num_examples,
        )
        attention = self.attend(sides, allowed=same_chunk(batch["chunk_ids"], batch["teacher_chunk_ids"]))
        values = teacher_values(teacher, num_examples, config=self.config)
        terms = self.terms(student, teacher, attention, values=values)
        coverage = coverage_ratio("dskd_cla", attention.student_covered.sum(), student.labels.shape[0])
        ours = terms["student_space"]
        return terms | {"student_space": replace(ours, metrics={**ours.metrics, "coverage": coverage})}
