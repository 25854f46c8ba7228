"""Tokenizers: what lacks an end, does not fit its model, cannot be read, or spells no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ByT5Tokenizer

from bad_inputs.cases import BadInput, Spoil
from bad_inputs.workplace import change_json, change_yaml

FILE = "student/tokenizer.json"


def in_file(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        edit(values)
        (folder / FILE).write_text(json.dumps(values), encoding="utf-8")

    return spoil


def in_config(**changes: Any) -> Spoil:
    return lambda folder: change_json(folder / "student" / "tokenizer_config.json", changes)


def added_tokens(side: str) -> Spoil:
    def spoil(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / side)
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.save_pretrained(folder / side)

    return spoil


def slow_only(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "student" / name).unlink()
    ByT5Tokenizer().save_pretrained(folder / "student")


def chat_template(text: str | None) -> Spoil:
    def spoil(folder: Path) -> None:
        change_yaml(folder / "recipe.yaml", student__template="chat")
        if text is not None:
            (folder / "student" / "chat_template.jinja").write_text(text)

    return spoil


def no_merges(values: dict[str, Any]) -> None:
    values["pre_tokenizer"] = {"type": "CharDelimiterSplit", "delimiter": "e"}


TOKENIZERS = [
    BadInput("no end token", ("student' has no end token (eos_token)", "could never end"), in_config(eos_token=None)),
    BadInput(
        "an end token of another vocabulary",
        ("student: the tokenizer has 701 ids and the model 700 embeddings", "check student.model"),
        in_config(eos_token="<|other|>"),
    ),
    BadInput(
        "added tokens beyond the student's embedding",
        ("student: the tokenizer has 702 ids and the model 700", "check student.model"),
        added_tokens("student"),
    ),
    BadInput(
        "tokenizers of student and teacher swapped",
        ("student: the tokenizer has 800 ids and the model 700", "student.tokenizer"),
        lambda folder: change_yaml(folder / "recipe.yaml", student__tokenizer="teacher", teacher__tokenizer="student"),
    ),
    BadInput("slow only", ("student' has no fast tokenizer (tokenizer.json)", "convert it first"), slow_only),
    BadInput(
        "tokenizer.json missing",
        ("student' has no tokenizer.json", "set the field 'tokenizer'"),
        lambda folder: (folder / FILE).unlink(),
    ),
    BadInput(
        "tokenizer.json cut",
        ("student': the tokenizer cannot be loaded", "double quotes"),
        lambda folder: (folder / FILE).write_text((folder / FILE).read_text()[:500]),
    ),
    BadInput(
        "tokenizer.json a list",
        ("student': the tokenizer cannot be loaded",),
        lambda folder: (folder / FILE).write_text("[]"),
    ),
    BadInput(
        "tokenizer elsewhere, where nothing is",
        ("recipe.yaml:7: student.tokenizer names './tok', which does not exist",),
        lambda folder: change_yaml(folder / "recipe.yaml", student__tokenizer="./tok"),
    ),
    BadInput(
        "pieces that do not spell the text",
        ("its pieces do not spell the text", "at byte 4", "choose another"),
        in_file(lambda values: values.update(pre_tokenizer=None)),
    ),
    BadInput(
        "a pre-tokenizer of unknown effect",
        ("CharDelimiterSplit", "would be a guess", "choose another"),
        in_file(no_merges),
    ),
    BadInput("chat without a template", ("has no chat template", "use template 'plain'"), chat_template(None)),
    BadInput(
        "a template that is no Jinja",
        ("chat template", "fails on a plain conversation"),
        chat_template("{% for m in x %}"),
    ),
    BadInput("a template that drops the answer", ("does not write the assistant's content",), chat_template("hello")),
    BadInput(
        "the same tokenizer is needed",
        ("objective logit_kd needs", "same tokenizer", "use an objective"),
        lambda folder: change_yaml(folder / "recipe.yaml", objective={"name": "logit_kd"}),
    ),
]
