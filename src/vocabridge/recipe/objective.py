"""The ``objective`` section: one objective with its settings, or a weighted composition of several."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vocabridge.errors import UserError
from vocabridge.objectives import objective_info, objective_names
from vocabridge.objectives.config import KdConfig, ObjectiveConfig
from vocabridge.recipe.problems import Problem, boolean_problems, unknown_key, validation_problems
from vocabridge.recipe.yaml_text import Path
from vocabridge.settings import Settings
from vocabridge.suggest import did_you_mean


class TermSettings(Settings):
    """``{name: dskd_cma, weight: 0.5, ...its own settings}``; each objective's config class sits in its file."""

    name: str
    weight: float = Field(1.0, gt=0)
    """Factor of what reaches the student; terms that train only learned parts (a discriminator) keep their own."""
    config: ObjectiveConfig


class ObjectiveSettings(Settings):
    """``{name: dskd_cma, ...its own settings}``, or ``{terms: [{name: ..., weight: ...}, ...]}``."""

    terms: Annotated[tuple[TermSettings, ...], Field(min_length=1)]
    is_composed: bool = False
    """Written as ``terms``: each term is then distillation alone, and cross-entropy a term of its own."""

    @property
    def name(self) -> str:
        """The objective's name; of a composition the names of its terms."""
        return " + ".join(term.name for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """What any of the terms reads."""
        return frozenset(need for term in self.terms for need in term.config.needs)

    def values(self) -> dict[str, Any]:
        """The section as a recipe writes it."""
        if not self.is_composed:
            (term,) = self.terms
            return {"name": term.name, **term.config.model_dump(mode="json")}
        return {
            "terms": [
                {"name": term.name, "weight": term.weight}
                | term.config.model_dump(mode="json", exclude={"kd_weight"} if _is_kd(type(term.config)) else set())
                for term in self.terms
            ]
        }


def read_objective(given: Mapping[str, Any]) -> tuple[ObjectiveSettings | None, list[Problem]]:
    """The validated section, or what is wrong with it; imports no torch."""
    if "terms" not in given:
        term, problems = _read_term(given, ("objective",), is_composed=False)
        return (ObjectiveSettings(terms=(term,)) if term else None), problems
    path: Path = ("objective", "terms")
    listed = given["terms"]
    if not isinstance(listed, list) or not listed or not all(isinstance(item, Mapping) for item in listed):
        return None, [Problem(path, "must be a list of {name: ..., weight: ...}.")]
    problems = [Problem(("objective", key), unknown_key(key, ["terms"])) for key in given if key != "terms"]
    read = [_read_term(item, (*path, index), is_composed=True) for index, item in enumerate(listed)]
    problems += [problem for _, found in read for problem in found]
    terms = tuple(term for term, _ in read if term is not None)
    return (None, problems) if problems else (ObjectiveSettings(terms=terms, is_composed=True), [])


def _read_term(given: Mapping[str, Any], path: Path, *, is_composed: bool) -> tuple[TermSettings | None, list[Problem]]:
    name = given.get("name")
    if not isinstance(name, str):
        return None, [Problem((*path, "name"), f"is missing: give one of {', '.join(objective_names())}.")]
    if "." not in name and name not in objective_names():
        text = f"is '{name}', which is unknown{did_you_mean(name, objective_names()) or '.'}"
        return None, [Problem((*path, "name"), f"{text} Known: {', '.join(objective_names())}.")]
    try:
        config_class = objective_info(name).config_class
    except UserError as error:
        return None, [Problem((*path, "name"), f"cannot be used: {error}")]
    own = {key: value for key, value in given.items() if key != "name" and not (is_composed and key == "weight")}
    problems: list[Problem] = []
    if is_composed and _is_kd(config_class):
        if "kd_weight" in own:
            text = "has no meaning inside terms: give 'weight', and cross_entropy as a term of its own."
            problems.append(Problem((*path, "kd_weight"), text))
        own["kd_weight"] = 1.0
    try:
        config = config_class.model_validate(own)
    except ValidationError as error:
        return None, problems + validation_problems(error, config_class, own, path)
    weight = given.get("weight", 1.0) if is_composed else 1.0
    problems += boolean_problems(config, own, path)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight <= sys.float_info.max:
        problems.append(Problem((*path, "weight"), f"must be a number greater than 0, but {weight!r} was given."))
    return (None, problems) if problems else (TermSettings(name=name, weight=weight, config=config), [])


def _is_kd(config_class: type[ObjectiveConfig]) -> bool:
    return issubclass(config_class, KdConfig)
