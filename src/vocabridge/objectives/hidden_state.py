"""Hidden states of chosen layers, pulled to the teacher's through a learned projection.

DistilBERT's cosine term (Sanh et al. 2019, arXiv 1910.01108), TinyBERT's hidden-state term (Jiao et al. 2020, arXiv
1909.10351), the latent term of ALM (Minixhofer et al. 2025, arXiv 2503.20083) and the span term of SRA (2026, arXiv
2605.01205), for causal models with any two tokenizers.

For layer pairs (k, k') out of ``layers``, byte-exact chunks c, states h_k(c) and h'_k'(c) pooled over the chunk's
positions on each side, learned affine maps P_k, and d the cosine distance 1 - cos(a, b) or the mean squared difference
|a - b|^2 / |b|^2:

    kd = mean over (k, k') of sum_c d(P_k h_k(c), h'_k'(c))
    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight kd

Needs both trunks and no teacher head. Layers count as in ``output_hidden_states``: 0 is the embeddings, n the last
hidden state after the final norm, -1 the same.

What we do differently, and why:
- The position of a state is the one that predicts a token, as everywhere here. ``pool: first`` takes the state that
  predicts the first token of a chunk: the only position of the chunk at which both models have read exactly the same
  bytes. It is the end of the chunk before, ALM's choice. At the chunk's last position one model may already have read
  bytes that the other has to predict, so it is not offered. ``mean`` averages the chunk's positions, as SRA does over
  its spans, but without SRA's weights from the last token's attention, which need attention maps.
- The squared difference is in units of the teacher's squared norm at that chunk, because models differ by orders of
  magnitude. ALM divides each channel by its mean square over the batch; that would make a micro-batch's gradient depend
  on its neighbours, and so on gradient accumulation.
- The projection goes from the student to the teacher (TinyBERT, ALM), so that the target stands still. DistilBERT has
  none; where both widths agree ours starts as the identity.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from vocabridge.losses.chunk_rows import ChunkRows, chunk_rows
from vocabridge.losses.hidden_states import cosine_distance, pool_chunks, relative_squared_distance
from vocabridge.models.capture import LayerRequest
from vocabridge.models.forward import SideForward
from vocabridge.objectives._layer_pairs import Trunks, layer_pairs
from vocabridge.objectives._reference import reference_loss
from vocabridge.objectives.base import (
    ForwardPair,
    LayerNeeds,
    LossTerm,
    Objective,
    ObjectiveSetup,
    Ratio,
    coverage_ratio,
    require_teacher,
)
from vocabridge.objectives.config import Cost, KdConfig
from vocabridge.pairs import PairBatch


class Config(KdConfig):
    """Settings of the hidden-state term."""

    paper: ClassVar[str] = "DistilBERT arXiv 1910.01108, TinyBERT arXiv 1909.10351, ALM latents arXiv 2503.20083"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "chunks", "layers")
    cost: ClassVar[Cost] = "student head"
    use_when: ClassVar[str] = "the student should imitate inner layers too; as a term beside one that reads logits"

    layers: tuple[tuple[int, int], ...] | None = Field(None, min_length=1)
    """Pairs [student layer, teacher layer]; default: the last ones, and the middle ones."""
    loss: Literal["cosine", "mse"] = "cosine"
    """``mse`` is in units of the teacher's squared norm."""
    pool: Literal["first", "mean"] = "first"
    """State of a chunk: at its first position, where both models have read the same bytes, or the mean."""


class HiddenState(Objective):
    """Distance between projected student states and teacher states, chunk by chunk."""

    config: Config

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        trunks = Trunks.of(setup)
        given = _last_and_middle(trunks) if config.layers is None else config.layers
        self.pairs = layer_pairs(given, trunks, objective="hidden_state", first=0)
        self.layers = LayerNeeds(
            LayerRequest(hidden_states=tuple(sorted({pair.student for pair in self.pairs}))),
            LayerRequest(hidden_states=tuple(sorted({pair.teacher for pair in self.pairs}))),
        )
        self.projectors = nn.ModuleList(
            _projector(trunks.student.width(pair.student), trunks.teacher.width(pair.teacher)) for pair in self.pairs
        )
        self._distance = cosine_distance if config.loss == "cosine" else relative_squared_distance

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``hidden_state``: cross-entropy in nats and a distance without unit."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        share, count = self.config.kd_weight, student.labels.shape[0]
        reference = reference_loss(student, 1 - share)
        distance = self._distances(student, teacher, chunks)
        reached = chunks.covered if self.config.pool == "mean" else chunks.num_chunks
        metrics = {
            **reference.metrics,
            "hidden_distance": Ratio(distance.detach(), chunks.num_chunks),
            "coverage": coverage_ratio("hidden_state", reached, count),
        }
        return {"hidden_state": LossTerm(reference.total + share * distance, count, metrics=metrics)}

    def _distances(self, student: SideForward, teacher: SideForward, chunks: ChunkRows) -> torch.Tensor:
        """Sum over chunks, mean over layer pairs."""
        sums = []
        for pair, projector in zip(self.pairs, self.projectors, strict=True):
            states = pool_chunks(student.layers.hidden_states[pair.student], chunks.student, self.config.pool)
            target = pool_chunks(teacher.layers.hidden_states[pair.teacher], chunks.teacher, self.config.pool)
            projected = projector(states.to(next(projector.parameters()).dtype)).to(target.dtype)
            sums.append(self._distance(projected, target).sum())
        return torch.stack(sums).mean()


def _last_and_middle(trunks: Trunks) -> tuple[tuple[int, int], ...]:
    num_student, num_teacher = trunks.student.num_layers, trunks.teacher.num_layers
    middle = max(1, num_student // 2)
    return ((middle, max(1, round(middle * num_teacher / num_student))), (num_student, num_teacher))


def _projector(student_size: int, teacher_size: int) -> nn.Linear:
    projector = nn.Linear(student_size, teacher_size)
    if student_size == teacher_size:
        nn.init.eye_(projector.weight)
        nn.init.zeros_(projector.bias)
    return projector
