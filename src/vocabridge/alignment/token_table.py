"""The bytes that each token id stands for, by undoing the alphabet of its pieces."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from tokenizers import AddedToken

from vocabridge.alignment.family import TokenizerFamily

_FALLBACK_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes: printable bytes keep their place, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Bytes and roles of every id of one tokenizer.

    Attributes:
        data: bytes of each id, a space marker read as a space; control tokens by their spelling; None for unused ids.
        lengths: number of bytes of each id, int64 [V]; 0 for unused ids.
        control_ids: ids of added tokens marked special, less the unknown token.
        is_control: whether each id is one of them, bool [V].
        added: the added tokens by id.
        fallback_ids: ids of ``<0xNN>`` pieces.
        unknown_id: id of the unknown token, or -1.
        missing_bytes: bytes that no piece of a byte-level vocabulary can spell.
        characters: pieces of one character, after undoing the space marker.
    """

    data: list[bytes | None]
    lengths: np.ndarray
    control_ids: frozenset[int]
    is_control: np.ndarray
    added: dict[int, AddedToken]
    fallback_ids: frozenset[int]
    unknown_id: int
    missing_bytes: frozenset[int]
    characters: frozenset[str] = field(repr=False)

    def text_bytes(self) -> list[bytes | None]:
        """A new list of the bytes of each id that spells text: None for control, unknown and unused ids."""
        data = list(self.data)
        for token_id in (*self.control_ids, self.unknown_id):
            if token_id >= 0:
                data[token_id] = None
        return data


def build_table(vocab: dict[str, int], added: dict[int, AddedToken], *, family: TokenizerFamily) -> TokenTable:
    """The table of a tokenizer.

    Args:
        vocab: piece -> id, added tokens included.
        added: id -> added token.
        family: how the pieces spell text.

    Returns:
        A table over the ids 0 .. max id.
    """
    size = max((*vocab.values(), *added), default=-1) + 1
    data: list[bytes | None] = [None] * size
    for piece, token_id in vocab.items():
        data[token_id] = _piece_bytes(piece, family)
    for token_id, token in added.items():
        data[token_id] = _unmark(token.content, family).encode()
    unknown_id = -1 if family.unknown_token is None else vocab.get(family.unknown_token, -1)
    fallback = {i for piece, i in vocab.items() if family.byte_fallback and _FALLBACK_PIECE.fullmatch(piece)}
    control = {token_id for token_id, token in added.items() if token.special} - {unknown_id}
    is_control = np.zeros(size, dtype=bool)
    is_control[list(control)] = True
    return TokenTable(
        data=data,
        lengths=np.array([len(piece or b"") for piece in data], dtype=np.int64),
        control_ids=frozenset(control),
        is_control=is_control,
        added=dict(added),
        fallback_ids=frozenset(fallback),
        unknown_id=unknown_id,
        missing_bytes=frozenset(byte for char, byte in BYTE_ALPHABET.items() if char not in vocab)
        if family.byte_level
        else frozenset(),
        characters=frozenset(_unmark(piece, family) for piece in vocab if len(piece) == 1),
    )


def _piece_bytes(piece: str, family: TokenizerFamily) -> bytes:
    if family.model == "ByT5":
        return piece.encode("latin-1") if len(piece) == 1 and ord(piece) < 256 else piece.encode()
    if family.byte_fallback and (match := _FALLBACK_PIECE.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    if family.continuing_prefix:
        piece = piece.removeprefix(family.continuing_prefix)
    if family.word_suffix:
        piece = piece.removesuffix(family.word_suffix)
    if family.byte_level:
        try:
            return bytes(map(BYTE_ALPHABET.__getitem__, piece))
        except KeyError:  # not written in the alphabet: the decoder takes such a piece as it stands
            return piece.encode()
    return _unmark(piece, family).encode()


def _unmark(piece: str, family: TokenizerFamily) -> str:
    return piece if family.space_marker is None else piece.replace(family.space_marker, " ")
