"""The mini study's data, and that its study file is one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from vocabridge.study.plan import load_study

MINI = Path(__file__).parents[2] / "studies" / "mini"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mini_prepare", MINI / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wording(prompt: str) -> str:
    """A question without its person, who is the one name that is capitalised inside it."""
    return re.sub(r"(?<=\s)[A-Z][a-z]+(?=\W)", "{who}", prompt)


def test_the_students_rows_are_often_wrong_and_the_teachers_never(prepare: ModuleType) -> None:
    rows = prepare.make_rows(0)
    right: dict[str, set[str]] = {}
    for row in rows["teacher"]:
        right.setdefault(row["prompt"], set()).add(row["response"])
    assert {len(right[row["prompt"]]) for row in rows["train"]} == {3}
    wrong = [row for row in rows["train"] if row["response"] not in right[row["prompt"]]]
    assert 0.25 < len(wrong) / len(rows["train"]) < 0.42
    for row in wrong:
        changed = [len(set(row["response"].split()) ^ set(answer.split())) for answer in right[row["prompt"]]]
        assert min(changed) == 2, "one of the right answers, but for the thing"


def test_tests_ask_in_words_that_train_other_facts(prepare: ModuleType) -> None:
    rows = prepare.make_rows(0)
    seen = {row["prompt"] for name in ("language", "teacher", "train") for row in rows[name]}
    trained = Counter(wording(row["prompt"]) for row in rows["train"])
    answers = {answer for row in rows["teacher"] for answer in [row["response"]]}
    assert len(rows["in_domain"]) == len(rows["out_of_domain"]) == 64
    for row in rows["in_domain"]:
        assert row["prompt"] not in seen
        assert trained[wording(row["prompt"])] >= 2
        assert len(set(row["response"])) == 3
        assert set(row["response"]) <= answers
    for row in rows["out_of_domain"]:
        assert row["prompt"] not in seen
        assert all(part + "\n" in seen for part in re.split(r"(?<=[?.]) ", row["prompt"].strip()))
        assert len(set(row["response"])) == 9


def test_the_same_seed_gives_the_same_rows(prepare: ModuleType) -> None:
    assert prepare.make_rows(0) == prepare.make_rows(0) != prepare.make_rows(1)


def test_the_study_file_is_one(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MINI, tmp_path / "studies" / "mini", ignore=shutil.ignore_patterns("__pycache__"))
    data = tmp_path / "build" / "study_mini" / "data"
    data.mkdir(parents=True)
    for name, rows in prepare.make_rows(0).items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("student", "teacher"):
        (data.parent / name).mkdir()
    monkeypatch.chdir(tmp_path)
    plan = load_study("studies/mini/study.yaml")
    assert len(plan.runs) == 100
    objectives = {run.variant: yaml.safe_load(run.recipe.resolved_yaml())["objective"] for run in plan.runs}
    ablations = {name: values for name, values in objectives.items() if name.startswith("dskd_cma")}
    full = ablations.pop("dskd_cma_ga")
    assert {name: changed(full, values) for name, values in ablations.items()} == {
        "dskd_cma": {"matching": "none"},
        "dskd_cma_ga_frozen": {"train_discriminator": False},
        "dskd_cma_ga_unmasked": {"positions": "all"},
        "dskd_cma_ga_weight_1": {"matching_weight": 1.0},
    }, "each changes one thing and nothing else"
    assert {plan.baseline_of(name) for name in ablations if name != plan.baseline} == {"dskd_cma_ga"}


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What differs, by the innermost name."""
    found = {}
    for name, value in after.items():
        if isinstance(value, dict):
            found |= changed(before[name], value)
        elif value != before[name]:
            found[name] = value
    return found
