"""What looks bad and is not: it is read, and read right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import tokenizer_zoo
from adversarial_text import ATOMS
from bad_inputs.cases import Spoil
from bad_inputs.conftest import Workplaces
from bad_inputs.tokenizer_cases import in_config, in_file
from bad_inputs.workplace import change_yaml
from span_oracle import SpanOracle
from tiny_pair import ROWS
from vocabridge.alignment import byte_spans
from vocabridge.models.loading import load_tokenizer
from vocabridge.models.spec import ModelSpec
from vocabridge.text import read_examples

SHORT = ("distill", "recipe.yaml", "training.max_steps=1", "training.save_strategy=no")
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS[:4]]

SAME_ROWS: dict[str, bytes] = {
    "a byte order mark": b"\xef\xbb\xbf" + b"\n".join(LINES),
    "CRLF": b"\r\n".join(LINES) + b"\r\n",
    "blank lines between": b"\n \n\t\n".join(LINES),
    "no newline at the end": b"\n".join(LINES),
    "everything escaped": b"\n".join(json.dumps(row).encode() for row in ROWS[:4]),
    "other fields, some of them large": b"\n".join(
        line[:-1] + b', "id": 7, "meta": {"deep": [[1]]}, "scan": "' + b"x" * 5_000_000 + b'"}' for line in LINES
    ),
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_other_bytes_of_the_same_rows_give_the_same_examples(tmp_path: Path, name: str) -> None:
    (tmp_path / "clean.jsonl").write_bytes(b"".join(line + b"\n" for line in LINES))
    (tmp_path / "odd.jsonl").write_bytes(SAME_ROWS[name])
    clean, odd = (
        [dataclasses.replace(example, source="") for example in read_examples(tmp_path / f"{which}.jsonl")]
        for which in ("clean", "odd")
    )
    assert odd == clean


def odd_file(folder: Path) -> None:
    """A byte order mark, CRLF, blank lines, an empty row, one of white space, one whose prompt is too long, NULs."""
    rows = [
        {"prompt": "Nothing?", "response": ""},
        {"prompt": "White?", "response": " \n"},
        {"prompt": "word " * 200, "response": "Too long."},
        {"prompt": "A NUL \0 inside", "response": "of \0 text"},
    ]
    lines = [*LINES, b"", *(json.dumps(row).encode() for row in rows)]
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))


def test_rows_of_which_nothing_is_left_are_counted(workplaces: Workplaces) -> None:
    folder = workplaces.fresh()
    odd_file(folder)
    command = (
        "inspect-pair",
        "student",
        "teacher",
        "--data",
        "train.jsonl",
        "--max-length",
        "64",
        "--json",
        "pair.json",
    )
    ended = workplaces.start(command)
    assert ended.code == 0, ended.output
    rows = json.loads((folder / "pair.json").read_text())["rows"]
    assert (rows["rows"], rows["kept"], rows["dropped_empty"], rows["dropped_long"]) == (8, 5, 2, 1)


ODD_INPUTS: dict[str, Spoil] = {
    "odd data": odd_file,
    "no pad token": in_config(pad_token=None),
    "NFKC": in_file(lambda values: values.update(normalizer={"type": "NFKC"})),
    "lower case": in_file(lambda values: values.update(normalizer={"type": "Lowercase"})),
    "truncation and padding in the tokenizer's file": in_file(
        lambda values: values.update(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            padding={
                **{"strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"},
            },
        )
    ),
}


@pytest.mark.parametrize("name", ODD_INPUTS)
def test_odd_inputs_are_trained_on(workplaces: Workplaces, name: str) -> None:
    folder = workplaces.fresh()
    change_yaml(folder / "recipe.yaml", evaluation=None)
    ODD_INPUTS[name](folder)
    ended = workplaces.start(SHORT)
    assert ended.code == 0, ended.output
    assert (folder / "run" / "model.safetensors").is_file()


def test_a_tokenizer_that_would_truncate_and_pad_is_not_let(workplaces: Workplaces) -> None:
    """Packages for sentence embeddings set both in ``tokenizer.json``; a row would lose all but its first tokens."""
    folder = workplaces.fresh()
    clean = load_tokenizer(ModelSpec(model=str(folder / "student")))
    text = ROWS[0]["response"]
    expected = byte_spans(clean, text)
    ODD_INPUTS["truncation and padding in the tokenizer's file"](folder)
    found = byte_spans(load_tokenizer(ModelSpec(model=str(folder / "student"))), text)
    assert found.ids == expected.ids
    assert len(found.ids) > 4
    assert found.spans.tolist() == expected.spans.tolist()


NORMALISING: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level-nfkc": lambda: tokenizer_zoo.byte_level_bpe(normalizer=normalizers.NFKC()),
    "byte-level-lower": lambda: tokenizer_zoo.byte_level_bpe(normalizer=normalizers.Lowercase()),
    "unigram-nfkc-lower": lambda: tokenizer_zoo.unigram(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
}


@pytest.mark.parametrize("kind", NORMALISING)
def test_normalisers_that_change_the_text_are_aligned(kind: str) -> None:
    tokenizer = NORMALISING[kind]()
    oracle = SpanOracle(tokenizer, kind)
    for text in [*(row["response"] for row in ROWS), "ﬁne Ⅳ ½ ＡＢＣ İstanbul STRASSE", "a\0b", *ATOMS]:
        assert not oracle.problems(text, byte_spans(tokenizer, text)), text


def test_swapped_models_are_trained_but_not_without_a_word(workplaces: Workplaces) -> None:
    """A small teacher may be meant (weak to strong), so the size is told and not refused."""
    folder = workplaces.fresh()
    change_yaml(folder / "recipe.yaml", evaluation=None, student__model="teacher", teacher__model="student")
    ended = workplaces.start(SHORT)
    assert ended.code == 0, ended.output
    assert "if they were swapped, swap the models of the sections student and teacher" in ended.errors
    assert "swapped" not in workplaces.first.errors
