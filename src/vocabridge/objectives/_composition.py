"""Several objectives as one: a weighted sum whose parts are logged apart."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from vocabridge.objectives.base import ForwardPair, LossTerm, Objective
from vocabridge.objectives.config import ObjectiveConfig
from vocabridge.pairs import PairBatch


@dataclass(frozen=True, slots=True)
class WeightedPart:
    """One objective of a composition."""

    name: str
    weight: float
    objective: Objective


class Composition(Objective):
    """L = sum_k weight_k objective_k; log names get their part's name in front: ``dskd_cma/coverage``.

    Auxiliary terms (of a discriminator, say) teach learned parts and not the student: they keep their own weight.
    """

    def __init__(self, parts: Sequence[WeightedPart]):
        nn.Module.__init__(self)
        self.config = ObjectiveConfig()
        self.parts = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        seen: Counter[str] = Counter()
        for part in parts:
            name = part.name.rpartition(".")[2]
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name}_{seen[name]}"
            self.parts[key] = part.objective
            self.weights[key] = part.weight
        self.layers = functools.reduce(operator.or_, (part.objective.layers for part in parts))

    def _named(self) -> list[tuple[str, Objective]]:
        return [(key, part) for key, part in self.parts.items() if isinstance(part, Objective)]

    def forward(self, pair: ForwardPair, batch: PairBatch) -> dict[str, LossTerm]:
        """The terms of every part, weighted."""
        terms = {}
        for key, part in self._named():
            for name, term in part(pair, batch).items():
                terms[f"{key}/{name}" if name != key else key] = replace(
                    term,
                    weight=term.weight * (1.0 if term.is_auxiliary else self.weights[key]),
                    metrics={f"{key}/{metric}": ratio for metric, ratio in term.metrics.items()},
                )
        return terms

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parts' groups, joined by name."""
        groups: dict[str, list[nn.Parameter]] = {}
        for _, part in self._named():
            for name, parameters in part.parameter_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups

    def set_step(self, step: int) -> None:
        """Told to every part."""
        for _, part in self._named():
            part.set_step(step)

    def record_gradients(self, enabled: bool) -> None:
        """Told to every part."""
        for _, part in self._named():
            part.record_gradients(enabled)

    def gradient_metrics(self) -> dict[str, float]:
        """Of every part, by its name."""
        return {
            f"{key}/{name}": value for key, part in self._named() for name, value in part.gradient_metrics().items()
        }

    def probe(self, batch: PairBatch, student_embedding: nn.Module, teacher_embedding: nn.Module) -> dict[str, float]:
        """Of every part, by its name."""
        return {
            f"{key}/{name}": value
            for key, part in self._named()
            for name, value in part.probe(batch, student_embedding, teacher_embedding).items()
        }
