"""The same response under both tokenizers: ids, labels, spans, chunks, truncation, datasets and batches."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

import tokenizer_zoo
from vocabridge.alignment import token_bytes
from vocabridge.errors import UserError
from vocabridge.pairs import (
    PairCollator,
    PairTokenizer,
    StreamingPairs,
    TokenizedPair,
    pad_token_id,
    tokenize_examples,
)
from vocabridge.prompts import render_prompt
from vocabridge.text import parse_row

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
RESPONSES = [
    "The capital of France is Paris.",
    " leading space and trailing space ",
    "\n\nnewlines\r\n\ttabs\n",
    f"emoji {FAMILY} and \U0001f680",
    "學生从老师那里学习語言模型。",
    "الطالب يتعلم, שלום",
    "e\u0301a\u0323\u0307 combining",
    "spelled <|endoftext|> and </s><s><unk><|im_start|> in text",
    "\u2581 marker \u2581\u2581",
    "\x00\x07 controls",
    "x",
]
PIECES = ["Paris", " ", "\n", "the ", "\U0001f600", "é", "語", "</s>", "<|endoftext|>", "\u2581", "1", ".", "\u0301"]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), min_size=1, max_size=25).map("".join)
texts = texts.filter(lambda text: text.strip() and text.encode("utf-8", "ignore").decode() == text)


def row(response, prompt="Where is Paris?\n"):
    return parse_row({"prompt": prompt, "output": response}, "f:1")


def supervised(side):
    return [label for label in side.labels if label != -100]


def spelled_bytes(tokenizer, ids):
    """The bytes of ids, from the vocabulary alone."""
    table = token_bytes(tokenizer)
    return b"".join(table[token_id] for token_id in ids)


def check_side(side, tokenizer, template_prompt_ids):
    """What holds of every side."""
    num_prompt = len(template_prompt_ids)
    assert side.input_ids[:num_prompt] == template_prompt_ids
    assert side.labels == [-100] * num_prompt + side.input_ids[num_prompt:]
    assert side.labels[0] == -100
    assert side.spans.shape == (len(supervised(side)), 2)
    assert side.chunk_ids.shape == (len(supervised(side)),)
    assert side.spans.dtype == side.chunk_ids.dtype == np.int64
    assert (np.diff(side.spans[:, 0]) >= 0).all()


@pytest.fixture(scope="module")
def pair_tokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)


# --- one pair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", RESPONSES)
def test_both_sides_spell_the_response(pair_tokenizer, response):
    pair = pair_tokenizer(row(response))
    assert not pair.truncated
    num_bytes = len(response.encode())
    for side, renderer in ((pair.student, pair_tokenizer.student), (pair.teacher, pair_tokenizer.teacher)):
        tokenizer = renderer.tokenizer
        check_side(side, tokenizer, render_prompt(row(response), "plain", tokenizer))
        *ids, end = supervised(side)
        assert end == tokenizer.eos_token_id
        assert end not in ids
        assert side.spans[-1].tolist() == [num_bytes, num_bytes]
        table = token_bytes(tokenizer)
        for token_id, (start, stop) in zip(ids, side.spans[:-1].tolist(), strict=True):
            # U+2581 in a text is one piece with a space in SentencePiece families.
            assert table[token_id] == response.encode()[start:stop].replace("\u2581".encode(), b" ") or (
                table[token_id] == response.encode()[start:stop]
            )
    assert pair.student.chunk_ids[-1] == pair.teacher.chunk_ids[-1] == pair.student.chunk_ids.max()
    assert (pair.student.chunk_ids == pair.student.chunk_ids[-1]).sum() == 1


@pytest.mark.parametrize("response", RESPONSES)
def test_chunks_cover_the_same_bytes(pair_tokenizer, response):
    pair = pair_tokenizer(row(response))
    for chunk in range(pair.student.chunk_ids.max() + 1):
        student = pair.student.spans[pair.student.chunk_ids == chunk]
        teacher = pair.teacher.spans[pair.teacher.chunk_ids == chunk]
        assert (student[0, 0], student[-1, 1]) == (teacher[0, 0], teacher[-1, 1])


@pytest.mark.parametrize("name", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_identical_tokenizers_align_one_to_one(name, request):
    tokenizer = request.getfixturevalue(name)
    for response in RESPONSES:
        pair = PairTokenizer(tokenizer, tokenizer)(row(response))
        assert pair.student.input_ids == pair.teacher.input_ids
        assert (
            pair.student.chunk_ids.tolist() == pair.teacher.chunk_ids.tolist() == list(range(len(pair.student.spans)))
        )


def test_student_alone(tiny_bpe_tokenizer):
    pair = PairTokenizer(tiny_bpe_tokenizer)(row("In France."))
    assert pair.teacher is None
    assert set(pair.student.chunk_ids.tolist()) == {-1}
    assert tiny_bpe_tokenizer.decode(supervised(pair.student)) == "In France.<|endoftext|>"


def test_empty_prompt_leaves_every_response_token_predictable(pair_tokenizer):
    pair = pair_tokenizer(row("In France.", prompt=""))
    assert pair.student.labels[0] == pair.teacher.labels[0] == -100
    assert pair.student.input_ids[0] == pair_tokenizer.student.tokenizer.bos_token_id
    assert len(pair.student.input_ids) == len(pair.student.spans) + 1


@pytest.mark.parametrize("response", ["", " ", "\n\t "])
def test_nothing_is_left_of_an_empty_response(pair_tokenizer, response):
    assert pair_tokenizer(row(response)) is None


# --- templates -------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat_pair_tokenizer(tiny_sentencepiece_tokenizer):
    student = tokenizer_zoo.byte_level_bpe(control=("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    student.chat_template = CHATML
    teacher = copy.deepcopy(tiny_sentencepiece_tokenizer)
    teacher.chat_template = LLAMA2
    return PairTokenizer(student, teacher, student_template="chat", teacher_template="chat")


def test_each_side_has_its_own_template_and_end_token(chat_pair_tokenizer):
    pair = chat_pair_tokenizer(row("In France.", prompt="Where is Paris?"))
    student, teacher = chat_pair_tokenizer.student.tokenizer, chat_pair_tokenizer.teacher.tokenizer
    assert student.decode(pair.student.input_ids) == (
        "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\nIn France.<|im_end|>"
    )
    assert teacher.decode(pair.teacher.input_ids) == "<s> [INST] Where is Paris? [/INST] In France.</s>"
    assert pair.student.chunk_ids[-1] == pair.teacher.chunk_ids[-1]
    assert pair.student.spans[-1].tolist() == pair.teacher.spans[-1].tolist() == [10, 10]


def test_the_templates_own_space_has_no_bytes(chat_pair_tokenizer):
    pair = chat_pair_tokenizer(row("France is warm."))
    teacher = chat_pair_tokenizer.teacher.tokenizer
    rendered = teacher.apply_chat_template(
        [{"role": "user", "content": "Where is Paris?\n"}, {"role": "assistant", "content": "France is warm."}]
    )["input_ids"]
    ids = supervised(pair.teacher)[:-1]
    assert teacher.convert_ids_to_tokens(ids[0]).startswith("\u2581")
    assert rendered[: len(pair.teacher.input_ids) - 1] == pair.teacher.input_ids[:-1]
    assert pair.teacher.spans[0, 0] == 0
    assert pair.teacher.spans[-2, 1] == 15
    assert (pair.teacher.chunk_ids >= 0).all()


def test_mixed_templates(chat_pair_tokenizer):
    student, teacher = chat_pair_tokenizer.student.tokenizer, chat_pair_tokenizer.teacher.tokenizer
    example = parse_row({"instruction": "Where is Paris?", "output": "In France."}, "f:1")
    pair = PairTokenizer(student, teacher, teacher_template="chat")(example)
    assert student.decode(pair.student.input_ids) == f"{example.prompt}In France.<|endoftext|>"
    assert "### Instruction" not in teacher.decode(pair.teacher.input_ids)


# --- truncation ------------------------------------------------------------------------------------------------------


def kept_bytes(side, tokenizer):
    return spelled_bytes(tokenizer, supervised(side))


@settings(max_examples=150, deadline=None)
@given(response=texts, max_length=st.integers(2, 60), data=st.data())
def test_truncation_cuts_both_sides_at_the_same_byte(pair_tokenizer, response, max_length, data):
    student, teacher = pair_tokenizer.student.tokenizer, pair_tokenizer.teacher.tokenizer
    if data.draw(st.booleans()):
        student, teacher = teacher, student
    example = row(response.replace("\u2581", "_"), prompt=data.draw(st.sampled_from(["", "Q\n"])))
    whole = PairTokenizer(student, teacher, max_length=10_000)(example)
    pair = PairTokenizer(student, teacher, max_length=max_length)(example)
    longest = max(len(whole.student.input_ids), len(whole.teacher.input_ids))
    if longest <= max_length:
        assert pair.student.input_ids == whole.student.input_ids
        assert not pair.truncated
        return
    # Every common cut of the untruncated row, found by comparing prefixes of the bytes of the ids.
    lengths = [
        {len(spelled_bytes(tokenizer, supervised(side)[:count])): count for count in range(1, len(side.spans))}
        for side, tokenizer in ((whole.student, student), (whole.teacher, teacher))
    ]
    rooms = [max_length - side.labels.count(-100) for side in (whole.student, whole.teacher)]
    cuts = [
        cut
        for cut in lengths[0].keys() & lengths[1].keys()
        if lengths[0][cut] <= rooms[0] and lengths[1][cut] <= rooms[1]
    ]
    if not cuts:
        assert pair is None
        return
    assert pair.truncated
    expected = example.response.encode()[: max(cuts)]
    assert kept_bytes(pair.student, student) == kept_bytes(pair.teacher, teacher) == expected
    assert pair.student.spans[-1, 1] == pair.teacher.spans[-1, 1] == len(expected)
    assert len(pair.student.input_ids) <= max_length
    assert len(pair.teacher.input_ids) <= max_length
    assert student.eos_token_id not in supervised(pair.student)
    assert pair.student.chunk_ids.max() == pair.teacher.chunk_ids.max()


def test_truncated_text_decodes_alike(pair_tokenizer):
    response = "The quick brown fox jumps over the lazy dog. " * 10
    for max_length in range(20, 90, 7):
        pair = PairTokenizer(pair_tokenizer.student.tokenizer, pair_tokenizer.teacher.tokenizer, max_length=max_length)(
            row(response)
        )
        student = pair_tokenizer.student.tokenizer.decode(supervised(pair.student))
        teacher = pair_tokenizer.teacher.tokenizer.decode([*pair.teacher.input_ids])
        assert response.startswith(student)
        assert teacher.endswith(student)
        assert len(student) > 0


def test_a_row_that_just_fits_is_whole(pair_tokenizer):
    student, teacher = pair_tokenizer.student.tokenizer, pair_tokenizer.teacher.tokenizer
    whole = pair_tokenizer(row("The capital of France is Paris."))
    longest = max(len(whole.student.input_ids), len(whole.teacher.input_ids))
    assert not PairTokenizer(student, teacher, max_length=longest)(row("The capital of France is Paris.")).truncated
    assert PairTokenizer(student, teacher, max_length=longest - 1)(row("The capital of France is Paris.")).truncated


def test_truncation_of_a_student_alone(tiny_bpe_tokenizer):
    prompt_ids = render_prompt(row("x"), "plain", tiny_bpe_tokenizer)
    pair = PairTokenizer(tiny_bpe_tokenizer, max_length=len(prompt_ids) + 3)(row("The capital of France is Paris."))
    assert pair.truncated
    assert len(supervised(pair.student)) == 3
    assert PairTokenizer(tiny_bpe_tokenizer, max_length=len(prompt_ids))(row("Paris")) is None


@pytest.mark.parametrize("name", ["wordpiece-lower", "unigram", "byte-level-nfkc", "byte-level-gaps", "bytes"])
def test_tokenizers_that_drop_or_rewrite_text(name, tiny_bpe_tokenizer):
    teacher = tokenizer_zoo.BUILDERS[name]()
    if teacher.eos_token is None:
        teacher.eos_token = teacher.sep_token
    text = "The  capital\u00a0of France \u04ff is\tParis\x04, \ufb01ne: \u00bd e\u0301!"
    for max_length in (20, 26, 33, 200):
        pair = PairTokenizer(tiny_bpe_tokenizer, teacher, max_length=max_length)(row(text, prompt="Q\n"))
        assert pair is not None
        for side in (pair.student, pair.teacher):
            assert len(supervised(side)) == len(side.spans) == len(side.chunk_ids)
            assert (side.spans[:, 1] <= len(text.encode())).all()
            assert len(side.input_ids) <= max_length
        assert pair.student.chunk_ids.max() == pair.teacher.chunk_ids.max()
        assert pair.truncated == (max_length != 200)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_bad_settings(tiny_bpe_tokenizer):
    with pytest.raises(UserError, match="max_length must be at least 2"):
        PairTokenizer(tiny_bpe_tokenizer, max_length=1)
    with pytest.raises(UserError, match="no chat template"):
        PairTokenizer(tiny_bpe_tokenizer, student_template="chat")
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        PairTokenizer(tiny_bpe_tokenizer, tokenizer)


def test_id_beyond_the_vocabulary(tiny_bpe_tokenizer):
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    processor = TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 12345)])
    tokenizer.backend_tokenizer.post_processor = processor
    with pytest.raises(UserError, match=r"f:1: .* gives the id 12345, beyond its vocabulary of 700 ids"):
        PairTokenizer(tokenizer)(row("Paris"))


# --- datasets --------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "Where is Paris?\n", "output": "In France."},
    {"prompt": "Where is Berlin? ", "output": "In Germany, and that is a long way from here. " * 20},
    {"prompt": "Q\n", "output": " "},
    {"prompt": "many words " * 100, "output": "x"},
    {"prompt": "<|endoftext|>\n", "output": "Text."},
]


def test_dataset_counts_what_became_of_the_rows(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, caplog):
    tokenizer = PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, max_length=60)
    examples = [parse_row(row, f"f:{number}") for number, row in enumerate(ROWS, start=1)]
    with caplog.at_level(logging.INFO, logger="vocabridge.pairs"):
        dataset = tokenize_examples(examples, tokenizer)
    stats = dataset.stats
    assert (stats.rows, stats.kept, stats.truncated, stats.dropped_empty, stats.dropped_long) == (5, 3, 1, 1, 1)
    assert stats.control_spellings == 1
    assert stats.trailing_spaces == 2
    assert len(dataset) == 3
    assert [pair.truncated for pair in dataset] == [False, True, False]
    assert isinstance(dataset[-1], TokenizedPair)
    assert len(dataset[:2]) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 of 5 rows kept; 1 truncated" in record.getMessage()


def test_dataset_without_a_row_left_is_refused(pair_tokenizer):
    examples = [parse_row(ROWS[2], "f:1"), parse_row(ROWS[3], "f:2")]
    tight = PairTokenizer(pair_tokenizer.student.tokenizer, max_length=60)
    with pytest.raises(UserError, match=r"No row is left: of 2 rows, 1 have no response and 1 .*max_length=60"):
        tokenize_examples(examples, tight)
    with pytest.raises(UserError, match="of 0 rows"):
        tokenize_examples([], pair_tokenizer)


def test_streaming_pairs_can_be_read_again(pair_tokenizer):
    stream = StreamingPairs(ROWS, pair_tokenizer)
    eager = tokenize_examples((parse_row(row, "f") for row in ROWS), pair_tokenizer)
    for _ in range(2):
        pairs = list(stream)
        assert [pair.student.input_ids for pair in pairs] == [pair.student.input_ids for pair in eager]
        assert stream.stats == eager.stats
    assert len(list(StreamingPairs(ROWS, pair_tokenizer, limit=1))) == 1
    with pytest.raises(UserError, match="No row is left"):
        list(StreamingPairs(ROWS[2:3], pair_tokenizer))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader_sees_every_pair_once(pair_tokenizer, num_workers):
    stream = StreamingPairs(ROWS, pair_tokenizer)
    loader = DataLoader(stream, batch_size=1, collate_fn=PairCollator(0, 3), num_workers=num_workers)
    lengths = sorted(batch["input_ids"].shape[1] for batch in loader)
    assert lengths == sorted(len(pair.student.input_ids) for pair in stream)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(pair_tokenizer):
    return [pair_tokenizer(row(response)) for response in RESPONSES[:5]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 1, 16])
def test_batch_holds_every_pair(pairs, padding_side, multiple):
    batch = PairCollator(7, 9, pad_to_multiple_of=multiple, padding_side=padding_side)(pairs)
    assert list(batch) == [
        prefix + name
        for prefix in ("", "teacher_")
        for name in ("input_ids", "attention_mask", "labels", "spans", "chunk_ids")
    ]
    for prefix, name, pad_id in (("", "student", 7), ("teacher_", "teacher", 9)):
        sides = [getattr(pair, name) for pair in pairs]
        longest = max(len(side.input_ids) for side in sides)
        width = batch[prefix + "input_ids"].shape[1]
        assert width == longest if multiple in (None, 1) else (width % 16 == 0 and width - longest < 16)
        for index, side in enumerate(sides):
            mask = batch[prefix + "attention_mask"][index].bool()
            assert batch[prefix + "input_ids"][index][mask].tolist() == side.input_ids
            assert batch[prefix + "labels"][index][mask].tolist() == side.labels
            assert set(batch[prefix + "input_ids"][index][~mask].tolist()) <= {pad_id}
            assert set(batch[prefix + "labels"][index][~mask].tolist()) <= {-100}
            assert mask[0 if padding_side == "right" else -1]
            count = len(side.spans)
            assert batch[prefix + "spans"][index, :count].tolist() == side.spans.tolist()
            assert batch[prefix + "chunk_ids"][index, :count].tolist() == side.chunk_ids.tolist()
            assert (batch[prefix + "spans"][index, count:] == -1).all()
            assert (batch[prefix + "chunk_ids"][index, count:] == -1).all()
        assert batch[prefix + "spans"].shape == (5, max(len(side.spans) for side in sides), 2)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batch_without_a_teacher(tiny_bpe_tokenizer):
    batch = PairCollator(0)([PairTokenizer(tiny_bpe_tokenizer)(row("Yes."))])
    assert list(batch) == ["input_ids", "attention_mask", "labels", "spans", "chunk_ids"]


def test_collator_refuses(pairs):
    with pytest.raises(UserError, match="needs teacher_pad_id"):
        PairCollator(0)(pairs)
    with pytest.raises(UserError, match="pad_to_multiple_of must be at least 1"):
        PairCollator(0, pad_to_multiple_of=0)
    with pytest.raises(UserError, match="padding_side must be 'left' or 'right'"):
        PairCollator(0, padding_side="middle")


def test_pad_token_falls_back_to_eos(tiny_bpe_tokenizer):
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a pad nor an EOS token"):
        pad_token_id(tokenizer)
