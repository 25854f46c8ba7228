"""Base of every objective's config; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Divergence = Literal["forward", "reverse", "jensen_shannon", "skewed_forward", "skewed_reverse", "adaptive"]


class ObjectiveConfig(BaseModel):
    """Validated settings of one objective; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    paper: ClassVar[str] = ""
    """Author, year and arXiv id, or empty."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the objective reads: any of ``teacher``, ``tokenizers``, ``chunks``."""
    use_when: ClassVar[str] = ""
    """One sentence for the listing: when to pick it."""
