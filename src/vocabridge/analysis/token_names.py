"""Tokens as a reader sees them: any script, white space made visible, broken characters as bytes, control by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from vocabridge.alignment import token_bytes

_MARKS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
_EMPTY = "\u2205"
_BASE = "\u25cc"
"""Dotted circle: carries a combining mark that has lost its letter to another token."""


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """A printable name for each id, never empty and without characters that a font or XML cannot show."""
    data = token_bytes(tokenizer)
    return [_name(tokenizer, int(token_id), data[int(token_id)]) for token_id in ids]


def _name(tokenizer: PreTrainedTokenizerBase, token_id: int, data: bytes | None) -> str:
    if data is None:
        spelled = tokenizer.convert_ids_to_tokens(token_id)
        return visible(spelled) if isinstance(spelled, str) and spelled else f"<{token_id}>"
    return visible_bytes(data)


def visible_bytes(data: bytes) -> str:
    """Text where the bytes are whole characters, else all of them in hexadecimal.

    >>> visible_bytes(bytes([0xE4, 0xBD]))
    '<E4 BD>'
    """
    try:
        return visible(data.decode("utf-8"))
    except UnicodeDecodeError:
        return f"<{data.hex(' ').upper()}>"


def visible(text: str) -> str:
    """White space as marks, other characters without a shape by their code point, a leading combining mark carried."""
    if not text:
        return _EMPTY
    shown = "".join(_MARKS.get(char) or (char if char.isprintable() else f"<U+{ord(char):04X}>") for char in text)
    return _BASE + shown if unicodedata.combining(shown[0]) or unicodedata.category(shown[0]) == "Mn" else shown


def shortened(name: str, length: int) -> str:
    """At most ``length`` characters, the end of a longer name replaced by an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "\u2026"
