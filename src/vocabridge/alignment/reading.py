"""Match tokens to normalised text where the joined pieces are not the text itself.

A depth-first search with memory of failed states over (token, position). It takes only the liberties that the
tokenizer's configuration gives it and must consume the whole text, so without unknown tokens its result is forced by
the bytes; with them it is the best reading, the tokenizer's own offset first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vocabridge.alignment.family import WHITE_SPACE, TokenizerFamily
from vocabridge.alignment.token_table import TokenTable

_MARKER = b" "  # how the table spells a space marker
_SPACE_RUN = re.compile(b"(?:" + b"|".join(char.encode() for char in sorted(WHITE_SPACE)) + b")+")
_SPACE_LEADS = frozenset(char.encode()[:1] for char in WHITE_SPACE)


@dataclass(frozen=True, slots=True)
class Reading:
    """Half-open ranges of normalised bytes, one a token, or the furthest point that any reading reached.

    Attributes:
        starts: start of each token.
        ends: end of each token.
        failed_token: None, or index of the token that matches nowhere; then starts and ends are empty.
        failed_at: position of that token.
    """

    starts: list[int]
    ends: list[int]
    failed_token: int | None = None
    failed_at: int = 0


class Reader:
    """Reads the tokens of one stretch of normalised text.

    Args:
        data: normalised text, UTF-8.
        token_ids: the tokens, in order.
        family: which liberties the tokenizer takes.
        table: bytes of each id.
        unknown_ends: token index -> where the tokenizer itself ends this unknown token (a normalised position).
    """

    def __init__(
        self,
        data: bytes,
        token_ids: Sequence[int],
        *,
        family: TokenizerFamily,
        table: TokenTable,
        unknown_ends: dict[int, int],
    ) -> None:
        self._data = data
        self._token_ids = token_ids
        self._family = family
        self._table = table
        self._unknown_ends = unknown_ends
        self._space_marker = (family.space_marker or " ").encode()
        self._whole_words = family.model in ("WordPiece", "WordLevel")
        spells_all = family.byte_level or family.byte_fallback
        self._drops_unknown = family.model == "BPE" and family.unknown_token is None and not spells_all
        self._has_gaps = bool(table.missing_bytes) or self._drops_unknown

    def read(self) -> Reading:
        """Find the first complete reading in the order of the options."""
        return self._read_straight() or self._search()

    def _read_straight(self) -> Reading | None:
        """The reading that takes the best option of every token; None where a search has to go back on one.

        A token that stands right here or right behind white space is what `_options` gives first, found at less cost.
        """
        data, pieces, drops_space = self._data, self._table.data, self._family.drops_space
        starts: list[int] = []
        ends: list[int] = []
        position = 0
        for index, token_id in enumerate(self._token_ids):
            piece = pieces[token_id] or b""
            start = position
            if drops_space and data[start : start + 1] in _SPACE_LEADS and (run := _SPACE_RUN.match(data, start)):
                start = run.end()
            # A marker may stand for all the white space here, and an unused id has no bytes: see `_options`.
            is_marked = drops_space and piece[:1] in _SPACE_LEADS and _SPACE_RUN.match(piece)
            if piece and not is_marked and data.startswith(piece, start):
                position = start + len(piece)
            elif step := next(self._options(index, position), None):
                start, position = step
            else:
                return None
            starts.append(start)
            ends.append(position)
        return Reading(starts, ends) if self._rest_is_skippable(position) else None

    def _search(self) -> Reading:
        """Depth first over all options."""
        count = len(self._token_ids)
        if count == 0:
            return Reading([], []) if self._rest_is_skippable(0) else Reading([], [], 0, 0)
        stack = [self._options(0, 0)]
        starts: list[int] = []
        ends: list[int] = []
        failed: set[tuple[int, int]] = set()
        furthest = (0, 0)
        while stack:
            step = next(stack[-1], None)
            index = len(stack) - 1
            if step is None:
                stack.pop()
                if ends:
                    failed.add((index, ends.pop()))
                    starts.pop()
                continue
            start, end = step
            if index + 1 == count:
                if self._rest_is_skippable(end):
                    return Reading([*starts, start], [*ends, end])
            elif (index + 1, end) not in failed:
                starts.append(start)
                ends.append(end)
                stack.append(self._options(index + 1, end))
            furthest = max(furthest, (index + 1, end))
        return Reading([], [], *furthest)

    def _options(self, index: int, position: int) -> Iterator[tuple[int, int]]:
        """Ranges that this token may cover when the tokens before it end at ``position``, best first."""
        token_id = self._token_ids[index]
        piece = self._table.data[token_id]
        assert piece is not None, f"id {token_id} is not in the vocabulary"
        marked = piece.startswith(_MARKER) and self._family.synthetic_prefix
        if marked and self._family.drops_space:
            yield from self._marker_over_white_space(piece, position)
        for start in self._starts(position):
            end = self._match(piece, start)
            if end >= 0:
                yield start, end
        if marked and (index == 0 or self._family.prefix_at_words):
            for start in self._starts(position):
                end = self._match(piece[1:], start)
                if end >= 0:
                    yield start, end
        if token_id in self._table.fallback_ids and self._family.model == "Unigram":
            spelled = b"<0x%02X>" % piece[0]
            if self._data.startswith(spelled, position):
                yield position, position + len(spelled)
        if token_id == self._table.unknown_id:
            yield from self._unknown(index, position)

    def _marker_over_white_space(self, piece: bytes, position: int) -> Iterator[tuple[int, int]]:
        """A leading marker stands for the whole white space before its word."""
        start = position
        while length := self._white_space_length(start):
            start += length
        if start > position:
            end = self._match(piece[1:], start)
            if end >= 0:
                yield position, end

    def _match(self, piece: bytes, position: int) -> int:
        """Where ``piece`` ends if it is read from ``position``, else -1."""
        if self._data.startswith(piece, position):
            return position + len(piece)
        if self._has_gaps:
            return self._match_with_gaps(piece, position)
        if self._space_marker == _MARKER or _MARKER not in piece:
            return -1
        first, *rest = piece.split(_MARKER)
        return self._match_parts(first, rest, position)

    def _match_parts(self, first: bytes, rest: list[bytes], position: int) -> int:
        """Match where a marker may be a space or, literally in the text, the marker's own character."""
        if not self._data.startswith(first, position):
            return -1
        position += len(first)
        for part in rest:
            for space in (_MARKER, self._space_marker):
                if self._data.startswith(space + part, position):
                    position += len(space) + len(part)
                    break
            else:
                return -1
        return position

    def _match_with_gaps(self, piece: bytes, position: int) -> int:
        """Match byte by byte, passing over what has no token (a BPE merges over the hole)."""
        for offset, byte in enumerate(piece):
            while offset and (length := self._unspeakable_length(position)):
                position += length
            if self._data[position : position + 1] == bytes([byte]):
                position += 1
            elif byte == 0x20 and self._data.startswith(self._space_marker, position):
                position += len(self._space_marker)
            else:
                return -1
        return position

    def _starts(self, position: int) -> Iterator[int]:
        """``position`` and every position behind it that lies after bytes without a token."""
        yield position
        while length := self._skip_length(position):
            position += length
            yield position

    def _rest_is_skippable(self, position: int) -> bool:
        *_, last = self._starts(position)
        return last == len(self._data)

    def _skip_length(self, position: int) -> int:
        if self._family.drops_space and (length := self._white_space_length(position)):
            return length
        return self._unspeakable_length(position)

    def _unspeakable_length(self, position: int) -> int:
        """Length of the byte or character at ``position`` if the vocabulary cannot spell it, else 0."""
        if self._table.missing_bytes:
            return int(position < len(self._data) and self._data[position] in self._table.missing_bytes)
        if self._drops_unknown:
            char = self._char(position)
            return len(char.encode()) if char and self._is_unknown(char) else 0
        return 0

    def _white_space_length(self, position: int) -> int:
        char = self._char(position)
        white = char in WHITE_SPACE or (self._family.model == "ByT5" and char.isspace())
        return len(char.encode()) if white else 0

    def _char(self, position: int) -> str:
        """The character that starts at ``position``; empty at the end and inside a character."""
        if position >= len(self._data) or self._data[position] & 0xC0 == 0x80:
            return ""
        lead = self._data[position]
        size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        return self._data[position : position + size].decode()

    def _is_unknown(self, char: str) -> bool:
        return (" " if char == self._family.space_marker else char) not in self._table.characters

    def _unknown(self, index: int, position: int) -> Iterator[tuple[int, int]]:
        """The tokenizer's own range first, then what the model could not know: longest first where it fuses."""
        own_end = self._unknown_ends.get(index, -1)
        # White space that has no token is not unknown: it lies in front.
        starts = [s for s in self._starts(position) if not (self._family.drops_space and self._white_space_length(s))]
        for start in starts:
            # Words are what the pre-tokenizer says; elsewhere no character with a piece of its own is unknown.
            if own_end > start and (self._whole_words or own_end in self._unknown_run(start)):
                yield start, own_end
        for start in starts:
            yield from ((start, end) for end in reversed(self._unknown_run(start)) if end != own_end)

    def _unknown_run(self, position: int) -> list[int]:
        """Ends of the runs of characters from ``position`` that one unknown token may cover."""
        ends: list[int] = []
        while char := self._char(position):
            if char in WHITE_SPACE if self._whole_words else not self._is_unknown(char):
                break
            position += len(char.encode())
            ends.append(position)
            if not (self._family.fuses_unknown or self._whole_words):
                break
        return ends
