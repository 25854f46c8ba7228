"""The directory is the registry: ``objectives/<name>.py`` is the recipe name ``<name>``.

Names, one-line summaries and config classes are read from the source files without importing them, because importing
an objective imports torch (seconds) while ``vocabridge validate`` and ``vocabridge objectives`` must answer at once.
An objective's config class therefore stands on its own: it derives from :class:`ObjectiveConfig` or one of its
subclasses in the same module (groups of settings inside it from :class:`~vocabridge.settings.Settings`), and uses only
what the file imports with ``from ... import`` out of ``typing``, ``pydantic`` and the config modules named below.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from vocabridge.errors import UserError
from vocabridge.objectives.config import ObjectiveConfig
from vocabridge.suggest import did_you_mean

if typing.TYPE_CHECKING:
    from vocabridge.objectives.base import Objective

_NOT_OBJECTIVES = {"base", "config"}
"""And every file whose name begins with an underscore: code that several objectives share."""

_CONFIG_BASES = {
    "ObjectiveConfig",
    "KdConfig",
    "DivergenceConfig",
    "DualSpaceConfig",
    "CrossAttentionConfig",
    "Settings",
    "PairedSpaceConfig",
}
_LIGHT_MODULES = {
    "typing",
    "pydantic",
    "vocabridge.settings",
    "vocabridge.objectives.config",
    "vocabridge.matching.config",
}
"""What a config class may use: modules that import no torch."""


@dataclass(frozen=True, slots=True)
class ObjectiveInfo:
    """What a listing shows of an objective; everything is read from its file."""

    name: str
    summary: str
    """First line of the module docstring."""
    config_class: type[ObjectiveConfig]


def objective_names() -> list[str]:
    """Names of the built-in objectives, sorted."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(stem for stem in stems if stem not in _NOT_OBJECTIVES and not stem.startswith("_"))


def objective_info(name: str) -> ObjectiveInfo:
    """Summary and config class of a built-in objective (``name``) or a user's own (``package.module``).

    Raises:
        UserError: no such objective.
    """
    if "." in name:
        module = _import_own(name)
        return ObjectiveInfo(name, (module.__doc__ or name).strip().splitlines()[0], module.Config)
    return _read_info(_checked(name))


def objective_class(name: str) -> type[Objective]:
    """The class behind a recipe name; imports torch.

    Raises:
        UserError: no such objective.
    """
    from vocabridge.objectives.base import Objective

    module = _import_own(name) if "." in name else importlib.import_module(f"{__name__}.{_checked(name)}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__:
            return value
    raise UserError(f"objective module '{name}' defines no subclass of Objective; see CONTRIBUTING.md.")


def _checked(name: str) -> str:
    known = objective_names()
    if name not in known:
        raise UserError(f"objective '{name}' is unknown{did_you_mean(name, known)}. Known: {', '.join(known)}.")
    return name


def _import_own(name: str) -> typing.Any:
    if os.getcwd() not in sys.path:  # a console script does not look in the current folder
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever its code raises; TypeError of a relative name, such as ".mine"
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UserError(f"objective '{name}' cannot be imported: {kind}{error}.") from error
    config_class = getattr(module, "Config", None)
    if not (isinstance(config_class, type) and issubclass(config_class, ObjectiveConfig)):
        raise UserError(
            f"objective module '{name}' must define a class 'Config' derived from ObjectiveConfig; see CONTRIBUTING.md."
        )
    return module


@functools.cache
def _read_info(name: str) -> ObjectiveInfo:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or name
    statements = [node for node in tree.body if _is_light_import(node) or _is_config(node)]
    namespace: dict[str, typing.Any] = {"__name__": f"{__name__}.{name}"}
    # Our own source file, not a user's. Without inherited futures annotations are types, not strings to look up later.
    exec(compile(ast.Module(statements, []), f"{name}.py", "exec", dont_inherit=True), namespace)
    return ObjectiveInfo(name, docstring.splitlines()[0], namespace["Config"])


def _is_light_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module in _LIGHT_MODULES


def _is_config(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        isinstance(base, ast.Name) and base.id in _CONFIG_BASES for base in node.bases
    )
