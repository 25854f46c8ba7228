"""Study files: what a good one plans, what a bad one is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from study_cases import BASE, STUDY, WriteStudy, finish
from vocabridge.errors import UserError
from vocabridge.study.plan import load_study


def test_every_variant_with_every_seed(write_study: WriteStudy) -> None:
    plan = load_study(write_study())
    assert [(run.variant, run.seed) for run in plan.runs] == [
        (variant, seed) for seed in (0, 1, 2) for variant in ("cma", "cma_ga", "sft")
    ]
    assert (plan.baseline, plan.variants, plan.seeds) == ("cma", ("cma", "cma_ga", "sft"), (0, 1, 2))
    for run in plan.runs:
        training = run.recipe.training.arguments()
        assert run.folder == Path("study", "runs", run.variant, f"seed{run.seed}")
        assert (training["seed"], training["output_dir"], training["max_steps"]) == (run.seed, str(run.folder), 4)
        assert run.recipe.evaluation is not None
        assert run.recipe.evaluation.seeds == (10, 20)


def test_a_variant_may_be_compared_with_another_than_the_baseline(write_study: WriteStudy) -> None:
    plan, other = load_study(write_study()), load_study(write_study(baselines={"sft": "cma_ga"}))
    assert [plan.baseline_of(variant) for variant in plan.variants] == ["cma", "cma", "cma"]
    assert [other.baseline_of(variant) for variant in plan.variants] == ["cma", "cma", "cma_ga"]
    assert [run.recipe for run in plan.runs] == [run.recipe for run in other.runs]


def test_variants_change_what_they_name_and_nothing_else(write_study: WriteStudy) -> None:
    runs = {run.variant: run.recipe.values() for run in load_study(write_study(seeds=[0])).runs}
    changed = {
        (variant, section)
        for variant in ("cma", "sft")
        for section in runs["cma_ga"]
        if runs[variant].get(section) != runs["cma_ga"][section] and section != "training"
    }
    assert changed == {("cma", "objective"), ("sft", "objective"), ("sft", "teacher")}
    assert {**runs["cma"]["objective"], "matching": "gan"} == runs["cma_ga"]["objective"]
    assert runs["sft"]["objective"]["name"] == "cross_entropy"
    assert "teacher" not in runs["sft"]


def test_the_base_may_stand_in_the_study(write_study: WriteStudy) -> None:
    base = {**BASE, "training": {"max_steps": 4}}  # the study names the run folders
    inline, other = load_study(write_study(base=base)), load_study(write_study())
    assert [run.recipe for run in inline.runs] == [run.recipe for run in other.runs]


def test_paths_are_found_from_the_study_and_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipes/data/train.jsonl", "studies/data/test.jsonl", "studies/models/big/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    base = {**BASE, "data": {"train": "data/train.jsonl"}}
    (tmp_path / "recipes/recipe.yaml").write_text(yaml.safe_dump(base))
    study = {
        **STUDY,
        "base": "../recipes/recipe.yaml",
        "evaluation": {"data": ["data/test.jsonl"]},
        "variants": {"cma": None, "big": {"teacher.model": "models/big"}, "big2": {"teacher": {"model": "models/big"}}},
    }
    (tmp_path / "studies/study.yaml").write_text(yaml.safe_dump(study))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for run in load_study(tmp_path / "studies/study.yaml").runs:
        assert run.recipe.data.train == (str(tmp_path / "recipes/data/train.jsonl"),)
        assert run.recipe.evaluation is not None
        assert run.recipe.evaluation.data == (str(tmp_path / "studies/data/test.jsonl"),)
        assert run.recipe.teacher is not None
        assert run.recipe.teacher.model == (
            "org/teacher" if run.variant == "cma" else str(tmp_path / "studies/models/big")
        )


def test_the_evaluation_is_laid_over_that_of_the_base(write_study: WriteStudy) -> None:
    base = {**BASE, "evaluation": {"data": "org/mine", "max_new_tokens": 7, "seeds": [1]}}
    (run, *_) = load_study(write_study(base=base, evaluation={"seeds": [5]})).runs
    assert run.recipe.evaluation is not None
    settings = run.recipe.evaluation
    assert (settings.data, settings.max_new_tokens, settings.seeds) == (("org/mine",), 7, (5,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"varients": {}}, r"study\.yaml:\d+: varients is unknown; did you mean 'variants'\?"),
        (
            {"baseline": "cma_gan"},
            r"study\.yaml:3: baseline is 'cma_gan', which is no variant; did you mean 'cma_ga'",
        ),
        (
            {"baselines": {"cma_gan": "cma"}},
            r"study\.yaml:\d+: baselines\.cma_gan is for 'cma_gan', which is no variant; did you mean 'cma_ga'",
        ),
        (
            {"baselines": {"sft": "cma_gan"}},
            r"study\.yaml:\d+: baselines\.sft is 'cma_gan', which is no variant; did you mean 'cma_ga'\? Known: cma, ",
        ),
        ({"baselines": {"sft": "sft"}}, r"study\.yaml:\d+: baselines\.sft is the variant itself; name the one"),
        ({"seeds": [0, 1, 0]}, r"study\.yaml:4: seeds is refused: 0 is given twice"),
        ({"seeds": []}, r"seeds must be given"),
        ({"seeds": [0, "x"]}, r"study\.yaml:6: seeds\[1\] must be a whole number, but 'x' was given"),
        ({"seeds": [True]}, r"seeds\[0\] must be a number, but true was given"),
        ({"variants": {}}, r"variants must be given"),
        (
            {"variants": {"cma": {"objective.matchin": "gan"}}},
            r"study\.yaml:\d+: variants\.cma: objective\.matchin is",
        ),
        ({"variants": {"cma": {"objectve.x": 1}}}, r"variants\.cma: objectve is unknown; did you mean 'objective'\?"),
        ({"variants": {"cma": {"objective": "sft"}}}, r"variants\.cma: objective must be a section"),
        ({"variants": {"cma": {"data.train.x": 1}}}, r"variants\.cma: 'data\.train\.x': data\.train is a value"),
        ({"variants": {"cma": {"data.": 1}}}, r"variants\.cma: 'data\.' is no override"),
        ({"variants": {"cma": {"teacher": None}}}, r"variants\.cma: recipe\.yaml:8: objective\.name 'dskd_cma' needs"),
        ({"variants": {"cma": {"training.seed": 3}}}, r"variants\.cma\.training\.seed cannot be changed by a variant"),
        (
            {"variants": {"cma": {"training": {"seed": 3}}}},
            r"cannot be changed by a variant: training\.seed is",
        ),
        ({"variants": {"cma": {"evaluation.limit": 3}}}, r"cannot be changed by a variant: evaluation is the study"),
        ({"variants": {"cma": None, "../x": None}}, r"variants\.\.\./x is no variant's name"),
        ({"variants": {"cma": None, "CMA": None}}, r"variants has two names that differ in capitals only"),
        ({"base": "missing.yaml"}, r"study\.yaml:1: base is 'missing\.yaml', which is no file"),
        ({"evaluation": {}}, r"needs an 'evaluation' section"),
        (
            {"evaluation": {"data": "org/t", "in_domain": "s"}},
            r"^study\.yaml: evaluation\.in_domain names 's'",
        ),
        (
            {"evaluation": {"data": "gone.jsonl"}},
            r"^study\.yaml: evaluation\.data names 'gone\.jsonl', which does",
        ),
        ({"base": {**BASE, "data": {"trian": "x"}}}, r"study\.yaml:3: data\.trian is unknown; did you mean 'train'\?"),
    ],
)
def test_mistakes_are_told_before_anything_runs(write_study: WriteStudy, changes: dict[str, Any], message: str) -> None:
    path = write_study(**changes)
    with pytest.raises(UserError, match=message):
        load_study(path)
    assert not Path("study").exists()


def test_every_mistake_is_told_once(write_study: WriteStudy) -> None:
    wrong = {
        "cma": {"objective.matchin": "gan"},
        "sft": {"training.learning_rte": 1},
        "good": None,
        "other": {"data.max_length": 0},
    }
    path = write_study(variants=wrong, evaluation={"data": "org/t", "in_domain": "s"})
    with pytest.raises(UserError) as caught:
        load_study(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert [next((name for name in wrong if f"variants.{name}:" in line), "") for line in lines].count("") == 1


def test_mistakes_in_the_base_name_its_file_and_line(write_study: WriteStudy) -> None:
    path = write_study()
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("max_steps", "max_stpes"))
    with pytest.raises(UserError, match=r"^recipe\.yaml:12: training\.max_stpes is unknown; did you mean 'max_steps'"):
        load_study(path)


def test_planning_imports_no_torch(write_study: WriteStudy) -> None:
    """As long as a run that is done tells how long others take; else models and data are looked at."""
    path = write_study()
    finish(load_study(path).runs[0], {"test": {10: [0.5]}})
    code = (
        "import sys\n"
        "from vocabridge.cli import app\n"
        f"app(['study', {str(path)!r}, '--dry-run'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "9 runs" in done.stdout
    assert "9 pending" not in done.stdout
    assert done.stdout.count("3 pending") == 2
