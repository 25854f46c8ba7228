"""From an objective's divergence settings to the row loss they name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vocabridge.losses.divergences import divergence
from vocabridge.objectives.config import DivergenceConfig


def row_divergence(config: DivergenceConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The row loss ``(student_logits [n, V], teacher_logits [n, V]) -> [n]`` in nats that ``config`` describes."""
    return divergence(
        config.divergence,
        skew=config.skew,
        adaptive_alpha=config.adaptive_alpha,
        jsd_beta=config.jsd_beta,
        temperature=config.temperature,
    )
