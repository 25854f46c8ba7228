import dataclasses

import numpy as np
import pytest

from tiny_pair import ROWS
from vocabridge import pair_cache
from vocabridge.alignment import vocabulary_cache
from vocabridge.errors import UserError
from vocabridge.pair_cache import cached_pairs, pack, unpack
from vocabridge.pairs import PairTokenizer, tokenize_examples
from vocabridge.text import Example, Message

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def example(prompt, response, source="x"):
    return Example(prompt, (Message("user", prompt),), response, (response,), source)


EXAMPLES = [
    *(example(row["prompt"], row["response"]) for row in ROWS),
    example("a\n", "b c " * 40),
    example("a\n", " "),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pair_cache, "_FEWEST_ROWS", 2)


@pytest.fixture
def count_tokenizing(monkeypatch):
    calls = []

    def tokenize(*args, **kwargs):
        calls.append(args)
        return tokenize_examples(*args, **kwargs)

    monkeypatch.setattr(pair_cache, "tokenize_examples", tokenize)
    return calls


def assert_same(pairs, others):
    assert len(pairs) == len(others) > 0
    assert pairs.stats == others.stats
    for pair, other in zip(pairs, others, strict=True):
        assert pair.truncated == other.truncated
        for side, same in ((pair.student, other.student), (pair.teacher, other.teacher)):
            if side is None or same is None:
                assert side is same
                continue
            assert (side.input_ids, side.labels) == (same.input_ids, same.labels)
            for array, same_array in ((side.spans, same.spans), (side.chunk_ids, same.chunk_ids)):
                assert array.dtype == same_array.dtype == np.int64
                np.testing.assert_array_equal(array, same_array)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_what_is_read_back_is_what_was_made(
    tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, count_tokenizing, caplog, with_teacher
):
    tokenize = PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer if with_teacher else None, max_length=48)
    expected = tokenize_examples(EXAMPLES, tokenize)
    assert expected.stats.truncated > 0
    assert expected.stats.dropped_empty > 0
    assert_same(unpack(pack(expected)), expected)
    for _ in range(2):
        caplog.clear()
        assert_same(cached_pairs(EXAMPLES, tokenize), expected)
        assert caplog.text.count("without a response dropped") == 1
    assert len(count_tokenizing) == 1


def test_anything_that_changes_the_pairs_gets_another_file(
    tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, count_tokenizing, monkeypatch, tmp_path
):
    student, teacher = tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer
    monkeypatch.setattr(student, "chat_template", TEMPLATE)
    cached_pairs(EXAMPLES, PairTokenizer(student, teacher))
    moved = [dataclasses.replace(row, source="elsewhere") for row in EXAMPLES]
    cached_pairs(moved, PairTokenizer(student, teacher))
    assert len(count_tokenizing) == 1, "where rows come from changes no pair"
    changes = [
        lambda: (EXAMPLES[:-1], PairTokenizer(student, teacher)),
        lambda: ([*EXAMPLES[1:], EXAMPLES[0]], PairTokenizer(student, teacher)),
        lambda: (EXAMPLES, PairTokenizer(student, teacher, max_length=100)),
        lambda: (EXAMPLES, PairTokenizer(student)),
        lambda: (EXAMPLES, PairTokenizer(teacher, student)),
        lambda: (EXAMPLES, PairTokenizer(student, teacher, student_template="chat")),
    ]
    for number, change in enumerate(changes):
        examples, tokenize = change()
        cached_pairs(examples, tokenize)
        assert len(count_tokenizing) == number + 2
    monkeypatch.setattr(student, "chat_template", TEMPLATE.replace("assistant: ", "answer: "))
    cached_pairs(EXAMPLES, PairTokenizer(student, teacher, student_template="chat"))
    monkeypatch.setattr(pair_cache.transformers, "__version__", "99")
    cached_pairs(EXAMPLES, PairTokenizer(student, teacher))
    assert len(count_tokenizing) == len(changes) + 3
    assert len(list((tmp_path / "cache").glob("pairs-*.npz"))) == len(changes) + 3


def test_a_template_that_writes_the_date_is_rendered_anew_on_another_day(
    tiny_bpe_tokenizer, count_tokenizing, monkeypatch
):
    render = type(tiny_bpe_tokenizer).apply_chat_template
    for day in ("Monday", "Tuesday", "Tuesday"):
        monkeypatch.setattr(tiny_bpe_tokenizer, "chat_template", "{{ day() }} " + TEMPLATE)

        def apply(conversation, day=day, **options):
            options["chat_template"] = f"{day} {TEMPLATE}"
            return render(tiny_bpe_tokenizer, conversation, **options)

        monkeypatch.setattr(tiny_bpe_tokenizer, "apply_chat_template", apply)
        cached_pairs(EXAMPLES, PairTokenizer(tiny_bpe_tokenizer, student_template="chat"))
    assert len(count_tokenizing) == 2


def test_a_damaged_file_is_made_again(tiny_bpe_tokenizer, count_tokenizing, tmp_path, caplog):
    tokenize = PairTokenizer(tiny_bpe_tokenizer)
    expected = cached_pairs(EXAMPLES, tokenize)
    (path,) = (tmp_path / "cache").glob("pairs-*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert_same(cached_pairs(EXAMPLES, tokenize), expected)
    assert len(count_tokenizing) == 2
    assert "damaged" in caplog.text


def test_no_changed_byte_changes_a_pair(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, tmp_path, caplog):
    """Names of arrays among them, which the zip format's own checksums leave out: without the right name a teacher's
    side would be missing."""
    tokenize = PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)
    examples = EXAMPLES[:2]
    expected = pack(cached_pairs(examples, tokenize))
    (path,) = (tmp_path / "cache").glob("pairs-*.npz")
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for position in [*range(0, directory, 7), *range(directory, len(whole))]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = vocabulary_cache._read(path)
        assert found is None or equal(found, expected), position
    assert caplog.text.count("damaged") > 100
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert vocabulary_cache._read(path) is None


def equal(arrays, others):
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in others)


def test_few_rows_leave_no_file(tiny_bpe_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_cache, "_FEWEST_ROWS", len(EXAMPLES) + 1)
    cached_pairs(EXAMPLES, PairTokenizer(tiny_bpe_tokenizer))
    assert not (tmp_path / "cache").exists()


def test_rows_without_any_response_are_refused_and_not_kept(tiny_bpe_tokenizer, tmp_path):
    with pytest.raises(UserError, match="No row is left"):
        cached_pairs([example("a", " "), example("b", "")], PairTokenizer(tiny_bpe_tokenizer))
    assert not list((tmp_path / "cache").glob("*"))
