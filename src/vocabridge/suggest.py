"""'Did you mean' for every place where a user types a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vocabridge.errors import visible


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or an empty string when nothing is near.

    >>> did_you_mean("temprature", ["temperature", "skew"])
    "; did you mean 'temperature'?"
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{visible(near[0])}'?" if near else ""
