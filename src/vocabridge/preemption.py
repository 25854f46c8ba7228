"""SIGTERM: the machine is wanted back, so what is done so far is kept and the command ends well."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a process that Ctrl-C stopped, as shells count it."""


class Preempted(KeyboardInterrupt):
    """SIGTERM came; whoever cleans up after Ctrl-C cleans up after this, and the exit status is 0 and not 130."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While inside, the first SIGTERM raises :class:`Preempted` in the main thread; others are ignored.

    Schedulers and launchers like to send it twice, and the second one must not break off what the first one saves.
    Outside the main thread nothing is changed.
    """
    try:
        before = signal.signal(signal.SIGTERM, _handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _handle(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Preempted
