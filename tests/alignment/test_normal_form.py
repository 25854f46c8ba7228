"""The way back from a normalised text, against the definition applied one character at a time."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from adversarial_text import adversarial_texts, texts
from vocabridge.alignment.normal_form import Rewrite, normal_form

NORMALIZERS = {
    "nfc": normalizers.NFC(),
    "nfkc": normalizers.NFKC(),
    "bert": normalizers.BertNormalizer(lowercase=True),
    "squeezing": normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(Regex(" {2,}"), " ")]),
}


def _parts(text: str, normalize: Callable[[str], str]) -> list[str]:
    """Each character joins the part before it unless that part and it normalise apart."""
    parts = list(text[:1])
    for char in text[1:]:
        apart = normalize(parts[-1] + char) == normalize(parts[-1]) + normalize(char)
        if apart and not unicodedata.combining(char):
            parts.append(char)
        else:
            parts[-1] += char
    return parts


def _boundaries(parts: list[str], normalize: Callable[[str], str]) -> tuple[list[int], list[int]]:
    """Text bytes where tokens start and end, of each boundary between normalised bytes."""
    starts, ends, done = [], [0], 0
    for part in parts:
        size, inner = len(part.encode()), range(len(normalize(part).encode()))
        starts += [done + i if part == normalize(part) else done for i in inner]
        ends += [done + i + 1 if part == normalize(part) else done + size for i in inner]
        done += size
    return [*starts, done], ends


def _check(text: str, name: str, rewrite: Rewrite) -> bool:
    """Whether the text was rewritten and its parts are known to be independent, so that there was something to see."""
    normalize = NORMALIZERS[name].normalize_str
    form = normal_form(text, rewrite)
    assert form.data == normalize(text).encode()
    parts = _parts(text, normalize)
    if "".join(map(normalize, parts)) != normalize(text) or max(map(len, parts), default=0) > 32:
        return False  # parts are merged further
    starts, ends = _boundaries(parts, normalize)
    if normalize(text) == text:
        starts = ends = list(range(len(form.data) + 1))
    assert form.starts.tolist() == starts, text
    assert form.ends.tolist() == ends, text
    return normalize(text) != text


@pytest.mark.parametrize("name", NORMALIZERS)
def test_boundaries_are_those_of_the_definition(name: str) -> None:
    rewrite = Rewrite(NORMALIZERS[name])  # remembers pairs of neighbours from text to text
    assert sum(_check(text, name, rewrite) for text in adversarial_texts(600, seed=21)) > 60


@settings(max_examples=200, deadline=None)
@given(text=texts, name=st.sampled_from(sorted(NORMALIZERS)))
def test_boundaries_of_any_text_are_those_of_the_definition(text: str, name: str) -> None:
    _check(text, name, Rewrite(NORMALIZERS[name]))


def test_a_part_ends_before_the_next_character_that_stands_alone() -> None:
    form = normal_form("ae\u0301\u0323b", Rewrite(NORMALIZERS["nfc"]))
    assert form.data == "a\u1eb9\u0301b".encode()
    assert form.starts.tolist() == [0, 1, 1, 1, 1, 1, 6, 7]
    assert form.ends.tolist() == [0, 1, 6, 6, 6, 6, 6, 7]


def test_more_pairs_of_neighbours_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabridge.alignment.normal_form._REMEMBERED", 5)
    rewrite = Rewrite(NORMALIZERS["nfkc"])
    for text in adversarial_texts(50, seed=22):
        _check(text, "nfkc", rewrite)
        assert normal_form(text, rewrite).starts.tolist() == normal_form(text, rewrite).starts.tolist()
