import re
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken

import tokenizer_zoo
from random_sides import random_sides
from tiny_pair import ROWS
from vocabridge.alignment import token_bytes
from vocabridge.errors import UserError
from vocabridge.models.forward import supervised_tokens
from vocabridge.objectives._columns import byte_keys, common_columns, shared_columns, take_columns
from vocabridge.objectives._row_pairs import same_token_pairs
from vocabridge.objectives._same_tokenizer import check_same_tokenizer, same_tokenizer_pairs
from vocabridge.pairs import PairCollator, PairTokenizer
from vocabridge.text import read_examples

LEAD_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ ' ' if m['role'] == 'assistant' else '' }}"
    "{{ m['content'] }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template that writes a space in front of the answer and ends it with a token other than EOS."""


@pytest.fixture
def setup(tiny_bpe_tokenizer):
    return random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer, rows=ROWS[:1]).setup


def chat_tokenizer():
    tokenizer = tokenizer_zoo.byte_level_bpe(control=("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = LEAD_TEMPLATE
    return tokenizer


def test_equal_tokenizers_pass_and_tell_their_common_size(setup, tiny_bpe_tokenizer):
    assert check_same_tokenizer("x", setup) == len(tiny_bpe_tokenizer)
    longer = tokenizer_zoo.byte_level_bpe()
    longer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    assert len(longer) == len(tiny_bpe_tokenizer) + 1
    for sides in ({"teacher_tokenizer": longer}, {"student_tokenizer": longer}):
        assert check_same_tokenizer("x", replace(setup, **sides)) == len(tiny_bpe_tokenizer)


def test_other_tokenizer_is_refused_with_the_first_id_and_both_spellings(setup, tiny_sentencepiece_tokenizer):
    with pytest.raises(UserError) as raised:
        check_same_tokenizer("logit_kd", replace(setup, teacher_tokenizer=tiny_sentencepiece_tokenizer))
    # ids 0..2 are control or unknown tokens on both sides
    student, teacher = (token_bytes(t) for t in (setup.student_tokenizer, tiny_sentencepiece_tokenizer))
    first = next(i for i in range(700) if student[i] != teacher[i])
    message = str(raised.value)
    assert f"id {first} is {student[first].decode()!r} for the student" in message
    assert "the control token '<pad>' for the teacher" in message
    assert "shared_vocabulary" in message


def test_ids_moved_by_a_control_token_are_refused(setup):
    shifted = tokenizer_zoo.byte_level_bpe(control=("<|pad|>", "<|endoftext|>"))  # one control token fewer
    message = "id 2 is the control token '<|im_start|>' for the student and '!' for the teacher"
    with pytest.raises(UserError, match=re.escape(message)):
        check_same_tokenizer("x", replace(setup, teacher_tokenizer=shifted))


def walked_pairs(pair, tables, end_ids):
    """Pairs within one example by comparing the text read so far: equal bytes before, equal bytes of the token."""
    sides = []
    for side, table in zip((pair.student, pair.teacher), tables, strict=True):
        pieces = [table[token] for token in side.labels if token != -100]
        sides.append([(b"".join(p or b"" for p in pieces[:k]), piece) for k, piece in enumerate(pieces)])
    found = [(i, j) for i, a in enumerate(sides[0]) for j, b in enumerate(sides[1]) if a == b and a[1]]
    if not pair.truncated:
        assert (pair.student.labels[-1], pair.teacher.labels[-1]) == end_ids
        found.append((len(sides[0]) - 1, len(sides[1]) - 1))
    return found


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("max_length", [128, 24])
def test_same_token_pairs_by_walking_the_text(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer, swapped, max_length):
    tokenizers = [tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer][:: -1 if swapped else 1]
    sides = random_sides(*tokenizers)
    tokenize = PairTokenizer(*tokenizers, max_length=max_length)
    pairs = [pair for pair in map(tokenize, read_examples(ROWS)) if pair]
    assert any(pair.truncated for pair in pairs) == (max_length == 24)
    batch = PairCollator(0, 0)(pairs)
    tables, ends = [token_bytes(t) for t in tokenizers], sides.setup.end_token_ids
    expected, offsets = [], [0, 0]
    for pair in pairs:
        expected += [(i + offsets[0], j + offsets[1]) for i, j in walked_pairs(pair, tables, ends)]
        offsets = [offsets[0] + len(pair.student.spans), offsets[1] + len(pair.teacher.spans)]
    student = supervised_tokens(batch["input_ids"], batch["labels"])
    teacher = supervised_tokens(batch["teacher_input_ids"], batch["teacher_labels"])
    keys = byte_keys(sides.setup)
    found = same_token_pairs(
        student, teacher, batch, student_keys=keys[0][student.labels], teacher_keys=keys[1][teacher.labels]
    )
    assert list(zip(found.student.tolist(), found.teacher.tolist(), strict=True)) == expected
    assert found.count == len(expected)
    assert 20 < found.count < min(offsets)


def test_equal_tokenizers_pair_every_position(tiny_bpe_tokenizer):
    sides = random_sides(tiny_bpe_tokenizer, tiny_bpe_tokenizer)
    found = same_tokenizer_pairs(sides.forward.student, sides.forward.teacher, sides.batch)
    assert found.student.tolist() == found.teacher.tolist() == list(range(len(sides.forward.student.labels)))


def test_another_template_changes_the_first_token_and_the_end_token_only():
    tokenizer = chat_tokenizer()
    tokenize = PairTokenizer(tokenizer, tokenizer, student_template="chat", max_length=128)
    assert tokenize.student.response_lead == " "
    assert tokenize.student.end_token_id != tokenize.teacher.end_token_id
    pairs = [tokenize(example) for example in read_examples(ROWS[:1])]
    batch = PairCollator(0, 0)(pairs)
    student = supervised_tokens(batch["input_ids"], batch["labels"])
    teacher = supervised_tokens(batch["teacher_input_ids"], batch["teacher_labels"])
    found = same_tokenizer_pairs(student, teacher, batch)
    rest = [(i, j) for i, j in zip(found.student.tolist(), found.teacher.tolist(), strict=True)]
    # " The" against "T", "he": only the words behind them are the same; the end tokens pair by role.
    spans = pairs[0].student.spans.tolist(), pairs[0].teacher.spans.tolist()
    first = [k for k, (i, _) in enumerate(rest) if spans[0][i][0] == 0]
    assert not first
    assert all(spans[0][i] == spans[1][j] for i, j in rest)
    assert rest[-1] == (len(student.labels) - 1, len(teacher.labels) - 1)
    labels = [(int(student.labels[i]), int(teacher.labels[j])) for i, j in rest]
    assert all(a == b for a, b in labels[:-1])
    assert labels[-1] == (tokenize.student.end_token_id, tokenize.teacher.end_token_id)
    assert len(rest) >= len(student.labels) - 2


@pytest.mark.parametrize(
    ("size", "ends", "expected"),
    [
        (4, (2, 2), {0: 0, 1: 1, 2: 2, 3: 3}),
        (4, (1, 3), {0: 0, 1: 3, 2: 2, 3: 1}),  # each end token is the other's partner, and so are the ids they leave
        (4, (1, 6), {0: 0, 1: 6, 2: 2, 3: 3}),  # the student has no id 6
        (4, (5, 0), {5: 0, 1: 1, 2: 2, 3: 3}),
    ],
)
def test_common_columns_pair_end_tokens_by_role(size, ends, expected):
    columns = common_columns(size, *ends)
    assert dict(zip(columns.student.tolist(), columns.teacher.tolist(), strict=True)) == expected


def test_shared_columns_are_equal_bytes_and_the_end_tokens(setup, tiny_sentencepiece_tokenizer):
    setup = replace(setup, teacher_tokenizer=tiny_sentencepiece_tokenizer, teacher_end_token_id=2)
    columns = shared_columns(setup)
    pairs = list(zip(columns.student.tolist(), columns.teacher.tolist(), strict=True))
    assert pairs[-1] == (setup.student_tokenizer.eos_token_id, 2)
    student, teacher = token_bytes(setup.student_tokenizer), token_bytes(tiny_sentencepiece_tokenizer)
    assert all(student[i] == teacher[j] is not None for i, j in pairs[:-1])
    assert {student[i] for i, _ in pairs[:-1]} == set(student) & set(teacher) - {None}
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) > 100


def test_an_end_token_that_is_text_is_a_column_once(setup, tiny_sentencepiece_tokenizer):
    setup = replace(setup, teacher_tokenizer=tiny_sentencepiece_tokenizer)
    plain = shared_columns(setup)
    text_id, partner = int(plain.student[7]), int(plain.teacher[7])
    columns = shared_columns(replace(setup, student_end_token_id=text_id))
    assert columns.student.tolist().count(text_id) == 1
    assert columns.student[-1] == text_id
    assert partner not in columns.teacher.tolist()


def test_take_columns_by_loops():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([4, 0, 5])
    taken = take_columns(logits, columns)
    assert taken.tolist() == [[row[c] for c in columns.tolist()] for row in logits.tolist()]
    assert torch.autograd.gradcheck(lambda x: take_columns(x, columns), logits)
