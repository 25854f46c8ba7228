"""Dual-space distillation with cross-model attention and key-query matching (DSKD-CMA, DSKD-CMA-GA).

Zhang et al. 2024, arXiv 2406.17328 (DSKD, CMA); "Dual-Space Knowledge Distillation with Key-Query Matching for Large
Language Models with Vocabulary Mismatch", ICASSP 2026, arXiv 2603.22056 (the GA term).

Student positions i (last hidden h_i, input token x_i, label y_i), teacher positions j (h'_j, x'_j, y'_j); E, E' input
embeddings (constants), W, W' heads, d, D hidden sizes, sd one scalar standard deviation, sg stop-gradient; positions
i = 1..n and j = 1..m of one example:

    queries Q_i = P_q [E(x_i); E(y_i)]            keys K_j = [E'(x'_j); E'(y'_j)] / sd
    S_ij = scale (Q_i . K_j - position_weight |j/m - i/n|)
    A = softmax_j(S)                              z_ts = A P_ts(h'/sd + E'(y')/sd) sg(W)^T
    A' = softmax_i(S^T)                           z_st = A' P_st(h) W'^T
    kd = CE(z_ts, y) + [argmax z_ts = y] D(z, sg(z_ts)) + KL(softmax z' || softmax z_st)
    L = (1 - kd_weight) CE(z, y) + kd_weight kd + matching_weight matching(Q, K)
        + exact_pair_weight sum of -log A_ij over exact pairs (i, j), chunks of one token on either side

What we do differently, and why:
- ``query_start: closed_form`` (default): P_q starts as the orthogonal map between the two embedding spaces fitted on
  tokens with identical bytes, on centred unit-length embeddings, for queries and keys alike. The attention then finds
  the exact partner of most tokens before any training; a random start finds about one in a hundred.
- ``position_weight`` and ``exact_pair_weight`` (0 as published) are ours. Token embeddings cannot tell the repetitions
  of a token apart; on SmolLM2-135M and Gemma-3-270M the closed-form start finds the partner of 83 % of exact pairs,
  with position_weight 0.5 of 98 %. With a random start and its flat scale the position term does nothing.
- sd is taken per example (``statistics: example``), so gradient accumulation is exact; ``batch`` is the published form.
- Padding and prompts never enter an attention, a statistic or the matching term (``gan.positions: all`` lets them into
  the latter, as published).
- No T^2 factor on divergences and no gradient into W through z_ts, as published.
- The published adaptive divergence applies its temperatures twice; here once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vocabridge.losses.chunk_rows import chunk_rows
from vocabridge.losses.cross_attention import CrossAttention, same_chunk
from vocabridge.matching.config import GanConfig, Matching, TransportConfig, check_matching_settings
from vocabridge.matching.gradient_meter import GradientMeter
from vocabridge.matching.term import MatchingTerm, PositionCounts
from vocabridge.objectives._cross_model_attention import CrossModelAttention, QueryKeys, distances
from vocabridge.objectives._dual_space import teacher_values
from vocabridge.objectives.base import ForwardPair, LossTerm, ObjectiveSetup, Ratio, require_teacher
from vocabridge.objectives.config import CrossAttentionConfig
from vocabridge.pairs import PairBatch


class Config(CrossAttentionConfig):
    """Settings of DSKD-CMA; the paper's values except for the query start."""

    paper: ClassVar[str] = "DSKD-CMA-GA, ICASSP 2026, arXiv 2603.22056 (DSKD: arXiv 2406.17328)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers")
    use_when: ClassVar[str] = "the tokenizers differ and the whole teacher distribution should reach the student"

    position_weight: float = Field(0.0, ge=0)
    """Subtracted from query-key products before scaling: this times the distance of relative positions, in [0, 1)."""
    exact_pair_weight: float = Field(0.0, ge=0)
    """Weight of -log A_ij, summed over chunks of one token on either side; trains the query projector only."""
    matching: Matching = "gan"
    matching_weight: float = Field(0.1, ge=0)
    """Weight of the matching term on the query projector, independent of token counts."""
    matching_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the weight rises linearly from 0."""
    gan: GanConfig = GanConfig()
    transport: TransportConfig = TransportConfig()

    @model_validator(mode="after")
    def _check_matching(self) -> Self:
        check_matching_settings(self.matching, gan=self.gan, transport=self.transport)
        return self


class DskdCma(CrossModelAttention):
    """Cross-model attention in both directions, with an optional key-query matching term."""

    config: Config

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_hidden_size is not None
        self.matching = MatchingTerm(
            config.matching,
            2 * setup.teacher_hidden_size,
            weight=config.matching_weight,
            warmup_steps=config.matching_warmup_steps,
            gan=config.gan,
            transport=config.transport,
        )
        self.meter = GradientMeter()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Projectors, and the discriminator when there is one to train."""
        projectors = [self.query_projector, self.teacher_to_student, self.student_to_teacher]
        groups = {
            "projectors": [parameter for module in projectors for parameter in module.parameters()],
            "discriminator": [parameter for parameter in self.matching.parameters() if parameter.requires_grad],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}

    def set_step(self, step: int) -> None:
        """Advances the matching term's warm-up and its alternation of updates."""
        self.matching.set_step(step)

    def record_gradients(self, enabled: bool) -> None:
        """Measure the gradients on the query projector during the coming backward passes."""
        self.meter.enabled = enabled

    def gradient_metrics(self) -> dict[str, float]:
        """Gradient norms on the query projector by loss, and the matching term's relative to distillation's."""
        norms = self.meter.norms()
        metrics = {f"query_gradient_norm_{name}": norm for name, norm in norms.items()}
        if norms.get("kd") and "matching" in norms:
            metrics["query_gradient_ratio"] = norms["matching"] / norms["kd"]
        return metrics

    @torch.no_grad()
    def probe(self, batch: PairBatch, student_embedding: nn.Module, teacher_embedding: nn.Module) -> dict[str, float]:
        """Distances between queries and keys of a fixed batch, and how much attention lies where it should."""
        sides = self.probed(batch, student_embedding, teacher_embedding)
        attention = self.attend(sides, position_weight=self.config.position_weight)
        located = _location_metrics(attention, batch) | _exact_pairs(attention, batch, sides).metrics
        return distances(sides) | {
            name: float(ratio.sum) / max(float(ratio.count), 1.0) for name, ratio in located.items()
        }

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """Terms ``student_space``, ``teacher_space``, ``exact_pairs`` and those of the matching, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        num_examples = batch["input_ids"].shape[0]
        sides = self.query_keys(
            student.tokens,
            teacher.tokens,
            student_embedding=student.embedding,
            teacher_embedding=teacher.embedding,
            num_examples=num_examples,
        )
        attention = self.attend(
            replace(sides, queries=self.meter.watch(sides.queries, sides.inputs, "kd")),
            position_weight=self.config.position_weight,
        )
        values = teacher_values(teacher, num_examples, config=self.config)
        terms = self.terms(student, teacher, attention, values=values)
        exact = _exact_pairs(attention, batch, sides)
        metrics = _location_metrics(attention, batch) | exact.metrics
        terms["student_space"] = replace(terms["student_space"], metrics={**terms["student_space"].metrics, **metrics})
        if self.config.exact_pair_weight:
            terms["exact_pairs"] = LossTerm(
                exact.total, student.labels.shape[0], weight=self.config.exact_pair_weight, is_auxiliary=True
            )
        matched = sides
        if self.config.gan.positions == "all":
            matched = self.with_unsupervised(sides, student, teacher, batch=batch)
        return terms | self.matching(
            self.meter.watch(matched.queries, matched.inputs, "matching"),
            matched.keys,
            query_rows=matched.query_rows,
            key_rows=matched.key_rows,
            num_examples=num_examples,
            supervised=PositionCounts(len(student.labels), len(teacher.labels)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _ExactPairs:
    """How the attention does on positions whose one counterpart is known: chunks of one token on either side."""

    total: Tensor
    """Scalar: sum of -log A_ij over the pairs, in nats."""
    metrics: dict[str, Ratio]


def _exact_pairs(attention: CrossAttention, batch: PairBatch, sides: QueryKeys) -> _ExactPairs:
    chunks = chunk_rows(sides.query_rows, batch["chunk_ids"], sides.key_rows, batch["teacher_chunk_ids"])
    scores = attention.student_scores(chunks.student.starts[chunks.one_to_one])
    partners = attention.teacher.columns[chunks.teacher.starts[chunks.one_to_one]]
    total = cross_entropy(scores, partners, reduction="sum")
    right = scores.detach().argmax(-1) == partners if partners.numel() else partners
    count = partners.shape[0]
    metrics = {
        "exact_pair_cross_entropy": Ratio(total.detach(), count),
        "exact_pair_accuracy": Ratio(right.sum(), count),
    }
    return _ExactPairs(total, metrics)


def _location_metrics(attention: CrossAttention, batch: PairBatch) -> dict[str, Ratio]:
    """Coverage, and the share of attention (mass, top-1) that lies in the byte-exact chunk of each covered position."""
    inside = same_chunk(batch["chunk_ids"], batch["teacher_chunk_ids"])
    covered = batch["chunk_ids"] >= 0
    weights = attention.student_weights.detach()
    count = covered.sum()
    top = inside.gather(2, weights.argmax(-1, keepdim=True)).squeeze(-1) if weights.numel() else covered
    return {
        "coverage": Ratio(count, attention.student.mask.sum()),
        "attention_in_chunk": Ratio((weights * inside).sum(), count),
        "attention_top1_in_chunk": Ratio((top & covered).sum(), count),
    }
