"""Token bytes and the vocabulary that two tokenizers share."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import tokenizer_zoo
from vocabridge.alignment import byte_spans, shared_vocabulary, token_bytes


def _plain(vocab: dict[str, int], *, space: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=space))
    backend.decoder = decoders.Metaspace() if space else decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("name", [name for name in tokenizer_zoo.BUILDERS if "nf" not in name and "lower" not in name])
def test_token_bytes_are_the_bytes_of_the_spans(name: str) -> None:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    table = token_bytes(tokenizer)
    seen = 0
    for text in tokenizer_zoo.CORPUS:
        encoded = byte_spans(tokenizer, text)
        for token_id, (start, end) in zip(encoded.ids, encoded.spans.tolist(), strict=True):
            covered = text.encode()[start:end]
            if table[token_id] is not None:
                assert table[token_id] in (covered, b" " + covered, b" " + covered.lstrip())
                seen += 1
    assert seen > 200


def test_control_and_unknown_tokens_have_no_bytes(tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    table = token_bytes(tiny_sentencepiece_tokenizer)
    assert [table[token_id] for token_id in tiny_sentencepiece_tokenizer.all_special_ids] == [None] * 4
    assert table[tiny_sentencepiece_tokenizer.convert_tokens_to_ids("<0xE2>")] == b"\xe2"
    assert len(table) == len(tiny_sentencepiece_tokenizer)


def test_identical_byte_strings_match_over_alphabets() -> None:
    student = _plain({"Ġa": 0, "b": 1, "Ċ": 2, "zz": 3, "A": 4})
    teacher = _plain({"<0x0A>": 0, "<0x41>": 1, "b": 2, "▁a": 3, "A": 4, "q": 5}, space=True)
    shared = shared_vocabulary(student, teacher)
    pairs = list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    # "A" takes the ordinary piece 4, not the byte piece 1; the newline has only a byte piece.
    assert pairs == [(0, 3), (1, 2), (2, 0), (4, 4)]


def test_the_lowest_of_several_ids_is_taken() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1, "a": 2}, unk_token="[UNK]"))
    student = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    shared = shared_vocabulary(student, _plain({"b": 0, "a": 1}))
    assert shared.student_ids.tolist() == [1]
    assert shared.teacher_ids.tolist() == [1]


def test_a_vocabulary_shares_all_but_control_tokens_with_itself(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    shared = shared_vocabulary(tiny_bpe_tokenizer, tokenizer_zoo.byte_level_bpe())
    assert shared.student_ids.tolist() == shared.teacher_ids.tolist()
    assert len(shared.student_ids) == len(tiny_bpe_tokenizer) - 3


def test_real_vocabularies(
    smollm2_tokenizer: PreTrainedTokenizerFast, gemma_tokenizer: PreTrainedTokenizerFast
) -> None:
    shared = shared_vocabulary(smollm2_tokenizer, gemma_tokenizer)
    assert len(shared.student_ids) > 40_000
    assert len(set(shared.teacher_ids.tolist())) == len(shared.teacher_ids)
    pieces = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    for student_piece, teacher_piece in (("Ġthe", "▁the"), ("A", "A"), ("Ċ", "\n")):
        student_id, teacher_id = (
            tokenizer.convert_tokens_to_ids(piece)
            for tokenizer, piece in ((smollm2_tokenizer, student_piece), (gemma_tokenizer, teacher_piece))
        )
        assert pieces[student_id] == teacher_id


def test_the_package_does_not_import_torch() -> None:
    code = "import sys, vocabridge.alignment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
