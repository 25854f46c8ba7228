from __future__ import annotations

import os
from pathlib import Path

import pytest

from vocabridge import durable
from vocabridge.durable import sync_tree, write_in_one_piece


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_in_one_piece(path, "old \u00e9\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_in_one_piece(path, "new\n")
    assert path.read_bytes() == "old \u00e9\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what the kernel is asked: file, rename, folder."""
    asked: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        asked.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        asked.append(f"{path.name} -> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(durable.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_in_one_piece(tmp_path / "a", "x")
    assert asked == ["a.tmp", "a.tmp -> a", tmp_path.name]
    asked.clear()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_text("y")
    sync_tree(tmp_path)
    assert asked == ["a", "b", "below", tmp_path.name]
