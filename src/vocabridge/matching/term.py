"""The key-query matching term of an objective: its weight, its schedule and what it logs."""

from __future__ import annotations

from torch import Tensor, nn

from vocabridge.losses.distances import mmd_squared
from vocabridge.losses.terms import LossTerm, Ratio
from vocabridge.matching.config import GanConfig, Matching, TransportConfig
from vocabridge.matching.gan import GanMatching


class MatchingTerm(nn.Module):
    """Loss terms that pull the queries to the keys; owns the discriminator when there is one."""

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
        self.gan = GanMatching(num_features, gan) if kind == "gan" else None

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
        self, queries: Tensor, keys: Tensor, *, query_rows: Tensor, key_rows: Tensor, num_examples: int
    ) -> dict[str, LossTerm]:
        """Terms for packed ``queries [N, F]`` and constant ``keys [M, F]`` of supervised positions only.

        Args:
            queries: with gradient.
            keys: constants of the frozen teacher.
            query_rows: ``[N]`` example of each query.
            key_rows: ``[M]`` example of each key.
            num_examples: in the micro-batch.
        """
        if self.gan is not None and queries.shape[0] and keys.shape[0]:
            return self._adversarial(self.gan, queries, keys)
        if self.kind == "mmd" and min(queries.shape[0], keys.shape[0]) > 1:
            # A statistic of the micro-batch: weighted by tokens, so an accumulated step takes the mean over its parts.
            count = queries.shape[0]
            total = mmd_squared(queries.float(), keys.float()) * count
            return {"mmd": LossTerm(total, count, weight=self.weight, is_auxiliary=True)}
        return {}

    def _adversarial(self, gan: GanMatching, queries: Tensor, keys: Tensor) -> dict[str, LossTerm]:
        sums = gan(queries, keys, weight=self.weight)
        num_queries, num_keys = queries.shape[0], keys.shape[0]
        return {
            "gan_queries": LossTerm(
                sums.query_loss,
                num_queries,
                is_auxiliary=True,
                metrics={"discriminator_query_accuracy": Ratio(sums.queries_right, num_queries)},
            ),
            "gan_keys": LossTerm(
                sums.key_loss,
                num_keys,
                unit="teacher_tokens",
                is_auxiliary=True,
                metrics={"discriminator_key_accuracy": Ratio(sums.keys_right, num_keys)},
            ),
        }
