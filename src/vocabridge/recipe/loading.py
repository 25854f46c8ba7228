"""From a file and ``section.key=value`` overrides to a :class:`Recipe`, or to every problem at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vocabridge.errors import UserError, visible
from vocabridge.models.spec import ModelSpec
from vocabridge.recipe import yaml_text
from vocabridge.recipe.objective import ObjectiveSettings, read_objective
from vocabridge.recipe.problems import Problem, boolean_problems, unknown_key, validation_problems, without_echoes
from vocabridge.recipe.schema import DataSettings, EvaluationSettings, Recipe, conflicts
from vocabridge.recipe.training import TrainingSettings
from vocabridge.settings import real_path

_CLASSES: dict[str, type[BaseModel]] = {
    "data": DataSettings,
    "student": ModelSpec,
    "teacher": ModelSpec,
    "objective": ObjectiveSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
}
_OPTIONAL = ("teacher", "evaluation")
_DATA_KEYS = (("data", "train"), ("data", "validation"), ("evaluation", "data"))
_MODEL_KEYS = (("student", "model"), ("student", "tokenizer"), ("teacher", "model"), ("teacher", "tokenizer"))
_FILE_ENDINGS = (".jsonl", ".json", ".ndjson", ".gguf")


@dataclass(frozen=True, slots=True)
class Source:
    """Where keys were written, for the start of an error line.

    Attributes:
        file: name of the file.
        lines: path of a key -> its line in that file.
        overridden: paths that were set from elsewhere.
        override_place: what to call that elsewhere.
    """

    file: str
    lines: Mapping[yaml_text.Path, int]
    overridden: frozenset[yaml_text.Path] = frozenset()
    override_place: str = "command line"

    def place(self, path: yaml_text.Path) -> str:
        """``recipe.yaml:7``, or ``override_place`` for what an override set."""
        new = path not in self.lines  # an unknown section that only an override names
        if any(path[: len(key)] == key or (new and key[: len(path)] == path) for key in self.overridden):
            return self.override_place
        line = self._line(path)
        return f"{self.file}:{line}" if line else self.file

    def refuse(self, problems: Sequence[Problem]) -> None:
        """Raise one :class:`UserError` with a line for each problem, in the order of the file."""
        if problems:
            ordered = sorted(problems, key=lambda problem: self._line(problem.path))
            lines = (f"{self.place(problem.path)}: {visible(f'{problem.key} {problem.text}')}" for problem in ordered)
            raise UserError("\n".join(dict.fromkeys(lines)))

    def _line(self, path: yaml_text.Path) -> int:
        """Line of the key, or of the nearest section around it; 0 when neither is in the file."""
        return next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe; imports no model library.

    A relative data or model path in the file is taken from the recipe's folder when it exists there, else from the
    current folder; in an override, from the current folder. What exists becomes absolute, so that the resolved recipe
    in a run folder stays valid; anything else is left alone (a hub id). ``training.output_dir`` is relative to the
    current folder, as in transformers.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` with the value in YAML (``training.learning_rate=5e-4``, ``teacher=null``).

    Raises:
        UserError: names every problem, one line each, with file, line and key.
    """
    mapping = read_recipe_file(path)
    values, overridden = _override(mapping.values, overrides)
    return build_recipe(values, Source(str(path), mapping.lines, overridden))


def read_recipe_file(path: str | Path) -> yaml_text.YamlMapping:
    """The sections of a recipe file as they were written, with paths found from its folder; nothing is checked yet.

    Raises:
        UserError: the file cannot be read or is no YAML mapping.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise UserError(f"{path}: the recipe cannot be read: {reason}.") from error
    mapping = yaml_text.read_mapping(text, source=str(path))
    make_absolute(mapping.values, file.parent)
    return mapping


def recipe_from_values(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Check a recipe given as nested dicts, as :meth:`Recipe.values` writes it.

    Args:
        values: the sections; paths are relative to the current folder.
        source: what to call the recipe in errors.

    Raises:
        UserError: names every problem, one line each.
    """
    return build_recipe(copy.deepcopy(dict(values)), Source(source, {}))


def build_recipe(values: dict[str, Any], source: Source) -> Recipe:
    """Check sections wherever they were written.

    Raises:
        UserError: names every problem, one line each, with the place that ``source`` gives.
    """
    values = {name: section for name, section in values.items() if not (section is None and name in _OPTIONAL)}
    make_absolute(values, Path())
    problems = [Problem((name,), unknown_key(name, _CLASSES)) for name in values if name not in _CLASSES]
    # A misspelled section may be any of those that are left out, so nothing follows from their absence.
    sections: dict[str, Any] = {} if problems else {name: None for name in _OPTIONAL if name not in values}
    for name in _CLASSES:
        if name in values:
            section, found = _section(name, values[name])
            problems += found
            sections |= {} if found else {name: section}
        elif name not in _OPTIONAL:
            problems.append(Problem((name,), "is missing: the recipe needs this section."))
    problems += [Problem(tuple(conflict.key.split(".")), conflict.problem) for conflict in conflicts(sections)]
    problems += _missing_files(values)
    source.refuse(without_echoes(problems))
    return Recipe(**sections)


def _section(name: str, given: Any) -> tuple[Any, list[Problem]]:
    """The validated section, or what is wrong with it."""
    if not isinstance(given, Mapping):
        return None, [Problem((name,), "must be a section: indented 'key: value' lines below it.")]
    if name == "objective":
        return read_objective(given)
    return _validated(_CLASSES[name], given, name)


def _validated(model: type[BaseModel], given: Mapping[str, Any], name: str) -> tuple[Any, list[Problem]]:
    try:
        section = model.model_validate(given)
    except ValidationError as error:
        return None, validation_problems(error, model, given, (name,))
    return section, list(boolean_problems(section, given, (name,)))


def _override(values: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], frozenset[yaml_text.Path]]:
    """The values with each ``section.key=value`` set, and the paths that were set."""
    values = copy.deepcopy(values)  # YAML anchors may share one dict between two keys
    paths: set[yaml_text.Path] = set()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"command line: '{visible(override)}' is no override; write section.key=value.")
        try:
            value = yaml_text.read_value(text)
        except UserError as error:
            raise UserError(f"command line: {visible(dotted)}: {error}") from error
        paths.add(set_value(values, keys, value, place=f"command line: '{visible(override)}'"))
    return values, frozenset(paths)


def set_value(values: dict[str, Any], keys: Sequence[str], value: Any, *, place: str) -> yaml_text.Path:
    """Set the value where the keys lead (a number is a place in a list), making sections on the way; gives the path.

    Args:
        values: the sections; changed in place.
        keys: ``["student", "lora", "r"]``.
        value: what to put there.
        place: what to call the override in an error.

    Raises:
        UserError: the keys lead through a plain value or past the end of a list.
    """
    here: Any = values
    path: yaml_text.Path = ()
    for depth, key in enumerate(keys):
        if isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            path = (*path, int(key))
        elif isinstance(here, dict):
            path = (*path, key)
            here[key] = {} if here.get(key) is None else here[key]
        else:
            problem = "is a list; name a place in it" if isinstance(here, list) else "is a value, it has no keys"
            raise UserError(f"{place}: {visible('.'.join(keys[:depth]))} {problem}.")
        parent, here = here, here[path[-1]]
    parent[path[-1]] = value
    return path


def make_absolute(values: Mapping[str, Any], folder: Path) -> None:
    """Replace in place every data and model path that exists in ``folder``."""
    for section, key in (*_DATA_KEYS, *_MODEL_KEYS):
        here = values.get(section)
        if isinstance(here, dict) and isinstance(given := here.get(key), str):
            here[key] = _found(given, folder)
        elif isinstance(here, dict) and isinstance(given, list):
            here[key] = [_found(item, folder) if isinstance(item, str) else item for item in given]


def _found(given: str, folder: Path) -> str:
    name, colon, split = given.rpartition(":")
    try:
        if colon and name and (folder / Path(name).expanduser()).is_dir():  # "folder:split" of a saved dataset
            return f"{_found(name, folder)}:{split}"
        path = folder / Path(given).expanduser()
        return str(real_path(path)) if given and path.exists() else given
    except (OSError, RuntimeError, ValueError):  # no name at all, which the section's own check tells
        return given


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no name at all, which the section's own check tells
        return True


def _missing_files(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Local files that are named but do not exist; a name without a file's ending may be a hub id."""
    for section, key in (*_DATA_KEYS, *_MODEL_KEYS):
        here = values.get(section)
        given = here.get(key) if isinstance(here, Mapping) else None
        for name in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
            local = isinstance(name, str) and (name.endswith(_FILE_ENDINGS) or name.startswith(("/", "./", "../", "~")))
            if local and not any(_exists(part) for part in (name, name.rpartition(":")[0]) if part):
                yield Problem((section, key), f"names '{name}', which does not exist.")
