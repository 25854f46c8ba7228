"""Arrays computed from two vocabularies, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path

from vocabridge.alignment.prepared import PreparedTokenizer

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "VOCABRIDGE_CACHE"
"""Environment variable that names another folder than the platform's usual one."""

Arrays = dict[str, np.ndarray]

_CHECKSUM = "checksum"


def cache_folder() -> Path:
    """Where arrays are kept: ``$VOCABRIDGE_CACHE``, else the platform's folder (Linux: ``~/.cache/vocabridge``)."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else user_cache_path("vocabridge", appauthor=False)


def fingerprint(prepared: PreparedTokenizer) -> str:
    """A name for one vocabulary, equal only where the bytes and kinds of all ids are equal."""
    digest = hashlib.blake2b(digest_size=16)
    table = prepared.table
    lengths = np.array([-1 if piece is None else len(piece) for piece in table.data], dtype=np.int64)
    digest.update(lengths.tobytes() + b"".join(piece or b"" for piece in table.data))
    digest.update(repr((sorted(table.control_ids), sorted(table.fallback_ids), table.unknown_id)).encode())
    return digest.hexdigest()


def cached(name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays kept under ``name``, or those that ``build`` makes, which are then kept.

    A file that is not what was written, by a checksum over names and contents, is made anew; a folder that cannot be
    written to costs a warning, not the run.
    """
    path = cache_folder() / f"{name}.npz"
    arrays = _read(path)
    if arrays is None:
        arrays = build()
        _write(path, arrays)
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if arrays.pop(_CHECKSUM).tobytes() == _checksum(arrays):
            return arrays
        reason = "it has another checksum"
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever the reader makes of a changed byte: the zip format has many fields
        reason = str(error)
    logger.warning("%s is damaged (%s) and is computed again.", path, reason)
    return None


def _checksum(arrays: Arrays) -> bytes:
    """Of names too: the zip format's own checksums leave them out, and an array under another name is another array."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _write(path: Path, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                checksum = np.frombuffer(_checksum(arrays), dtype=np.uint8)
                np.savez(file, allow_pickle=False, **arrays, **{_CHECKSUM: checksum})
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), so it is computed again next time; set %s to a folder that can.",
            path,
            error,
            FOLDER_VARIABLE,
        )
