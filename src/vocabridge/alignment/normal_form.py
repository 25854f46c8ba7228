"""The normalised form of a text and the way back: which bytes of the text a normalised byte came from."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from vocabridge.alignment.family import TokenizerFamily

# Characters in front that may change what a normaliser makes of the next one; longer runs would cost their square.
_CONTEXT = 32
_REMEMBERED = 2**16  # short texts, and pairs of neighbours, a few megabytes


class Rewrite:
    """The rewriting part of a normaliser, with a memory of what it makes of short texts.

    Args:
        normalizer: a normaliser of the tokenizers library, which has no type of its own for all of them.
    """

    def __init__(self, normalizer: Any) -> None:
        self._whole: Callable[[str], str] = normalizer.normalize_str
        self._short = lru_cache(maxsize=_REMEMBERED)(self._whole)
        self._separable: set[tuple[str, str]] = set()

    def __call__(self, text: str) -> str:
        """The normalised text."""
        return self._short(text) if len(text) <= _CONTEXT + 1 else self._whole(text)

    def separates(self, before: str, char: str) -> bool:
        """Whether ``char`` normalises on its own behind ``before``."""
        # Marks can be reordered over several characters, which no test of neighbours sees.
        return not unicodedata.combining(char) and self(before + char) == self(before) + self(char)

    def inseparable(self, pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """The pairs of neighbours whose second character does not normalise on its own."""
        new = pairs - self._separable
        stuck = {pair for pair in new if not self.separates(*pair)}
        if len(self._separable) > _REMEMBERED:
            self._separable = set()
        self._separable |= new - stuck
        return stuck


@dataclass(frozen=True, slots=True)
class NormalForm:
    """Normalised bytes of a text and, for each boundary between them, where it lies in the text.

    A boundary inside a rewritten piece has no byte position in the text: a token that starts there starts at the piece,
    one that ends there ends with the piece. A boundary at a deleted piece has two: tokens leave deleted bytes out.

    Attributes:
        data: the normalised text, UTF-8.
        starts: int64 [len(data) + 1]; text byte where a token that starts at this boundary starts.
        ends: int64 [len(data) + 1]; text byte where a token that ends at this boundary ends.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray

    def boundary_at(self, text_byte: int) -> int:
        """The first boundary whose token end lies at or behind ``text_byte``."""
        return int(np.searchsorted(self.ends, text_byte, side="left"))


def make_rewrite(family: TokenizerFamily) -> Rewrite | None:
    """The normaliser less what only concerns spaces at the ends and their marker; None when nothing is left."""
    if not family.rewriting:
        return None
    # The library builds components from JSON only as part of a whole tokenizer.
    shell = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": list(family.rewriting)},
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    }
    return Rewrite(Tokenizer.from_str(json.dumps(shell)).normalizer)


def normal_form(text: str, rewrite: Rewrite | None) -> NormalForm:
    """Normalise a text and map every boundary back.

    Args:
        text: the text, without lone surrogates.
        rewrite: the normaliser, or None for the text as it is.

    Returns:
        The normal form; with ``rewrite=None`` or a text that it leaves alone, every boundary is its own position.
    """
    normal = text if rewrite is None else rewrite(text)
    if normal == text or rewrite is None:
        data = text.encode()
        positions = np.arange(len(data) + 1, dtype=np.int64)
        return NormalForm(data, positions, positions)
    parts = _minimal_parts(text, rewrite)
    while True:
        rewritten = {part: rewrite(part) for part in dict.fromkeys(parts)}
        if "".join(map(rewritten.__getitem__, parts)) == normal:
            return _map_back(parts, rewritten, normal)
        parts = _merge_at_mismatch(parts, rewritten, normal)


def _minimal_parts(text: str, rewrite: Rewrite) -> list[str]:
    """Cut before every character that normalises on its own behind the part so far."""
    neighbours = partial(zip, text, text[1:])
    stuck = rewrite.inseparable(set(neighbours()))
    if not stuck:
        return list(text)
    parts: list[str] = []
    done = 0
    for position in [index for index, pair in enumerate(neighbours(), 1) if pair in stuck]:
        if position <= done:
            continue
        start = position - 1
        parts.extend(text[done:start])
        done = position
        while done < len(text) and not rewrite.separates(text[max(start, done - _CONTEXT) : done], text[done]):
            done += 1
        parts.append(text[start:done])
    parts.extend(text[done:])
    return parts


def _merge_at_mismatch(parts: list[str], rewritten: dict[str, str], normal: str) -> list[str]:
    """Join the part where the normalised parts leave ``normal`` with its neighbours (twice as many each time)."""
    position, index = 0, 0
    while index < len(parts) - 1 and normal.startswith(rewritten[parts[index]], position):
        position += len(rewritten[parts[index]])
        index += 1
    width = max(1, len(parts[index]))
    first, last = max(0, index - width), min(len(parts), index + width + 1)
    return [*parts[:first], "".join(parts[first:last]), *parts[last:]]


def _map_back(parts: list[str], rewritten: dict[str, str], normal: str) -> NormalForm:
    kinds = {part: kind for kind, part in enumerate(rewritten)}
    kind_of = np.fromiter(map(kinds.__getitem__, parts), np.int64, len(parts))
    sizes = np.array([len(part.encode()) for part in rewritten])[kind_of]
    normal_sizes = np.array([len(after.encode()) for after in rewritten.values()])[kind_of]
    is_same = np.array([part == after for part, after in rewritten.items()])[kind_of]
    part_ends = sizes.cumsum()
    part_of = np.repeat(np.arange(len(parts)), normal_sizes)  # of each normalised byte
    starts, ends = (part_ends - sizes)[part_of], part_ends[part_of]
    kept = np.flatnonzero(is_same[part_of])
    starts[kept] += kept - (normal_sizes.cumsum() - normal_sizes)[part_of[kept]]
    ends[kept] = starts[kept] + 1
    return NormalForm(normal.encode(), np.append(starts, part_ends[-1]), np.insert(ends, 0, 0))
