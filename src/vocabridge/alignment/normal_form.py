"""The normalised form of a text and the way back: which bytes of the text a normalised byte came from."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from vocabridge.alignment.family import TokenizerFamily

Rewrite = Callable[[str], str]

# Characters in front that may change what a normaliser makes of the next one; longer runs would cost their square.
_CONTEXT = 32


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
    normalizer = Tokenizer.from_str(json.dumps(shell)).normalizer
    assert normalizer is not None
    return partial(_normalize, normalizer)


def _normalize(normalizer: object, text: str) -> str:
    return normalizer.normalize_str(text)  # type: ignore[attr-defined]


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
    return _map_back(_pieces(text, normal, rewrite))


def _pieces(text: str, normal: str, rewrite: Rewrite) -> list[tuple[str, str]]:
    """Minimal ``(text, normalised)`` pieces that normalise on their own and join to ``normal``."""
    pieces = _grow(text, rewrite)
    while "".join(piece for _, piece in pieces) != normal:
        pieces = _merge_at_mismatch(pieces, normal, rewrite)
    return pieces


def _grow(text: str, rewrite: Rewrite) -> list[tuple[str, str]]:
    known: dict[str, str] = {}

    def cached(part: str) -> str:
        if part not in known:
            known[part] = rewrite(part)
        return known[part]

    parts: list[str] = []
    start = 0
    for position in range(1, len(text)):
        char = text[position]
        before = text[max(start, position - _CONTEXT) : position]
        # Marks can be reordered over several characters, which no test of neighbours sees.
        if not unicodedata.combining(char) and cached(before + char) == cached(before) + cached(char):
            parts.append(text[start:position])
            start = position
    parts.append(text[start:])
    return [(part, cached(part)) for part in parts]


def _merge_at_mismatch(pieces: list[tuple[str, str]], normal: str, rewrite: Rewrite) -> list[tuple[str, str]]:
    """Join the piece where the normalised pieces leave ``normal`` with its neighbours (twice as many each time)."""
    position, index = 0, 0
    while index < len(pieces) - 1 and normal.startswith(pieces[index][1], position):
        position += len(pieces[index][1])
        index += 1
    width = max(1, len(pieces[index][0]))
    first, last = max(0, index - width), min(len(pieces), index + width + 1)
    merged = "".join(part for part, _ in pieces[first:last])
    return [*pieces[:first], (merged, rewrite(merged)), *pieces[last:]]


def _map_back(pieces: list[tuple[str, str]]) -> NormalForm:
    starts: list[int] = []
    ends: list[int] = [0]
    text_byte = 0
    for part, normal in pieces:
        size, normal_size = len(part.encode()), len(normal.encode())
        if part == normal:
            starts.extend(range(text_byte, text_byte + size))
            ends.extend(range(text_byte + 1, text_byte + size + 1))
        else:
            starts.extend([text_byte] * normal_size)
            ends.extend([text_byte + size] * normal_size)
        text_byte += size
    starts.append(text_byte)
    return NormalForm(
        "".join(normal for _, normal in pieces).encode(),
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.int64),
    )
