"""Which checkpoints are whole, by files that are cut, changed, missing; and which of them may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vocabridge import checkpoint_files
from vocabridge.checkpoint_files import (
    FILES_RECORD,
    check_whole,
    checkpoints,
    damage,
    last_whole_checkpoint,
    retire,
    seal,
)
from vocabridge.errors import UserError


def write(run_dir: Path, step: int, *, sealed: bool = True) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    (folder / "optimizer_0").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(200)) * step)
    (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b"moments" * step)
    (folder / "empty").write_bytes(b"")
    if sealed:
        seal(folder)
    return folder


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


@pytest.fixture(params=[2**26, 64], ids=["one block", "many blocks"], autouse=True)
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_BLOCK_BYTES", request.param)
    monkeypatch.setattr(checkpoint_files, "_READ_BYTES", min(request.param, 16))


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert damage(folder) is None
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES_RECORD):
        whole = path.read_bytes()
        for position in range(0, len(whole), 3):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert damage(folder) == f"{path.relative_to(folder).as_posix()} has another checksum"
        path.write_bytes(whole)
    assert damage(folder) is None


def test_a_record_with_a_changed_byte_never_says_whole_of_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    record = folder / FILES_RECORD
    whole = record.read_bytes()
    for position in range(0, len(whole), 2):
        record.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            same = json.loads(record.read_bytes()) == json.loads(whole)
        except ValueError:
            same = False
        assert same or damage(folder) is not None, record.read_bytes()


def test_cut_missing_and_unfinished_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    model = folder / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    assert damage(folder) == "model.safetensors has 399 bytes and not 400"
    model.unlink()
    assert damage(folder) == "model.safetensors is missing"
    model.write_bytes(content)
    (folder / "note.txt").write_text("of no concern")
    assert damage(folder) is None
    for text in ("", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"num_bytes": 400}}', '{"a": {"x": 1}}'):
        (folder / FILES_RECORD).write_text(text)
        assert damage(folder) == f"{FILES_RECORD} cannot be read"
    (folder / FILES_RECORD).unlink()
    assert damage(folder) == f"it has no {FILES_RECORD}, so it was never finished"
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged \(it has no .*take another checkpoint"):
        check_whole(folder)


def test_the_last_whole_one_is_taken_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert last_whole_checkpoint(tmp_path / "absent") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not caplog.text
    (tmp_path / "checkpoint-10" / "empty").unlink()
    write(tmp_path, 11, sealed=False)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10 is damaged (empty is missing) and is not used" in caplog.text
    assert f"checkpoint-11 is damaged (it has no {FILES_RECORD}" in caplog.text
    assert "going on from" in caplog.text
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step}" / FILES_RECORD).write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint is whole \(checkpoint-11: .*; checkpoint-10: empty is miss"):
        last_whole_checkpoint(tmp_path)


def set_back_the_clock(run_dir: Path) -> None:
    """The newest checkpoint looks the oldest."""
    for path in checkpoints(run_dir):
        second = 2_000_000_000 - int(path.name.removeprefix("checkpoint-"))
        os.utime(path, (second, second))


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "best", "kept"),
    [
        ([2, 4, 10], 10, 1, None, [10]),
        ([2, 4, 10], 10, 2, None, [4, 10]),
        ([2, 4, 10], 10, 3, None, [2, 4, 10]),
        ([2, 4, 10], 10, None, None, [2, 4, 10]),
        ([2, 4, 10], 10, 0, None, [2, 4, 10]),
        ([2, 4, 10], 10, 1, 2, [2, 10]),
        ([2, 4, 10], 10, 2, 2, [2, 10]),
        ([2, 4, 10], 10, 1, 10, [10]),
        ([2, 4, 30, 40], 10, 2, None, [4, 10]),  # 30 and 40 were damaged, and the run went on from 4
        ([4, 40], 10, 1, None, [10]),
    ],
)
def test_surplus_checkpoints_go_by_step_and_the_newest_stays(
    tmp_path: Path, steps: list[int], newest: int, limit: int | None, best: int | None, kept: list[int]
) -> None:
    run_dir, trash = tmp_path / "run", tmp_path / "trash"
    trash.mkdir()
    for step in {*steps, newest}:
        write(run_dir, step)
    set_back_the_clock(run_dir)
    best_path = None if best is None else f"/elsewhere/before/it/was/moved/checkpoint-{best}"
    retire(run_dir, trash, newest=f"checkpoint-{newest}", limit=limit, best=best_path)
    assert names(run_dir) == [f"checkpoint-{step}" for step in kept]
    assert all(damage(path) is None for path in (*checkpoints(run_dir), *checkpoints(trash)))
