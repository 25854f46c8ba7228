"""What decides the rows of an optimizer step, and which settings are advised to a run whose steps would be others."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vocabridge.errors import UserError
from vocabridge.step_rows import STEP_ROWS_FILE, check_step_rows, step_rows


def arguments(rows: int, accumulation: int, processes: int, **others: Any) -> Any:
    split = SimpleNamespace(split_batches=others.pop("split", False))
    return SimpleNamespace(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        world_size=processes,
        accelerator_config=split,
        **{"groups_by_length": False, "dataloader_num_workers": 0, **others},
    )


def same(first: Any, second: Any, *, is_stream: bool = False) -> bool:
    return step_rows(first, is_stream=is_stream) == step_rows(second, is_stream=is_stream)


def test_rows_may_be_shared_out_anyhow() -> None:
    assert same(arguments(8, 1, 1), arguments(2, 2, 2))
    assert same(arguments(8, 1, 1), arguments(8, 1, 1, dataloader_num_workers=2))
    assert same(arguments(8, 1, 1), arguments(8, 1, 2, split=True))
    assert not same(arguments(8, 1, 1), arguments(8, 1, 2))
    assert not same(arguments(8, 1, 1), arguments(8, 2, 1))


def test_batches_of_similar_length_keep_processes_and_accumulation() -> None:
    grouped = arguments(8, 2, 2, groups_by_length=True)
    assert same(grouped, arguments(8, 2, 2, groups_by_length=True, dataloader_num_workers=2))
    for other in ((8, 4, 1), (8, 1, 4), (16, 1, 2)):
        assert not same(grouped, arguments(*other, groups_by_length=True))


def test_a_stream_that_workers_share_keeps_its_batches() -> None:
    """Two workers fill batches with every second row: two of four rows are not four of two."""
    shared = arguments(4, 2, 1, dataloader_num_workers=2)
    assert same(shared, arguments(2, 2, 2, dataloader_num_workers=2), is_stream=True)
    assert not same(shared, arguments(2, 4, 1, dataloader_num_workers=2), is_stream=True)
    assert not same(shared, arguments(4, 2, 1, dataloader_num_workers=3), is_stream=True)
    alone = arguments(4, 2, 1, dataloader_num_workers=1)
    assert same(alone, arguments(2, 4, 1), is_stream=True)


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    def message(before: Any, now: Any, *, is_stream: bool = False) -> str:
        (tmp_path / STEP_ROWS_FILE).write_text(json.dumps(step_rows(before, is_stream=is_stream)))
        with pytest.raises(UserError) as refusal:
            check_step_rows(tmp_path, step_rows(now, is_stream=is_stream), now)
        return str(refusal.value)

    return message


@pytest.mark.parametrize("split", [False, True])
def test_the_advised_settings_give_the_steps_of_before(refused: Any, split: bool) -> None:
    num_advised = 0
    for rows, size, accumulation, processes in itertools.product(range(1, 13), (1, 2, 3, 6), (1, 4), (1, 2, 3)):
        per_device = size * processes if split else size
        now = arguments(per_device, accumulation, processes, split=split)
        if size * accumulation * processes == rows:
            continue
        told = refused(arguments(rows, 1, 1), now)
        found = re.search(r"set training\.per_device_train_batch_size=(\d+) training\.\w+_steps=(\d+),", told)
        assert (found is None) == (rows % processes != 0), told
        if found is None:
            assert f"start a number of processes that divides {rows}." in told
            continue
        batch, steps = map(int, found.groups())
        assert batch * steps * (1 if split else processes) == rows
        assert batch <= per_device, "larger batches may not fit into memory"
        assert not split or batch % processes == 0
        num_advised += 1
    assert num_advised > 50


def test_what_may_not_change_is_listed(refused: Any) -> None:
    told = refused(arguments(4, 2, 2, groups_by_length=True), arguments(4, 4, 1, groups_by_length=True))
    assert "was written with processes 2, " in told
    assert "training.gradient_accumulation_steps 2" in told
    assert "(now: processes 1, " in told


def test_a_checkpoint_without_a_record_is_taken(tmp_path: Path) -> None:
    check_step_rows(tmp_path, {"rows of an optimizer step": 8}, arguments(8, 1, 1))


@pytest.mark.parametrize("content", ["[1]", "{", '{"rows": "many"}'])
def test_a_strange_record_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / STEP_ROWS_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{STEP_ROWS_FILE} cannot be used"):
        check_step_rows(tmp_path, {"rows of an optimizer step": 8}, arguments(8, 1, 1))
