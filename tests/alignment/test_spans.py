"""Byte spans over every family, against an oracle written apart from the package."""

from __future__ import annotations

import gc
import multiprocessing
import random
import unicodedata
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tokenizer_zoo
from adversarial_text import adversarial_texts, texts
from span_oracle import SpanOracle
from vocabridge.alignment import EncodedText, byte_spans
from vocabridge.errors import UserError

REAL = {
    "byte-smollm2-gaps": "smollm2_tokenizer",
    "sentencepiece-gemma": "gemma_tokenizer",
    "wordpiece-lower-minilm": "minilm_tokenizer",
}
TEXTS_PER_TINY_TOKENIZER = 500
TEXTS_PER_REAL_TOKENIZER = 1000


@pytest.fixture(scope="module", params=tokenizer_zoo.BUILDERS)
def tiny(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase]:
    return request.param, tokenizer_zoo.BUILDERS[request.param]()


def _check(name: str, tokenizer: PreTrainedTokenizerBase, sample: list[str]) -> None:
    oracle = SpanOracle(tokenizer, name)
    wrong = [(text, found) for text in sample if (found := oracle.problems(text, byte_spans(tokenizer, text)))]
    assert not wrong, f"{len(wrong)} of {len(sample)}: {min(wrong, key=lambda item: len(item[0]))}"


def test_spans_are_right_on_adversarial_texts(tiny: tuple[str, PreTrainedTokenizerBase]) -> None:
    _check(*tiny, list(adversarial_texts(TEXTS_PER_TINY_TOKENIZER, seed=1)))


@pytest.mark.parametrize("name", REAL)
def test_spans_of_real_tokenizers_are_right(name: str, request: pytest.FixtureRequest) -> None:
    _check(name, request.getfixturevalue(REAL[name]), list(adversarial_texts(TEXTS_PER_REAL_TOKENIZER, seed=2)))


def test_at_least_ten_thousand_texts() -> None:
    assert TEXTS_PER_TINY_TOKENIZER * len(tokenizer_zoo.BUILDERS) + TEXTS_PER_REAL_TOKENIZER * len(REAL) >= 10_000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_spans_are_right_on_any_text(tiny: tuple[str, PreTrainedTokenizerBase], text: str) -> None:
    _check(*tiny, [text])


def test_control_tokens_keep_the_span_of_their_spelling(tiny: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = tiny
    oracle = SpanOracle(tokenizer, name)
    end = tokenizer.eos_token or tokenizer.sep_token
    found = 0
    for text in adversarial_texts(100, seed=3):
        text = f"{text}{end}{text}"
        encoded = byte_spans(tokenizer, text, specials="control")
        assert not oracle.problems(text, encoded), (text, oracle.problems(text, encoded))
        spans = [
            tuple(span)
            for span, i in zip(encoded.spans.tolist(), encoded.ids, strict=True)
            if i == tokenizer.convert_tokens_to_ids(end)
        ]
        found += len(spans)
        # A Unigram model also reads a spelling that only the normaliser makes (full-width brackets).
        spellings = [unicodedata.normalize("NFKC", text.encode()[start:stop].decode()) for start, stop in spans]
        assert all(spelling.strip() == end for spelling in spellings)
    assert found >= 100


def test_control_spellings_are_text_by_default(tiny: tuple[str, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = tiny
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for spelling in (*tokenizer.all_special_tokens, "＜/s＞"):
        for text in (spelling, f"a {spelling} b", f"{spelling}{spelling}"):
            assert control.isdisjoint(byte_spans(tokenizer, text).ids), text


@pytest.mark.parametrize("name", ["wordpiece-cased", "characters"])
def test_spans_are_the_offsets_where_those_are_right(name: str) -> None:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    for text in adversarial_texts(300, seed=6):
        raw = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        offsets = [[len(text[:char].encode()) for char in pair] for pair in raw["offset_mapping"]]
        encoded = byte_spans(tokenizer, text)
        assert encoded.ids == raw["input_ids"]
        assert encoded.spans.tolist() == offsets


def test_the_oracle_notices_a_boundary_moved_by_one_byte() -> None:
    generator = random.Random(4)
    for name in ("byte-level", "byte-level-nfc", "sentencepiece-prepend", "sentencepiece-replace", "bytes"):
        tokenizer = tokenizer_zoo.BUILDERS[name]()
        oracle = SpanOracle(tokenizer, name)
        moved = caught = 0
        for text in adversarial_texts(100, seed=5):
            encoded = byte_spans(tokenizer, text)
            inner = [i for i in range(len(encoded.ids) - 1) if encoded.spans[i, 1] == encoded.spans[i + 1, 0] > 0]
            if not inner:
                continue
            index = generator.choice(inner)
            spans = encoded.spans.copy()
            spans[index, 1] += generator.choice((-1, 1))
            spans[index + 1, 0] = spans[index, 1]
            wrong = EncodedText(encoded.ids, spans, encoded.shared, encoded.dropped)
            moved, caught = moved + 1, caught + bool(oracle.problems(text, wrong))
        assert moved > 60
        assert caught / moved > 0.95, name


def test_bytes_of_one_character_lie_in_several_tokens(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = byte_spans(tiny_bpe_tokenizer, "é👩")
    assert encoded.spans[0].tolist() in ([0, 1], [0, 2])
    assert encoded.spans[-1].tolist()[1] == 6
    assert len(encoded.ids) > 2  # the woman is not one token, yet every token has bytes of its own
    assert (np.diff(encoded.spans, axis=1) > 0).all()


def test_the_synthetic_marker_is_empty_and_a_composed_letter_is_whole() -> None:
    marked = byte_spans(tokenizer_zoo.sentencepiece_bpe(), "学生 the")
    assert marked.spans[:2].tolist() == [[0, 6], [6, 10]]
    nfc = byte_spans(tokenizer_zoo.BUILDERS["byte-level-nfc"](), "e\u0301a")
    assert nfc.spans[-1].tolist() == [3, 4]  # two characters became one, and the next still starts at byte 3


def test_bytes_without_a_token_are_dropped_and_said_to_be() -> None:
    encoded = byte_spans(tokenizer_zoo.BUILDERS["byte-level-gaps"](), "ab,\x04!? z")
    assert encoded.dropped.tolist() == [[3, 4]]
    assert [4, 5] in encoded.spans.tolist()


@pytest.mark.parametrize("name", [name for name in tokenizer_zoo.BUILDERS if name != "byt5"])
def test_the_tokenizer_is_left_as_it_was(name: str) -> None:
    tokenizer = tokenizer_zoo.BUILDERS[name]()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    before = backend.to_str()
    assert len(byte_spans(tokenizer, "one two three four five six </s>").ids) > 3
    assert backend.to_str() == before
    assert backend.encode_special_tokens is False
    backend.no_truncation()
    backend.no_padding()


def test_tokens_added_later_are_seen() -> None:
    tokenizer = tokenizer_zoo.byte_level_bpe()
    byte_spans(tokenizer, "a")
    tokenizer.add_tokens(["zebra"])
    encoded = byte_spans(tokenizer, "a zebra")
    assert encoded.ids[-1] == len(tokenizer) - 1
    assert encoded.spans[-1].tolist() == [2, 7]


@given(
    text=st.text(alphabet=st.characters(categories=["Cs", "Ll"]), min_size=1).filter(
        lambda text: any("\ud800" <= c <= "\udfff" for c in text)
    )
)
def test_lone_surrogates_are_refused_with_their_position(
    tiny_bpe_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    position = next(index for index, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(UserError, match=f"at character {position},"):
        byte_spans(tiny_bpe_tokenizer, text)


def test_a_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        name_or_path = "somewhere"

    with pytest.raises(UserError, match=r"SlowTokenizer \(somewhere\) has no fast tokenizer"):
        byte_spans(SlowTokenizer(), "a")


def test_pieces_that_do_not_spell_the_text_are_refused() -> None:
    vocab = {"a": 0, "b": 1, "<unk>": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(UserError, match="CharDelimiterSplit"):
        byte_spans(tokenizer, "a|b")


def test_a_misfit_names_the_token_and_the_byte() -> None:
    tokenizer = tokenizer_zoo.byte_level_bpe()
    byte_spans(tokenizer, "a")
    tokenizer.backend_tokenizer.normalizer = tokenizer_zoo.normalizers.Lowercase()  # behind the cache's back
    with pytest.raises(UserError, match=r"token 1 \('d'\) does not match 'D' at byte 1"):
        byte_spans(tokenizer, "1D")


def test_a_custom_component_is_refused() -> None:
    class Upper:
        def normalize(self, text: object) -> None:
            text.uppercase()

    tokenizer = tokenizer_zoo.byte_level_bpe()
    tokenizer.backend_tokenizer.normalizer = tokenizer_zoo.normalizers.Normalizer.custom(Upper())
    with pytest.raises(UserError, match="custom Normalizer written in Python"):
        byte_spans(tokenizer, "a")


def test_forked_workers_give_the_same_spans(tiny_sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    expected = byte_spans(tiny_sentencepiece_tokenizer, "The dog 😀").spans.tolist()
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: sender.send(byte_spans(tiny_sentencepiece_tokenizer, "The dog 😀").spans.tolist())
    )
    worker.start()
    assert receiver.poll(30)
    assert receiver.recv() == expected
    worker.join()


def test_threads_give_the_same_spans(tiny_bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = [*adversarial_texts(200, seed=10), *["a <|endoftext|> b"] * 50]
    ids = [byte_spans(tiny_bpe_tokenizer, text).ids for text in sample]
    with ThreadPoolExecutor(4) as pool:
        assert [encoded.ids for encoded in pool.map(lambda text: byte_spans(tiny_bpe_tokenizer, text), sample)] == ids


def test_the_cache_does_not_keep_a_tokenizer_alive() -> None:
    tokenizer = tokenizer_zoo.unigram()
    byte_spans(tokenizer, "a")
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None
