"""Approximate likelihood matching (ALM): both models give every chunk of the text the same likelihood.

Minixhofer, Vulic, Ponti 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", arXiv
2503.20083 (binarised f-divergence of chunk likelihoods, outcome debiasing). Needs the teacher's and the student's heads
and byte-exact chunks, no vocabulary map and no learned parts.

    l(c) = sum_(t in c) log p(y_t | before) + log P(the next token starts with a token-ending byte | c and before)
    f(c) = -[e^a b + (1 - e^a) log(1 - e^b)],   a = l_T(c) / tau - 1e-6,   b = l_S(c) / tau - 1e-6
    L = (1 - kd_weight) CE + kd_weight tau sum_c f(c)

Token-ending bytes are space, tab and newline; control and added tokens count too. Chunks whose end the teacher does not
think is one (probability at most ``merge_threshold``) are joined with the next. The cross-entropy is from the
same pass; the backward pass applies the student's head once more. The term's least value is not 0: where both agree,
``binary_cross_entropy`` is the entropy of the tempered likelihood, with zero gradient.

What we do differently, and why:
- ``temperature`` 5 rather than the released 100: the best of the paper's own sensitivity table (56.3 against 55.5).
- The difference is multiplied by tau. The published gradient falls as 1 / tau and is scaled back by balancing gradient
  norms (GradMag); with a fixed ``kd_weight`` it would be inert, here it stays of the size of cross-entropy's.
- The sum over chunks is divided by the student's tokens, as every term, not by the micro-batch's number of chunks:
  gradient accumulation is exact. Merging is within an example.
- At the end of an example, the chunk before the end token has the end token as its outcome; the end token's own chunk
  has none (nothing follows it), nor has the last chunk of a truncated text (what follows it is not supervised).
- ``append_outcome`` and ``merge_threshold`` 0.1 are on, as recommended by the authors (55.5 against 54.1 without).
- The debiasing by precomputed matrices, superseded by these two, and the loss on hidden states are left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import token_bytes
from vocabridge.alignment.family import tokenizer_name
from vocabridge.errors import UserError
from vocabridge.losses.chunk_likelihood import chunk_difference, chunk_log_probs, label_and_boundary_log_probs
from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.chunked_head import head_rows
from vocabridge.models.forward import SideForward
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
from vocabridge.objectives.config import KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of approximate likelihood matching; the setting that its authors recommend, at the best temperature."""

    paper: ClassVar[str] = "ALM, 2025, arXiv 2503.20083"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    use_when: ClassVar[str] = "the tokenizers differ a lot, and a vocabulary map or learned parts are not wanted"

    difference: Literal[
        "binary_cross_entropy",
        "binary_reverse_kl",
        "binary_kl_limit",
        "absolute_log",
        "absolute_probability",
        "renyi",
        "k2",
        "k3",
    ] = "binary_cross_entropy"
    """Between the two log-likelihoods of a chunk."""
    temperature: float = Field(5.0, gt=0)
    """Likelihoods are compared to the power of 1 / temperature; long chunks would otherwise have none to compare."""
    renyi_alpha: float = Field(0.5, gt=0)
    """Order of ``renyi``; not 1."""
    append_outcome: bool = True
    """Count the probability that a token ends where the chunk does, which undoes a bias between tokenizers."""
    merge_threshold: float | None = Field(0.1, ge=0, lt=1)
    """Join chunks where the teacher's probability of such an end is at most this; null keeps all chunks apart."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.renyi_alpha == 1:
            raise ValueError("renyi_alpha must not be 1; use binary_cross_entropy, to which it tends there")
        if self.difference != "renyi" and self.renyi_alpha != 0.5:
            raise ValueError(f"renyi_alpha has no effect with difference '{self.difference}'; leave it out")
        if self.difference in ("absolute_log", "binary_kl_limit") and self.temperature != 5.0:
            raise ValueError(f"temperature has no effect with difference '{self.difference}'; leave it out")
        return self


class Alm(Objective):
    """Matches the likelihood of every chunk of the response."""

    config: Config
    student_boundaries: Tensor | None
    teacher_boundaries: Tensor | None

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_tokenizer is not None
        assert setup.teacher_head is not None
        masks: list[Tensor | None] = [None, None]
        if config.append_outcome or config.merge_threshold is not None:
            student_end, teacher_end = setup.end_token_ids
            masks = [
                boundary_mask(setup.student_tokenizer, len(setup.student_head.weight), end_token_id=student_end),
                boundary_mask(setup.teacher_tokenizer, len(setup.teacher_head.weight), end_token_id=teacher_end),
            ]
        # Follow from the tokenizers, so they are not saved.
        self.register_buffer("student_boundaries", masks[0], persistent=False)
        self.register_buffer("teacher_boundaries", masks[1], persistent=False)
        self._difference = chunk_difference(
            config.difference, temperature=config.temperature, renyi_alpha=config.renyi_alpha
        )

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``alm``, in nats per supervised student token."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        student_log_probs = _log_probs(student, self.student_boundaries)
        with torch.no_grad():
            teacher_log_probs = _log_probs(teacher, self.teacher_boundaries)
        pieces = chunk_log_probs(
            chunks,
            student_log_probs,
            teacher_log_probs,
            student_rows=student.rows,
            teacher_rows=teacher.rows,
            append_outcome=self.config.append_outcome,
            merge_threshold=self.config.merge_threshold,
        )
        cross_entropy = -student_log_probs[:, 0].sum()
        difference = self._difference(pieces.teacher, pieces.student).sum()
        share, count, num_pieces = self.config.kd_weight, student.labels.shape[0], pieces.student.shape[0]
        gap = (pieces.teacher - pieces.student.detach()).abs().sum()
        metrics = {
            "cross_entropy": Ratio(cross_entropy.detach(), count),
            "chunk_difference": Ratio(difference.detach(), num_pieces),
            "chunk_log_likelihood_gap": Ratio(gap, num_pieces),
            "chunks_per_token": Ratio(num_pieces, count),
            "coverage": coverage_ratio("alm", chunks.covered, count),
        }
        total = (1 - share) * cross_entropy + share * difference
        return {"alm": LossTerm(total, count, metrics=metrics)}


def boundary_mask(tokenizer: PreTrainedTokenizerBase, num_ids: int, *, end_token_id: int) -> Tensor:
    """``[V]`` bool: the ids before which a token of any tokenizer ends, at white space or at a control token.

    Raises:
        UserError: no ordinary token begins with white space, so the boundaries of words cannot be told.
    """
    pieces = token_bytes(tokenizer)[:num_ids]
    spaces = [token_id for token_id, piece in enumerate(pieces) if piece and piece[:1] in b" \t\n"]
    if not spaces:
        raise UserError(
            f"objective alm: no token of {tokenizer_name(tokenizer)} begins with white space, so word ends cannot be "
            "told; set append_outcome: false and merge_threshold: null."
        )
    controls = {token_id for token_id, piece in enumerate(pieces) if piece is None} | {*tokenizer.added_tokens_decoder}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 has one token for both
        controls.discard(tokenizer.unk_token_id)  # it stands for some text
    mask = torch.zeros(num_ids, dtype=torch.bool)
    mask[[*spaces, *(token_id for token_id in controls if token_id < num_ids), end_token_id]] = True
    return mask


def _log_probs(side: SideForward, boundaries: Tensor | None) -> Tensor:
    """``[N, 2]``: of the label, and of a boundary before the next token."""

    def row_function(logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Tensor:
        return label_and_boundary_log_probs(logits[0], rows[0], boundaries)

    return head_rows(row_function, [head_input(side)], [side.labels])
