"""Byte spans and chunks of arbitrary text under tokenizers of every family, judged by the oracle of the tests."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import tokenizer_zoo
from adversarial_text import ATOMS, texts
from span_oracle import SpanOracle
from vocabridge.alignment import byte_spans, encode_continuation
from vocabridge.errors import UserError
from vocabridge.pairs import PairTokenizer, TokenizedSide
from vocabridge.text import parse_row

FAMILIES = tuple(tokenizer_zoo.BUILDERS)
LOSSLESS = (
    "byte-level",
    "byte-level-prefix",
    "sentencepiece-prepend",
    "sentencepiece-metaspace",
    "sentencepiece-replace",
    "bytes",
)
"""Every byte of every text lies in exactly one token, so that both sides of a chunk must cover the same bytes."""

_SURROGATES = re.compile("[\ud800-\udfff]")

TEXTS = st.one_of(
    texts,
    st.lists(
        st.one_of(st.sampled_from([*ATOMS, "\ud83d", "\udfff"]), st.text(st.characters(), max_size=3)), max_size=8
    ).map("".join),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=3), st.integers(1, 40)),
    st.lists(st.sampled_from([*tokenizer_zoo.CORPUS, " ", "\n"]), max_size=2).map("".join),
)
"""Atoms that break offsets, any characters (with lone surrogates), long runs of one thing, ordinary text."""


@cache
def _family(name: str) -> tuple[PreTrainedTokenizerBase, SpanOracle]:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    return tokenizer, SpanOracle(tokenizer, name)


def check_spans(text: str, name: str) -> str:
    """Spans of the text, alone and as a continuation; gives ``read`` or ``refused``.

    Raises:
        AssertionError: the oracle has found something wrong, or a text was refused that is one.
    """
    tokenizer, oracle = _family(name)
    for encode in (byte_spans, encode_continuation):
        sentence = ""
        try:
            encoded = encode(tokenizer, text)
        except UserError as error:
            sentence = str(error)
        assert ("lone surrogate" in sentence) == bool(_SURROGATES.search(text)), (name, text, sentence)
        if sentence:
            return "refused"
        assert not (found := oracle.problems(text, encoded)), (name, text, found)
    return "read"


@cache
def _pair(student: str, teacher: str) -> PairTokenizer:
    sides = (_family(name)[0] for name in (student, teacher))
    return PairTokenizer(*sides, max_length=64)


def check_chunks(text: str, student: str, teacher: str) -> str:
    """Chunks of the text as a response; gives ``read`` or ``refused``.

    Raises:
        AssertionError: two sides of a chunk cover other bytes, a chunk could be split, or a span is past the text.
    """
    if _SURROGATES.search(text):
        return "refused"
    pair = _pair(student, teacher)(parse_row({"prompt": "a\n", "response": text}, "row"))
    if pair is None:
        return "refused"
    assert pair.teacher is not None
    sides = (pair.student, pair.teacher)
    ids = [set(side.chunk_ids[side.chunk_ids >= 0].tolist()) for side in sides]
    assert ids[0] == ids[1], (student, teacher, text)
    for chunk in ids[0]:
        starts, ends = zip(*(_covered(side, chunk) for side in sides), strict=True)
        assert starts[0] == starts[1], (student, teacher, text, chunk)
        assert ends[0] == ends[1], (student, teacher, text, chunk)
        assert ends[0] <= len(text.encode())
        inner = [_borders(side, chunk) for side in sides]
        assert not inner[0] & inner[1], f"chunk {chunk} could be split: {student}, {teacher}, {text!r}"
    return "read"


def _covered(side: TokenizedSide, chunk: int) -> tuple[int, int]:
    spans = side.spans[side.chunk_ids == chunk]
    positions = np.flatnonzero(side.chunk_ids == chunk)
    assert (np.diff(positions) == 1).all(), "a chunk is one range of positions"
    return int(spans[:, 0].min()), int(spans[:, 1].max())


def _borders(side: TokenizedSide, chunk: int) -> set[int]:
    """Byte positions inside a chunk at which its tokens could be cut apart."""
    spans = side.spans[side.chunk_ids == chunk]
    start, end = int(spans[:, 0].min()), int(spans[:, 1].max())
    candidates = {int(value) for value in spans[:, 1]} - {start, end}
    return {cut for cut in candidates if all(last <= cut or first >= cut for first, last in spans.tolist())}
