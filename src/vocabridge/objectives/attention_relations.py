"""Attention relations among chunks: how queries, keys and values relate to each other, as in the teacher.

MiniLM (Wang et al. 2020, arXiv 2002.10957: query-key and value-value relations of the last layer) and MiniLMv2 (Wang et
al. 2021, arXiv 2012.15828: query-query, key-key and value-value, any layer, relation heads), for causal models with any
two tokenizers.

For a layer, an example with byte-exact chunks 1..C and a relation (a, b), say a = query, b = key: the projections of
all heads are pooled per chunk, concatenated to width F and split anew into A relation heads, as many on both sides.

    R_i = softmax over j <= i of (a_i . b_j / sqrt(F / A))        R' likewise, for the teacher with its own F
    kd = mean over layers, relations and heads of sum_i KL(R'_i || R_i)
    L = (1 - kd_weight) sum_i CE(z_i, y_i) + kd_weight kd

Needs both trunks and no teacher head, and no learned part: the widths of the two models may differ.

What we do differently, and why:
- Relations are among chunks of the response, so two tokenizations give matrices of one size; the papers' are among all
  tokens of one vocabulary. Prompts are left out because each model reads its own.
- The positions are those that predict a token. ``pool: first`` takes a chunk's first one, at which both models have
  read exactly the same bytes; ``mean`` averages.
- Causal: a chunk relates to itself and those before it.
- Queries and keys are taken as their projections give them, before rotary embedding and query-key norms. A rotation
  depends on token positions, which two tokenizers do not share; hence query-key relations are not the model's attention
  probabilities.
- Grouped key-value heads are repeated to the number of query heads, so that F is the same for all three.
- The mean over relations, where the papers have a sum: kd_weight means the same for one relation and for three.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vocabridge.errors import UserError
from vocabridge.losses.attention_relations import Relation, relation_divergence
from vocabridge.losses.chunk_rows import ChunkRows, Ranges, chunk_rows
from vocabridge.losses.cross_attention import Padding
from vocabridge.losses.hidden_states import pool_chunks
from vocabridge.models.capture import LayerRequest
from vocabridge.models.forward import SideForward
from vocabridge.models.projections import AttentionProjections
from vocabridge.objectives._layer_pairs import LayerPair, Trunks, layer_pairs
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

_MAX_DEFAULT_HEADS = 48
"""Of MiniLMv2's base-size students."""


class Config(KdConfig):
    """Settings of the attention relations; MiniLMv2's by default."""

    paper: ClassVar[str] = "MiniLMv2, Findings of ACL 2021, arXiv 2012.15828 (MiniLM: arXiv 2002.10957)"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "chunks", "layers")
    cost: ClassVar[Cost] = "student head"
    use_when: ClassVar[str] = "the student should attend as the teacher does; as a term beside one that reads logits"

    layers: tuple[tuple[int, int], ...] = Field(((-1, -1),), min_length=1)
    """Pairs [student layer, teacher layer], counted from 1; MiniLMv2 takes a large teacher's upper middle layer."""
    relations: tuple[Literal["query_key", "query_query", "key_key", "value_value"], ...] = Field(
        ("query_query", "key_key", "value_value"), min_length=1
    )
    """MiniLM's are query_key and value_value."""
    num_relation_heads: int | None = Field(None, ge=1)
    """Default: the largest number up to 48 that divides both models' attention widths."""
    pool: Literal["first", "mean"] = "first"
    """State of a chunk: at its first position, where both models have read the same bytes, or the mean."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.relations)) < len(self.relations):
            raise ValueError("relations names one of them twice; name each once")
        return self


class AttentionRelations(Objective):
    """KL between the two models' relation matrices of chosen layers."""

    config: Config

    def __init__(self, config: Config, setup: ObjectiveSetup):
        super().__init__(config, setup)
        trunks = Trunks.of(setup)
        self.pairs = layer_pairs(config.layers, trunks, objective="attention_relations", first=1)
        self.layers = LayerNeeds(
            LayerRequest(attention=tuple(sorted({pair.student for pair in self.pairs}))),
            LayerRequest(attention=tuple(sorted({pair.teacher for pair in self.pairs}))),
        )
        self.num_heads = _num_relation_heads(config.num_relation_heads, trunks)

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """One term ``attention_relations``, in nats."""
        student, teacher = pair.student, require_teacher(pair)
        chunks = chunk_rows(student.rows, batch["chunk_ids"], teacher.rows, batch["teacher_chunk_ids"])
        share, count = self.config.kd_weight, student.labels.shape[0]
        reference = reference_loss(student, 1 - share)
        divergences = torch.stack([self._of_layers(each, student, teacher, chunks, batch) for each in self.pairs]).mean(
            0
        )
        named = zip(self.config.relations, divergences.detach().unbind(), strict=True)
        reached = chunks.covered if self.config.pool == "mean" else chunks.num_chunks
        metrics = {
            **reference.metrics,
            **{f"{name}_divergence": Ratio(value, chunks.num_chunks) for name, value in named},
            "coverage": coverage_ratio("attention_relations", reached, count),
        }
        total = reference.total + share * divergences.mean()
        return {"attention_relations": LossTerm(total, count, metrics=metrics)}

    def _of_layers(
        self, layers: LayerPair, student: SideForward, teacher: SideForward, chunks: ChunkRows, batch: PairBatch
    ) -> Tensor:
        """``[relations]`` divergence of each relation, summed over chunks."""
        padding = Padding.of(chunks.rows, batch["input_ids"].shape[0])
        mine = self._states(student.layers.attention[layers.student], chunks.student, padding)
        theirs = self._states(teacher.layers.attention[layers.teacher], chunks.teacher, padding)
        counts = padding.mask.sum(1)
        return torch.stack(
            [
                relation_divergence(_relation(mine, name), _relation(theirs, name), counts, num_heads=self.num_heads)
                for name in self.config.relations
            ]
        )

    def _states(self, projections: AttentionProjections, ranges: Ranges, padding: Padding) -> dict[str, Tensor]:
        """``[B, R, F]`` of every chunk, by part."""
        parts = {"query": projections.query, "key": projections.key, "value": projections.value}
        num_heads = projections.query.shape[1]
        return {
            name: padding.pad(_repeated(pool_chunks(states, ranges, self.config.pool), num_heads))
            for name, states in parts.items()
        }


def _repeated(states: Tensor, num_heads: int) -> Tensor:
    """``[C, G, D] -> [C, F]``, each key-value head as often as it has query heads."""
    return states.repeat_interleave(num_heads // states.shape[1], dim=1).flatten(1)


def _relation(states: dict[str, Tensor], name: str) -> Relation:
    left, right = name.split("_")
    return Relation(states[left], states[right])


def _num_relation_heads(given: int | None, trunks: Trunks) -> int:
    widths = []
    for side, trunk in (("student", trunks.student), ("teacher", trunks.teacher)):
        if trunk.attention_size is None:
            raise UserError(f"objective attention_relations: the {side} has no attention; take another objective.")
        widths.append(trunk.attention_size)
    common = math.gcd(*widths)
    if given is None:
        return max(number for number in range(1, _MAX_DEFAULT_HEADS + 1) if common % number == 0)
    if common % given:
        raise UserError(
            f"objective attention_relations: num_relation_heads {given} does not divide both attention widths, "
            f"{widths[0]} of the student and {widths[1]} of the teacher; give a divisor of {common}."
        )
    return given
