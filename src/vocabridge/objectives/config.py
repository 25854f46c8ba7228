"""Base of every objective's config; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from vocabridge.settings import Settings

Divergence = Literal[
    "forward",
    "reverse",
    "jensen_shannon",
    "generalised_jsd",
    "skewed_forward",
    "skewed_reverse",
    "adaptive",
    "total_variation",
]
"""Row divergences of :mod:`vocabridge.losses.divergences`."""

Cost = Literal["student head", "both heads", "both heads twice", "no head"]
"""What a training step pays beside the two trunks: how often which vocabulary head is applied."""


class ObjectiveConfig(Settings):
    """Validated settings of one objective."""

    paper: ClassVar[str] = ""
    """Title or method, venue and arXiv id, or empty."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the objective reads: any of ``teacher``, ``tokenizers``, ``chunks``, ``same_tokenizer``, ``layers``."""
    cost: ClassVar[Cost] = "student head"
    use_when: ClassVar[str] = ""
    """One sentence for the listing: when to pick it."""


class KdConfig(ObjectiveConfig):
    """Of an objective that learns from a teacher: L = (1 - kd_weight) cross-entropy + kd_weight distillation."""

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    cost: ClassVar[Cost] = "both heads"

    kd_weight: float = Field(0.5, ge=0, le=1)
    """Share of the distillation terms; the rest goes to cross-entropy on the reference."""


class DivergenceConfig(KdConfig):
    """Of an objective with a choice of divergence between two rows of logits."""

    divergence: Divergence = "forward"
    """Between the student's and the teacher's distribution; ``forward`` is KL(teacher || student)."""
    temperature: float = Field(2.0, gt=0)
    """Of every divergence; cross-entropies run at 1."""
    skew: float = Field(0.1, gt=0, lt=1)
    """Share of the numerator's distribution in the skewed mixtures."""
    adaptive_alpha: float = Field(0.5, gt=0, lt=1)
    """Teacher probability mass that counts as the tail in the adaptive divergence."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in the mixture of the generalised Jensen-Shannon divergence."""
