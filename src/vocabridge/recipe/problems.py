"""Validation errors as sentences: which key, what is wrong with it, what would be right."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from vocabridge.recipe.training import NOT_TAKEN, OwnTrainingSettings
from vocabridge.recipe.yaml_text import Path
from vocabridge.suggest import did_you_mean

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping of keys to values",
    "mapping": "a mapping of keys to values",
    "model": "a mapping of keys to values",
    "list": "a list",
    "tuple": "a list",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one key; ``text`` goes on after the key."""

    path: Path
    text: str

    @property
    def key(self) -> str:
        """The key as a user writes it: ``student.lora.r`` or ``data.train[1]``."""
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return "".join(parts).removeprefix(".")


def validation_problems(error: ValidationError, model: type[BaseModel], given: Any, prefix: Path) -> list[Problem]:
    """One problem for each key of a section that ``model`` refuses.

    Args:
        error: what pydantic raised.
        model: class that the section was validated against.
        given: the section as the user wrote it.
        prefix: path of the section.
    """
    by_path: dict[Path, list[Any]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # follows from an item that is wrong and has its own line
        by_path.setdefault(_written_path(detail, given), []).append(detail)
    return [Problem((*prefix, *path), _sentence(path, details, model)) for path, details in by_path.items()]


def boolean_problems(validated: Any, given: Any, path: Path) -> Iterator[Problem]:
    """Places where ``true`` or ``false`` was written for a number: pydantic would read it as 1 or 0."""
    if isinstance(given, bool) and isinstance(validated, int | float) and not isinstance(validated, bool):
        yield Problem(path, f"must be a number, but {_shown(given)} was given.")
    elif isinstance(given, Mapping):
        for key, value in given.items():
            inner = validated.get(key) if isinstance(validated, Mapping) else getattr(validated, str(key), value)
            yield from boolean_problems(inner, value, (*path, key))
    elif isinstance(given, list) and isinstance(validated, list | tuple) and len(given) == len(validated):
        for index, (inner, value) in enumerate(zip(validated, given, strict=True)):
            yield from boolean_problems(inner, value, (*path, index))


def without_echoes(problems: Iterable[Problem]) -> list[Problem]:
    """The problems without "x is missing" where a misspelled x is named beside it."""
    problems = list(problems)
    misspelled = {
        (*problem.path[:-1], match[1])
        for problem in problems
        if (match := re.match(r"is unknown; did you mean '([^']+)'", problem.text))
    }
    return [
        problem for problem in problems if not (problem.path in misspelled and problem.text.startswith("is missing"))
    ]


def unknown_key(name: str, accepted: Iterable[str]) -> str:
    """What is wrong with a key that is not among ``accepted``, and which of them is nearest."""
    accepted = list(accepted)
    listing = ", ".join(accepted) or "no settings of its own"
    return f"is unknown{did_you_mean(name, accepted) or '.'} Accepted: {listing}."


def _written_path(detail: Any, given: Any) -> Path:
    """The part of pydantic's location that the user wrote: tags of union members are cut off."""
    path: list[str | int] = []
    for part in detail["loc"]:
        in_mapping = isinstance(given, Mapping) and part in given
        in_list = isinstance(given, list) and isinstance(part, int) and part < len(given)
        if not (in_mapping or in_list):
            return (*path, part) if detail["type"] == "missing" else tuple(path)
        given = given[part]
        path.append(part)
    return tuple(path)


def _sentence(path: Path, details: list[Any], model: type[BaseModel]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown_field(path, model)
    if first["type"] == "missing":
        return "is missing."
    if first["type"] == "value_error":
        return f"is refused: {str(first['ctx']['error']).rstrip('.')}."
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    choices = [
        choice for detail in details for choice in re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
    ]
    hint = did_you_mean(first["input"], choices) if isinstance(first["input"], str) else ""
    return f"must be {expected}, but {_shown(first['input'])} was given{hint or '.'}"


def _unknown_field(path: Path, model: type[BaseModel]) -> str:
    name = str(path[-1])
    accepted = list(_model_at(model, path[:-1]).model_fields)
    if issubclass(model, OwnTrainingSettings):
        if name in NOT_TAKEN:
            return f"cannot be set in a recipe: {NOT_TAKEN[name]}."
        ours = ", ".join(OwnTrainingSettings.model_fields)
        near = did_you_mean(name, accepted) or "."
        return f"is unknown{near} Accepted: every field of transformers.TrainingArguments, and {ours}."
    return unknown_key(name, accepted)


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel]:
    """Class of the nested section at ``path``; optional sections (``LoraSpec | None``) count as their class."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return model


def _expected(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = context[name]
        return f"{words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind in ("too_short", "string_too_short"):
        return "given"
    for prefix, name in _EXPECTED.items():
        if kind.startswith(prefix):
            return name
    return str(detail["msg"]).removeprefix("Input should be ")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
