"""Trains the runs of a study, each in a process of its own, in order or several at once.

A run that fails does not stop the others. Ctrl-C (or SIGTERM) asks every process for a checkpoint and waits for it, a
second Ctrl-C stops them at once, a third one kills them. Started again, the study goes on: done runs are skipped, all
others continue from their last checkpoint, and a process that outlived a killed study is waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vocabridge.durable import open_to_append, write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.preemption import INTERRUPTED
from vocabridge.study.plan import PlannedRun, StudyPlan
from vocabridge.study.status import (
    LOG_FILE,
    RECIPE_FILE,
    RunStatus,
    current_status,
    is_locked,
    read_status,
    write_status,
)

_POLL_SECONDS = 0.1
_STUDY_LOCK = ".study.lock"

Command = Callable[[Path], Sequence[str]]
"""Run folder -> the command line that trains it."""


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """Where the runs of a study stand after ``run_study``."""

    statuses: Mapping[PlannedRun, RunStatus]
    interrupted: bool
    preempted: bool = False
    """It was interrupted by SIGTERM."""

    @property
    def failed(self) -> list[PlannedRun]:
        """Runs that failed."""
        return [run for run, status in self.statuses.items() if status.state == "failed"]


def child_command(folder: Path) -> list[str]:
    """The command line of the process that trains one run."""
    return [sys.executable, "-m", "vocabridge.study.child", str(folder)]


def run_study(
    plan: StudyPlan,
    *,
    jobs: int = 1,
    command: Command = child_command,
    tell: Callable[[str], None] = lambda line: None,
) -> StudyOutcome:
    """Train all runs that are not done.

    Args:
        plan: the study.
        jobs: processes at once; with more than one, the processor's threads are divided among them.
        command: how a run folder is trained.
        tell: is given a line whenever a run starts or ends.

    Raises:
        UserError: another process runs this study, or a run folder cannot be written.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(plan.folder / _STUDY_LOCK).acquire(blocking=False)
    except Timeout:
        raise UserError(f"{plan.folder}: another process runs this study; wait for it, or stop it first.") from None
    except OSError as error:
        raise UserError(f"output_dir: {plan.folder} cannot be used ({error.strerror}); name another folder.") from error
    with held:
        runner = _Runner(plan, jobs=jobs, command=command, tell=tell)
        with _signals(runner.stop):
            runner.work()
    statuses = {run: current_status(run) for run in plan.runs}
    return StudyOutcome(statuses, interrupted=runner.num_stops > 0, preempted=runner.preempted)


@dataclass(slots=True)
class _Process:
    """A run that is being trained: by a process of ours, or by one that an earlier, killed study left behind."""

    run: PlannedRun
    popen: subprocess.Popen[bytes] | None
    started: float = field(default_factory=time.monotonic)
    num_stops: int = 0
    """How often it was told to stop."""

    def exit_code(self) -> int | None:
        """None while it runs."""
        if self.popen is not None:
            return self.popen.poll()
        return None if is_locked(self.run.folder) else 0


class _Runner:
    """The loop over runs that wait and processes that run."""

    def __init__(self, plan: StudyPlan, *, jobs: int, command: Command, tell: Callable[[str], None]) -> None:
        self.waiting = deque(run for run in plan.runs if current_status(run).state != "done")
        self.num_runs = len(plan.runs)
        self.jobs = jobs
        self.command = command
        self.tell = tell
        self.processes: list[_Process] = []
        self.num_stops = 0
        self.preempted = False
        self.num_ended = self.num_runs - len(self.waiting)

    def work(self) -> None:
        """Until nothing waits and nothing runs, or, once told to stop, until nothing runs."""
        if self.num_ended:
            self.tell(f"{self.num_ended} of {self.num_runs} runs are done already")
        while self.processes or (self.waiting and not self.num_stops):
            while self.waiting and len(self.processes) < self.jobs and not self.num_stops:
                self.processes.append(self._start(self.waiting.popleft()))
            time.sleep(_POLL_SECONDS)
            for process in list(self.processes):
                if (code := process.exit_code()) is not None:
                    self.processes.remove(process)
                    self._ended(process, code)
                elif process.num_stops < self.num_stops:
                    self._stop(process)

    def stop(self, number: int, frame: Any) -> None:
        """Signal handler; the loop passes it on, so that no process that starts at this moment is missed.

        A second SIGTERM is ignored: a scheduler and what it started may both send one.
        """
        if number == signal.SIGTERM and self.num_stops:
            return
        self.preempted = self.preempted or number == signal.SIGTERM
        self.num_stops += 1

    def _stop(self, process: _Process) -> None:
        """Ask a process to stop, more firmly each time; one that is not ours is left alone and no longer waited for."""
        if process.popen is None:
            self.processes.remove(process)
            return
        process.num_stops += 1
        # The scheduler's SIGTERM may reach the process too; only one of another kind would stop it at once.
        first = signal.SIGTERM if self.preempted else signal.SIGINT
        process.popen.send_signal({1: first, 2: signal.SIGINT}.get(process.num_stops, signal.SIGKILL))
        if process.num_stops == 1:
            again = "" if self.preempted else " (Ctrl-C again stops at once)"
            self.tell(f"{process.run.title}: stopping; a checkpoint is saved first{again}")

    def _start(self, run: PlannedRun) -> _Process:
        if is_locked(run.folder):
            self.tell(f"{run.title}: is trained by a process of an earlier start; waiting for it")
            return _Process(run, None)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_in_one_piece(run.folder / RECIPE_FILE, run.recipe.resolved_yaml())
            with open_to_append(run.folder / LOG_FILE) as log:
                popen = subprocess.Popen(
                    list(self.command(run.folder)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=child_environment(self.jobs),
                    start_new_session=True,  # a terminal's Ctrl-C must reach it once, by our hand
                )
        except OSError as error:
            raise UserError(
                f"{run.folder}: cannot be written ({error.strerror}); mend that and start again."
            ) from error
        self.tell(f"[{self.num_ended + len(self.processes) + 1}/{self.num_runs}] {run.title}: started")
        return _Process(run, popen)

    def _ended(self, process: _Process, code: int) -> None:
        run = process.run
        status = read_status(run.folder)
        told_why = (code == 1 and status.state == "failed") or (code == INTERRUPTED and status.state == "interrupted")
        if code != 0 and not told_why and not self.num_stops:
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            message = f"its process ended with {reason}; see {run.folder / LOG_FILE}"
            status = status.model_copy(update={"state": "failed", "message": message})
            write_status(run.folder, status)
        self.num_ended += 1
        after = f" after {time.monotonic() - process.started:.0f} s"
        self.tell(f"{run.title}: {status.state}{after}" + (f": {status.message}" if status.message else ""))


def child_environment(jobs: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a run's process: with several at once, each gets its share of the threads.

    >>> child_environment(2, {"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"]
    '4'
    >>> child_environment(1, {})
    {}
    """
    environment = dict(os.environ if environment is None else environment)
    if jobs == 1:
        return environment
    share = str(threads_of_a_run(jobs, environment))
    return {**environment, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}


def threads_of_a_run(jobs: int, environment: Mapping[str, str] | None = None) -> int:
    """Threads of each of several processes on a processor."""
    given = (os.environ if environment is None else environment).get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() else _available_threads()
    return max(1, threads // jobs)


def _available_threads() -> int:
    """Of this process, where the system tells; containers and ``taskset`` give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
