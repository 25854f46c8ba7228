"""Losses and logged numbers as sums with their counts, so that they add up exactly over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Unit = Literal["student_tokens", "teacher_tokens"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A logged number as numerator and denominator."""

    sum: Tensor | float
    count: Tensor | float


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A loss as a sum, never a mean.

    The trainer adds ``weight * sum / (number of units in the whole optimizer step, over ranks and accumulation)``;
    hence accumulation, batch split and data parallelism leave the gradient unchanged.
    """

    sum: Tensor
    """Differentiable scalar: the sum over this micro-batch."""
    count: Tensor | int
    """How many units this micro-batch has; for the log only."""
    unit: Unit = "student_tokens"
    """What the step-wide divisor counts: supervised student or teacher positions."""
    weight: float = 1.0
    is_auxiliary: bool = False
    """Says nothing of the student, so it is left out of ``eval_loss``, by which checkpoints are chosen."""
    metrics: Mapping[str, Ratio] = field(default_factory=dict)
    """Parts of the term and diagnostics, logged by these names."""
