"""The key-query matching term of an objective: its weight, its schedule and what it logs.

``gan`` sums over positions. All other kinds compare queries and keys within each example of two or more positions on
both sides. ``conditional_transport`` then sums over positions as well; ``sinkhorn``, ``energy``, ``mmd`` and ``coral``
are one number per example, counted once for each of its queries. Hence every kind is exact under gradient accumulation
and any split of the batch, and does not depend on the scale of the embeddings (``gan`` sees them as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocabridge.losses.cross_attention import Padding
from vocabridge.losses.distances import coral_distance, energy_distance, mmd_squared
from vocabridge.losses.terms import LossTerm, Ratio
from vocabridge.losses.transport import sinkhorn_divergence
from vocabridge.matching.conditional_transport import ConditionalTransport
from vocabridge.matching.config import GanConfig, Matching, TransportConfig
from vocabridge.matching.examples import MatchedExamples
from vocabridge.matching.gan import GanMatching

DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mmd": mmd_squared,
    "energy": energy_distance,
    "coral": coral_distance,
}


@dataclass(frozen=True, slots=True)
class PositionCounts:
    """Supervised positions of the micro-batch."""

    queries: int
    keys: int


class MatchingTerm(nn.Module):
    """Loss terms that pull the queries to the keys; owns the discriminator, or critic and navigator, if there is one.

    The trained parameters of every kind are :meth:`parameters`.
    """

    def __init__(
        self,
        kind: Matching,
        num_features: int,
        *,
        weight: float,
        warmup_steps: int,
        gan: GanConfig,
        transport: TransportConfig = TransportConfig(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.kind = kind
        self._full_weight = weight
        self._warmup_steps = warmup_steps
        self._step = 0
        self._transport_config = transport
        self.gan = GanMatching(num_features, gan) if kind == "gan" else None
        self.transport = ConditionalTransport(num_features, transport) if kind == "conditional_transport" else None

    def set_step(self, step: int) -> None:
        """Number of finished optimizer steps: moves the weight warm-up and the alternation of updates."""
        self._step = step
        if self.gan is not None:
            self.gan.set_step(step)

    @property
    def weight(self) -> float:
        """Weight at the present step."""
        return self._full_weight * (min(1.0, self._step / self._warmup_steps) if self._warmup_steps else 1.0)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        query_rows: Tensor,
        key_rows: Tensor,
        num_examples: int,
        supervised: PositionCounts | None = None,
    ) -> dict[str, LossTerm]:
        """Terms for packed ``queries [N, F]`` and constant ``keys [M, F]``.

        Terms and metrics have the same names for every micro-batch, an empty one too: ranks add them up by place.

        Args:
            queries: with gradient.
            keys: constants of the frozen teacher.
            query_rows: ``[N]`` example of each query, sorted.
            key_rows: ``[M]`` example of each key, sorted.
            num_examples: in the micro-batch.
            supervised: how many of both, those in front, are supervised positions; default all. Only ``gan`` takes
                others.
        """
        counts = supervised or PositionCounts(queries.shape[0], keys.shape[0])
        if self.kind == "none":
            return {}
        if self.gan is not None:
            return self._adversarial(self.gan, queries, keys, counts)
        examples = MatchedExamples.select(
            queries, keys, query_rows=query_rows, key_rows=key_rows, num_examples=num_examples
        )
        if self.transport is not None:
            return self._conditional(self.transport, examples, counts)
        return self._per_example(examples, counts)

    def _adversarial(
        self, gan: GanMatching, queries: Tensor, keys: Tensor, counts: PositionCounts
    ) -> dict[str, LossTerm]:
        """Means over all positions, times the supervised ones, by whose number the trainer divides."""
        sums = gan(queries, keys, weight=self.weight)
        queries_right, keys_right = sums.queries_right[: counts.queries].sum(), sums.keys_right[: counts.keys].sum()
        return {
            "gan_queries": LossTerm(
                sums.query_loss * (counts.queries / max(queries.shape[0], 1)),
                counts.queries,
                is_auxiliary=True,
                metrics={"discriminator_query_accuracy": Ratio(queries_right, counts.queries)},
            ),
            "gan_keys": LossTerm(
                sums.key_loss * (counts.keys / max(keys.shape[0], 1)),
                counts.keys,
                unit="teacher_tokens",
                is_auxiliary=True,
                metrics={"discriminator_key_accuracy": Ratio(keys_right, counts.keys)},
            ),
        }

    def _conditional(
        self, transport: ConditionalTransport, examples: MatchedExamples, counts: PositionCounts
    ) -> dict[str, LossTerm]:
        sums = transport(examples, weight=self.weight)
        num_queries, num_keys = examples.num_queries.sum(), examples.num_keys.sum()
        metrics = {
            "transport_uniform_cost": Ratio(sums.uniform_cost, num_queries),
            "transport_query_entropy": Ratio(sums.query_entropy, num_queries),
        }
        return {
            "transport_queries": LossTerm(
                sums.query_cost, counts.queries, is_auxiliary=True, metrics=metrics | examples.diagnostics()
            ),
            "transport_keys": LossTerm(
                sums.key_cost,
                counts.keys,
                unit="teacher_tokens",
                is_auxiliary=True,
                metrics={"transport_key_entropy": Ratio(sums.key_entropy, num_keys)},
            ),
        }

    def _per_example(self, examples: MatchedExamples, counts: PositionCounts) -> dict[str, LossTerm]:
        metrics = examples.diagnostics()
        if self.kind == "sinkhorn":
            values, errors = self._sinkhorn(examples)
            metrics["sinkhorn_marginal_error"] = Ratio(
                (errors * examples.num_queries).sum(), examples.num_queries.sum()
            )
        elif examples.num_examples:
            distance = DISTANCES[self.kind]
            values = torch.stack([distance(queries, keys) for queries, keys in examples.pairs()])
        else:
            values = examples.num_queries.to(examples.queries.dtype)  # [0]
        # The empty or finite sum over the queries keeps a path to them where no example is left.
        total = (values * examples.num_queries).sum() + 0.0 * examples.queries.sum()
        return {self.kind: LossTerm(total, counts.queries, weight=self.weight, is_auxiliary=True, metrics=metrics)}

    def _sinkhorn(self, examples: MatchedExamples) -> tuple[Tensor, Tensor]:
        x = Padding.of(examples.query_rows, examples.num_examples)
        y = Padding.of(examples.key_rows, examples.num_examples)
        result = sinkhorn_divergence(
            x.pad(examples.queries),
            y.pad(examples.keys),
            x_mask=x.mask,
            y_mask=y.mask,
            regularization=self._transport_config.regularization,
            iterations=self._transport_config.iterations,
        )
        return result.divergence, result.marginal_error
