"""Dual-space distillation with cross-model attention and key-query matching (DSKD-CMA, DSKD-CMA-GA).

Zhang et al. 2024, arXiv 2406.17328 (DSKD, CMA); "Dual-Space Knowledge Distillation with Key-Query Matching for Large
Language Models with Vocabulary Mismatch", ICASSP 2026, arXiv 2603.22056 (the GA term).

Student positions i (last hidden h_i, input token x_i, label y_i), teacher positions j (h'_j, x'_j, y'_j); E, E' input
embeddings (constants), W, W' heads, d, D hidden sizes, sd one scalar standard deviation, sg stop-gradient:

    queries Q_i = P_q [E(x_i); E(y_i)]            keys K_j = [E'(x'_j); E'(y'_j)] / sd
    A = softmax_j(scale Q K^T)                    z_ts = A P_ts(h'/sd + E'(y')/sd) sg(W)^T
    A' = softmax_i((scale Q K^T)^T)               z_st = A' P_st(h) W'^T
    kd = CE(z_ts, y) + [argmax z_ts = y] D(z, sg(z_ts)) + KL(softmax z' || softmax z_st)
    L = (1 - kd_weight) CE(z, y) + kd_weight kd + matching_weight * matching(Q, K)

What we do differently, and why:
- ``query_start: closed_form`` (default): P_q starts as the orthogonal map between the two embedding spaces fitted on
  tokens with identical bytes, on centred unit-length embeddings, for queries and keys alike. The attention then finds
  the exact partner of most tokens before any training; a random start finds about one in a hundred.
- sd is taken per example (``statistics: example``), so gradient accumulation is exact; ``batch`` is the published form.
- Padding and prompts never enter an attention, a statistic or the matching term.
- No T^2 factor on divergences and no gradient into W through z_ts, as published.
- The published adaptive divergence applies its temperatures twice; here once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vocabridge.alignment import shared_vocabulary
from vocabridge.errors import UserError
from vocabridge.losses.cross_attention import Padding, attention_weights
from vocabridge.losses.distances import distribution_report
from vocabridge.losses.procrustes import orthogonal_map, unit_centred
from vocabridge.matching.config import GanConfig, Matching
from vocabridge.matching.gradient_meter import GradientMeter
from vocabridge.matching.term import MatchingTerm
from vocabridge.models.forward import SideForward, SupervisedTokens, supervised_tokens
from vocabridge.objectives._dual_space import DualSpace, embed, scaled, teacher_values
from vocabridge.objectives.base import ForwardPair, LossTerm, ObjectiveSetup, Ratio, require_teacher
from vocabridge.objectives.config import DivergenceConfig
from vocabridge.pairs import PairBatch


class Config(DivergenceConfig):
    """Settings of DSKD-CMA; the paper's values except for the query start."""

    paper: ClassVar[str] = "DSKD-CMA-GA, ICASSP 2026, arXiv 2603.22056 (DSKD: arXiv 2406.17328)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers")
    use_when: ClassVar[str] = "the tokenizers differ and the whole teacher distribution should reach the student"

    value: Literal["hidden_and_label", "hidden"] = "hidden_and_label"
    """What the teacher's values hold; ``hidden`` leaves out the embedding of its label, so that it cannot be copied."""
    query_start: Literal["random", "closed_form"] = "closed_form"
    query_normalize: Literal["none", "scalar"] = "none"
    """With a random start: divide the query's input by its standard deviation (``scalar``), or not, as published."""
    score_scale: float | None = Field(None, gt=0)
    """Factor on query-key products; default 1/sqrt(2D) for a random start, 20 for the closed form."""
    statistics: Literal["example", "batch"] = "example"
    """Over which supervised positions the scalar standard deviations are taken."""
    matching: Matching = "gan"
    matching_weight: float = Field(0.1, ge=0)
    """Weight of the matching term on the query projector, independent of token counts."""
    matching_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the weight rises linearly from 0."""
    gan: GanConfig = GanConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.query_start == "closed_form" and self.query_normalize != "none":
            raise ValueError("query_normalize has no effect with query_start 'closed_form'; leave it out")
        if self.matching != "gan" and self.gan != GanConfig():
            raise ValueError(f"gan settings have no effect with matching '{self.matching}'; leave them out")
        return self


@dataclass(frozen=True, slots=True)
class _Attention:
    """Both directions of the cross-model attention of one micro-batch."""

    to_student: Tensor
    """[B, R_s, R_t] weights of each student position over the teacher's positions."""
    to_teacher: Tensor
    """[B, R_t, R_s]"""
    student: Padding
    teacher: Padding


class DskdCma(DualSpace):
    """Cross-model attention in both directions, with an optional key-query matching term."""

    config: Config
    student_center: Tensor
    teacher_center: Tensor

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        assert setup.teacher_hidden_size is not None
        student_size, teacher_size = setup.student_hidden_size, setup.teacher_hidden_size
        self.query_projector = nn.Linear(2 * student_size, 2 * teacher_size)
        self.closed_form = config.query_start == "closed_form"
        self.score_scale = config.score_scale or (20.0 if self.closed_form else (2 * teacher_size) ** -0.5)
        if self.closed_form:
            self.register_buffer("student_center", torch.zeros(student_size))
            self.register_buffer("teacher_center", torch.zeros(teacher_size))
            self._start_closed_form(setup)
        self.matching = MatchingTerm(
            config.matching,
            2 * teacher_size,
            weight=config.matching_weight,
            warmup_steps=config.matching_warmup_steps,
            gan=config.gan,
        )
        self.meter = GradientMeter()

    @torch.no_grad()
    def _start_closed_form(self, setup: ObjectiveSetup) -> None:
        assert setup.teacher_tokenizer is not None
        assert setup.teacher_embedding is not None
        shared = shared_vocabulary(setup.student_tokenizer, setup.teacher_tokenizer)
        if len(shared.student_ids) < 2:
            raise UserError(
                "objective dskd_cma: the two vocabularies share no token, so query_start 'closed_form' has nothing to "
                "fit; use query_start: random."
            )
        student = embed(setup.student_embedding, torch.as_tensor(shared.student_ids))
        teacher = embed(setup.teacher_embedding, torch.as_tensor(shared.teacher_ids))
        self.student_center.copy_(student.mean(0))
        self.teacher_center.copy_(teacher.mean(0))
        rotation = orthogonal_map(
            unit_centred(student, student.mean(0)), unit_centred(teacher, teacher.mean(0)).to(student.device)
        )
        self.query_projector.weight.copy_(torch.block_diag(rotation, rotation))
        self.query_projector.bias.zero_()

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
        """Distances between queries and keys of a fixed batch, and how much attention lies in the right chunk."""
        student = supervised_tokens(batch["input_ids"], batch["labels"])
        teacher = supervised_tokens(batch["teacher_input_ids"], batch["teacher_labels"])
        num_examples = batch["input_ids"].shape[0]
        queries = self.queries(self.query_inputs(student, student_embedding, num_examples)).float()
        keys = self.keys(teacher, teacher_embedding, num_examples).float()
        report = distribution_report(queries, keys, x_groups=student.rows, y_groups=teacher.rows, seed=0)
        attention = self._attend(student, teacher, queries, keys, num_examples)
        located = _location_metrics(attention, batch)
        return report | {name: float(ratio.sum) / max(float(ratio.count), 1.0) for name, ratio in located.items()}

    def queries(self, inputs: Tensor) -> Tensor:
        """Query inputs ``[N, 2d]`` to queries ``[N, 2D]``; never in bfloat16 by autocast: the scores are scaled up."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.query_projector(inputs.to(self.query_projector.weight.dtype))

    def query_inputs(self, tokens: SupervisedTokens, embedding: nn.Module, num_examples: int) -> Tensor:
        """Constant ``[N, 2d]``: the student's embeddings of input token and label of each supervised position."""
        if self.closed_form:
            return _token_pairs(tokens, embedding, self.student_center)
        inputs = _token_pairs(tokens, embedding, None)
        return self._scaled(inputs, tokens.rows, num_examples) if self.config.query_normalize == "scalar" else inputs

    def keys(self, tokens: SupervisedTokens, embedding: nn.Module, num_examples: int) -> Tensor:
        """Constant ``[M, 2D]``: the teacher's embeddings of input token and label of each supervised position."""
        if self.closed_form:
            return _token_pairs(tokens, embedding, self.teacher_center)
        return self._scaled(_token_pairs(tokens, embedding, None), tokens.rows, num_examples)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """Terms ``student_space``, ``teacher_space`` and those of the matching, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        num_examples = batch["input_ids"].shape[0]
        inputs = self.query_inputs(student.tokens, student.embedding, num_examples)
        keys = self.keys(teacher.tokens, teacher.embedding, num_examples)
        queries = self.queries(inputs)
        attention = self._attend(
            student.tokens, teacher.tokens, self.meter.watch(queries, inputs, "kd"), keys, num_examples
        )
        return {
            "student_space": self._student_space(student, teacher, attention, batch),
            "teacher_space": self._teacher_space(student, teacher, attention),
            **self.matching(
                self.meter.watch(queries, inputs, "matching"),
                keys,
                query_rows=student.rows,
                key_rows=teacher.rows,
                num_examples=num_examples,
            ),
        }

    def _attend(
        self, student: SupervisedTokens, teacher: SupervisedTokens, queries: Tensor, keys: Tensor, num_examples: int
    ) -> _Attention:
        student_padding = Padding.of(student.rows, num_examples)
        teacher_padding = Padding.of(teacher.rows, num_examples)
        padded_queries = student_padding.pad(queries)
        padded_keys = teacher_padding.pad(keys.to(queries.dtype))
        with torch.autocast(queries.device.type, enabled=False):
            scores = padded_queries @ padded_keys.transpose(1, 2) * self.score_scale
        return _Attention(
            to_student=attention_weights(scores, teacher_padding.mask),
            to_teacher=attention_weights(scores.transpose(1, 2), student_padding.mask),
            student=student_padding,
            teacher=teacher_padding,
        )

    def _scaled(self, values: Tensor, rows: Tensor, num_examples: int) -> Tensor:
        return scaled(values, rows, num_examples, statistics=self.config.statistics)

    def _values(self, teacher: SideForward, num_examples: int) -> Tensor:
        settings = self.config
        values = teacher_values(teacher, num_examples, statistics=settings.statistics, value=settings.value)
        return self.teacher_to_student(values.to(self.teacher_to_student.weight.dtype))

    def _student_space(
        self, student: SideForward, teacher: SideForward, attention: _Attention, batch: PairBatch
    ) -> LossTerm:
        values = attention.teacher.pad(self._values(teacher, batch["input_ids"].shape[0]))
        projected = attention.student.pack(attention.to_student.to(values.dtype) @ values)
        term = self.losses.student_space(student, projected, torch.ones_like(student.labels, dtype=torch.bool))
        return replace(term, metrics={**term.metrics, **_location_metrics(attention, batch)})

    def _teacher_space(self, student: SideForward, teacher: SideForward, attention: _Attention) -> LossTerm:
        hidden = student.hidden_states.to(self.student_to_teacher.weight.dtype)
        values = attention.student.pad(self.student_to_teacher(hidden))
        projected = attention.teacher.pack(attention.to_teacher.to(values.dtype) @ values)
        covered = torch.ones_like(teacher.labels, dtype=torch.bool)
        return self.losses.teacher_space(teacher, projected, covered, num_student_tokens=student.labels.shape[0])


def _token_pairs(tokens: SupervisedTokens, embedding: nn.Module, center: Tensor | None) -> Tensor:
    parts = [embed(embedding, tokens.input_ids), embed(embedding, tokens.labels)]
    if center is not None:
        parts = [unit_centred(part, center.to(part.dtype)) for part in parts]
    return torch.cat(parts, dim=-1)


def _location_metrics(attention: _Attention, batch: PairBatch) -> dict[str, Ratio]:
    """Coverage, and the share of attention (mass, top-1) that lies in the byte-exact chunk of each covered position."""
    student_chunks, teacher_chunks = batch["chunk_ids"], batch["teacher_chunk_ids"]
    covered = student_chunks >= 0
    inside = (student_chunks[:, :, None] == teacher_chunks[:, None, :]) & covered[:, :, None]
    weights = attention.to_student.detach()
    count = covered.sum()
    top = inside.gather(2, weights.argmax(-1, keepdim=True)).squeeze(-1) if weights.numel() else covered
    return {
        "coverage": Ratio(count, attention.student.mask.sum()),
        "attention_in_chunk": Ratio((weights * inside).sum(), count),
        "attention_top1_in_chunk": Ratio((top & covered).sum(), count),
    }
