"""What every objective is: a module that turns one forward of both models into loss sums."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vocabridge.losses.chunked_head import HeadInput
from vocabridge.losses.terms import LossTerm, Ratio
from vocabridge.models.capture import NO_LAYERS, LayerRequest, TrunkShape
from vocabridge.models.forward import SideForward
from vocabridge.models.heads import OutputHead
from vocabridge.objectives.config import ObjectiveConfig
from vocabridge.pairs import PairBatch

logger = logging.getLogger(__name__)

__all__ = [
    "ForwardPair",
    "LayerNeeds",
    "LossTerm",
    "Objective",
    "ObjectiveSetup",
    "Ratio",
    "coverage_ratio",
    "head_input",
    "require_teacher",
]


@dataclass(frozen=True, slots=True)
class ForwardPair:
    """Both models' packed supervised positions; ``teacher`` is None for objectives that need none."""

    student: SideForward
    teacher: SideForward | None


@dataclass(frozen=True, slots=True)
class LayerNeeds:
    """Inner layers that an objective reads; each side's forward captures these and no others."""

    student: LayerRequest = NO_LAYERS
    teacher: LayerRequest = NO_LAYERS

    def __or__(self, other: LayerNeeds) -> LayerNeeds:
        """What two terms of one composition need together."""
        return LayerNeeds(self.student | other.student, self.teacher | other.teacher)


@dataclass(frozen=True, slots=True)
class ObjectiveSetup:
    """What an objective may look at once, before training."""

    student_hidden_size: int
    student_embedding: nn.Module
    student_tokenizer: PreTrainedTokenizerBase
    student_head: OutputHead
    teacher_hidden_size: int | None = None
    teacher_embedding: nn.Module | None = None
    teacher_head: OutputHead | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    student_trunk: TrunkShape | None = None
    """Number and widths of the layers, for objectives that read inner ones."""
    teacher_trunk: TrunkShape | None = None
    student_end_token_id: int | None = None
    """The label that ends a response under the student's template; None: the tokenizer's EOS token."""
    teacher_end_token_id: int | None = None

    @property
    def end_token_ids(self) -> tuple[int, int]:
        """The end tokens of student and teacher, which pair by role whatever their spelling."""
        assert self.teacher_tokenizer is not None
        return (
            _first_given(self.student_end_token_id, self.student_tokenizer.eos_token_id),
            _first_given(self.teacher_end_token_id, self.teacher_tokenizer.eos_token_id),
        )


class Objective(nn.Module):
    """Base class; a subclass owns its learned parts (projectors, discriminator) as ordinary submodules.

    A subclass's file defines ``Config(ObjectiveConfig)`` and one subclass of this class, whose constructor takes
    ``(config, setup)``. Its parameters reach the optimizer through :meth:`parameter_groups`.
    """

    layers = LayerNeeds()
    """Inner layers to capture; a subclass that needs ``layers`` sets its own in the constructor."""

    def __init__(self, config: ObjectiveConfig, setup: ObjectiveSetup):
        super().__init__()
        self.config = config

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """Loss terms of one micro-batch, by stable names that appear in the log."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by optimizer group; ``projectors`` and ``discriminator`` have their own learning rates."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return {"projectors": trained} if trained else {}

    def set_step(self, step: int) -> None:
        """Told the number of finished optimizer steps before each forward; for warm-ups and alternation."""

    def record_gradients(self, enabled: bool) -> None:
        """Told whether the coming backward passes shall be measured for :meth:`gradient_metrics`."""

    def gradient_metrics(self) -> dict[str, float]:
        """Numbers gathered during the recorded backward passes (empty when there are none)."""
        return {}

    def probe(self, batch: PairBatch, student_embedding: nn.Module, teacher_embedding: nn.Module) -> dict[str, float]:
        """Diagnostics on a fixed batch of token ids, without running either model (empty when there are none)."""
        return {}


def _first_given(*token_ids: int | None) -> int:
    return next(token_id for token_id in token_ids if token_id is not None)


def require_teacher(pair: ForwardPair) -> SideForward:
    """The teacher's side, for objectives that cannot do without."""
    assert pair.teacher is not None, "the trainer gave no teacher forward to an objective that needs one"
    return pair.teacher


def coverage_ratio(objective: str, covered: Tensor | int, total: int) -> Ratio:
    """The logged ``coverage``: how many of the student's supervised positions the distillation terms reach.

    Warns when a micro-batch has positions and none is covered: its distillation loss is 0, which looks like success.
    """
    if total and not int(covered):
        logger.warning(
            "objective %s: none of the %d supervised student positions of a micro-batch has a partner on the teacher's "
            "side, so it teaches nothing here; 'vocabridge inspect-pair' shows how well the tokenizers fit.",
            objective,
            total,
        )
    return Ratio(covered, total)


def head_input(side: SideForward, hidden: Tensor | None = None, *, train_head: bool = True) -> HeadInput:
    """The side's head applied to ``hidden`` (default: the side's own last hidden states) for a chunked loss."""
    head = side.head
    return HeadInput(
        hidden=side.hidden_states if hidden is None else hidden,
        weight=head.weight,
        bias=head.bias,
        soft_cap=head.soft_cap,
        logit_scale=head.logit_scale,
        train_head=train_head,
    )
