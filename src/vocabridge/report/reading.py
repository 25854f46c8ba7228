"""Reading files that a run may be writing at this moment: what cannot be read is noted, never an error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vocabridge.metrics_log import Log, parse_log

_Model = TypeVar("_Model", bound=BaseModel)


def with_relative_paths(text: str) -> str:
    """The text with files below the current folder named from there: a page is read on other machines."""
    return text.replace(f"{Path.cwd()}/", "")


@dataclass(slots=True)
class Reader:
    """Reads files and remembers which of them are damaged."""

    notes: list[str] = field(default_factory=list)
    """One sentence a file, shown in the report."""

    def text(self, path: Path) -> str | None:
        """The file's text; None where there is none."""
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self.notes.append(f"{path} cannot be read ({error}).")
            return None

    def mapping(self, path: Path) -> dict[str, Any] | None:
        """A JSON object."""
        text = self.text(path)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"{path} is damaged ({error}).")
            return None
        if isinstance(found, dict):
            return found
        self.notes.append(f"{path} holds no JSON object.")
        return None

    def model(self, path: Path, kind: type[_Model]) -> _Model | None:
        """A JSON object of a known shape."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            self.notes.append(f"{path} has not the expected content ({f'{place}: ' * bool(place)}{first['msg']}).")
            return None

    def log(self, path: Path) -> Log:
        """A run's ``metrics.jsonl``."""
        log = parse_log(self.text(path) or "")
        self.notes += [f"{path}:{number} is no log entry and was left out." for number in log.broken]
        return log.values
