"""Reading what is there, whatever its stage and whatever is broken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import report_cases
from vocabridge.errors import UserError
from vocabridge.report.collect import collect
from vocabridge.report.reading import Reader
from vocabridge.study.plan import load_study
from vocabridge.study.results import study_results, write_results


def test_study_file_and_folder_give_the_same(tmp_path: Path) -> None:
    file = report_cases.finished_study(tmp_path)
    write_results(study_results(load_study(file)))
    by_file, by_folder = collect(file), collect(tmp_path / "out")
    assert by_file == by_folder
    assert by_file.study is not None
    assert by_file.variants == ("cma", "cma_ga", "sft")
    assert len(by_file.runs) == 9
    assert by_file.runs[0].analysis.probe is not None
    assert by_file.notes == ()


def test_a_study_folder_alone_shows_its_last_results(tmp_path: Path) -> None:
    file = report_cases.finished_study(tmp_path / "here")
    write_results(study_results(load_study(file)))
    file.unlink()
    (tmp_path / "here").rename(tmp_path / "moved")
    report = collect(tmp_path / "moved" / "out")
    assert len(report.runs) == 9
    assert all(run.log and run.recipe for run in report.runs)


def test_an_unfinished_study_is_read(tmp_path: Path) -> None:
    report = collect(report_cases.partial_study(tmp_path))
    states = [run.record.state for run in report.runs]
    assert sorted(states) == ["done", "failed", *["pending"] * 7]
    torn = report.runs[2]
    assert torn.log == {"loss": {5: 3.0}}
    assert report.notes == ()


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    report_cases.write_run(tmp_path / "student", seed=7)
    report = collect(tmp_path / "student")
    assert report.study is None
    (run,) = report.runs
    assert (run.title, run.record.state, run.record.steps) == ("student, seed 7", "done", report_cases.STEPS)
    assert run.record.seconds == 37.0
    assert run.recipe is None


def test_what_is_nothing_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        collect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is neither a study file"):
        collect(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="name the study's YAML file"):
        collect(tmp_path)
    (tmp_path / "study.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"study\.json cannot be read"):
        collect(tmp_path)


def test_damaged_files_are_noted_and_left_out(tmp_path: Path) -> None:
    report_cases.write_run(tmp_path, seed=0)
    (tmp_path / "run.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text("{", encoding="utf-8")
    (tmp_path / "analysis" / "probe.json").write_text('{"data": 3}', encoding="utf-8")
    report = collect(tmp_path)
    (run,) = report.runs
    assert (run.environment, run.recipe, run.evaluation, run.analysis.probe) == (None, None, None, None)
    assert run.analysis.points is not None
    for name in ("run.json", "recipe.yaml", "results.json", "probe.json"):
        assert sum(name in note for note in report.notes) == 1, name


def test_log_takes_the_later_of_two_values_and_skips_a_torn_end(tmp_path: Path) -> None:
    entries = [{"loss": 1.0, "step": 5}, {"loss": 2.0, "name": "x", "step": 10}, {"loss": 1.5, "step": 5}]
    lines = [json.dumps(entry) for entry in entries] + ['{"loss": NaN, "step": 15}', '{"loss": 3, "st']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    reader = Reader()
    log = reader.log(path)
    assert math.isnan(log["loss"].pop(15))
    assert log == {"loss": {5: 1.5, 10: 2.0}}
    assert reader.notes == []
    path.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    assert reader.log(path)["loss"][5] == 1.0
    assert [f"{path}:5" in note for note in reader.notes] == [True]


def test_paths_below_the_current_folder_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report_cases.write_run(tmp_path / "run", seed=0)
    (tmp_path / "run" / "recipe.yaml").write_text(f"data: {tmp_path}/train.jsonl\n", encoding="utf-8")
    assert collect(Path("run")).runs[0].recipe == "data: train.jsonl\n"
