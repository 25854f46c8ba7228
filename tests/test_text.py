"""Row forms, sources and every kind of broken row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from vocabridge.errors import UserError
from vocabridge.text import Example, Message, iter_examples, parse_row, read_examples

GOOD_LINE = b'{"prompt": "Q\\n", "output": "A"}\n'


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- row forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["output", "response", "completion"])
def test_prompt_and_response(field):
    example = parse_row({"prompt": "Q\n", field: "A", "category": 3}, "f:1")
    assert example == Example("Q\n", (Message("user", "Q\n"),), "A", ("A",), "f:1")


def test_instruction_without_input_uses_the_short_alpaca_template():
    example = parse_row({"instruction": "Name a fruit.", "input": "", "output": "Fig"}, "f:1")
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a fruit.\n\n### Response:\n"
    )
    assert example.messages == (Message("user", "Name a fruit."),)
    assert parse_row({"instruction": "Name a fruit.", "input": None, "output": "Fig"}, "f:1") == example


def test_instruction_with_input_uses_the_long_alpaca_template():
    example = parse_row({"instruction": "Sum {up}.", "input": "1 {2}", "response": "3"}, "f:1")
    assert example.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSum {up}.\n\n### Input:\n1 {2}\n\n### Response:\n"
    )
    assert example.messages == (Message("user", "Sum {up}.\n\n1 {2}"),)


def test_prompt_is_the_plain_form_and_instruction_the_chat_form():
    example = parse_row({"prompt": "rendered", "instruction": "I", "input": "X", "output": "A"}, "f:1")
    assert example.prompt == "rendered"
    assert example.messages == (Message("user", "I\n\nX"),)


def test_messages():
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": None}]}
    assert parse_row(row, "f:1") == Example("Hi\n", (Message("user", "Hi"),), "Hello", ("Hello",), "f:1")


def test_messages_of_several_turns():
    contents = ["Be brief.", "Hi", "Hello", "Bye"]
    roles = ["system", "user", "assistant", "user"]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    example = parse_row({"messages": [*turns, {"role": "assistant", "content": "Ciao"}]}, "f:1")
    assert example.messages == tuple(map(Message, roles, contents))
    assert example.response == "Ciao"
    assert example.prompt == "System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nHello\n\nUser:\nBye\n\nAssistant:\n"


def test_conversational_prompt_and_completion():
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Hello"}],
    }
    assert parse_row(row, "f:1") == Example("Hi\n", (Message("user", "Hi"),), "Hello", ("Hello",), "f:1")


def test_several_references_keep_their_order():
    example = parse_row({"prompt": "Q", "output": ["first", "second", "first"]}, "f:1")
    assert example.response == "first"
    assert example.references == ("first", "second", "first")


def test_null_fields_count_as_absent():
    row = {"prompt": "Q", "messages": None, "output": None, "response": "A"}
    assert parse_row(row, "f:1").response == "A"


def test_an_empty_response_is_kept():
    assert parse_row({"prompt": "Q", "output": ""}, "f:1").response == ""


# --- broken rows -----------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
BAD_ROWS = {
    "not an object": ([1], "must be an object with named fields, not a list"),
    "no response": ({"prompt": "Q"}, "no response: expected a field 'output' or 'response' or 'completion'"),
    "null response": ({"prompt": "Q", "output": None}, "no response"),
    "misspelled response": ({"prompt": "Q", "reponse": "A"}, "did you mean 'response'?"),
    "no prompt": ({"output": "A"}, "no prompt: expected a field 'prompt' or 'instruction' or 'messages'"),
    "misspelled prompt": ({"instuction": "Q", "output": "A"}, "did you mean 'instruction'?"),
    "no fields": ({}, "Fields found: none"),
    "number as response": ({"prompt": "Q", "output": 4}, "'output' must be a string, not a number"),
    "number as prompt": ({"prompt": 4, "output": "A"}, "'prompt' must be a string, not a number"),
    "boolean as instruction": ({"instruction": True, "output": "A"}, "'instruction' must be a string, not a boolean"),
    "list as input": ({"instruction": "I", "input": [], "output": "A"}, "'input' must be a string, not a list"),
    "object as response": ({"prompt": "Q", "output": {}}, "'output' must be a string, not an object"),
    "number among references": ({"prompt": "Q", "output": ["A", 1]}, "'output[1]' must be a string, not a number"),
    "no references": ({"prompt": "Q", "output": []}, "'output' is an empty list"),
    "messages of a string": ({"messages": "hi"}, "'messages' must be a list of messages, not a string"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "message of a string": ({"messages": ["hi"]}, "messages[0] must be an object with 'role' and 'content'"),
    "message without content": ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
    "message with null content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "'messages[1].content' must be a string, not null",
    ),
    "unknown role": ({"messages": [{"role": "asistant", "content": "A"}]}, "did you mean 'assistant'?"),
    "foreign role": ({"messages": [{"role": "tool", "content": "A"}]}, "Accepted: system, user, assistant"),
    "ends with the user": ({"messages": [USER, ASSISTANT, USER]}, "'messages' ends with 'user'"),
    "assistant first": ({"messages": [ASSISTANT]}, "messages[0].role is 'assistant' where 'user' is expected"),
    "two users": ({"messages": [USER, USER, ASSISTANT]}, "messages[1].role is 'user' where 'assistant' is expected"),
    "late system": (
        {"messages": [USER, {"role": "system", "content": "S"}, ASSISTANT]},
        "messages[1].role is 'system' where 'assistant' is expected",
    ),
    "system only": ({"messages": [{"role": "system", "content": "S"}]}, "'messages' ends with 'system'"),
    "prompt ends with the assistant": ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, "'prompt' ends with"),
    "empty conversational prompt": ({"prompt": [], "completion": [ASSISTANT]}, "'prompt' is empty"),
    "completion by the user": ({"prompt": [USER], "completion": [USER]}, "exactly one message, the assistant's"),
    "two completions": ({"prompt": [USER], "completion": [ASSISTANT] * 2}, "exactly one message, the assistant's"),
    "lone surrogate": ({"prompt": "Q", "output": "ab\ud83d"}, r"half of a surrogate pair (\ud83d) at character 2"),
    "lone surrogate in a message": (
        {"messages": [{"role": "user", "content": "\udc00"}, ASSISTANT]},
        "'messages[0].content' holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_broken_row_names_its_place_and_field(case):
    row, expected = BAD_ROWS[case]
    with pytest.raises(UserError) as caught:
        parse_row(row, "train.jsonl:12")
    assert str(caught.value).startswith("train.jsonl:12: ")
    assert expected in str(caught.value)


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_jsonl_names_each_line(tmp_path):
    path = write(tmp_path / "train.jsonl", {"prompt": "Q1", "output": "A1"}, {"prompt": "Q2", "output": "A2"})
    assert [example.source for example in read_examples(path)] == [f"{path}:1", f"{path}:2"]
    assert [example.response for example in read_examples(str(path))] == ["A1", "A2"]


def test_bom_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE.replace(b"\n", b"\r\n") + b"\r\n  \n" + GOOD_LINE.rstrip(b"\n"))
    examples = read_examples(path)
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:4"]
    assert examples[0].prompt == "Q\n"


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    path = write(tmp_path / "separators.jsonl", {"prompt": "a\u2028b\u0085c", "output": "\u2029"})
    (example,) = read_examples(path)
    assert example.prompt == "a\u2028b\u0085c"
    assert example.response == "\u2029"


BAD_LINES = {
    "truncated": (b'{"prompt": "Q", "output": \n', "broken JSON at column"),
    "array line": (b"[1, 2]\n", "a line must be a JSON object, not a list"),
    "string line": (b'"hello"\n', "a line must be a JSON object, not a string"),
    "latin-1": (b'{"prompt": "caf\xe9", "output": "A"}\n', "byte 15 of the line (0xe9) is not UTF-8"),
    "surrogate escape": (b'{"prompt": "Q", "output": "\\ud800"}\n', "half of a surrogate pair"),
    "deep nesting": (b"[" * 200_000 + b"\n", "broken JSON"),
    "huge number": (b'{"prompt": ' + b"9" * 10_000 + b"}\n", "broken JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_broken_line_names_file_and_line(tmp_path, case):
    line, expected = BAD_LINES[case]
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + line)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert expected in str(caught.value)


def test_surrogate_pair_escape_is_one_character(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "Q", "output": "\\ud83d\\ude00"}\n')
    assert read_examples(path)[0].response == "\U0001f600"


def test_json_array_file_is_named_as_such(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"prompt": "Q", "output": "A"}], indent=1))
    with pytest.raises(UserError, match="looks like one JSON array; write one object per line"):
        read_examples(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="there are no rows"):
        read_examples(path)


def test_missing_file_suggests_a_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "Q", "output": "A"})
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'train.jsonl'\?"):
        iter_examples(tmp_path / "trian.jsonl")


def test_streaming_reads_no_further_than_asked(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD_LINE + b"broken\n")
    assert next(iter_examples(path)).response == "A"
    assert len(read_examples(path, limit=1)) == 1
    with pytest.raises(UserError, match="limit must be at least 1"):
        read_examples(path, limit=0)


# --- lists and datasets ----------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Q{index}", "output": f"A{index}"} for index in range(4)]


def test_rows_and_examples_in_a_list():
    examples = read_examples(ROWS)
    assert [example.source for example in examples] == ["rows[0]", "rows[1]", "rows[2]", "rows[3]"]
    assert read_examples(examples) == examples
    with pytest.raises(UserError, match="there are no rows"):
        read_examples([])
    with pytest.raises(UserError, match=r"rows\[1\]: no response"):
        read_examples([ROWS[0], {"prompt": "Q"}])


def test_dataset_and_streaming_dataset():
    dataset = datasets.Dataset.from_list(ROWS)
    assert read_examples(dataset) == read_examples(ROWS)
    assert read_examples(dataset.to_iterable_dataset(), limit=2) == read_examples(ROWS[:2])


def test_dataset_of_messages():
    dataset = datasets.Dataset.from_list([{"messages": [USER, ASSISTANT]}])
    assert read_examples(dataset)[0].response == "A"


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    examples = read_examples(tmp_path / "saved")
    assert [example.response for example in examples] == ["A0", "A1", "A2", "A3"]
    assert examples[2].source == f"{tmp_path / 'saved'}[2]"
    with pytest.raises(UserError, match="no splits"):
        read_examples(tmp_path / "saved", split="train")


def test_saved_dataset_with_splits(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved"
    assert len(read_examples(f"{folder}:test")) == 1
    assert len(read_examples(folder, split="train")) == 4
    assert len(read_examples(datasets.DatasetDict(splits), split="test")) == 1
    with pytest.raises(UserError, match=r"say which split.*Splits: train, test"):
        read_examples(folder)
    with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'\?"):
        read_examples(f"{folder}:tset")


def test_folder_of_jsonl_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", *ROWS)
    assert len(read_examples(tmp_path / "data")) == 4
    assert len(read_examples(f"{tmp_path / 'data'}:train[:3]")) == 3
    with pytest.raises(UserError, match="'datasets' cannot load it"):
        read_examples(tmp_path / "data", split="nosuch")


def test_several_sources_are_read_one_after_the_other(tmp_path):
    first = write(tmp_path / "first.jsonl", *ROWS[:2])
    second = write(tmp_path / "second.jsonl", *ROWS[2:])
    assert [example.response for example in read_examples((str(first), second))] == ["A0", "A1", "A2", "A3"]
    with pytest.raises(UserError, match="no such file"):
        iter_examples([first, tmp_path / "third.jsonl"])


def test_split_of_something_without_splits(tmp_path):
    path = write(tmp_path / "train.jsonl", *ROWS)
    with pytest.raises(UserError, match="a JSON-lines file has no splits"):
        read_examples(path, split="train")
    with pytest.raises(UserError, match="the rows given have no splits"):
        read_examples(ROWS, split="train")


def test_import_is_light():
    code = "import sys, vocabridge.text; assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
