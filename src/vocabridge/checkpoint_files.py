"""Which checkpoints of a run are whole, which one it goes on from, and which are deleted.

The last file written into a checkpoint, ``checkpoint-files.json``, holds size and checksum of all others. A checkpoint
without it was never finished; one whose files do not match it is damaged. Neither is ever loaded.

Order is by optimizer step, never by the time of a file: clocks are set back, and copies have times of their own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from vocabridge.errors import UserError

logger = logging.getLogger(__name__)

FILES_RECORD = "checkpoint-files.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK_BYTES = 2**26
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the record holds of a file."""

    num_bytes: int
    checksum: int
    """CRC-32 of the CRC-32 of every 64 MiB; it finds accidents, not attacks."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a folder named like a checkpoint."""
    return _NAME.fullmatch(path.name) is not None and path.is_dir()


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders by step, whole or not."""
    return sorted(filter(is_checkpoint, run_dir.iterdir()), key=_step) if run_dir.is_dir() else []


def seal(checkpoint: Path) -> None:
    """Write the record of a finished checkpoint."""
    record = {name: asdict(_facts(path)) for name, path in _files(checkpoint).items()}
    (checkpoint / FILES_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None of one that is whole."""
    path = checkpoint / FILES_RECORD
    if not path.is_file():
        return f"it has no {FILES_RECORD}, so it was never finished"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = {name: FileFacts(**facts) for name, facts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{FILES_RECORD} cannot be read"
    files = _files(checkpoint)
    if missing := sorted(record.keys() - files.keys()):
        return f"{missing[0]} is missing"
    try:
        for name, facts in record.items():
            if (size := files[name].stat().st_size) != facts.num_bytes:
                return f"{name} has {size} bytes and not {facts.num_bytes}"
        for name, facts in record.items():
            if _facts(files[name]) != facts:
                return f"{name} has another checksum"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not whole.

    Raises:
        UserError: it is damaged or was never finished.
    """
    if what := damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged ({what}) and cannot be used; take another checkpoint or start anew.")


def last_whole_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step that is whole; None where there is none at all.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found: list[str] = []
    for checkpoint in reversed(checkpoints(run_dir)):
        what = damage(checkpoint)
        if what is None:
            if found:
                logger.warning("going on from %s, the last whole checkpoint", checkpoint)
            return checkpoint
        logger.warning("%s is damaged (%s) and is not used", checkpoint, what)
        found.append(f"{checkpoint.name}: {what}")
    if found:
        raise UserError(f"{run_dir}: no checkpoint is whole ({'; '.join(found)}); start anew with --overwrite.")
    return None


def retire(run_dir: Path, trash: Path, *, newest: str, limit: int | None, best: str | None) -> None:
    """Move surplus checkpoints into ``trash``, the oldest first, so that a kill leaves none of them half deleted.

    Args:
        run_dir: the run folder.
        trash: a folder on the same disk that is about to be deleted.
        newest: name of the checkpoint that was just written; it is whole and stays.
        limit: most checkpoints to keep; None or 0 keeps all.
        best: name, or path, of the best checkpoint, which stays as well.
    """
    if not limit or limit < 0:
        return
    protected = {newest} | ({Path(best).name} if best else set())
    found = checkpoints(run_dir)
    num_kept = max(limit, sum(checkpoint.name in protected for checkpoint in found))
    # Steps beyond the newest one are of a past that is trained again.
    found.sort(key=lambda checkpoint: (_step(checkpoint) <= _step(Path(newest)), _step(checkpoint)))
    surplus = [checkpoint for checkpoint in found if checkpoint.name not in protected]
    for checkpoint in surplus[: max(0, len(found) - num_kept)]:
        checkpoint.rename(trash / checkpoint.name)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def _files(checkpoint: Path) -> dict[str, Path]:
    """All files but the record, by their path inside the checkpoint."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {path.relative_to(checkpoint).as_posix(): path for path in paths if path.name != FILES_RECORD}


def _facts(path: Path) -> FileFacts:
    size = path.stat().st_size
    offsets = range(0, size, _BLOCK_BYTES)
    with ThreadPoolExecutor(max(1, min(len(offsets), os.cpu_count() or 1))) as pool:
        checksums = pool.map(partial(_block_checksum, path), offsets)
        return FileFacts(size, zlib.crc32(b"".join(each.to_bytes(4, "big") for each in checksums)))


def _block_checksum(path: Path, offset: int) -> int:
    checksum = 0
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(_BLOCK_BYTES // _READ_BYTES):
            if not (content := file.read(_READ_BYTES)):
                break
            checksum = zlib.crc32(content, checksum)
    return checksum
