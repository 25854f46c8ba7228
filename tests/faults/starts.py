"""Starting ``vocabridge`` commands, killing them at chosen moments, and waiting for their end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_SERVER = Path(__file__).with_name("fork_server.py")


@dataclass(frozen=True, slots=True)
class Fault:
    """Kill -9, or another signal, at the ``at``-th file operation whose path matches ``pattern``."""

    pattern: str
    at: int
    delay: float | None = None
    """Seconds after that operation has begun; None: exactly before it."""
    role: str = "command"
    """Or ``run``: a study's child process."""
    number: int = signal.SIGKILL
    """Of the signal; one that is no kill needs a delay."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit status; negative: the signal."""
    out: str
    """Its standard output."""
    errors: str
    """Its standard error."""
    operations: int
    """File operations that matched the fault's pattern, of a command that ended by itself."""
    struck: bool
    """The fault came to pass."""

    @property
    def output(self) -> str:
        """Of both streams, one after the other."""
        return self.out + self.errors


class ForkServer:
    """Runs one command at a time; every start is a fresh process."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        fault: Fault | None = None,
        preparations: Sequence[str] = (),
        meanwhile: Callable[[int], bool] | None = None,
        seconds: float = 300,
    ) -> Ended:
        """Run a command to its end.

        Args:
            arguments: after ``vocabridge``.
            folder: where it runs.
            fault: what befalls it.
            preparations: names of functions of the server, called in its process first.
            meanwhile: called with the process id about every millisecond until it returns True.
            seconds: after which it is killed and the test fails.
        """
        output, errors, mark = (self._scratch / name for name in ("output", "errors", "mark"))
        for path in (output, errors, mark, mark.with_suffix(".count")):
            path.unlink(missing_ok=True)
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": {"VOCABRIDGE_CACHE": str(folder / "user-cache")},
            "fault": None if fault is None else {**asdict(fault), "mark": str(mark)},
            "preparations": list(preparations),
            "output": str(output),
            "errors": str(errors),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = int(self._answer())
        end = time.monotonic() + seconds
        marked = False
        while not select.select([self._process.stdout], [], [], 0.001)[0]:
            if not marked and fault is not None and fault.delay is not None and mark.exists():
                marked = True
                time.sleep(fault.delay)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(mark.read_text()), fault.number)
            if meanwhile is not None and meanwhile(pid):
                meanwhile = None
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {errors.read_text()[-2000:]}")
        code = int(self._answer())
        count = mark.with_suffix(".count")
        return Ended(
            code,
            output.read_text(errors="replace"),
            errors.read_text(errors="replace"),
            operations=int(count.read_text()) if count.exists() else 0,
            struck=code == -signal.SIGKILL or marked,
        )

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        return line.decode().strip()
