"""Is this a right answer of ``byte_spans``? Written apart from the package: own alphabets, the library's decoder.

Nothing here looks at how spans are found. Each token is spelled with transformers' byte map or by plain replacement and
compared with the bytes that its span claims, normalised by the tokenizer's own normaliser where it has one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vocabridge.alignment import EncodedText

_NOT_WHITE_SPACE = frozenset("\x1c\x1d\x1e\x1f")  # for Python they are, for the tokenizers library they are not
_MAX_DECODES = 6
_CHAR_OF = bytes_to_unicode()
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}


def _strip(data: bytes) -> bytes:
    return data.decode(errors="surrogateescape").strip().encode(errors="surrogateescape")


def _runs(owners: Iterable[list[int]]) -> list[tuple[int, int]]:
    """Ranges of bytes with several owners, split where all owners change."""
    runs: list[tuple[int, int]] = []
    before: set[int] = set()
    for byte, tokens in enumerate(owners):
        if len(tokens) > 1 and before & set(tokens) and runs:
            runs[-1] = (runs[-1][0], byte + 1)
        elif len(tokens) > 1:
            runs.append((byte, byte + 1))
        before = set(tokens) if len(tokens) > 1 else set()
    return runs


class SpanOracle:
    """Finds what is wrong with the spans of one tokenizer.

    Args:
        tokenizer: the tokenizer.
        kind: the name of its builder in `tokenizer_zoo`, whose first word says how its pieces are written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
        self._tokenizer = tokenizer
        self._family = kind.split("-")[0]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = backend.normalizer if backend is not None else None
        self._unknown_id = (
            tokenizer.unk_token_id if self._family in ("unigram", "wordpiece", "characters", "clip") else None
        )
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._vocab = tokenizer.get_vocab()
        self._drops_space = "words" in kind or self._family in ("wordpiece", "clip")
        self._rewrites = "nf" in kind or "lower" in kind
        # In these families every byte of every text has a token.
        self._is_lossless = self._family in ("byte", "bytes", "sentencepiece") and "gaps" not in kind

    def problems(self, text: str, encoded: EncodedText) -> list[str]:
        """What is wrong; an empty list for a right answer."""
        data = text.encode()
        return [
            *self._order(data, encoded),
            *self._cover(data, encoded),
            *self._pieces(data, encoded),
            *self._dropped(data, encoded),
            *(self._prefixes(text, encoded) if self._is_lossless and not self._rewrites else ()),
        ]

    def _order(self, data: bytes, encoded: EncodedText) -> list[str]:
        spans = encoded.spans
        if spans.shape != (len(encoded.ids), 2) or spans.dtype != np.int64:
            return [f"shape {spans.shape}, dtype {spans.dtype}"]
        flat = [int(value) for value in spans.reshape(-1)]
        if any(not 0 <= value <= len(data) for value in flat):
            return ["a span outside the text"]
        starts, ends = flat[::2], flat[1::2]
        ordered = starts == sorted(starts) and ends == sorted(ends) and all(map(int.__le__, starts, ends))
        return [] if ordered else ["spans out of order"]

    def _cover(self, data: bytes, encoded: EncodedText) -> list[str]:
        owners: list[list[int]] = [[] for _ in data]
        for index, (start, end) in enumerate(encoded.spans.tolist()):
            for byte in range(start, end):
                owners[byte].append(index)
        shared = {index for tokens in owners if len(tokens) > 1 for index in tokens}
        dropped = {byte for start, end in encoded.dropped.tolist() for byte in range(start, end)}
        problems = []
        if shared != set(encoded.shared.tolist()):
            problems.append(f"overlapping tokens {shared}, said to be {encoded.shared}")
        if shared and not self._rewrites:
            problems.append("tokens overlap although nothing rewrites the text")
        for start, end in _runs(owners):
            if self._normalize(data[start:end]) == data[start:end]:
                problems.append(f"tokens overlap on {data[start:end]!r}, which the normaliser leaves alone")
        if dropped != {byte for byte, tokens in enumerate(owners) if not tokens}:
            problems.append("bytes without a token are not the dropped ones")
        return problems

    def _pieces(self, data: bytes, encoded: EncodedText) -> list[str]:
        shared = set(encoded.shared.tolist())
        problems = []
        for index, (token_id, (start, end)) in enumerate(zip(encoded.ids, encoded.spans.tolist(), strict=True)):
            covered = data[start:end]
            if index not in shared and not self._spells(token_id, covered):
                problems.append(f"token {index} {self._tokenizer.convert_ids_to_tokens(token_id)!r} covers {covered!r}")
        return problems

    def _spells(self, token_id: int, covered: bytes) -> bool:
        if token_id in self._added and covered.decode(errors="replace").strip() == self._added[token_id]:
            return True
        if token_id == self._unknown_id:
            return self._may_be_unknown(covered)
        piece = self._piece(token_id)
        if self._family == "unigram" and covered == b"<0x%02X>" % piece[0]:
            return True  # a Unigram model takes the spelling of a byte piece for that piece
        options = {covered, self._normalize(covered)}
        if self._family in ("sentencepiece", "unigram"):
            options |= {option.replace("▁".encode(), b" ") for option in tuple(options)}
        if self._drops_space:  # a marker covers the white space in front of its word
            options = {_strip(option) for option in options}
            piece = _strip(piece)
        # A missing byte may sit inside a token: the model never saw it.
        options |= {self._without_missing(option) for option in tuple(options)}
        return piece in options or (piece[:1] == b" " and piece[1:] in options)

    def _piece(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._added and "▁" not in piece:
            return piece.encode()
        if self._family in ("byte", "bytes", "clip"):
            piece = piece.removesuffix("</w>") if self._family == "clip" else piece
            return bytes(_BYTE_OF[char] for char in piece)
        if self._family == "byt5":
            return piece.encode("latin-1")
        if self._family == "wordpiece":
            return piece.removeprefix("##").encode()
        if len(piece) == 6 and piece.startswith("<0x") and self._family in ("sentencepiece", "unigram"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()

    def _normalize(self, covered: bytes) -> bytes:
        """The normalised bytes; parts of a character at either end stay as they are."""
        if self._normalizer is None:
            return covered
        parts = re.split("([\ud800-\udfff]+)", covered.decode(errors="surrogateescape"))
        parts[::2] = [self._normalizer.normalize_str(part) for part in parts[::2]]
        return "".join(parts).encode(errors="surrogateescape")

    def _without_missing(self, covered: bytes) -> bytes:
        if self._family != "byte":
            return covered
        return bytes(byte for byte in covered if _CHAR_OF[byte] in self._vocab)

    def _may_be_unknown(self, covered: bytes) -> bool:
        """An unknown token covers whole characters, none of which the model has (or one word, in WordPiece)."""
        try:
            chars = self._normalize(covered).decode()
        except UnicodeDecodeError:  # an unknown token is whole characters
            return False
        if self._family == "wordpiece":
            return bool(chars) and not any(char.isspace() and char not in _NOT_WHITE_SPACE for char in chars.strip(" "))
        known = {char for char in chars if ("▁" if char == " " else char) in self._vocab}
        return bool(chars) and not known

    def _dropped(self, data: bytes, encoded: EncodedText) -> list[str]:
        if self._is_lossless and len(encoded.dropped):
            return ["bytes dropped by a lossless tokenizer"]
        ranges = [data[start:end] for start, end in encoded.dropped.tolist()]
        return [f"dropped {part!r}" for part in ranges if not self._may_be_dropped(part)]

    def _may_be_dropped(self, part: bytes) -> bool:
        if self._family == "byte":
            return self._without_missing(part) == b""
        if not self._drops_space and self._family != "byt5":
            return False
        normal = self._normalize(part).decode(errors="replace")
        return all(char.isspace() or unicodedata.category(char) in ("Zs", "Cf", "Cc", "Mn") for char in normal)

    def _prefixes(self, text: str, encoded: EncodedText) -> list[str]:
        """The library's own decoder gives the text up to each span's end (one leading space aside)."""
        if "▁" in text or any(content in text for content in self._added.values()):
            return []  # decoded as a space, or trimmed around
        problems = []
        char_ends = {len(text[:index].encode()): index for index in range(len(text) + 1)}
        whole = [(index, end) for index, end in enumerate(encoded.spans[:, 1].tolist()) if end in char_ends]
        for index, end in whole[:: 1 + len(whole) // _MAX_DECODES]:
            decoded = self._tokenizer.decode(encoded.ids[: index + 1], clean_up_tokenization_spaces=False)
            expected = text[: char_ends[end]]
            if decoded not in (expected, expected.removeprefix(" "), " " + expected):
                problems.append(f"the first {index + 1} tokens decode to {decoded!r}, span ends at {end}")
        return problems
