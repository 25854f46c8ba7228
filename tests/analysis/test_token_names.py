"""Names of tokens in every script, of bytes, white space and control tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from vocabridge.alignment import encode_continuation
from vocabridge.analysis.token_names import shortened, token_names, visible, visible_bytes


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b" the", "\u2423the"),
        (b"\n\t\r", "\u21b5\u21e5\u240d"),
        ("敏捷".encode(), "敏捷"),
        ("école".encode(), "école"),
        ("😀".encode(), "😀"),
        (b"\xf0\x9f", "<F0 9F>"),
        (b" \xf0", "<20 F0>"),
        (b"\x00", "<U+0000>"),
        ("\u200b".encode(), "<U+200B>"),
        ("\ufffe".encode(), "<U+FFFE>"),
        ("\u0301".encode(), "\u25cc\u0301"),
        (b"<b>&\"'", "<b>&\"'"),
        (b"", "\u2205"),
    ],
)
def test_bytes(data: bytes, name: str) -> None:
    assert visible_bytes(data) == name


def test_every_name_of_a_vocabulary_is_printable(
    tiny_bpe_tokenizer: PreTrainedTokenizerFast, tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
        names = token_names(tokenizer, range(len(tokenizer)))
        assert len(names) == len(tokenizer) > 500
        is_hex = [name[0] == "<" and set(name[1:-1]) <= set("0123456789ABCDEF ") for name in names]
        assert sum(is_hex) > 64
        assert all(name.isprintable() and (bare or " " not in name) for name, bare in zip(names, is_hex, strict=True))
        assert names[tokenizer.eos_token_id] == tokenizer.eos_token
        assert names[tokenizer.pad_token_id] == tokenizer.pad_token


def test_names_of_a_text_join_to_it(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_continuation(tiny_bpe_tokenizer, "The quick brown\nfox").ids
    assert "".join(token_names(tiny_bpe_tokenizer, ids)) == visible("The quick brown\nfox")


def test_shortened() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde\u2026"
