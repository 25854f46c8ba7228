"""Processes that a launcher started share the work of one command, and end together.

They talk through the key-value store that every launcher brings (``torchrun``, ``accelerate launch``), not through
collectives: whoever is free takes the next item, and who fails tells the others, which would wait in a collective for
ever. Nothing here imports torch before there is a launcher.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vocabridge.errors import UserError, one_line
from vocabridge.preemption import Preempted

if TYPE_CHECKING:
    from torch.distributed import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

_PIECE = 4 * 2**20
"""Bytes; the store takes no value above 8 MiB."""
_PAUSE = 0.02
"""Seconds between two looks at the store."""
_STOPPED = "stopped"
_connections = itertools.count()


class FailedElsewhere(UserError):
    """Another process failed first and says why; this one only ends."""

    def __init__(self) -> None:
        super().__init__("another process failed, whose message says why; this one ends with it.")


class Ranks:
    """This process and those beside it; alone by default. All of them must call the same methods in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None) -> None:
        """See :func:`launched_ranks`.

        Args:
            rank: of this process.
            world_size: number of processes.
            store: what they share, unless it is one alone.
        """
        assert (store is None) == (world_size == 1), "several processes need a store"
        self.rank, self.world_size, self._store = rank, world_size, store
        self._calls = itertools.count()

    @property
    def is_first(self) -> bool:
        """Whether this process reads and writes what only one may."""
        return self.rank == 0

    def on_first(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns on the first process, on all of them; the others do not call it."""
        if self._store is None:
            return make()
        key = f"{next(self._calls)}/value"
        if not self.is_first:
            self._wait_for(key)
            return cast(Result, self._received(key))
        value = make()
        self._send(key, value)
        return value

    def wait(self) -> None:
        """Return when all processes have called this, however long that takes."""
        call = next(self._calls)
        if self._store is None:
            return
        self._store.set(f"{call}/{self.rank}", "")
        for rank in range(self.world_size):
            self._wait_for(f"{call}/{rank}")

    def check_same(self, value: object, what: str) -> None:
        """Compare a small value with that of the first process; returns when all have found theirs the same.

        Raises:
            UserError: they differ, as on machines with other files.
        """
        if self.on_first(lambda: value) != value:
            raise UserError(
                f"{what} are not the same on process {self.rank} as on the first one; give all processes the same "
                "files and the same kind of device."
            )
        self.wait()

    def spread(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[tuple[int, Result]]:
        """Do the work for every item once, on whichever process is free.

        Yields:
            On the first process the place of each item and its result, as they come; nothing on the others, which must
            iterate all the same.
        """
        if self._store is None:
            yield from ((place, work(item)) for place, item in enumerate(items))
            return
        call, num_left, num_read = next(self._calls), len(items), 0
        while True:
            place = self._store.add(f"{call}/taken", 1) - 1
            if place < len(items):
                self._check()
                result = work(items[place])
                if self.is_first:
                    num_left -= 1
                    yield place, result
                else:
                    self._send(f"{call}/{self._store.add(f'{call}/sent', 1) - 1}", (place, result))
            elif not self.is_first or not num_left:
                return
            else:
                self._wait_for(f"{call}/{num_read}")
            while self.is_first and self._store.check([f"{call}/{num_read}"]):
                yield self._received(f"{call}/{num_read}", discard=True)
                num_read, num_left = num_read + 1, num_left - 1

    # --- ending together ----------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The end of the common work: the first process, which may hold the store, waits for the others."""
        if self._store is None:
            return
        self._store.set(f"left/{self.rank}", "")
        for rank in range(self.world_size) if self.is_first else ():
            self._wait_for(f"left/{rank}")

    def tell(self, error: BaseException) -> None:
        """Let the others end because of an error of this process.

        Raises:
            FailedElsewhere: another process failed before.
            KeyboardInterrupt: another process was told to stop before.
        """
        if self._store is None or isinstance(error, FailedElsewhere):
            return
        kind = "failed"
        if isinstance(error, KeyboardInterrupt):
            kind = "preempted" if isinstance(error, Preempted) else "interrupted"
        if self._store.add("failures", 1) == 1:
            self._store.set(_STOPPED, kind)
            return
        self._wait_for(_STOPPED)

    def _check(self) -> None:
        assert self._store is not None
        if self._store.check([_STOPPED]):
            kind = self._store.get(_STOPPED).decode()
            raise {"interrupted": KeyboardInterrupt, "preempted": Preempted}.get(kind, FailedElsewhere)()

    def _wait_for(self, key: str) -> None:
        assert self._store is not None
        self._check()
        while not self._store.check([key]):
            time.sleep(_PAUSE)
            self._check()

    # --- values -------------------------------------------------------------------------------------------------------

    def _send(self, key: str, value: object) -> None:
        assert self._store is not None
        data = pickle.dumps(value)
        starts = range(0, len(data), _PIECE)
        for piece, start in enumerate(starts):
            self._store.set(f"{key}/{piece}", data[start : start + _PIECE])  # type: ignore[arg-type]  # bytes do
        self._store.set(key, str(len(starts)))

    def _received(self, key: str, *, discard: bool = False) -> Any:
        assert self._store is not None
        pieces = [f"{key}/{piece}" for piece in range(int(self._store.get(key)))]
        value = pickle.loads(b"".join(map(self._store.get, pieces)))  # of our own processes, as torch.distributed does
        for name in (*pieces, key) if discard else ():
            self._store.delete_key(name)
        return value


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes that a launcher started for this command; without one, this process alone.

    If one of them leaves the block by an error, the others leave it as soon as they look up from what they do.

    Raises:
        UserError: the launcher's processes cannot find each other.
        FailedElsewhere: another process failed.
        KeyboardInterrupt: another process was told to stop.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    from torch.distributed import DistError

    ranks = _connected()
    try:
        try:
            yield ranks
            ranks.leave()
        except BaseException as error:
            ranks.tell(error)
            raise
    except DistError as error:
        raise UserError(
            "the processes have lost touch with the first one; its own message says why it ended, or the system ended "
            "it for want of memory."
        ) from error


def _connected() -> Ranks:
    import torch
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, rank, world_size = next(iter(rendezvous("env://")))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the launcher's processes cannot find each other: {one_line(error)}") from error
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return Ranks(rank, world_size, PrefixStore(f"vocabridge/{next(_connections)}", store))
