"""The loop over processes, with a stand-in that 'trains' in no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from study_cases import WriteStudy
from vocabridge.errors import UserError
from vocabridge.study.plan import StudyPlan, load_study
from vocabridge.study.runner import Command, child_environment, run_study
from vocabridge.study.status import RunStatus, current_status, read_status, run_lock, write_status

TESTS = str(Path(__file__).parents[1])

FAKE_CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path.append({tests!r})
from study_cases import write_evaluation
from vocabridge.errors import UserError
from vocabridge.study.child import Trained, run_child

def train(recipe):
    folder = Path(recipe.training.output_dir)
    key = f"{{folder.parent.name}}-{{folder.name}}"
    log = Path("log.jsonl")
    def note(event):
        with log.open("a") as file:
            facts = dict(run=key, event=event, threads=os.environ.get("OMP_NUM_THREADS"), pid=os.getpid())
            file.write(json.dumps(facts) + "\\n")
    note("start")
    behaviour = Path(f"behaviour-{{key}}")
    wanted = behaviour.read_text() if behaviour.exists() else ""
    if wanted == "user error":
        raise UserError("training.learning_rate is silly.")
    if wanted == "bug":
        raise ZeroDivisionError("no tokens")
    if wanted == "kill":
        os.kill(os.getpid(), 9)
    if wanted == "stubborn":
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                note("asked")
    if wanted == "changed":
        raise UserError("the run was started with other values of x; start anew with --overwrite.")
    if wanted == "wait":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            note("checkpoint")
            return Trained(steps=2, interrupted=True)
    time.sleep(0.2 if wanted == "slow" else 0)
    write_evaluation(folder, {{"test": {{10: [0.5, 1.0], 20: [0.25, 1.0]}}}})
    note("end")
    return Trained(steps=4, interrupted=False)

sys.exit(run_child(Path(sys.argv[1]), train))
"""


@pytest.fixture
def command(tmp_path: Path) -> Command:
    (tmp_path / "fake.py").write_text(FAKE_CHILD.format(tests=TESTS))
    return lambda folder: [sys.executable, str(tmp_path / "fake.py"), str(folder)]


@pytest.fixture
def plan(write_study: WriteStudy) -> StudyPlan:
    return load_study(
        write_study(seeds=[0, 1], variants={"cma": None, "sft": {"objective": {"name": "cross_entropy"}}})
    )


@pytest.fixture
def leftovers() -> Iterator[None]:
    """Ends what a test's stand-ins left running."""
    yield
    for entry in events():
        try:
            os.kill(entry["pid"], signal.SIGKILL)
        except ProcessLookupError:
            continue


def events() -> list[dict]:
    log = Path("log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def started() -> list[str]:
    return [entry["run"] for entry in events() if entry["event"] == "start"]


def wait_for(condition: Callable[[], object], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def states(plan: StudyPlan) -> dict[str, str]:
    return {f"{run.variant}-seed{run.seed}": current_status(run).state for run in plan.runs}


def test_all_runs_in_order_and_none_twice(plan: StudyPlan, command: Command) -> None:
    lines: list[str] = []
    outcome = run_study(plan, command=command, tell=lines.append)
    assert started() == ["cma-seed0", "sft-seed0", "cma-seed1", "sft-seed1"]
    assert not outcome.interrupted
    assert {status.state for status in outcome.statuses.values()} == {"done"}
    assert [line for line in lines if "started" in line][-1] == "[4/4] sft, seed 1: started"
    status = current_status(plan.runs[0])
    assert (status.steps, status.sessions) == (4, 1)
    assert status.seconds > 0
    run_study(plan, command=command, tell=lines.append)
    assert len(started()) == 4
    assert lines[-1] == "4 of 4 runs are done already"


def test_a_failure_does_not_stop_the_others(plan: StudyPlan, command: Command) -> None:
    for name, behaviour in [("cma-seed0", "user error"), ("sft-seed0", "bug"), ("cma-seed1", "kill")]:
        Path(f"behaviour-{name}").write_text(behaviour)
    outcome = run_study(plan, command=command)
    assert [outcome.statuses[run].state for run in plan.runs] == ["failed", "failed", "failed", "done"]
    assert outcome.failed == list(plan.runs[:3])
    messages = [outcome.statuses[run].message for run in plan.runs[:3]]
    assert messages[0] == "training.learning_rate is silly."
    assert messages[1] == "ZeroDivisionError: no tokens"
    assert "signal SIGKILL; see study/runs/cma/seed1/study.log" in messages[2].replace(os.sep, "/")
    log = (plan.runs[1].folder / "study.log").read_text()
    assert "Traceback" in log
    for path in Path().glob("behaviour-*"):
        path.unlink()
    outcome = run_study(plan, command=command)
    assert not outcome.failed
    assert len(started()) == 4 + 3
    assert current_status(plan.runs[2]).sessions == 2


def test_a_process_that_cannot_start_is_told(plan: StudyPlan) -> None:
    outcome = run_study(plan, command=lambda folder: [sys.executable, "-c", "import no_such_module"])
    assert {status.state for status in outcome.statuses.values()} == {"failed"}
    assert "exit status 1; see" in current_status(plan.runs[0]).message
    assert "no_such_module" in (plan.runs[0].folder / "study.log").read_text()


def test_parallel_runs_share_the_threads(plan: StudyPlan, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in plan.runs:
        Path(f"behaviour-{run.variant}-seed{run.seed}").write_text("slow")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    outcome = run_study(plan, jobs=2, command=command)
    assert {status.state for status in outcome.statuses.values()} == {"done"}
    at_once, most = 0, 0
    for entry in events():
        at_once += {"start": 1, "end": -1}[entry["event"]]
        most = max(most, at_once)
    assert most <= 2
    assert {entry["threads"] for entry in events()} == {"2"}


def test_threads() -> None:
    assert child_environment(3, {"OMP_NUM_THREADS": "2", "A": "b"}) == {
        "A": "b",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    assert int(child_environment(2, {})["OMP_NUM_THREADS"]) >= 1


def test_a_damaged_status_costs_one_more_look(plan: StudyPlan, command: Command) -> None:
    run_study(plan, command=command)
    (plan.runs[1].folder / "study-status.json").write_text('{"state": "do')
    assert states(plan)["sft-seed0"] == "pending"
    run_study(plan, command=command)
    assert started()[4:] == ["sft-seed0"]
    assert set(states(plan).values()) == {"done"}


def test_a_stale_running_status_is_run_again(plan: StudyPlan, command: Command) -> None:
    run = plan.runs[0]
    run.folder.mkdir(parents=True)
    write_status(run.folder, RunStatus(state="running", sessions=1))
    run_study(plan, command=command)
    assert set(states(plan).values()) == {"done"}
    assert read_status(run.folder).sessions == 2


STUDY_PROCESS = """
import sys
from vocabridge.study.plan import load_study
from vocabridge.study.runner import run_study
command = lambda folder: [sys.executable, "fake.py", str(folder)]
outcome = run_study(load_study("study.yaml"), command=command, tell=lambda line: print(line, flush=True))
print("interrupted", outcome.interrupted, flush=True)
"""


@pytest.fixture
def study_process(plan: StudyPlan, command: Command, leftovers: None) -> Iterator[subprocess.Popen[str]]:
    """A study in a process of its own whose first run trains until it is told to stop."""
    Path("behaviour-cma-seed0").write_text("wait")
    process = subprocess.Popen([sys.executable, "-c", STUDY_PROCESS], stdout=subprocess.PIPE, text=True)
    wait_for(started)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_stops(study_process: subprocess.Popen[str], plan: StudyPlan, number: int) -> None:
    study_process.send_signal(number)
    out, _ = study_process.communicate(timeout=60)
    assert "interrupted True" in out
    assert [entry["event"] for entry in events()] == ["start", "checkpoint"]
    assert states(plan) == {
        "cma-seed0": "interrupted",
        **dict.fromkeys(["sft-seed0", "cma-seed1", "sft-seed1"], "pending"),
    }


def test_the_third_signal_kills(plan: StudyPlan, command: Command, leftovers: None) -> None:
    Path("behaviour-cma-seed0").write_text("stubborn")
    process = subprocess.Popen([sys.executable, "-c", STUDY_PROCESS], stdout=subprocess.PIPE, text=True)
    wait_for(started)
    for asked in (1, 2):
        process.send_signal(signal.SIGINT)
        wait_for(lambda asked=asked: len(events()) == 1 + asked)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "interrupted True" in out
    assert states(plan)["cma-seed0"] == "interrupted"


def test_a_changed_recipe_is_told_in_the_words_of_a_study(plan: StudyPlan, command: Command) -> None:
    Path("behaviour-cma-seed0").write_text("changed")
    outcome = run_study(plan, command=command)
    assert outcome.statuses[plan.runs[0]].message.endswith("--overwrite. In a study: remove its folder.")


def test_a_child_leaves_a_folder_alone_that_another_trains_in(plan: StudyPlan, command: Command) -> None:
    run_study(plan, command=command)
    folder = plan.runs[0].folder
    with run_lock(folder):
        done = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another process trains here" in done.stderr
    assert len(started()) == 4


def test_a_killed_study_leaves_its_run_alone_and_finds_it_again(
    study_process: subprocess.Popen[str], plan: StudyPlan, command: Command
) -> None:
    with pytest.raises(UserError, match="another process runs this study"):
        run_study(plan, command=command)
    study_process.kill()
    study_process.wait()
    assert states(plan)["cma-seed0"] == "running", "its own process lives on"
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if "waiting for it" in line:
            os.kill(events()[0]["pid"], signal.SIGINT)

    run_study(plan, command=command, tell=tell)
    assert lines[0] == "cma, seed 0: is trained by a process of an earlier start; waiting for it"
    assert started() == ["cma-seed0", "sft-seed0", "cma-seed1", "sft-seed1"], "not trained twice at once"
    assert states(plan)["cma-seed0"] == "interrupted"
    Path("behaviour-cma-seed0").unlink()
    run_study(plan, command=command)
    assert set(states(plan).values()) == {"done"}
    assert read_status(plan.runs[0].folder).sessions == 2


def test_a_killed_run_goes_on_at_the_next_start(
    study_process: subprocess.Popen[str], plan: StudyPlan, command: Command
) -> None:
    study_process.kill()
    study_process.wait()
    os.kill(events()[0]["pid"], signal.SIGKILL)
    wait_for(lambda: states(plan)["cma-seed0"] == "interrupted")
    Path("behaviour-cma-seed0").unlink()
    run_study(plan, command=command)
    assert set(states(plan).values()) == {"done"}


def test_a_folder_that_cannot_be_made(plan: StudyPlan, command: Command) -> None:
    Path("study").write_text("a file")
    with pytest.raises(UserError, match="output_dir: study cannot be used"):
        run_study(plan, command=command)
