"""Starts ``vocabridge`` commands by fork, so that a start costs a fork and not five seconds of imports.

Run as a script. Each line on stdin is a request, answered by a line with the process id and, when the command has
ended, by a line with its exit status (negative: a signal). One command runs at a time.

A fault counts the file operations that match a pattern (opening, renaming, making and removing: Python's audit events,
raised before the operation) and strikes at one of them: the process kills itself there, or leaves a mark and whoever
reads the mark kills it a moment later. Counting operations and not seconds makes a moment mean the same on any machine.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Watch:
    """The fault of this process, and what it has counted."""

    def __init__(self) -> None:
        self.role = "command"
        self.count = 0
        self.fault: dict[str, Any] | None = None

    def arm(self, fault: dict[str, Any]) -> None:
        self.fault = fault
        self.pattern = re.compile(fault["pattern"])
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.fault is None or self.role != self.fault["role"]:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not self.pattern.search(os.fsdecode(path)):
            return
        self.count += 1
        if self.count != self.fault["at"]:
            return
        if self.fault["delay"] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(Path(self.fault["mark"]), str(os.getpid()))


def write_whole(path: Path, text: str) -> None:
    """A kill may fall between a file's making and its content."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


WATCH = Watch()


class ForkedRun:
    """Stands in for the ``subprocess.Popen`` of a study's run: the same child process, forked."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.closerange(3, 1024)  # locks of the study, which subprocess closes too
            os.environ.update(env)
            _leave(lambda: self._train(Path(command[-1])))

    def _train(self, folder: Path) -> int:
        from vocabridge.study import child

        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        WATCH.role, WATCH.count = "run", 0
        return child.run_child(folder, child._distill)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


# --- what may be done to a command before it runs --------------------------------------------------------------------


def small_shards() -> None:
    """Every row of a teacher cache becomes a shard of its own."""
    from vocabridge.models import teacher_capture

    teacher_capture.TOKENS_PER_BATCH = 1
    teacher_capture.capture.__kwdefaults__["shard_bytes"] = 1


def dying_worker() -> None:
    """The first process that prepares the batch of a certain row is killed, as for want of memory."""
    from torch.utils.data import get_worker_info

    from vocabridge.pairs import PairDataset

    original: Callable[..., Any] = PairDataset.__getitem__

    def read(pairs: PairDataset, index: int) -> Any:
        if get_worker_info() is not None and index == 5 and not os.path.exists("killed"):
            Path("killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(pairs, index)

    PairDataset.__getitem__ = read  # type: ignore[method-assign]


def without_privileges() -> None:
    """Permissions bind root too: the capabilities that override them are dropped (Linux)."""
    import ctypes

    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
        nothing = (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def clock_runs_backwards() -> None:
    """A day for each time that somebody asks."""
    now, asked = time.time(), itertools.count()
    time.time = lambda: now - 86_400.0 * next(asked)


def nan_in_one_term() -> None:
    """The adversarial term of the third step is NaN, the first time that it is trained."""
    from vocabridge.objectives.base import LossTerm
    from vocabridge.objectives.dskd_cma import DskdCma

    original: Callable[..., dict[str, LossTerm]] = DskdCma.forward
    called = itertools.count(1)

    def forward(self: DskdCma, *given: Any) -> dict[str, LossTerm]:
        terms = original(self, *given)
        if next(called) == 3 and not os.path.exists("nan"):
            Path("nan").write_text("")
            terms["gan_queries"] = dataclasses.replace(
                terms["gan_queries"], sum=terms["gan_queries"].sum * float("nan")
            )
        return terms

    DskdCma.forward = forward  # type: ignore[method-assign]


PREPARATIONS = {
    each.__name__: each
    for each in (small_shards, dying_worker, without_privileges, clock_runs_backwards, nan_in_one_term)
}


# --- the server ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Import everything, then fork at every request."""
    import torch

    import vocabridge.analysis.analyze
    import vocabridge.cli
    import vocabridge.evaluation.evaluate
    import vocabridge.report.page
    import vocabridge.run
    import vocabridge.study.child
    import vocabridge.study.results
    import vocabridge.study.runner  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or each process would copy the pages of all modules when it first collects garbage
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _leave(lambda request=request: _command(request))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _command(request: dict[str, Any]) -> int:
    from vocabridge import cli
    from vocabridge.study import runner

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, request["output"]), (2, request["errors"])):
        with open(name, "wb") as stream:
            os.dup2(stream.fileno(), descriptor)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    runner.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedRun, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    for name in request["preparations"]:
        PREPARATIONS[name]()
    if request["fault"]:
        WATCH.arm(request["fault"])
    sys.argv = ["vocabridge", *request["arguments"]]
    try:
        cli.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    else:
        code = 0
    if request["fault"]:
        write_whole(Path(request["fault"]["mark"]).with_suffix(".count"), str(WATCH.count))
    return code


def _leave(work: Callable[[], int]) -> None:
    """Run, then end this process without going back into what it was forked from."""
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
