"""Encoding a response as it continues after a newline or a control token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tokenizer_zoo
from adversarial_text import adversarial_texts, texts
from span_oracle import SpanOracle
from vocabridge.alignment import byte_spans, encode_continuation

LOSSLESS = [
    "byte-level",
    "byte-level-prefix",
    "sentencepiece-prepend",
    "sentencepiece-metaspace",
    "sentencepiece-replace",
    "unigram",
    "unigram-bytes",
    "bytes",
]
PREFIXED = ["byte-level-prefix", "sentencepiece-prepend", "sentencepiece-metaspace", "unigram", "unigram-bytes"]


@pytest.fixture(scope="module", params=tokenizer_zoo.BUILDERS)
def tiny(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase]:
    return request.param, tokenizer_zoo.BUILDERS[request.param]()


def test_spans_of_continuations_are_right(tiny: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = tiny
    oracle = SpanOracle(tokenizer, name)
    for text in adversarial_texts(200, seed=7):
        for variant in (text, "\n" + text, " " + text):
            found = oracle.problems(variant, encode_continuation(tokenizer, variant))
            assert not found, (variant, found)


@pytest.mark.parametrize("name", LOSSLESS)
def test_no_token_is_synthetic(name: str) -> None:
    """Each token has bytes of the text and is as long as them, so no space was put in front."""
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    for text in ("The dog", " The dog", "  The", "\nThe", "\n\n The", "学生", "\t", "▁a", " ", "\n", "dog</s>", "😀 a"):
        encoded = encode_continuation(tokenizer, text)
        assert encoded.spans[0, 0] == 0
        assert encoded.spans[-1, 1] == len(text.encode())
        assert (encoded.spans[:, 1] > encoded.spans[:, 0]).all(), (text, encoded)
        pieces = tokenizer.convert_ids_to_tokens(encoded.ids)
        if text[0] not in " \n▁":
            assert not pieces[0].startswith(("▁", "Ġ")), (text, pieces)


@pytest.mark.parametrize("name", PREFIXED)
def test_ids_are_those_behind_a_prompt(name: str) -> None:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    prompt = "What is it?\n"
    for text in ("The dog sleeps.", " dog", "学生 the", "a\n\nb", "1. First"):
        whole = byte_spans(tokenizer, prompt + text)
        first = next(i for i, start in enumerate(whole.spans[:, 0]) if start >= len(prompt))
        assert encode_continuation(tokenizer, text).ids == whole.ids[first:]


def test_a_leading_newline_is_not_torn_from_the_next(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("\n", "\n\n", "\n\nThe dog", "\n The"):
        assert encode_continuation(tiny_bpe_tokenizer, text).ids == byte_spans(tiny_bpe_tokenizer, text).ids


def test_a_newline_run_of_gemma_stays_one_token(gemma_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_continuation(gemma_tokenizer, "\n\nParis")
    assert gemma_tokenizer.convert_ids_to_tokens(encoded.ids) == ["\n\n", "Paris"]
    assert encoded.spans.tolist() == [[0, 2], [2, 7]]


def test_empty_text(tiny: tuple[str, PreTrainedTokenizerBase]) -> None:
    encoded = encode_continuation(tiny[1], "")
    assert encoded.ids == []
    assert encoded.spans.shape == (0, 2)


def test_words_keep_their_marker_where_white_space_has_no_token() -> None:
    tokenizer = tokenizer_zoo.word_piece()
    assert encode_continuation(tokenizer, "The dog").ids == byte_spans(tokenizer, "The dog").ids


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_any_text_is_spelled_whole(tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    encoded = encode_continuation(tiny_sentencepiece_tokenizer, text)
    spelled = b"".join(text.encode()[start:end] for start, end in encoded.spans)
    assert spelled == text.encode()
    assert all(start < end for start, end in encoded.spans.tolist())


def test_the_tokenizer_keeps_its_prefix(tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    before = tiny_sentencepiece_tokenizer.backend_tokenizer.to_str()
    encode_continuation(tiny_sentencepiece_tokenizer, "\nThe dog")
    assert tiny_sentencepiece_tokenizer.backend_tokenizer.to_str() == before
    assert tiny_sentencepiece_tokenizer.tokenize("The")[0].startswith("▁")
