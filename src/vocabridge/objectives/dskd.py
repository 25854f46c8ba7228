"""Dual-space distillation between models with the same tokenizer (DSKD, DSKDv2).

Zhang et al. 2024, arXiv 2406.17328 (DSKD); Zhang et al. 2025, arXiv 2504.11426 (DSKDv2). Position i holds the same
token on both sides; h_i, h'_i last hidden states, W, W' heads, z, z' logits, y labels, sg the stop-gradient:

    z_ts = P_ts(h'_i) sg(W)^T     z_st = P_st(h_i) W'^T
    kd = CE(z_ts, t) + D(z_i, sg(z_ts)) + KL(softmax z'_i || softmax z_st)
    L = (1 - kd_weight) CE(z, y) + kd_weight kd

DSKD: both projectors are learned from a random start and t = y (``projector_start: random, t2s_target: label,
teacher_space_projector: learned``). DSKDv2, the default: P_ts starts as the least-squares map between the two heads,
P_st is always that of the student's present head, t = argmax z', and D counts only where argmax z_ts = t. It is the
default because its projected teacher is like the teacher sooner (numbers in ``dskd_eta``): a random start has to learn
that first, and with t = y the projector learns the reference answer, which the student's cross-entropy has anyway.

What we do differently, and why:
- Projector start and teacher-space projector come from the tokens with bytes and the end tokens: rows of a head that
  belong to unused control tokens are noise. Biases and logit scales of the heads are taken into account.
- All sums are divided by the student tokens of the whole optimizer step; DSKDv2 divides its divergence in the student's
  space by the number of agreeing rows of the micro-batch, which depends on how batches are split.
- P_st is recomputed every 10 steps (published: every step); the reasons are those of ``dskd_eta``.
- The divergence in the teacher's space is forward KL, as in DSKD; DSKDv2 uses the chosen one there (``dskd_eta``, too).
- Each model reads its own template: positions pair over the response, the two end tokens by role.
- No T^2 factor on divergences; the adaptive one divides by the temperature once.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from vocabridge.losses.divergences import forward_kl
from vocabridge.objectives._columns import common_columns
from vocabridge.objectives._paired_space import NO_ID, PairedSpace
from vocabridge.objectives._same_tokenizer import check_same_tokenizer, same_tokenizer_pairs
from vocabridge.objectives.base import ForwardPair, LossTerm, ObjectiveSetup, require_teacher
from vocabridge.objectives.config import PairedSpaceConfig
from vocabridge.pairs import PairBatch


class Config(PairedSpaceConfig):
    """Settings of DSKD on one tokenizer; the values of DSKDv2, but for ``recompute_every``."""

    paper: ClassVar[str] = "DSKD, EMNLP 2024, arXiv 2406.17328; DSKDv2, arXiv 2504.11426"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "same_tokenizer", "chunks")
    use_when: ClassVar[str] = "both models have the same tokenizer, and logits alone (logit_kd) are not enough"


class Dskd(PairedSpace):
    """The three dual-space losses at every token of the response."""

    def __init__(self, config: Config, setup: ObjectiveSetup):
        assert setup.teacher_head is not None
        columns = common_columns(check_same_tokenizer("dskd", setup), *setup.end_token_ids)
        targets = torch.full((len(setup.teacher_head.weight),), NO_ID)
        targets[columns.teacher] = columns.student
        super().__init__(
            config,
            setup,
            name="dskd",
            targets=targets,
            teacher_divergence=partial(forward_kl, temperature=config.temperature),
        )

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``dual_space``, in nats."""
        return self.paired_terms(pair, same_tokenizer_pairs(pair.student, require_teacher(pair), batch))
