"""Base of every objective's config; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _check_divergence(self) -> Self:
        readers = {"skew": "skewed", "adaptive_alpha": "adaptive", "jsd_beta": "generalised_jsd"}
        # By value, not by what was written: a resolved recipe writes every default out and must read back.
        for name in self.model_dump(include=set(readers), exclude_defaults=True):
            if not self.divergence.startswith(readers[name]):
                raise ValueError(f"{name} has no effect with divergence '{self.divergence}'; leave it out")
        return self


class TwoSpaceConfig(DivergenceConfig):
    """Of an objective with a loss in the output space of either model."""

    cost: ClassVar[Cost] = "both heads twice"

    teacher_top_k: int | None = Field(None, ge=2)
    """Compare in the teacher's space only the teacher's k likeliest tokens of each position, both sides renormalised.

    Saves two of the three products with the teacher's head; what is ignored stands in
    :mod:`vocabridge.losses.vocabulary_cut`. Default: the whole vocabulary."""


class DualSpaceConfig(TwoSpaceConfig):
    """Of an objective that mixes projected hidden states of one model into the positions of the other."""

    needs: ClassVar[tuple[str, ...]] = ("teacher", "tokenizers", "chunks")

    value: Literal["hidden_and_label", "hidden"] = "hidden_and_label"
    """What the teacher's values hold; ``hidden`` leaves out the embedding of its label, so that it cannot be copied."""
    statistics: Literal["example", "batch"] = "example"
    """Over which supervised positions the scalar standard deviations are taken."""


class CrossAttentionConfig(DualSpaceConfig):
    """Of an objective whose student positions attend to teacher positions by learned queries."""

    query_start: Literal["random", "closed_form"] = "closed_form"
    query_normalize: Literal["none", "scalar"] = "none"
    """With a random start: divide the query's input by its standard deviation (``scalar``), or not, as published."""
    score_scale: float | None = Field(None, gt=0)
    """Factor on query-key products; default 1/sqrt(2D) for a random start, 20 for the closed form."""

    @model_validator(mode="after")
    def _check_query(self) -> Self:
        if self.query_start == "closed_form" and self.query_normalize != "none":
            raise ValueError("query_normalize has no effect with query_start 'closed_form'; leave it out")
        return self


class PairedSpaceConfig(TwoSpaceConfig):
    """Of an objective that projects hidden states between both models at pairs of positions."""

    projector_start: Literal["random", "pseudo_inverse"] = "pseudo_inverse"
    """``pseudo_inverse``: projected states begin with the logits nearest those before, over shared tokens."""
    t2s_target: Literal["label", "teacher_argmax"] = "teacher_argmax"
    """What the projected teacher shall predict. ``teacher_argmax``: what the teacher does; where it fails in that, the
    divergence from it is left out."""
    teacher_space_projector: Literal["learned", "recomputed"] = "recomputed"
    """From student to teacher: trained, or computed anew from the student's present head."""
    recompute_every: int = Field(10, ge=1)
    """Optimizer steps between two computations of that projector; 1 is the published form."""

    @model_validator(mode="after")
    def _check_projector(self) -> Self:
        changed = self.model_dump(include={"recompute_every"}, exclude_defaults=True)
        if self.teacher_space_projector == "learned" and changed:
            raise ValueError("recompute_every has no effect with teacher_space_projector 'learned'; leave it out")
        return self
