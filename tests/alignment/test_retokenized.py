"""Source tokens spelled in target tokens, against one encoding at a time and a search over all tilings."""

from __future__ import annotations

import time

import pytest
from transformers import PreTrainedTokenizerFast

import tokenizer_zoo
from vocabridge.alignment import encode_continuation, retokenized, token_bytes

EXACT = ["byte_level_bpe", "sentencepiece_bpe", "unigram", "raw_bytes"]
PAIRS = [(source, target) for source in EXACT for target in EXACT if source != target and source != "raw_bytes"]


def build(name: str) -> PreTrainedTokenizerFast:
    return getattr(tokenizer_zoo, name)()


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_spellings_are_the_bytes_of_the_token(source_name: str, target_name: str) -> None:
    source, target = build(source_name), build(target_name)
    spelled = retokenized(source, target)
    source_bytes, target_bytes = token_bytes(source), token_bytes(target)
    assert len(spelled) == len(source_bytes)
    singles = {data for data in target_bytes if data and len(data) == 1}
    seen = 0
    for token_id, data in enumerate(source_bytes):
        ids = spelled[token_id].tolist()
        if data is None:
            assert ids == []
        elif ids:
            assert b"".join(target_bytes[i] for i in ids) == data
            seen += 1
        else:
            assert any(bytes([byte]) not in singles for byte in data), data
    assert seen > 200


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_text_is_encoded_as_it_continues(source_name: str, target_name: str) -> None:
    source, target = build(source_name), build(target_name)
    spelled = retokenized(source, target)
    target_bytes, compared = token_bytes(target), 0
    for token_id, data in enumerate(token_bytes(source)):
        try:
            text = (data or b"").decode()
        except UnicodeDecodeError:
            continue
        ids = encode_continuation(target, text).ids if text.strip() else []
        if ids and b"".join(target_bytes[i] or b"" for i in ids) == data:
            assert spelled[token_id].tolist() == ids, text
            compared += 1
    assert compared > 200


def test_part_of_a_character_is_tiled_by_the_fewest_tokens() -> None:
    source, target = build("byte_level_bpe"), build("sentencepiece_bpe")
    spelled, target_bytes = retokenized(source, target), token_bytes(target)
    by_bytes = {data for data in target_bytes if data}

    def fewest(data: bytes) -> float:
        if not data:
            return 0
        heads = (end for end in range(1, len(data) + 1) if data[:end] in by_bytes)
        return min((1 + fewest(data[end:]) for end in heads), default=float("inf"))

    parts = [i for i, data in enumerate(token_bytes(source)) if data and not valid(data)]
    longer = [i for i in parts if len(token_bytes(source)[i]) > 1]
    assert len(longer) >= 5
    for token_id in parts:
        assert len(spelled[token_id]) == fewest(token_bytes(source)[token_id])


def valid(data: bytes) -> bool:
    return data.decode(errors="ignore").encode() == data


def test_bytes_that_the_target_cannot_spell_give_nothing() -> None:
    source = build("sentencepiece_bpe")
    target = tokenizer_zoo.byte_level_bpe(alphabet=["a", "b", "Ġ"], vocab_size=60)
    spelled, source_bytes, target_bytes = retokenized(source, target), token_bytes(source), token_bytes(target)
    known = {data for data in target_bytes if data and len(data) == 1}
    lost = [i for i, data in enumerate(source_bytes) if data and any(bytes([byte]) not in known for byte in data)]
    assert len(lost) > 100
    assert all(len(spelled[i]) == 0 for i in lost)


def test_a_rewriting_tokenizer_spells_its_own_form() -> None:
    source, target = build("byte_level_bpe"), build("word_piece")
    spelled, pieces = retokenized(source, target), token_bytes(target)
    token_id = source.convert_tokens_to_ids("ĠThe")
    assert token_id is not None
    assert b"".join(pieces[i] for i in spelled[token_id].tolist()) == b"the"
    unknown = target.unk_token_id
    assert unknown not in spelled.ids.tolist()


def test_control_spellings_are_text() -> None:
    source, target = build("byte_level_bpe"), build("sentencepiece_bpe")
    source.add_tokens(["</s>"])
    spelled = retokenized(source, target)[source.convert_tokens_to_ids("</s>")].tolist()
    assert target.eos_token == "</s>"
    assert len(spelled) > 1
    assert target.eos_token_id not in spelled


def test_real_vocabularies(
    smollm2_tokenizer: PreTrainedTokenizerFast, gemma_tokenizer: PreTrainedTokenizerFast
) -> None:
    token_bytes(smollm2_tokenizer), token_bytes(gemma_tokenizer)
    start = time.perf_counter()
    spelled = retokenized(gemma_tokenizer, smollm2_tokenizer)
    assert time.perf_counter() - start < 30  # about 3 seconds on an idle core
    pieces = token_bytes(smollm2_tokenizer)
    token_id = token_bytes(gemma_tokenizer).index(b" Wigan")
    assert b"".join(pieces[i] for i in spelled[token_id].tolist()) == b" Wigan"
    assert (spelled.offsets[1:] > spelled.offsets[:-1]).sum() > 255_000
