"""What is refused before a model is loaded, and what files are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vocabridge.errors import UserError
from vocabridge.evaluation.engine import GenerationSettings
from vocabridge.evaluation.plan import EvaluationPlan, named_sources, plan_evaluation

ROWS = [{"prompt": "q1\n", "response": "a1"}, {"prompt": "q2\n", "response": " "}, {"prompt": "q3\n", "response": "a3"}]


def _plan(**changes: object) -> EvaluationPlan:
    arguments = {"seeds": (1, 2), "settings": GenerationSettings(), **changes}
    return plan_evaluation({"dev": ROWS, "test": ROWS}, **arguments)


def test_rows_without_a_response_are_left_out_and_counted() -> None:
    (dev, _) = _plan().files
    assert [example.response for example in dev.examples] == ["a1", "a3"]
    assert dev.num_without_response == 1


def test_the_first_file_is_in_domain_unless_said_otherwise() -> None:
    assert [file.in_domain for file in _plan().files] == [True, False]
    assert [file.in_domain for file in _plan(in_domain=["test"]).files] == [False, True]


def test_limit_counts_rows_of_the_file() -> None:
    assert [len(file.examples) for file in _plan(limit=2).files] == [1, 1]


def test_greedy_decoding_needs_one_seed() -> None:
    assert _plan(settings=GenerationSettings(temperature=0)).seeds == (1,)
    assert _plan().seeds == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (3, 3)}, "3 twice"),
        ({"seeds": (-1,)}, "holds -1"),
        ({"in_domain": ["tset"]}, "did you mean 'test'"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _plan(**changes)


def test_a_file_without_any_response_is_refused() -> None:
    with pytest.raises(UserError, match="dev: none of its 1 rows has a response"):
        plan_evaluation({"dev": ROWS[1:2]}, seeds=(1,), settings=GenerationSettings())


def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": \n')
    with pytest.raises(UserError, match=r"dev\.jsonl:2"):
        plan_evaluation([str(path)], seeds=(1,), settings=GenerationSettings())


def test_names_are_stems_told_apart_by_their_folders() -> None:
    assert list(named_sources([Path("a/test.jsonl"), "b/test.jsonl", "b/dev.jsonl"])) == ["a-test", "b-test", "dev"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no data file"),
        ({}, "no data file"),
        (["a/x.jsonl", "a/x.jsonl"], "given twice"),
        (["p/a/x.jsonl", "q/a/x.jsonl"], "both be called 'a-x'"),
        ({"../x": ROWS}, "cannot name a data file"),
    ],
)
def test_files_that_cannot_be_told_apart_are_refused(files: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_sources(files)
