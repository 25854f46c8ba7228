"""The tokenizer-pair report against counts made token by token."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter

import numpy as np
import pytest
from rich.console import Console

import tokenizer_zoo
import vocabridge.alignment.report as report_module
from vocabridge.alignment import token_bytes
from vocabridge.alignment.report import pair_report, render_report
from vocabridge.errors import UserError
from vocabridge.pairs import PairTokenizer
from vocabridge.report.collect import PairFile
from vocabridge.text import read_examples

RESPONSES = [
    "The capital of France is Paris.",
    "学生从老师那里学习 \U0001f600!",
    "1. boil the water\n2. add rice",
    "Oui, é.",
]


def examples(responses=RESPONSES, prompt="Where is it?\n"):
    return read_examples([{"prompt": prompt, "output": response} for response in responses])


@pytest.fixture(scope="module")
def pair_tokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer):
    return PairTokenizer(tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer)


@pytest.fixture(scope="module")
def report(pair_tokenizer):
    return pair_report(pair_tokenizer, examples())


def boundaries(tokenizer, ids):
    """Byte positions between tokens, from the bytes of the ids alone."""
    table = token_bytes(tokenizer)
    return np.cumsum([len(table[token_id]) for token_id in ids]).tolist()


def test_chunks_against_common_boundaries(pair_tokenizer, report):
    sizes = Counter()
    tokens = [0, 0]
    for example in examples():
        pair = pair_tokenizer(example)
        cuts = [
            boundaries(renderer.tokenizer, [label for label in side.labels if label != -100][:-1])
            for renderer, side in (
                (pair_tokenizer.student, pair.student),
                (pair_tokenizer.teacher, pair.teacher),
            )
        ]
        tokens = [total + len(side) for total, side in zip(tokens, cuts, strict=True)]
        previous = 0
        for cut in sorted(set(cuts[0]) & set(cuts[1])):
            sizes[":".join(str(sum(previous < end <= cut for end in side)) for side in cuts)] += 1
            previous = cut
    assert report.chunk_sizes == dict(sizes)
    assert report.chunks == sizes.total()
    assert len(sizes) > 3
    assert list(report.chunk_sizes.values()) == sorted(sizes.values(), reverse=True)
    assert [report.student.tokens, report.teacher.tokens] == tokens
    assert report.student.one_to_one_share == pytest.approx(sizes["1:1"] / tokens[0])
    assert report.teacher.one_to_one_share == pytest.approx(sizes["1:1"] / tokens[1])
    assert report.student.tokens_per_chunk == pytest.approx(tokens[0] / sizes.total())
    assert report.student.coverage == report.teacher.coverage == 1
    assert report.response_bytes == sum(len(response.encode()) for response in RESPONSES)
    assert report.teacher.tokens_per_byte == pytest.approx(tokens[1] / report.response_bytes)
    assert report.student.byte_coverage == report.teacher.byte_coverage == 1


def test_vocabulary_overlap(pair_tokenizer, report):
    tables = [token_bytes(side.tokenizer) for side in (pair_tokenizer.student, pair_tokenizer.teacher)]
    shared = {piece for piece in tables[0] if piece} & {piece for piece in tables[1] if piece}
    assert report.shared_tokens == len(shared) > 256
    assert report.student.vocabulary_size == len(tables[0])
    assert report.student.shared_share == pytest.approx(len(shared) / len(tables[0]))
    assert report.teacher.shared_share == pytest.approx(len(shared) / len(tables[1]))


def test_roles(pair_tokenizer, report):
    student, teacher = pair_tokenizer.student.tokenizer, pair_tokenizer.teacher.tokenizer
    assert report.student.roles["end"].token == student.eos_token
    assert report.student.roles["end"].id == student.eos_token_id
    assert report.student.roles["unk"] is None
    assert {role: token.token for role, token in report.teacher.roles.items()} == {
        "end": "</s>",
        "bos": "<s>",
        "eos": teacher.eos_token,
        "pad": "<pad>",
        "unk": "<unk>",
    }


def test_identical_tokenizers(tiny_bpe_tokenizer):
    report = pair_report(PairTokenizer(tiny_bpe_tokenizer, tiny_bpe_tokenizer), examples())
    assert list(report.chunk_sizes) == ["1:1"]
    assert report.student.one_to_one_share == report.teacher.one_to_one_share == 1
    assert report.student == report.teacher
    assert report.warnings == []


def test_dropped_text_lowers_coverage(tiny_bpe_tokenizer):
    teacher = tokenizer_zoo.word_piece()
    teacher.eos_token = teacher.sep_token
    report = pair_report(PairTokenizer(tiny_bpe_tokenizer, teacher), examples(["a    b", "the fox"]))
    assert report.response_bytes == 13
    assert report.teacher.byte_coverage == pytest.approx(8 / 13)
    assert report.student.byte_coverage == 1
    assert any("leave out 38.5% of the text's bytes" in warning for warning in report.warnings)


def test_json_round_trip(report):
    values = json.loads(report.to_json())
    assert values["rows"]["kept"] == 4
    assert values["student"]["roles"]["bos"]["id"] == report.student.roles["bos"].id
    assert type(report).model_validate(values) == report


def test_the_page_reads_what_is_written(report):
    """It has models of its own for this file, so that it imports no torch."""
    written = json.loads(report.to_json())
    read = json.loads(PairFile.model_validate_json(report.to_json()).model_dump_json())
    sides = {side: {name: written[side][name] for name in read[side]} for side in ("student", "teacher")}
    assert read == {name: written[name] for name in read} | sides
    assert read["chunks"] > 0


def test_rendering(pair_tokenizer, report):
    console = Console(file=io.StringIO(), width=140)
    console.print(render_report(report))
    text = console.file.getvalue()
    assert "<|endoftext|>" in text
    assert "4 of 4 rows" in text
    assert "1:1" in text
    assert f"{report.student.one_to_one_share:.1%}" in text


def test_markup_in_tokens_is_shown_as_it_is(tiny_bpe_tokenizer):
    teacher = tokenizer_zoo.word_piece()
    teacher.eos_token = teacher.sep_token
    report = pair_report(PairTokenizer(tiny_bpe_tokenizer, teacher), examples(["the fox"]))
    console = Console(file=io.StringIO(), width=140)
    console.print(render_report(report))
    assert "[SEP]" in console.file.getvalue()


def test_warnings_about_rows(pair_tokenizer):
    student, teacher = pair_tokenizer.student.tokenizer, pair_tokenizer.teacher.tokenizer
    rows = examples(["fox " * 100, " "]) + examples(["x"], prompt="</s> ") + examples(["x"], prompt="word " * 60)
    warnings = pair_report(PairTokenizer(student, teacher, max_length=50), rows).warnings
    for expected in (
        "1 of 2 rows are cut at max_length=50",
        "1 rows are dropped: their prompt fills",
        "1 rows are dropped: they have no response",
        "1 plain prompts spell a control token",
        "2 plain prompts end in a space",
    ):
        assert any(warning.startswith(expected) for warning in warnings), (expected, warnings)


def test_warnings_about_sides(tiny_bpe_tokenizer, monkeypatch):
    student = copy.deepcopy(tiny_bpe_tokenizer)
    student.pad_token = None
    student.chat_template = "{{ messages }}"
    teacher = tokenizer_zoo.raw_bytes()
    monkeypatch.setattr(report_module, "check_tokenizer_file", lambda tokenizer: ["rebuilt"] * (tokenizer is teacher))
    warnings = pair_report(PairTokenizer(student, teacher), examples()).warnings
    for expected in (
        "of the teacher's tokens match one token of the other side",
        "The student's tokenizer has no pad token",
        "The student has a chat template but is given plain prompts",
        "rebuilt",
    ):
        assert sum(expected in warning for warning in warnings) == 1, (expected, warnings)


def test_without_a_teacher(tiny_bpe_tokenizer):
    with pytest.raises(UserError, match="has no teacher"):
        pair_report(PairTokenizer(tiny_bpe_tokenizer), examples())
