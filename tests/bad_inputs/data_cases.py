"""Data files: bytes, JSON, rows, conversations, and rows of which nothing is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bad_inputs.cases import DISTILL, BadInput, Spoil
from bad_inputs.workplace import change_yaml

GOOD_LINE = b'{"prompt": "Who wrote Emma?", "response": "Jane Austen."}\n'


def write(content: bytes, *, file: str = "train.jsonl") -> Spoil:
    return lambda folder: (folder / file).write_bytes(content)


def second_line(name: str, line: bytes, *says: str) -> BadInput:
    """A good line, then a bad one."""
    return BadInput(name, ("train.jsonl:2: ", *says), write(GOOD_LINE + line + b"\n"))


def row(name: str, values: Any, *says: str) -> BadInput:
    return second_line(name, json.dumps(values).encode(), *says)


def turns(name: str, *roles: str, says: tuple[str, ...]) -> BadInput:
    return row(name, {"messages": [{"role": role, "content": "some words"} for role in roles]}, *says)


def nothing_left(name: str, prompt: str, response: str, *says: str) -> BadInput:
    content = json.dumps({"prompt": prompt, "response": response}).encode() + b"\n"
    return BadInput(name, ("No row is left: of 3 rows", *says), write(content * 3))


def one_endless_line(folder: Path) -> None:
    os.truncate(folder / "train.jsonl", 0)
    os.truncate(folder / "train.jsonl", 100_000_000)


def a_response_of_5_megabytes(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(GOOD_LINE + json.dumps({"prompt": "a", "response": "w" * 5_000_000}).encode())


def split_that_is_not_there(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [json.loads(GOOD_LINE)] * 2
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(folder / "saved")
    change_yaml(folder / "recipe.yaml", data__train="saved:tset")


def pipe(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    os.mkfifo(folder / "train.jsonl")


def folder_without_data(folder: Path) -> None:
    (folder / "rows").mkdir()
    change_yaml(folder / "recipe.yaml", data__train="rows")


ENCODING = [
    second_line(
        "Latin-1", '{"prompt": "a", "response": "caf\u00e9"}'.encode("latin-1"), "0xe9", "not UTF-8", "convert it"
    ),
    BadInput(
        "UTF-16", ("train.jsonl:1: byte 0", "not UTF-8", "convert it"), write(GOOD_LINE.decode().encode("utf-16"))
    ),
    second_line(
        "half a surrogate pair", b'{"prompt": "a", "response": "x \\ud83d"}', "'response'", "ud83d", "write the whole"
    ),
    second_line(
        "a raw NUL", b'{"prompt": "a\0", "response": "b"}', "column 14", "control character", "Write one whole"
    ),
    BadInput("NULs at the end, as a crash leaves them", ("train.jsonl:2: broken JSON",), write(GOOD_LINE + bytes(512))),
    second_line("a byte order mark inside", b"\xef\xbb\xbf" + GOOD_LINE.strip(), "Unexpected UTF-8 BOM"),
]

SIZE = [
    BadInput(
        "100 MB without a line's end",
        ("train.jsonl:1: the line is longer than 67,108,864 bytes", "one row per line"),
        one_endless_line,
    ),
    BadInput(
        "a response of 5 MB",
        ("train.jsonl:2: 'response' has 5,000,000 characters", "split it into rows"),
        a_response_of_5_megabytes,
    ),
    BadInput("empty", ("train.jsonl: there are no rows",), write(b"")),
    BadInput("blank lines only", ("train.jsonl: there are no rows",), write(b"\n \r\n\t\n")),
]

SYNTAX = [
    BadInput(
        "one array",
        ("train.jsonl:1: broken JSON", "one object per line"),
        write(b"[" + GOOD_LINE.strip() + b",\n" + GOOD_LINE.strip() + b"]"),
    ),
    second_line("a line that was cut", GOOD_LINE[:50], "Unterminated string", "one whole JSON object per line"),
    second_line("single quotes", b"{'prompt': 'a', 'response': 'b'}", "double quotes"),
    BadInput("CSV", ("train.jsonl:1: broken JSON at column 1",), write(b"prompt,response\na,b\n")),
    second_line(
        "a key twice", b'{"prompt": "a", "prompt": "b", "response": "c"}', "'prompt' is given twice", "keep one"
    ),
    second_line(
        "a key twice in a message",
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "'content' is given twice",
        "keep one",
    ),
    second_line("100,000 brackets", b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    second_line(
        "a number of 5000 digits", b'{"prompt": "a", "response": "b", "id": ' + b"7" * 5000 + b"}", "too many digits"
    ),
    second_line("a string", b'"Jane Austen."', "must be a JSON object, not a string"),
]

ROWS = [
    row("a field misspelled", {"promt": "a", "response": "b"}, "no prompt", "did you mean 'prompt'"),
    row("no response", {"prompt": "a", "answer": "b"}, "no response", "'output' or 'response'", "Fields found"),
    row(
        "a prompt that is an object",
        {"prompt": {"text": "a"}, "response": "b"},
        "'prompt' must be a string, not an object",
    ),
    row("a response that is a number", {"prompt": "a", "response": 7}, "'response' must be a string, not a number"),
    row(
        "a reference that is null", {"prompt": "a", "response": ["b", None]}, "'response[1]' must be a string, not null"
    ),
    turns(
        "the assistant begins", "assistant", "user", says=("messages[0].role is 'assistant' where 'user' is expected",)
    ),
    turns("the system comes late", "user", "system", "assistant", says=("messages[1].role is 'system'",)),
    turns("the user has the last word", "user", says=("'messages' ends with 'user'", "ending with the assistant")),
    turns(
        "a role of another format",
        "human",
        "gpt",
        says=("messages[0].role is 'human'", "Accepted: system, user, assistant"),
    ),
    row(
        "content in parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "'messages[0].content' must be a string, not a list",
    ),
]

NOTHING_LEFT = [
    nothing_left("white space only", " ", " \n\t", "3 have no response", "train.jsonl:1", "give rows with responses"),
    nothing_left(
        "truncation empties all", "word " * 200, "x", "3 have a prompt", "max_length=64", "raise data.max_length"
    ),
]

ELSEWHERE = [
    BadInput("a bad row of the evaluation", ("test.jsonl:1: broken JSON",), write(b"{", file="test.jsonl")),
    BadInput(
        "an evaluation without responses",
        ("test: none of its 1 rows has a response",),
        write(b'{"prompt": "a", "response": ""}', file="test.jsonl"),
    ),
    BadInput(
        "a bad row of the validation",
        ("other.jsonl:1: broken JSON",),
        write(b"{", file="other.jsonl"),
        (*DISTILL, "data.validation=other.jsonl", "training.eval_strategy=steps", "training.eval_steps=1"),
    ),
    BadInput(
        "a bad first row of a stream", ("train.jsonl:1: broken JSON",), write(b"{"), (*DISTILL, "data.streaming=true")
    ),
    BadInput("a split that is not there", ("there is no split 'tset'", "did you mean 'test'"), split_that_is_not_there),
    BadInput("a pipe", ("train.jsonl: is a pipe or a device", "write them to a file"), pipe),
    BadInput(
        "a folder without data", ("rows: not a JSON-lines file, and 'datasets' cannot load it",), folder_without_data
    ),
]

DATA = [*ENCODING, *SIZE, *SYNTAX, *ROWS, *NOTHING_LEFT, *ELSEWHERE]
