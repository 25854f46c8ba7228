"""Files of a teacher cache: what is written is found again, and whatever is wrong with them is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vocabridge.errors import UserError
from vocabridge.models import cache_shards
from vocabridge.models.cache_shards import ShardWriter, remove_leftovers
from vocabridge.models.teacher_cache import CACHE_FILE, CacheKey, TeacherCache, create_cache, open_cache
from vocabridge.models.teacher_rows import TeacherRow, row_key

KEY = CacheKey(teacher="a" * 32, compute_dtype="float32", attention="sdpa", hidden_size=5, storage_dtype="float32")


def row(number: int, length: int, *, prompt: int = 3) -> TeacherRow:
    ids = np.arange(prompt + length) + 100 * number
    spans = np.stack([np.arange(length), np.arange(length) + 1], axis=1)
    return TeacherRow(ids, spans)


ROWS = [row(0, 4), row(1, 1), row(2, 7), row(3, 2)]
STATES = [
    torch.randn(each.num_supervised, 5, generator=torch.Generator().manual_seed(i)) for i, each in enumerate(ROWS)
]


def write(folder: Path, rows: list[int], *, shard_bytes: int = 1, dtype: torch.dtype = torch.float32) -> None:
    create_cache(folder, with_dtype(dtype))
    with ShardWriter(folder, dtype, shard_bytes=shard_bytes) as writer:
        for index in rows:
            writer.add(ROWS[index], STATES[index])


def with_dtype(dtype: torch.dtype) -> CacheKey:
    return dataclasses.replace(KEY, storage_dtype=str(dtype).removeprefix("torch."))


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> TeacherCache:
    cache = open_cache(folder, with_dtype(dtype))
    assert cache is not None
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "cache", [0, 1, 3, 2], shard_bytes=5 * 5 * 4)  # two rows fill a shard
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    return tmp_path / "cache"


def test_rows_come_back_exactly(folder: Path) -> None:
    cache = opened(folder)
    assert len(cache) == 4
    for each, states in zip(ROWS, STATES, strict=True):
        assert torch.equal(cache.read(each.key), states)
        assert cache.read(each.key).untyped_storage().nbytes() > states.nbytes, "a view of the mapped file, not a copy"
    assert cache.num_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_response_that_begins_a_stored_one_is_served_and_no_other(folder: Path) -> None:
    cache = opened(folder)
    whole = ROWS[2].input_ids
    assert torch.equal(cache.read(row_key(whole[:-3], 4)), STATES[2][:4])
    assert row_key(whole, 6) not in cache, "another border between prompt and response"
    assert row_key(np.append(whole, 1), 8) not in cache, "longer than what is stored"
    changed = whole.copy()
    changed[-1] += 1
    assert row_key(changed, 7) not in cache
    absent = row(9, 2)
    assert cache.missing([ROWS[0], absent, absent, ROWS[3]]) == [absent]
    with pytest.raises(UserError, match=r"lacks a row of this data.*run 'vocabridge cache-teacher'"):
        cache.read(absent.key)


def test_files_hold_the_response_and_its_byte_spans(folder: Path) -> None:
    found = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        starts = np.concatenate([[0], np.cumsum(tensors["lengths"])])
        for start, end in itertools.pairwise(starts.tolist()):
            found[tuple(tensors["response_ids"][start:end].tolist())] = tensors["spans"][start:end].tolist()
    expected = {tuple(each.input_ids[-each.num_supervised :].tolist()): each.spans.tolist() for each in ROWS}
    assert found == expected


def test_states_are_kept_in_the_type_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "cache", [0], dtype=torch.bfloat16)
    stored = opened(tmp_path / "cache", torch.bfloat16).read(ROWS[0].key)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, STATES[0].bfloat16())
    with ShardWriter(tmp_path, torch.float16) as writer, pytest.raises(UserError, match="not finite in float16"):
        writer.add(ROWS[0], STATES[0] * 1e6)


def test_a_cache_grows(tmp_path: Path) -> None:
    write(tmp_path, [0, 1])
    assert opened(tmp_path).missing(ROWS) == ROWS[2:]
    write(tmp_path, [2, 3])
    assert opened(tmp_path).missing(ROWS) == []


def test_ctrl_c_keeps_the_rows_that_were_whole(tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)

    def interrupted() -> None:
        with ShardWriter(tmp_path, torch.float32) as writer:
            writer.add(ROWS[0], STATES[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert opened(tmp_path).missing(ROWS) == ROWS[1:]


def test_a_failed_write_is_told_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [0])

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_shards, "save_file", full)
    with pytest.raises(UserError, match=r"failed \(No space left on device\); its finished shards are kept"):
        write(tmp_path, [1, 2])
    assert not list(tmp_path.glob("*.partial"))
    assert opened(tmp_path).missing(ROWS) == ROWS[1:]


def test_what_a_kill_leaves_counts_for_nothing_and_is_removed(folder: Path) -> None:
    (folder / "states-00.safetensors.partial").write_bytes(b"half")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.with_suffix(".json").unlink()  # killed between the two renames
    assert len(opened(folder)) == 2
    remove_leftovers(folder)
    assert not shard.exists()
    assert not list(folder.glob("*.partial"))
    assert len(opened(folder)) == 2


# --- damage ----------------------------------------------------------------------------------------------------------


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def read_all(folder: Path) -> list[torch.Tensor]:
    cache = opened(folder)
    return [cache.read(each.key) for each in ROWS]


def test_missing_shard(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    mend = f"delete it and {shard.stem}.json, then run 'vocabridge cache-teacher' again"
    with pytest.raises(UserError, match=rf"{shard} is damaged \(the file is missing\); {mend}"):
        opened(folder)
    shard.with_suffix(".json").unlink()
    assert len(opened(folder).missing(ROWS)) == 2, "mended as told"


def test_shard_that_is_cut_off(folder: Path) -> None:
    shard = first_shard(folder)
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(UserError, match=rf"damaged \(it has {len(content) - 8} bytes and not {len(content)}\)"):
        opened(folder)


def test_every_changed_byte_is_found(folder: Path) -> None:
    shard = first_shard(folder)
    whole = shard.read_bytes()
    for position in range(0, len(whole), 3):
        flip(shard, position)
        with pytest.raises(UserError, match="is damaged"):
            read_all(folder)
        shard.write_bytes(whole)
    assert all(map(torch.equal, read_all(folder), STATES))


def test_damage_in_one_row_leaves_the_others_readable(folder: Path) -> None:
    shard = next(path for path in folder.glob("*.safetensors") if load_file(path)["lengths"].tolist() == [4, 1])
    marker = STATES[1].numpy().tobytes()
    flip(shard, shard.read_bytes().index(marker))
    cache = opened(folder)
    assert torch.equal(cache.read(ROWS[0].key), STATES[0])
    with pytest.raises(UserError, match=r"is damaged \(row 1 has another checksum\)"):
        cache.read(ROWS[1].key)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"rows": 1}'])
def test_unreadable_json_files(folder: Path, content: str) -> None:
    facts = first_shard(folder).with_suffix(".json")
    before = facts.read_text()
    facts.write_text(content)
    with pytest.raises(UserError, match=rf"damaged \({facts.name} cannot be read\)"):
        opened(folder)
    facts.write_text(before)
    (folder / CACHE_FILE).write_text(content)
    with pytest.raises(UserError, match=r"cache\.json is damaged.*delete the folder"):
        opened(folder)


# --- other teachers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "b" * 32}, "written with other weights or configuration of the teacher;"),
        ({"compute_dtype": "bfloat16"}, r"written with other teacher\.dtype \(float32, now bfloat16\);"),
        ({"attention": "eager"}, r"other attention kernel \(sdpa, now eager\);"),
        ({"storage_dtype": "float16"}, r"other teacher\.cache\.dtype \(float32, now float16\);"),
        ({"hidden_size": 6}, r"other hidden size \(5, now 6\);"),
        ({"format": 2}, r"other file format \(1, now 2\);"),
    ],
)
def test_stale_cache(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_cache(folder, dataclasses.replace(KEY, **change))  # type: ignore[arg-type]


def test_every_part_of_the_key_is_on_disk(folder: Path) -> None:
    assert json.loads((folder / CACHE_FILE).read_text()) == dataclasses.asdict(KEY)


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    assert open_cache(tmp_path / "absent", KEY) is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no teacher cache but holds other things \(notes\.txt\)"):
        create_cache(tmp_path, KEY)
    with pytest.raises(UserError, match="cannot be written"):
        create_cache(tmp_path / "notes.txt" / "below", KEY)
