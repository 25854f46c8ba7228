"""From the layer pairs that a recipe names to layers that exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vocabridge.models.capture import TrunkShape, resolve_layer
from vocabridge.objectives.base import ObjectiveSetup


@dataclass(frozen=True, slots=True)
class Trunks:
    """Both models' shapes."""

    student: TrunkShape
    teacher: TrunkShape

    @classmethod
    def of(cls, setup: ObjectiveSetup) -> Trunks:
        """The shapes of the models that an objective is set up for."""
        assert setup.student_trunk is not None
        assert setup.teacher_trunk is not None
        return cls(setup.student_trunk, setup.teacher_trunk)


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A student layer and the teacher layer it learns from, by non-negative numbers."""

    student: int
    teacher: int


def layer_pairs(
    given: Sequence[tuple[int, int]], trunks: Trunks, *, objective: str, first: Literal[0, 1]
) -> tuple[LayerPair, ...]:
    """Pairs of existing layers, each once.

    Args:
        given: (student layer, teacher layer), as a recipe has them; see :mod:`vocabridge.models.capture`.
        trunks: both models.
        objective: whose setting it is, for messages.
        first: the smallest number there is, 0 for hidden states, 1 for attention.

    Raises:
        UserError: there is no such layer.
    """
    where = f"objective {objective}, layers:"
    pairs = [
        LayerPair(
            resolve_layer(student, trunks.student.num_layers, first=first, where=f"{where} student layer"),
            resolve_layer(teacher, trunks.teacher.num_layers, first=first, where=f"{where} teacher layer"),
        )
        for student, teacher in given
    ]
    return tuple(dict.fromkeys(pairs))
