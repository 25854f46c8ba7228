"""Shards of a teacher cache: a safetensors file of whole rows, and a small JSON file that says it is complete.

A shard is written aside and renamed; its JSON file comes last, so a shard without one was never finished and counts for
nothing. The JSON file tells the size of the shard and the checksum of everything but the states; each row's states
have a checksum of their own, compared whenever the row is read. States are mapped, not read, when a shard is opened.

Axes: n rows of a shard, T supervised positions of all of them, R of one, H hidden size.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vocabridge.durable import sync_file, write_in_one_piece
from vocabridge.errors import UserError
from vocabridge.models.teacher_rows import PROMPT_BYTES, TeacherRow, join_key, prompt_digest

SHARD_BYTES = 2**28
"""A shard is written when its states have grown to this; what a kill can cost."""

_PREFIX = "states-"
_PARTIAL = ".partial"
_INDEX: dict[str, type[np.generic]] = {
    "response_ids": np.int32,
    "spans": np.int32,
    "prompts": np.uint8,
    "lengths": np.int64,
    "checksums": np.int64,
}
"""Tensors that are not states, and their types."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedRow:
    """A row and its states."""

    row: TeacherRow
    states: Tensor
    """``[R, H]`` last hidden states at the positions that predict the response's tokens, on the CPU."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What the JSON file beside a shard holds."""

    rows: int
    tokens: int
    """T."""
    num_bytes: int
    """Size of the safetensors file."""
    index_checksum: int
    """CRC-32 of the tensors that are not states."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An open shard."""

    path: Path
    facts: ShardFacts
    keys: Sequence[bytes]
    """Names of the n rows."""
    starts: np.ndarray
    """``[n + 1]`` first position of each row, and T."""
    checksums: np.ndarray
    """``[n]`` CRC-32 of each row's states."""
    states: Tensor
    """``[T, H]``, mapped into memory."""

    def read(self, row: int, length: int) -> Tensor:
        """The first ``length`` states ``[length, H]`` of a row, still mapped.

        Raises:
            UserError: the row is damaged.
        """
        states = self.states[self.starts[row] : self.starts[row + 1]]
        if _checksum(states) != self.checksums[row]:
            raise damaged(self.path, f"row {row} has another checksum")
        return states[:length]


def damaged(shard: Path, what: str) -> UserError:
    """One sentence about a shard that cannot be used, and how to mend it."""
    return UserError(
        f"teacher cache: {shard} is damaged ({what}); delete it and {_facts_path(shard).name}, then run "
        "'vocabridge cache-teacher' again, which computes its rows anew."
    )


def open_shards(folder: Path) -> list[Shard]:
    """All finished shards of a cache.

    Raises:
        UserError: one is missing, cut off or changed.
    """
    return [_open(path.with_suffix(".safetensors")) for path in sorted(folder.glob(f"{_PREFIX}*.json"))]


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left; nobody may be writing."""
    for path in (*folder.glob(f"*{_PARTIAL}"), *folder.glob("*.json.tmp")):
        path.unlink()
    for path in folder.glob(f"{_PREFIX}*.safetensors"):
        if not _facts_path(path).exists():
            path.unlink()


class ShardWriter:
    """Collects rows and writes them as shards; on leaving the context, also after Ctrl-C, the rest is written.

    Args:
        folder: of the cache.
        dtype: of the states on disk.
        shard_bytes: size of the states from which a shard is written.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES):
        self._folder, self._dtype, self._shard_bytes = folder, dtype, shard_bytes
        self._rows: list[CapturedRow] = []
        self._num_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write()

    def add(self, row: TeacherRow, states: Tensor) -> None:
        """Take a row with its states ``[R, H]``.

        Raises:
            UserError: the states do not fit into the type on disk, or writing failed.
        """
        assert len(states) == row.num_supervised
        states = states.to(device="cpu", dtype=self._dtype).contiguous()
        if not torch.isfinite(states).all():
            raise UserError(
                f"the teacher's hidden states are not finite in {str(self._dtype).removeprefix('torch.')}; choose "
                "another teacher.cache.dtype or teacher.dtype."
            )
        self._rows.append(CapturedRow(row, states))
        self._num_bytes += states.nbytes
        if self._num_bytes >= self._shard_bytes:
            self._write()

    def _write(self) -> None:
        rows, self._rows, self._num_bytes = self._rows, [], 0  # emptied first: a failed write is not tried twice
        if rows:
            try:
                _write_shard(self._folder, rows)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"teacher cache: writing to {self._folder} failed ({error}); its finished shards are kept, so free "
                    "some space or mend the permissions and run the same command again."
                ) from error


def _write_shard(folder: Path, rows: Sequence[CapturedRow]) -> None:
    index = {
        "response_ids": np.concatenate([each.row.input_ids[-each.row.num_supervised :] for each in rows]).astype("i4"),
        "spans": np.concatenate([each.row.spans for each in rows]).astype("i4"),
        "prompts": np.stack([np.frombuffer(prompt_digest(each.row.key), dtype=np.uint8) for each in rows]),
        "lengths": np.array([each.row.num_supervised for each in rows], dtype=np.int64),
        "checksums": np.array([_checksum(each.states) for each in rows], dtype=np.int64),
    }
    # A name of its own: several processes write into one folder.
    path = folder / f"{_PREFIX}{secrets.token_hex(6)}.safetensors"
    partial = path.with_name(path.name + _PARTIAL)
    try:
        tensors = {name: torch.from_numpy(array) for name, array in index.items()}
        save_file(tensors | {"hidden_states": torch.cat([each.states for each in rows])}, partial)
        facts = ShardFacts(len(rows), len(index["spans"]), partial.stat().st_size, _index_checksum(index))
        sync_file(partial)
        partial.replace(path)
        write_in_one_piece(_facts_path(path), json.dumps(asdict(facts), indent=2) + "\n")
    finally:
        partial.unlink(missing_ok=True)


def _open(path: Path) -> Shard:
    facts = _read_facts(path)
    if not path.exists():
        raise damaged(path, "the file is missing")
    if (size := path.stat().st_size) != facts.num_bytes:
        raise damaged(path, f"it has {size} bytes and not {facts.num_bytes}")
    try:
        with safe_open(path, framework="pt") as stored:
            # The library has compared the header with the file by now; here its shapes are compared with the facts.
            shapes = {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            if misfit := _misfit(shapes, facts):
                raise damaged(path, misfit)
            index = {name: stored.get_tensor(name).numpy() for name in _INDEX}
            states = stored.get_tensor("hidden_states")
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"it cannot be read: {error}") from error
    if _index_checksum(index) != facts.index_checksum:
        raise damaged(path, "its index has another checksum")
    if any(index[name].dtype != dtype for name, dtype in _INDEX.items()):
        raise damaged(path, "its index is of another type")
    lengths = index["lengths"]
    # One by one first, because a sum can overflow into the right number.
    if (lengths < 0).any() or (lengths > facts.tokens).any() or lengths.sum() != facts.tokens:
        raise damaged(path, "the lengths of its rows do not add up")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    responses = np.split(index["response_ids"], starts[1:-1])
    keys = [join_key(prompt.tobytes(), ids) for prompt, ids in zip(index["prompts"], responses, strict=True)]
    return Shard(path, facts, keys, starts, index["checksums"], states)


def _misfit(shapes: Mapping[str, list[int]], facts: ShardFacts) -> str | None:
    """What does not fit the facts; the width of the states is the cache's to know."""
    rows, tokens = facts.rows, facts.tokens
    width = shapes.get("hidden_states", [0])[-1]
    expected = {
        "response_ids": [tokens],
        "spans": [tokens, 2],
        "prompts": [rows, PROMPT_BYTES],
        "lengths": [rows],
        "checksums": [rows],
        "hidden_states": [tokens, width],
    }
    wrong = [name for name in expected if shapes.get(name) != expected[name]]
    return f"its {wrong[0]} are missing or of another size" if wrong else None


def _read_facts(path: Path) -> ShardFacts:
    try:
        facts = ShardFacts(**json.loads(_facts_path(path).read_text(encoding="utf-8")))
        if any(type(value) is not int or value < 0 for value in asdict(facts).values()):
            raise ValueError
        return facts
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, f"{_facts_path(path).name} cannot be read") from error


def _facts_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _index_checksum(index: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in _INDEX:
        checksum = zlib.crc32(np.ascontiguousarray(index[name]).tobytes(), checksum)
    return checksum


def _checksum(states: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)
