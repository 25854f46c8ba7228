"""What one bad input is: a folder in which a command succeeds, one thing in it spoilt, and what must be said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bad_inputs.workplace import change_yaml

Spoil = Callable[[Path], object]
"""Damages one thing in the folder."""

DISTILL = ("distill", "recipe.yaml")
RESUME = (*DISTILL, "--resume")


def nothing(folder: Path) -> None:
    """The command line alone is bad."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """One mistake, and the sentence it must get."""

    name: str
    says: tuple[str, ...]
    """Fragments of the sentence, in its order: the place, what is wrong, how to mend it."""
    spoil: Spoil = nothing
    command: tuple[str, ...] = DISTILL
    has_run: bool = False
    """A finished run of the good recipe lies in ``run``."""
    num_sentences: int = 1


def set_in_recipe(name: str, value: Any, *says: str, **others: Any) -> BadInput:
    """A mistake in one key, written into the file, so that the sentence must name file and line."""
    key = name.partition(": ")[0]
    dotted = key.replace(".", "__")
    return BadInput(name, says, lambda folder: change_yaml(folder / "recipe.yaml", **{dotted: value, **others}))


def with_overrides(name: str, *says: str, overrides: tuple[str, ...] | None = None) -> BadInput:
    """A mistake in an override; the name is the override where none is given."""
    return BadInput(name, says, command=(*DISTILL, *(overrides or (name,))))
