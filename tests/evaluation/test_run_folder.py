"""Kills, torn lines and folders of other evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vocabridge.errors import UserError
from vocabridge.evaluation.run_folder import Manifest, PredictionFile, RunFolder

MANIFEST = Manifest(model="m1", settings={"temperature": 1.0, "limit": None}, data={"dev": "d1"})


def _record(index: int) -> dict[str, object]:
    return {"index": index, "prediction": f"caf\u00e9 \u2028 line\nbreak {index}"}


def test_records_come_back_in_the_order_of_the_examples(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "dev.seed1.jsonl")
    file.append([_record(2), _record(0)])
    file.append([_record(1)])
    assert file.load() == {index: _record(index) for index in (0, 1, 2)}
    file.finish(file.load())
    assert not file.partial_path.exists()
    assert [json.loads(line)["index"] for line in file.path.read_text("utf-8").split("\n")[:-1]] == [0, 1, 2]
    assert file.load() == {index: _record(index) for index in (0, 1, 2)}


@pytest.mark.parametrize("tail", [b'{"index": 7, "pred', b'{"index": 7}', b"\x00\x00\x00\n", b"[7]\n"])
def test_a_torn_tail_is_cut_off_before_more_is_written(tmp_path: Path, tail: bytes) -> None:
    file = PredictionFile(tmp_path / "dev.seed1.jsonl")
    file.append([_record(0), _record(1)])
    whole = file.partial_path.read_bytes()
    file.partial_path.write_bytes(whole + tail)
    assert sorted(file.load()) == [0, 1]
    assert file.partial_path.read_bytes() == whole
    file.append([_record(2)])
    assert sorted(file.load()) == [0, 1, 2]


def test_the_same_evaluation_may_go_on_and_gain_files(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", MANIFEST).save_bits("dev", {"bits": 1.5}, rows=[{"bits": 1.5}])
    more = Manifest("m1", MANIFEST.settings, {"test": "d2"})
    folder = RunFolder(tmp_path / "run", more)
    assert folder.load_bits("dev") == {"bits": 1.5}
    assert folder.load_bits("test") is None
    with pytest.raises(UserError, match="the data of 'dev'"):  # the first file is still guarded
        RunFolder(tmp_path / "run", Manifest("m1", MANIFEST.settings, {"dev": "changed"}))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Manifest("m2", MANIFEST.settings, MANIFEST.data), "the model"),
        (Manifest("m1", {"temperature": 0.5, "limit": None}, MANIFEST.data), "temperature (1.0 there, 0.5 now)"),
        (Manifest("m1", MANIFEST.settings, {"dev": "d9"}), "the data of 'dev'"),
    ],
)
def test_another_evaluation_is_refused_until_overwritten(tmp_path: Path, other: Manifest, named: str) -> None:
    folder = RunFolder(tmp_path, MANIFEST)
    folder.predictions("dev", 1).append([_record(0)])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path, other)
    assert named in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert folder.predictions("dev", 1).load(), "a refusal must not touch the files"
    assert not RunFolder(tmp_path, other, overwrite=True).predictions("dev", 1).load()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="holds no evaluation"):
        RunFolder(tmp_path, MANIFEST)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "model.safetensors", MANIFEST)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        RunFolder(tmp_path, MANIFEST)


def test_results_stay_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, MANIFEST)
    folder.save_results("old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vocabridge.evaluation.run_folder.os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        folder.save_results("new")
    assert (tmp_path / "results.json").read_text() == "old"
