"""What a run folder says about itself, also after a kill or with a damaged file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from study_cases import BASE, STUDY, WriteStudy, finish
from vocabridge.study.plan import PlannedRun, load_study
from vocabridge.study.status import (
    RunStatus,
    current_status,
    fingerprint,
    is_locked,
    read_status,
    run_lock,
    write_status,
)

SCORES = {"test": {10: [0.5, 1.0]}}


def test_status_is_read_back(tmp_path: Path) -> None:
    assert read_status(tmp_path) == RunStatus()
    status = RunStatus(state="failed", message="why: ‘x’", recipe="ab", seconds=1.5, sessions=2, steps=None)
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["study-status.json"]


@pytest.mark.parametrize("text", ["", '{"state": "do', '{"state": "finished"}', "[1]", "\xff\xfe", '{"seconds": "x"}'])
def test_a_damaged_status_is_pending(tmp_path: Path, text: str) -> None:
    (tmp_path / "study-status.json").write_bytes(text.encode("latin-1"))
    assert read_status(tmp_path) == RunStatus(message="its status file is damaged")


def test_running_means_that_a_process_holds_the_lock(tmp_path: Path) -> None:
    write_status(tmp_path, RunStatus(state="running", seconds=3.0))
    assert read_status(tmp_path).state == "interrupted"
    holder = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from vocabridge.study.status import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert read_status(tmp_path).state == "running"
    finally:
        process.kill()  # as a power cut or the out-of-memory killer does: nothing is cleaned up
        process.communicate()
    deadline = time.monotonic() + 10
    while is_locked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_status(tmp_path).state == "interrupted"
    assert read_status(tmp_path).seconds == 3.0


def test_looking_at_a_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir()), "looking leaves no trace"
    with run_lock(tmp_path):
        assert is_locked(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_done_holds_for_the_recipe_that_was_trained(write_study: WriteStudy) -> None:
    run = load_study(write_study()).runs[0]
    finish(run, SCORES)
    assert current_status(run).state == "done"
    changed = load_study(write_study(base={**BASE, "training": {"max_steps": 5}})).runs[0]
    assert changed.folder == run.folder
    status = current_status(changed)
    assert (status.state, status.message) == ("pending", "its recipe has changed")
    assert current_status(run).state == "done"


def test_a_study_may_be_moved(write_study: WriteStudy) -> None:
    run = load_study(write_study()).runs[0]
    finish(run, SCORES)
    Path("study").rename("moved")
    assert current_status(load_study(write_study(output_dir="moved")).runs[0]).state == "done"
    assert current_status(run).state == "pending"


def test_a_study_may_be_moved_with_all_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "deeper"
    here.mkdir()
    (here / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')

    def only_run(folder: Path, **data: Any) -> PlannedRun:
        monkeypatch.chdir(folder)
        base = {**BASE, "data": {"train": "train.jsonl", **data}}
        Path("study.yaml").write_text(json.dumps({**STUDY, "base": base, "seeds": [0]}))
        return load_study(Path("study.yaml")).runs[0]

    finish(only_run(here), SCORES)
    there.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    here.rename(there)
    run = only_run(there)
    assert current_status(run).state == "done"
    assert current_status(only_run(there, limit=7)).message == "its recipe has changed"
    (there / "other.jsonl").write_text("{}")
    assert current_status(only_run(there, train="other.jsonl")).message == "its recipe has changed"
    forget_newest_setting(run)
    assert current_status(run).state == "done", "moved, and met by a newer version"


def forget_newest_setting(run: PlannedRun) -> str:
    """The run as a version would have left it that did not know one of the settings; its recipe."""
    recipe = (run.folder / "study-recipe.yaml").read_text()
    before = recipe.replace("  shard_teacher: false\n", "")
    assert before != recipe
    (run.folder / "study-recipe.yaml").write_text(before)
    write_status(run.folder, read_status(run.folder).model_copy(update={"recipe": fingerprint(before)}))
    return before


def test_a_setting_that_is_new_since_a_run_ended_stood_at_its_default(write_study: WriteStudy) -> None:
    run = load_study(write_study()).runs[0]
    finish(run, SCORES)
    before = forget_newest_setting(run)
    assert current_status(run).state == "done"
    (run.folder / "study-recipe.yaml").write_text(before.replace("max_steps: 4", "max_steps: 5"))
    assert current_status(run).state == "pending", "the file is not of the run that is done"
    other = load_study(write_study(variants={"cma": {"training.shard_teacher": True}})).runs[0]
    (run.folder / "study-recipe.yaml").write_text(before)
    assert current_status(other).state == "pending"


def test_done_without_results_is_not_done(write_study: WriteStudy) -> None:
    run = load_study(write_study()).runs[0]
    finish(run, SCORES)
    (run.folder / "evaluation" / "results.json").unlink()
    assert current_status(run).message == "its results are gone"
