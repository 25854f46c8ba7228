"""YAML as people expect it: ``5e-4`` is a number, ``no`` is a word, a key given twice is an error, lines are known.

PyYAML follows YAML 1.1, where ``5e-4`` is a string, ``no`` is false, ``010`` is eight and ``1:30`` is ninety. Each of
these is a trap in a recipe (``learning_rate: 5e-4``, ``eval_strategy: no``), so the scalars here follow the core schema
of YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from vocabridge.errors import UserError, visible

Path = tuple[str | int, ...]

_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way to start a resolver table afresh


class _Dumper(yaml.SafeDumper):
    """Quotes a word that either YAML 1.1 or 1.2 would not read as text, so that any reader gets the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out in full: a recipe with ``&id001`` in it is hard to read."""
        return True


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True, slots=True)
class YamlMapping:
    """A mapping read from text, and the line each of its keys stands on."""

    values: dict[str, Any]
    lines: dict[Path, int]
    """Path of keys (and list positions) -> 1-based line."""


def read_mapping(text: str, *, source: str) -> YamlMapping:
    """Parse a YAML document whose root is a mapping.

    Args:
        text: the document.
        source: the file name to show in errors.

    Raises:
        UserError: not YAML, no mapping, a key given twice or a key that is not text; all duplicates are named.
    """
    with _told_as_user_error(source):
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{source}: the file must hold sections such as 'data:' and 'training:', and has none.")
            lines, problems = _lines(node, source)
            if problems:
                raise UserError("\n".join(problems))
            return YamlMapping(loader.construct_document(node), lines)
        finally:
            loader.dispose()


@contextmanager
def _told_as_user_error(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(_syntax_problem(error, source)) from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: it is nested too deeply.") from error
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # a tag such as !!int on something else
        raise UserError(f"{source}: not valid YAML: {visible(str(error))}.") from error


def read_value(text: str) -> Any:
    """The value of one override as YAML reads it: ``5e-4``, ``true``, ``[1, 2]``, ``{name: dskd_cma}`` or a word.

    Raises:
        UserError: brackets or quotes that do not close.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(f"the value '{visible(text)}' is not valid YAML; quote it.") from error


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Double quotes where YAML would take a character for a line break (NEL, line and paragraph separators)."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(values: dict[str, Any]) -> str:
    """Block-style YAML that :func:`read_mapping` reads back to equal values; keys stay in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _lines(root: yaml.MappingNode, source: str) -> tuple[dict[Path, int], list[str]]:
    lines: dict[Path, int] = {}
    problems: list[str] = []
    repeated: set[Path] = set()
    for path, key in _keys(root, (), set()):
        line = key.start_mark.line + 1
        if not isinstance(path[-1], int) and key.tag != "tag:yaml.org,2002:str":
            problems.append(f"{source}:{line}: the key '{visible(str(path[-1]))}' must be text; quote it.")
        elif path in lines and not any(path[:end] in repeated for end in range(len(path))):
            repeated.add(path)
            dotted = visible(".".join(map(str, path)))
            problems.append(f"{source}:{line}: {dotted} is given twice (first on line {lines[path]}); keep one.")
        lines.setdefault(path, line)
    return lines, problems


def _keys(node: yaml.Node, path: Path, seen: set[int]) -> Iterator[tuple[Path, yaml.Node]]:
    """Every key and list item below ``node`` with its path; an anchored node is walked once, at its first place."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            here = (*path, key.value if isinstance(key, yaml.ScalarNode) else "?")
            yield here, key
            yield from _keys(value, here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item
            yield from _keys(item, (*path, index), seen)


def _syntax_problem(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{source}:{mark.line + 1}" if mark else source
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{where}: not valid YAML: {visible(reason)}."
