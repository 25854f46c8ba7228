"""A teacher's last hidden states on disk: one folder for one teacher, rows found by what the teacher reads.

The folder's ``cache.json`` holds everything that could change the states of given token ids: the fingerprint of weights
and configuration, the type they were computed in, the attention kernel, the type on disk. Tokenizer, template and
truncation act through the token ids, which are a row's name (:mod:`vocabridge.models.teacher_rows`), and a row of other
data is merely another row. So a folder serves any student and any data, and grows by the rows it lacks.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor

from vocabridge.durable import write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.models.cache_shards import Shard, damaged, open_shards
from vocabridge.models.dtypes import dtype_name
from vocabridge.models.teacher_rows import TeacherRow, num_supervised

CACHE_FILE = "cache.json"
LOCK_FILE = ".lock"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What must be equal for cached states to stand for computed ones.

    Batch composition, device and kernel versions are left out: they change the last bits, as they do without a cache.
    """

    teacher: str
    """Fingerprint of weights and configuration."""
    compute_dtype: str
    """Type of the weights in memory, such as ``bfloat16``."""
    attention: str
    """Attention kernel of transformers."""
    hidden_size: int
    storage_dtype: str
    """Type of the states on disk."""
    format: int = _FORMAT
    """Of the files."""


_MEANING = {
    "teacher": "weights or configuration of the teacher",
    "compute_dtype": "teacher.dtype",
    "attention": "attention kernel",
    "hidden_size": "hidden size",
    "storage_dtype": "teacher.cache.dtype",
    "format": "file format",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row lies."""

    shard: int
    row: int


class TeacherCache:
    """An open cache; rows that are written later appear when it is opened again.

    Args:
        folder: of the cache.
        key: its teacher.
        shards: its open shards.
    """

    def __init__(self, folder: Path, key: CacheKey, shards: list[Shard]):
        self.folder, self.key, self._shards = folder, key, shards
        places = {
            name: _Place(number, row) for number, shard in enumerate(shards) for row, name in enumerate(shard.keys)
        }
        self._keys = sorted(places)
        self._places = [places[name] for name in self._keys]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._keys)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(shard.facts.num_bytes for shard in self._shards)

    def missing(self, rows: Iterable[TeacherRow]) -> list[TeacherRow]:
        """Those rows, each once, that the cache can not serve."""
        wanted = {row.key: row for row in rows}
        return [row for key, row in wanted.items() if self._find(key) is None]

    def __contains__(self, key: bytes) -> bool:
        """Whether :meth:`read` can serve the row of this name."""
        return self._find(key) is not None

    def read(self, key: bytes) -> Tensor:
        """States ``[R, H]`` of a row, by its name, in the type on disk; mapped from the file, so do not write to them.

        Raises:
            UserError: the row is not there, or damaged.
        """
        place = self._find(key)
        if place is None:
            raise self.lacks("a row")
        return self._shards[place.shard].read(place.row, num_supervised(key))

    def lacks(self, what: str) -> UserError:
        """One sentence about rows that are not there."""
        return UserError(
            f"the teacher cache {self.folder} lacks {what} of this data under this tokenizer, template and max_length; "
            "run 'vocabridge cache-teacher' with the same recipe, which adds what is missing."
        )

    def _find(self, key: bytes) -> _Place | None:
        """A row that the one of this name begins, found because such names follow each other in order."""
        position = bisect.bisect_left(self._keys, key)
        if position < len(self._keys) and self._keys[position].startswith(key):
            return self._places[position]
        return None


def create_cache(folder: Path, key: CacheKey) -> None:
    """Make an empty cache, unless there is one.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    if (folder / CACHE_FILE).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = (LOCK_FILE, f"{CACHE_FILE}.tmp")  # all that a command killed at its start leaves
        if others := sorted(path.name for path in folder.iterdir() if path.name not in own):
            raise UserError(
                f"teacher.cache: folder {folder} is no teacher cache but holds other things ({others[0]}); name an "
                "empty or new folder."
            )
        write_in_one_piece(folder / CACHE_FILE, json.dumps(asdict(key), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"teacher.cache: folder {folder} cannot be written ({error}); name another.") from error


def open_cache(folder: Path, key: CacheKey) -> TeacherCache | None:
    """The cache in ``folder``, or None where there is none yet.

    Raises:
        UserError: it belongs to another teacher, or a file of it is damaged or missing.
    """
    path = folder / CACHE_FILE
    if not path.exists():
        return None
    try:
        found = CacheKey(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"teacher cache: {path} is damaged ({error}); delete the folder {folder}.") from error
    if changed := [field.name for field in fields(key) if getattr(found, field.name) != getattr(key, field.name)]:
        listing = "; ".join(_difference(name, getattr(found, name), getattr(key, name)) for name in changed)
        raise UserError(
            f"the teacher cache {folder} is stale: it was written with other {listing}; name another folder in "
            "teacher.cache or delete this one."
        )
    shards = open_shards(folder)
    for shard in shards:
        states = shard.states
        if states.shape[1] != key.hidden_size or dtype_name(states.dtype) != key.storage_dtype:
            raise damaged(shard.path, f"its states are {dtype_name(states.dtype)}, {states.shape[1]} wide")
    return TeacherCache(folder, found, shards)


def _difference(name: str, before: object, now: object) -> str:
    values = "" if name == "teacher" else f" ({before}, now {now})"
    return f"{_MEANING[name]}{values}"
