"""Exact byte spans of tokens: prefix sums where the pieces spell the text, a search where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from transformers import PreTrainedTokenizerBase

from vocabridge.alignment.family import WHITE_SPACE
from vocabridge.alignment.normal_form import NormalForm, normal_form
from vocabridge.alignment.prepared import PreparedTokenizer, RawTokens, Specials, prepare, prepare_again
from vocabridge.alignment.reading import Reader
from vocabridge.errors import UserError

_NO_TOKENS = np.empty(0, dtype=np.int64)
_NO_RANGES = np.empty((0, 2), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """The tokens of a text and the bytes that each covers.

    Attributes:
        ids: token ids, without BOS and EOS.
        spans: int64 [n, 2], half-open ``[start, end)`` in UTF-8 bytes of the text, starts and ends non-decreasing;
            a synthetic marker has an empty span.
        shared: int64 [k], indices of tokens whose span overlaps another token's, because the normaliser rewrote what
            they cover together and there is no byte position between them.
        dropped: int64 [k, 2], byte ranges that no token covers.
    """

    ids: list[int]
    spans: np.ndarray
    shared: np.ndarray
    dropped: np.ndarray


def byte_spans(tokenizer: PreTrainedTokenizerBase, text: str, *, specials: Specials = "text") -> EncodedText:
    """Encode a text, without BOS and EOS, and say which bytes each token covers.

    The tokenizer is left as it was. The first call for a tokenizer builds its table (half a second for 262,144 tokens):
    call `token_bytes` before forking workers, so that they inherit it.

    Args:
        tokenizer: a fast tokenizer, or ByT5.
        text: any text without lone surrogates.
        specials: ``"text"`` reads the spelling of a control token (``</s>``) as text; ``"control"`` as that token.

    Returns:
        Ids and spans; where the joined bytes of the tokens are the text, the spans are proved by that.

    Raises:
        UserError: The tokenizer is not covered, its pieces do not spell the text, a control token comes out of text, or
            the text holds a lone surrogate.
    """
    return _encode(tokenizer, prepare(tokenizer), text, specials=specials, prefix=True)


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Encode a text as it continues after a newline or a control token: no synthetic space in front of it.

    Control spellings are text. The text is encoded behind a newline and cut there; when a token covers both sides, or
    the tokenizer does not keep newlines, it is encoded alone. Where white space has no tokens every word keeps its own
    marker, as it would behind any prompt.

    Args:
        tokenizer: a fast tokenizer, or ByT5.
        text: any text without lone surrogates; may be empty or begin with spaces or newlines.

    Returns:
        Ids and spans in bytes of ``text``.

    Raises:
        UserError: As for `byte_spans`.
    """
    if not text:
        return EncodedText([], _NO_RANGES, _NO_TOKENS, _NO_RANGES)
    prepared = prepare(tokenizer)
    if prepared.family.drops_space or not prepared.keeps_newlines:
        return byte_spans(tokenizer, text)
    _utf8(text)  # so that a lone surrogate is reported at its own position
    behind = _cut_front(_encode(tokenizer, prepared, "\n" + text, specials="text", prefix=True), num_bytes=1)
    return _encode(tokenizer, prepare(tokenizer), text, specials="text", prefix=False) if behind is None else behind


def _cut_front(encoded: EncodedText, *, num_bytes: int) -> EncodedText | None:
    """What follows the first bytes, in the same memory; None when a token lies on both sides of the cut."""
    first = 0
    while first < len(encoded.ids) and encoded.spans[first, 0] < num_bytes:
        first += 1
    if first and encoded.spans[first - 1, 1] > num_bytes:
        return None
    spans = encoded.spans[first:]
    spans -= num_bytes
    if not (len(encoded.shared) or len(encoded.dropped)):
        return EncodedText(encoded.ids[first:], spans, _NO_TOKENS, _NO_RANGES)
    return EncodedText(
        encoded.ids[first:],
        spans,
        encoded.shared[encoded.shared >= first] - first,
        np.maximum(encoded.dropped[encoded.dropped[:, 1] > num_bytes] - num_bytes, 0),
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prepared: PreparedTokenizer, text: str, *, specials: Specials, prefix: bool
) -> EncodedText:
    data = _utf8(text)
    raw = _raw_tokens(prepared, text, specials=specials, prefix=prefix)
    ids = np.fromiter(raw.ids, np.int64, len(raw.ids))
    try:
        is_control = prepared.table.is_control[ids]
    except IndexError:  # tokens were added since it was prepared
        prepared = prepare_again(tokenizer)
        raw = _raw_tokens(prepared, text, specials=specials, prefix=prefix)
        ids = np.fromiter(raw.ids, np.int64, len(raw.ids))
        is_control = prepared.table.is_control[ids]
    if specials == "text" and np.count_nonzero(is_control):
        _refuse_control(prepared, raw)
    spans = _spell(prepared, raw, data, ids)
    if spans is not None:
        return EncodedText(raw.ids, spans, _NO_TOKENS, _NO_RANGES)
    spans = _search(prepared, raw, text)
    return EncodedText(raw.ids, spans, _shared_tokens(spans), _gaps(spans, len(data)))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which is no "
            "valid Unicode text; remove it or decode the source again"
        ) from None


def _raw_tokens(prepared: PreparedTokenizer, text: str, *, specials: Specials, prefix: bool) -> RawTokens:
    try:
        return prepared.encoder.encode(text, specials=specials, prefix=prefix)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions, such as for an unknown character without <unk>
        raise UserError(f"{prepared.name} cannot encode the text {text[:40]!r}: {error}") from error


def _refuse_control(prepared: PreparedTokenizer, raw: RawTokens) -> None:
    index = next(i for i, token_id in enumerate(raw.ids) if token_id in prepared.table.control_ids)
    spelling = prepared.table.added[raw.ids[index]].content
    raise UserError(
        f"{prepared.name} turns the text into the control token {spelling!r} (token {index}) although control "
        "spellings are to be read as text; remove that spelling from the text"
    )


def _spell(prepared: PreparedTokenizer, raw: RawTokens, data: bytes, ids: np.ndarray) -> np.ndarray | None:
    """Prefix sums if the tokens spell the text, or the text behind one synthetic space; else None."""
    pieces = itemgetter(*raw.ids)(prepared.table.data) if len(ids) > 1 else [prepared.table.data[i] for i in raw.ids]
    joined = b"".join(pieces)  # type: ignore[arg-type]  # None for unused ids, which no tokenizer gives
    if joined == data:
        prefix_length = 0
    elif prepared.family.synthetic_prefix and joined[:1] == b" " and joined[1:] == data:
        prefix_length = 1
    else:
        return None
    spans = np.zeros((len(ids), 2), dtype=np.int64)
    ends = spans[:, 1]
    prepared.table.lengths[ids].cumsum(out=ends)
    if prefix_length:
        np.maximum(ends - prefix_length, 0, out=ends)
    spans[1:, 0] = ends[:-1]
    return spans


def _search(prepared: PreparedTokenizer, raw: RawTokens, text: str) -> np.ndarray:
    """Spans by matching tokens to the normalised text between literal added tokens."""
    if prepared.family.unsupported:
        raise UserError(
            f"{prepared.name}: its pieces do not join to the text, and its pre-tokenizer {prepared.family.unsupported} "
            "is not one whose effect on the text is known, so byte spans would be a guess; choose another tokenizer"
        )
    char_bytes = _char_bytes(text)
    spans = np.zeros((len(raw.ids), 2), dtype=np.int64)
    token, char = 0, 0
    for index, start, end in [*_literal_tokens(prepared, raw, text), (len(raw.ids), len(text), len(text))]:
        stretch = _Stretch(text[char:start], token, index, int(char_bytes[char]))
        spans[token:index] = _read_stretch(prepared, raw, stretch, char_bytes)
        if index < len(raw.ids):
            spans[index] = char_bytes[start], char_bytes[end]
        token, char = index + 1, end
    return spans


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A part of the text without literal added tokens, with its tokens ``[first, last)``."""

    text: str
    first: int
    last: int
    byte_offset: int


def _char_bytes(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: byte position of each character and of the end."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    positions = np.arange(len(text) + 1, dtype=np.int64)
    for first in (0x80, 0x800, 0x10000):  # from here on a character takes one byte more
        positions[1:] += (codes >= first).cumsum()
    return positions


def _literal_tokens(prepared: PreparedTokenizer, raw: RawTokens, text: str) -> list[tuple[int, int, int]]:
    """``(token index, first character, end character)`` of added tokens read literally off the text."""
    added = prepared.table.added
    if raw.encoding is None or added.keys().isdisjoint(raw.ids):
        return []
    found: list[tuple[int, int, int]] = []
    for index, (token_id, (start, end)) in enumerate(zip(raw.ids, raw.encoding.offsets, strict=True)):
        token = added.get(token_id)
        if token is None or text[start:end].strip() != token.content.strip():
            continue
        floor = found[-1][2] if found else 0
        while token.lstrip and start > floor and text[start - 1] in WHITE_SPACE:
            start -= 1
        while token.rstrip and end < len(text) and text[end] in WHITE_SPACE:
            end += 1
        if start >= floor:
            found.append((index, start, end))
    return found


def _read_stretch(prepared: PreparedTokenizer, raw: RawTokens, stretch: _Stretch, char_bytes: np.ndarray) -> np.ndarray:
    form = normal_form(stretch.text, prepared.rewrite)
    token_ids = raw.ids[stretch.first : stretch.last]
    reading = Reader(
        form.data,
        token_ids,
        family=prepared.family,
        table=prepared.table,
        unknown_ends=_unknown_ends(prepared, raw, stretch, form, char_bytes),
    ).read()
    if reading.failed_token is not None:
        _refuse_spelling(prepared, token_ids, form, reading.failed_token, reading.failed_at)
    starts = form.starts[reading.starts]
    ends = form.ends[reading.ends]
    empty = np.equal(reading.starts, reading.ends)
    return np.stack((starts, np.where(empty, starts, ends)), axis=1) + stretch.byte_offset


def _unknown_ends(
    prepared: PreparedTokenizer, raw: RawTokens, stretch: _Stretch, form: NormalForm, char_bytes: np.ndarray
) -> dict[int, int]:
    unknown_id = prepared.table.unknown_id
    if raw.encoding is None or unknown_id < 0 or unknown_id not in raw.ids:
        return {}
    offsets = raw.encoding.offsets
    return {
        index - stretch.first: form.boundary_at(int(char_bytes[offsets[index][1]]) - stretch.byte_offset)
        for index in range(stretch.first, stretch.last)
        if raw.ids[index] == unknown_id
    }


def _refuse_spelling(
    prepared: PreparedTokenizer, token_ids: list[int], form: NormalForm, index: int, position: int
) -> None:
    text_byte = int(form.starts[min(position, len(form.data))])
    context = form.data[position : position + 24].decode(errors="replace")
    what = (
        f"token {index} ({(prepared.table.data[token_ids[index]] or b'').decode(errors='replace')!r})"
        if index < len(token_ids)
        else "the end of the tokens"
    )
    raise UserError(
        f"{prepared.name}: its pieces do not spell the text: {what} does not match {context!r} at byte {text_byte} "
        "(after normalisation); byte spans would be a guess, so choose another tokenizer or remove that text"
    )


def _shared_tokens(spans: np.ndarray) -> np.ndarray:
    """Indices of tokens with bytes whose span overlaps a neighbour's."""
    filled = np.flatnonzero(spans[:, 1] > spans[:, 0])
    overlaps = spans[filled[1:], 0] < spans[filled[:-1], 1]
    return filled[np.append(overlaps, False) | np.insert(overlaps, 0, False)] if len(filled) else _NO_TOKENS


def _gaps(spans: np.ndarray, num_bytes: int) -> np.ndarray:
    """Byte ranges that no span covers."""
    filled = spans[spans[:, 1] > spans[:, 0]]
    bounds = np.concatenate((np.zeros(1, np.int64), filled.reshape(-1), np.full(1, num_bytes, np.int64))).reshape(-1, 2)
    return bounds[bounds[:, 1] > bounds[:, 0]]
