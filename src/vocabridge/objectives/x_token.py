"""X-Token: the student's whole distribution, carried to the teacher's vocabulary by a sparse map of spellings.

"X-Token: Projection-Guided Cross-Tokenizer Knowledge Distillation", NVIDIA 2026, arXiv 2605.21699 (P-KL and H-KL; the
reference implementation is NeMo RL's). Needs both heads and byte-exact chunks; nothing is learned but the student.

M (V_s x V_t, rows sum to 1) comes from spelling each vocabulary in the other: pieces weigh 1, 0.1, 0.01, .. (four at
most), both directions added up, the four heaviest of a row kept; tokens with equal bytes, control tokens with equal
spelling and the two end tokens are pinned to each other. Over chunks c with student rows i and teacher rows j,
temperature T, K the teacher tokens that M reaches, and a divergence D (KL(teacher || student) by default):

    P-KL   q(k) ~ mean_i sum_v M_vk softmax(z_i / T)_v     p(k) ~ exp(mean_j log softmax(z'_j / T)_k)     k in K
           kd = sum_c D(p, q)
    H-KL   q ~ exp(mean_i log softmax(z_i / T)),  p ~ exp(mean_j log softmax(z'_j / T))  over whole vocabularies
           kd = sum_c D(p, q on common tokens and on one bucket for the rest) + sum_k |sorted p_rest - sorted q_rest|
    L = (1 - kd_weight) CE + kd_weight kd

Common tokens are pairs with weight 1 in M (``strict``) or at least 0.6 (``relaxed``).

What we do differently, and why:
- The published support is the 8192 teacher columns with the highest logits in the micro-batch, so what a row learns
  depends on its neighbours. Ours is K, always, in full: no truncation and no error from one. Teacher probability
  outside K (2 to 3 % for SmolLM2 <- Gemma 3 on Dolly) is left out and logged (``teacher_mass_on_support``).
- Chunk means of log-probabilities are normalised; the published ones sum to less than 1 where a chunk has several rows.
- H-KL's common part includes a bucket for the rest: without it the published KL has a gradient where both models
  agree. Its sorted part is exact and padded with zeros instead of cut at 8192 entries and at the shorter side.
- ``kd_weight`` is fixed. The published default multiplies the loss by sg(CE / KD) of the micro-batch, which gradient
  accumulation changes. For the same reason sums are divided by the student's tokens, not by the number of chunks.
- No factor T^2, as in every method here (T is 1 by default, as published).
- Control tokens pair by role or equal spelling, not by similar spelling (``<pad>`` and ``<bos>`` are similar), and the
  generator's "scale trick" (the last of 32 weights set to 0.2) is left out.
- Chunks are byte-exact rather than found by a scored alignment of strings.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import retokenized, shared_vocabulary, token_bytes
from vocabridge.errors import UserError
from vocabridge.losses.chunk_rows import chunk_rows, segment_mean
from vocabridge.losses.divergences import divergence
from vocabridge.losses.paired_chunks import ChunkLogits, paired_chunks_loss
from vocabridge.losses.sorted_rows import sorted_l1
from vocabridge.losses.vocabulary_projection import (
    Entries,
    Projection,
    common_tokens,
    project,
    projection_entries,
    spelling_entries,
)
from vocabridge.objectives._columns import take_columns
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
from vocabridge.objectives.config import DivergenceConfig
from vocabridge.pairs import PairBatch

LEAST_WEIGHT = {"strict": 1.0, "relaxed": 0.6}
"""In the map, of a pair of common tokens."""

LEAST_PROBABILITY = 1e-30
"""Stands for less; its logarithm and the inverse of it, which is in the gradient, fit float32."""


class Config(DivergenceConfig):
    """Settings of X-Token."""

    paper: ClassVar[str] = "X-Token, NVIDIA 2026, arXiv 2605.21699"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")
    use_when: ClassVar[str] = (
        "the whole distribution should count, without learned projectors; h_kl if most tokens pair"
    )

    loss: Literal["p_kl", "h_kl"] = "p_kl"
    """``p_kl`` carries the student's probabilities over; ``h_kl`` compares common tokens, and the rest by rank."""
    common: Literal["relaxed", "strict"] = "relaxed"
    """Which tokens are common in ``h_kl``: weight at least 0.6 in the map, or 1."""
    temperature: float = Field(1.0, gt=0)
    """Of both sides' distributions; cross-entropies run at 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss == "p_kl" and self.common != "relaxed":
            raise ValueError("common has no effect with loss 'p_kl'; leave it out")
        return self


class XToken(Objective):
    """Divergence of chunk distributions in the teacher's vocabulary, or over common tokens."""

    config: Config
    student_common: Tensor
    student_rest: Tensor
    teacher_common: Tensor
    teacher_rest: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_head is not None
        entries, pinned = vocabulary_map(setup)
        # No buffer: data parallelism cannot send sparse tensors.
        self._projection = Projection.of(entries, len(setup.student_head.weight))
        common = common_tokens(entries, pinned=pinned, threshold=LEAST_WEIGHT[config.common])
        sizes = (len(setup.student_head.weight), len(setup.teacher_head.weight))
        for side, ids, size in zip(("student", "teacher"), (common.rows, common.columns), sizes, strict=True):
            rest = np.setdiff1d(np.arange(size), ids)
            self.register_buffer(f"{side}_common", torch.from_numpy(ids), persistent=False)
            self.register_buffer(f"{side}_rest", torch.from_numpy(rest), persistent=False)
        if not len(entries.rows):
            raise UserError("objective x_token: no token of one vocabulary can be spelled in the other; use dskd_cma.")
        self._divergence = divergence(
            config.divergence, skew=config.skew, adaptive_alpha=config.adaptive_alpha, jsd_beta=config.jsd_beta
        )

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``x_token``, cross-entropy included, in nats per supervised student token."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        is_projected = self.config.loss == "p_kl"
        result = paired_chunks_loss(
            head_input(student),
            student.labels,
            head_input(teacher),
            chunks=chunks,
            chunk_losses=self._projected if is_projected else self._hybrid,
            weights=[1.0] if is_projected else [1.0, 1.0],
            kd_weight=self.config.kd_weight,
        )
        count = student.labels.shape[0]
        losses = ["projected_divergence"] if is_projected else ["common_divergence", "sorted_rest_distance"]
        metrics = {
            **result.reference,
            **{name: Ratio(value, chunks.num_chunks) for name, value in zip(losses, result.sums, strict=True)},
            "top1_agreement": Ratio(result.metrics[0], chunks.num_chunks),
            "teacher_mass_on_support": Ratio(result.metrics[1], chunks.num_chunks),
            "coverage": coverage_ratio("x_token", chunks.covered, count),
        }
        return {"x_token": LossTerm(result.total, count, metrics=metrics)}

    def _projected(self, block: ChunkLogits) -> tuple[list[Tensor], list[Tensor]]:
        projection = self._projection = self._projection.to(block.student.device, block.student.dtype)
        probs = (block.student / self.config.temperature).softmax(-1)
        # The map is linear, so the mean may come first: a chunk is then mapped once.
        mean = segment_mean(probs, block.student_chunks, block.num_chunks)
        own = project(mean, projection).clamp(min=LEAST_PROBABILITY).log()
        teacher = self._teacher_means(block)
        theirs = take_columns(teacher, projection.teacher_ids)
        agrees = (own.detach().argmax(-1) == theirs.argmax(-1)).float()
        mass = (theirs.logsumexp(-1) - teacher.logsumexp(-1)).exp()
        return [self._divergence(own, theirs)], [agrees, mass]

    def _hybrid(self, block: ChunkLogits) -> tuple[list[Tensor], list[Tensor]]:
        # A mean of logits is a mean of log-probabilities up to a constant, which normalising takes away.
        tempered = block.student / self.config.temperature
        own = segment_mean(tempered, block.student_chunks, block.num_chunks).log_softmax(-1)
        theirs = self._teacher_means(block).log_softmax(-1)
        own_common, own_rest = take_columns(own, self.student_common), take_columns(own, self.student_rest)
        common, rest = take_columns(theirs, self.teacher_common), take_columns(theirs, self.teacher_rest)
        agrees = (own_common.detach().argmax(-1) == common.argmax(-1)).float()
        mass = common.exp().sum(-1)
        distance = sorted_l1(own_rest.exp(), rest.exp())
        if len(self.student_rest) and len(self.teacher_rest):
            own_common = torch.cat([own_common, own_rest.logsumexp(-1, keepdim=True)], dim=-1)
            common = torch.cat([common, rest.logsumexp(-1, keepdim=True)], dim=-1)
        return [self._divergence(own_common, common), distance], [agrees, mass]

    def _teacher_means(self, block: ChunkLogits) -> Tensor:
        """``[c, V_t]`` mean tempered logits of every chunk: its mean log-probabilities up to a constant."""
        return segment_mean(block.teacher, block.teacher_chunks, block.num_chunks) / self.config.temperature


def vocabulary_map(setup: ObjectiveSetup) -> tuple[Entries, Entries]:
    """Entries of M, and those pairs of student and teacher tokens among them that are pinned to each other."""
    assert setup.teacher_tokenizer is not None
    assert setup.teacher_head is not None
    tokenizers = (setup.student_tokenizer, setup.teacher_tokenizer)
    sizes = (len(setup.student_head.weight), len(setup.teacher_head.weight))
    pinned = _pinned(setup, sizes)
    spelled, spelling = retokenized(*tokenizers), retokenized(*tokenizers[::-1])
    both = (spelling_entries(spelled.offsets, spelled.ids), spelling_entries(spelling.offsets, spelling.ids))
    inside = (_inside(both[0], sizes), _inside(both[1], sizes[::-1]))
    return projection_entries(inside[0], inside[1], pinned=pinned), pinned


def _inside(entries: Entries, sizes: tuple[int, int]) -> Entries:
    """Entries of tokens that both heads know."""
    return entries.select((entries.rows < sizes[0]) & (entries.columns < sizes[1]))


def _pinned(setup: ObjectiveSetup, sizes: tuple[int, int]) -> Entries:
    """Tokens that are the same on both sides: by role, by bytes, or by spelling where neither has bytes of its own."""
    student, teacher = setup.student_tokenizer, setup.teacher_tokenizer
    assert teacher is not None
    pairs = dict([setup.end_token_ids])
    if student.eos_token_id is not None and teacher.eos_token_id is not None:
        pairs.setdefault(student.eos_token_id, teacher.eos_token_id)  # where the chat template ends otherwise
    shared = shared_vocabulary(student, teacher)
    for student_id, teacher_id in zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True):
        pairs.setdefault(student_id, teacher_id)
    taken = set(pairs.values())
    for student_id, teacher_id in _same_spelling(student, teacher):
        if teacher_id not in taken:
            pairs.setdefault(student_id, teacher_id)
    ids = np.array(list(pairs.items()), dtype=np.int64).reshape(-1, 2)
    return _inside(Entries(ids[:, 0], ids[:, 1], np.ones(len(ids))), sizes)


def _same_spelling(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Pairs of ids with equal entries in the two vocabularies and equal bytes, or none: control tokens, byte pieces."""
    own, other = token_bytes(student), token_bytes(teacher)
    teacher_ids = {piece: i for i, piece in enumerate(teacher.convert_ids_to_tokens(list(range(len(other)))))}
    pieces = enumerate(student.convert_ids_to_tokens(list(range(len(own)))))
    return [
        (i, teacher_ids[piece]) for i, piece in pieces if piece in teacher_ids and own[i] == other[teacher_ids[piece]]
    ]
