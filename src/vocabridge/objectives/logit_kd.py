"""Distillation of logits between models with the same tokenizer: the classical form, with a choice of divergence.

Hinton, Vinyals and Dean 2015, arXiv 1503.02531 (forward KL at a temperature); Gu et al. 2024 (MiniLLM), arXiv
2306.08543 (reverse); Agarwal et al. 2024 (GKD), arXiv 2306.13649 (generalised Jensen-Shannon); Ko et al. 2024
(DistiLLM), arXiv 2402.03898 (skewed); Wu et al. 2024 (AKL), arXiv 2404.02657 (adaptive); Wen et al. 2023 (f-DISTILL),
arXiv 2307.15190 (total variation).

Over supervised student positions i, with z_i and z'_i the two models' logits at the same token, y_i its id, T the
temperature and D the divergence (q the teacher's, p the student's distribution; forward is sum q log(q / p)):

    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight sum_i D(softmax(z'_i / T), softmax(z_i / T))

There is no factor T^2: as in the published code of DSKD and DistiLLM the distillation gradient shrinks as T grows.
Hinton's factor comes from ``kd_weight: w T^2 / (1 - w + w T^2)`` instead of w (0.8 for w = 0.5 and T = 2), which is the
same balance; what remains is a factor on the whole loss, to which Adam is indifferent.

Needs one tokenizer for both models; heads padded to different sizes (151,936 and 152,064 rows for the same 151,665
tokens) are cut to the ids that both have.

What we do differently, and why:
- Each model reads its own prompt template; positions are paired over the response, and the two end tokens, which may
  differ (``<|im_end|>`` of a chat student, ``<|endoftext|>`` of a base teacher), are each other's column.
- Equal vocabularies are checked id by id at the start instead of trusted; a pair that differs is refused.
- The adaptive divergence divides by the temperature once (the code released with DSKD-KQ does so twice).
- Divergences are exactly 0 with a zero gradient where both models agree, and non-finite logits are never replaced.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vocabridge.losses.paired_rows import paired_rows_loss
from vocabridge.objectives._columns import common_columns, take_columns
from vocabridge.objectives._divergence import row_divergence
from vocabridge.objectives._same_tokenizer import check_same_tokenizer, same_tokenizer_pairs
from vocabridge.objectives.base import (
    ForwardPair,
    LossTerm,
    Objective,
    ObjectiveSetup,
    Ratio,
    coverage_ratio,
    head_input,
    require_teacher,
)
from vocabridge.objectives.config import Cost, DivergenceConfig
from vocabridge.pairs import PairBatch


class Config(DivergenceConfig):
    """Settings of logit distillation."""

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531 (GKD: 2306.13649, DistiLLM: 2402.03898)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "same_tokenizer", "chunks")
    cost: ClassVar[Cost] = "both heads"
    use_when: ClassVar[str] = "both models have the same tokenizer"


class LogitKd(Objective):
    """Divergence between the two models' next-token distributions at every token of the response."""

    config: Config
    student_columns: Tensor
    teacher_columns: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        self.num_columns = check_same_tokenizer("logit_kd", setup)
        student_end, teacher_end = setup.end_token_ids
        self.same_end = student_end == teacher_end
        columns = common_columns(self.num_columns, student_end, teacher_end)
        self.register_buffer("student_columns", columns.student, persistent=False)
        self.register_buffer("teacher_columns", columns.teacher, persistent=False)
        self._divergence = row_divergence(config)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``logit_kd``, cross-entropy included, in nats (total variation has no unit)."""
        student, teacher = pair.student, require_teacher(pair)
        pairs = same_tokenizer_pairs(student, teacher, batch)
        result = paired_rows_loss(
            head_input(student),
            student.labels,
            head_input(teacher),
            student_index=pairs.student,
            teacher_index=pairs.teacher,
            row_losses=self._rows,
            weights=[1.0],
            kd_weight=self.config.kd_weight,
        )
        num_tokens = student.labels.shape[0]
        metrics = {
            **result.reference,
            "divergence": Ratio(result.sums[0], num_tokens),
            "top1_agreement": Ratio(result.metrics[0], pairs.count),
            "coverage": coverage_ratio("logit_kd", pairs.count, num_tokens),
        }
        return {"logit_kd": LossTerm(result.total, num_tokens, metrics=metrics)}

    def _rows(self, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        if self.same_end:  # equal ids on both sides, so that no column has to be copied
            own, theirs = (side[:, : self.num_columns] for side in logits)
        else:
            own = take_columns(logits[0], self.student_columns)
            theirs = take_columns(logits[1], self.teacher_columns)
        agrees = own.detach().argmax(-1) == theirs.argmax(-1)
        return [self._divergence(own, theirs)], [agrees.float()]
