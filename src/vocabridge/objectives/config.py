"""Base of every objective's config; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from vocabridge.settings import Settings

Divergence = Literal["forward", "reverse", "jensen_shannon", "skewed_forward", "skewed_reverse", "adaptive"]


class ObjectiveConfig(Settings):
    """Validated settings of one objective."""

    paper: ClassVar[str] = ""
    """Title or method, venue and arXiv id, or empty."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the objective reads: any of ``teacher``, ``tokenizers``, ``chunks``."""
    use_when: ClassVar[str] = ""
    """One sentence for the listing: when to pick it."""
