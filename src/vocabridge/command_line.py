"""What all commands have in common: how their words are read, how they are stopped, and how their errors are told."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from vocabridge.errors import UserError, visible
from vocabridge.preemption import INTERRUPTED, Preempted, sigterm_raises
from vocabridge.ranks import FailedElsewhere

_UsageError: Any = typer.BadParameter.__base__
"""Of words that no command takes; typer has no public name for it."""

_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""A full or failing disk, a quota, a folder that may not be written: not bugs, so they need no traceback."""


class ListCommand(TyperCommand):
    """Lets an option that may be repeated take several words at once: ``--seeds 10 20 30``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat such an option before each word that follows it."""
        lists = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        return super().parse_args(ctx, _repeat_options(args, lists))


def _repeat_options(args: list[str], lists: set[str]) -> list[str]:
    """``--seeds 10 20 --limit 3`` -> ``--seeds 10 --seeds 20 --limit 3``.

    >>> _repeat_options(["M", "--seeds", "10", "20", "--limit", "3"], {"--seeds"})
    ['M', '--seeds', '10', '--seeds', '20', '--limit', '3']
    """
    repeated: list[str] = []
    option = ""
    for position, word in enumerate(args):
        if word.startswith("-"):
            option = word if word in lists else ""
        elif option and args[position - 1] != option:
            repeated.append(option)
        repeated.append(word)
    return repeated


def run_app(app: typer.Typer, name: str) -> NoReturn:
    """Run the command that this process was started with, and exit.

    A user's mistake is one line on stderr and exit status 2, without a traceback.
    """
    try:
        sys.exit(app(prog_name=name, standalone_mode=False) or 0)
    except FailedElsewhere:
        sys.exit(2)
    except _UsageError as error:
        if message := error.format_message():  # none of a command without words, whose help has been shown
            command = error.ctx.command_path if error.ctx else name
            end = "" if message.endswith((".", "?")) else "."
            print(f"error: {visible(message)}{end} See {command} --help.", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        # A DataLoader worker's error comes back with its traceback in the message; the sentence is at its end.
        for line in str(error).rpartition("UserError: ")[2].strip().split("\n"):
            print(f"error: {visible(line)}", file=sys.stderr)  # it may quote a file that would move the cursor
        sys.exit(2)
    except BrokenPipeError:
        # The reader (head, less) has gone; without this the interpreter complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {place}{error.strerror}; free some space or mend the permissions, and the same command goes on "
            "(distill with --resume): what was finished before is whole.",
            file=sys.stderr,
        )
        sys.exit(2)


@dataclass
class Stoppable:
    """Work that may be interrupted."""

    hint: str
    """How to go on then."""


@contextmanager
def stoppable(hint: str) -> Iterator[Stoppable]:
    """Long work: Ctrl-C leaves with exit status 130, SIGTERM (preemption) with 0, and both say how to go on."""
    work = Stoppable(hint)
    try:
        with sigterm_raises():
            yield work
    except KeyboardInterrupt as stop:
        if _is_first():
            print(f"interrupted; {work.hint}", file=sys.stderr)
        raise typer.Exit(0 if isinstance(stop, Preempted) else INTERRUPTED) from None


def _is_first() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def check_json(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work for it is done."""
    if path and not path.parent.is_dir():
        raise UserError(f"--json {path}: the folder {path.parent} does not exist.")
    if path and path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file.")
