"""The whole plan of a recipe: parts per rank, parts on disk, whether it fits, and what a change would save."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from vocabridge.plan.changes import candidates
from vocabridge.plan.disk import disk_parts
from vocabridge.plan.models import PlannedModels, planned_models, with_student
from vocabridge.plan.step import Part, Step, step_of, step_parts, teacher_weight_bytes, unknown
from vocabridge.plan.training_state import (
    Placement,
    Strategy,
    communication_bytes,
    gradient_bytes,
    optimizer_bytes,
    weight_bytes,
)
from vocabridge.recipe import Recipe

USABLE = 0.9
"""Share of a device's memory that a plan may fill; the driver, the allocator's gaps and the loader have the rest."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something to change, and the bytes a rank saves by it alone."""

    text: str
    saving: int
    fits: bool | None
    """Whether it alone makes the recipe fit; None where the device is not known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe needs; bytes."""

    strategy: Strategy
    world_size: int
    device: tuple[Part, ...]
    """Of a rank's device."""
    disk: tuple[Part, ...]
    """Of the run."""
    notes: tuple[str, ...]
    device_memory: int | None
    changes: tuple[Change, ...]
    """The largest saving first."""

    @property
    def total(self) -> int:
        """All parts of a device together, as if all were largest at once."""
        return _sum(self.device)

    @property
    def fits(self) -> bool | None:
        """Whether they fill at most :data:`USABLE` of the device; None where that is not known."""
        return _fits(self.total, self.device_memory)

    def to_json(self) -> str:
        """The plan for programs."""
        return json.dumps(asdict(self) | {"total": self.total, "fits": self.fits}, indent=1)


def recipe_plan(
    recipe: Recipe, *, strategy: Strategy = "ddp", world_size: int = 1, device_memory: int | None = None
) -> Plan:
    """Plan a recipe from its configuration; no weights are read and nothing is written.

    Args:
        recipe: a validated recipe.
        strategy: of data parallelism.
        world_size: number of ranks, one a device.
        device_memory: bytes of each device.

    Raises:
        UserError: a configuration, a tokenizer or the optimizer cannot be had.
    """
    models, placement = planned_models(recipe), _placement(recipe, strategy, world_size)
    parts = device_parts(recipe, models, placement)
    changes = _changes(recipe, models, placement, device_memory)
    return Plan(
        strategy=strategy,
        world_size=world_size,
        device=parts,
        disk=tuple(disk_parts(recipe, models, placement)),
        notes=tuple(unknown(models, step_of(recipe, placement.world_size), placement)),
        device_memory=device_memory,
        changes=tuple(sorted(changes, key=lambda change: -change.saving)),
    )


def planned_total(recipe: Recipe, models: PlannedModels, *, strategy: Strategy, world_size: int) -> int:
    """Bytes of each device, where nothing else is asked.

    Raises:
        UserError: the optimizer is not known.
    """
    return _sum(device_parts(recipe, models, _placement(recipe, strategy, world_size)))


def device_parts(recipe: Recipe, models: PlannedModels, placement: Placement) -> tuple[Part, ...]:
    """All parts of a rank's device that take anything.

    Raises:
        UserError: the optimizer is not known.
    """
    arguments = recipe.training.arguments()
    optim, optim_args = arguments.get("optim", "adamw_torch"), arguments.get("optim_args")
    step = step_of(recipe, placement.world_size)
    parts = [
        *_weights(models, step, placement),
        Part("gradients", gradient_bytes(models.trained, placement), "of what is trained"),
        Part("optimizer", optimizer_bytes(models.trained, placement, optim=optim, optim_args=optim_args), optim),
        Part("communication", communication_bytes(models, placement), placement.strategy),
        *step_parts(models, step, placement),
    ]
    return tuple(part for part in parts if part.num_bytes)


def _weights(models: PlannedModels, step: Step, placement: Placement) -> Iterator[Part]:
    student, learned = (list(module.parameters()) for module in (models.student, models.objective))
    buffers = sum(value.nbytes for value in models.objective.buffers())
    yield Part("student's weights", weight_bytes(student, placement), _described(student, placement))
    yield Part("objective's weights", weight_bytes(learned, placement) + buffers, "projectors, discriminator, maps")
    if models.teacher is not None:
        described = step.quantization or _described(list(models.teacher.parameters()), Placement())
        basis = "embeddings and head" if step.teacher_is_cached else described
        where = "on every rank" if step.teacher_pieces == 1 else f"layers over {step.teacher_pieces} ranks"
        yield Part("teacher's weights", teacher_weight_bytes(models.teacher, step), f"{basis}, {where}")


def _described(parameters: list[Any], placement: Placement) -> str:
    """``1.54 billion, bfloat16``."""
    names = dict.fromkeys(str(placement.held_dtype(value)).removeprefix("torch.") for value in parameters)
    number = sum(value.numel() for value in parameters)
    rounded = f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
    return f"{rounded}, {' and '.join(names)}"


def _placement(recipe: Recipe, strategy: Strategy, world_size: int) -> Placement:
    arguments = recipe.training.arguments()
    return Placement(strategy, world_size, half=bool(arguments.get("bf16") or arguments.get("fp16")))


def _changes(
    recipe: Recipe, models: PlannedModels, placement: Placement, device_memory: int | None
) -> Iterator[Change]:
    total = _sum(device_parts(recipe, models, placement))
    for candidate in candidates(recipe, placement):
        changed = replace(placement, strategy=cast(Strategy, candidate.strategy))
        after = _sum(device_parts(candidate.recipe, with_student(models, candidate.recipe), changed))
        if after < total:
            yield Change(candidate.text, total - after, _fits(after, device_memory))


def _sum(parts: Sequence[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def _fits(total: int, device_memory: int | None) -> bool | None:
    return None if device_memory is None else total <= USABLE * device_memory
