"""What to change first where a recipe does not fit: each change on its own, as one would type it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vocabridge.errors import UserError
from vocabridge.plan.step import has_checkpointing
from vocabridge.plan.training_state import Placement
from vocabridge.recipe import Recipe, recipe_from_values
from vocabridge.recipe.loading import set_value


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe with one thing changed, and perhaps another strategy."""

    text: str
    """What to add to the command."""
    recipe: Recipe
    strategy: str
    """The same as before unless the change is that."""


def candidates(recipe: Recipe, placement: Placement) -> Iterator[Candidate]:
    """Changes that the recipe allows: checkpointing, half the batch, a cached or shared teacher, LoRA, FSDP2."""
    arguments = recipe.training.arguments()
    if not has_checkpointing(arguments):
        yield from _changed(recipe, {"training.activation_checkpointing": True}, placement)
    yield from _changed(recipe, _half_batch(arguments), placement)
    if recipe.teacher is not None and recipe.teacher.cache is None:
        yield from _changed(recipe, {"teacher.cache": True}, placement)
        if placement.world_size > 1 and not placement.is_deepspeed:  # the trainer refuses it there
            yield from _changed(recipe, {"training.shard_teacher": True}, placement)
    if recipe.student.lora is None:
        yield from _changed(recipe, {"student.lora.r": 16}, placement)
    if placement.strategy == "ddp" and placement.world_size > 1:
        yield Candidate("--strategy fsdp2", recipe, "fsdp2")


def _half_batch(arguments: dict[str, Any]) -> dict[str, Any]:
    """Half of it, with the same rows a step where their number is fixed."""
    if budget := arguments.get("max_tokens_per_batch"):
        return {"training.max_tokens_per_batch": budget // 2}
    rows = arguments.get("per_device_train_batch_size", 8)
    if rows == 1:
        return {}
    steps = arguments.get("gradient_accumulation_steps", 1)
    return {"training.per_device_train_batch_size": rows // 2, "training.gradient_accumulation_steps": 2 * steps}


def _changed(recipe: Recipe, changes: dict[str, Any], placement: Placement) -> Iterator[Candidate]:
    values = recipe.values()
    for key, value in changes.items():
        set_value(values, key.split("."), value, place=key)
    text = " ".join(f"{key}={_as_typed(value)}" for key, value in changes.items())
    try:
        changed = recipe_from_values(values)
    except UserError:  # it does not go with something else in the recipe
        return
    if changes:
        yield Candidate(text, changed, placement.strategy)


def _as_typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
