"""Base of every validated group of settings; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

LARGEST_INTEGER = 2**32 - 1
"""Numpy's largest seed, and more than there is of anything that a setting counts."""


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _possible_number(cls, given: Any) -> Any:
        if isinstance(given, int) and abs(given) > LARGEST_INTEGER:
            raise ValueError(f"it must be at most {LARGEST_INTEGER}")
        return given


_LONGEST_PART = 255
"""Bytes that file systems take between two slashes."""


def _possible_name(given: str) -> str:
    if not given.isprintable():
        raise ValueError("it holds a character that no name has")
    if max(len(part.encode()) for part in given.split("/")) > _LONGEST_PART or len(given) > 4000:
        raise ValueError("it is longer than any file system takes")
    try:
        Path(given).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user '{given[1:].partition('/')[0]}' whose folder '~' could stand for") from None
    return given


def real_path(name: str | Path) -> Path:
    """Where a name leads; unlike ``Path.resolve`` also of links that lead in a circle, which are told when opened."""
    return Path(os.path.realpath(Path(name).expanduser()))


Name = Annotated[str, AfterValidator(_possible_name)]
"""A file, a folder or a hub id: text that can be looked for on a disk."""
