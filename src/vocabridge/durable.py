"""Files that are whole or absent after a kill, a full disk or a power cut: written aside, synced, renamed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from vocabridge.errors import UserError

_FOLDERS_CANNOT_BE_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
"""Some network file systems, and Windows."""

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Windows has no such flag."""


def write_in_one_piece(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that replaces the one before it, or fails and leaves it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a killed process left it, or somebody laid a link there that leads elsewhere
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file at its end; it is made if missing.

    Raises:
        UserError: it is a link, as a folder from somebody else may hold, and what it leads to would be written to.
    """
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINK, 0o666), "ab")
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a link, and only files of its own folder are written to; remove it.") from error
        raise


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk: its new name must not get there first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_CANNOT_BE_SYNCED:
            raise


def sync_tree(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if not path.is_dir():
        sync_file(path)
        return
    for child in sorted(path.iterdir()):
        sync_tree(child)
    sync_folder(path)
