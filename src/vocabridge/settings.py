"""Base of every validated group of settings; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys, wrong types, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


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


Name = Annotated[str, AfterValidator(_possible_name)]
"""A file, a folder or a hub id: text that can be looked for on a disk."""
