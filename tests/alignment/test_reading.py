"""The straight reading against the search that it saves."""

from __future__ import annotations

import pytest

import tokenizer_zoo
from adversarial_text import adversarial_texts
from vocabridge.alignment import byte_spans
from vocabridge.alignment.reading import Reader, Reading

# In the others the pieces join to every text.
SEARCHED = sorted(tokenizer_zoo.BUILDERS.keys() - {"byte-level", "byte-level-prefix", "bytes", "byt5"})


@pytest.mark.parametrize("name", SEARCHED)
def test_the_straight_reading_is_what_the_search_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    sample = list(adversarial_texts(300, seed=23))
    straight = [byte_spans(tokenizer, text).spans.tolist() for text in sample]
    searched = 0

    def give_up(reader: Reader) -> Reading | None:
        nonlocal searched
        searched += 1
        return None

    monkeypatch.setattr(Reader, "_read_straight", give_up)
    assert [byte_spans(tokenizer, text).spans.tolist() for text in sample] == straight
    assert searched >= 10
