"""Running a teacher into a cache: the right states, shared out to ranks, with room on the disk."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.models import teacher_capture
from vocabridge.models.teacher_cache import CacheKey, TeacherCache, create_cache, open_cache
from vocabridge.models.teacher_capture import capture, capture_size, check_space, token_batches
from vocabridge.models.teacher_rows import TeacherRow, row_key

KEY = CacheKey(teacher="a" * 32, compute_dtype="float32", attention="sdpa", hidden_size=16, storage_dtype="float32")


def random_row(seed: int, prompt: int, response: int) -> TeacherRow:
    generator = np.random.default_rng(seed)
    spans = np.stack([np.arange(response), np.arange(response) + 1], axis=1)
    return TeacherRow(generator.integers(0, 256, prompt + response), spans)


LENGTHS = [(5, 3), (1, 7), (9, 1), (2, 2), (20, 13), (3, 3), (4, 11)]
ROWS = [random_row(seed, *lengths) for seed, lengths in enumerate(LENGTHS)]


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


def opened(folder: Path) -> TeacherCache:
    cache = open_cache(folder, KEY)
    assert cache is not None
    return cache


def reference(model: PreTrainedModel, row: TeacherRow) -> torch.Tensor:
    """The row alone, through the model's own output: no batch, no padding, no mask."""
    ids = torch.from_numpy(row.input_ids)[None]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    start = len(row.input_ids) - row.num_supervised
    return torch.stack([states[t - 1] for t in range(start, len(row.input_ids))])


@pytest.mark.parametrize("max_tokens", [1, 30, 8192])
def test_states_are_the_models(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    monkeypatch.setattr(teacher_capture, "TOKENS_PER_BATCH", max_tokens)
    create_cache(tmp_path, KEY)
    capture(model, ROWS, tmp_path, key=KEY)
    cache = opened(tmp_path)
    for row in ROWS:
        expected = reference(model, row)
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(cache.read(row.key), expected, rtol=1e-5, atol=1e-5)


def test_a_beginning_has_the_states_of_the_whole(model: PreTrainedModel, tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)
    capture(model, ROWS, tmp_path, key=KEY)
    row = ROWS[4]
    short = TeacherRow(row.input_ids[:-6], row.spans[:-6])
    served = opened(tmp_path).read(row_key(short.input_ids, short.num_supervised))
    torch.testing.assert_close(served, reference(model, short), rtol=1e-5, atol=1e-5)


def test_ranks_share_the_rows_out(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_capture, "TOKENS_PER_BATCH", 30)
    create_cache(tmp_path, KEY)
    shares = []
    for rank in (0, 1, 2):
        before = len(opened(tmp_path))
        capture(model, ROWS, tmp_path, key=KEY, rank=rank, world_size=3)
        shares.append(len(opened(tmp_path)) - before)
    assert sum(shares) == len(ROWS)
    assert min(shares) > 0
    assert opened(tmp_path).missing(ROWS) == []


def test_batches_hold_every_row_once_and_keep_the_limit() -> None:
    batches = token_batches(ROWS, 30)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, ROWS))
    assert [id(row) for row in batches[0]] == [id(ROWS[4])], "the longest first, alone: it is over the limit"
    assert all(len(batch) * max(len(row.input_ids) for row in batch) <= 30 for batch in batches[1:])
    assert any(len(batch) > 1 for batch in batches)
    again = token_batches(ROWS[::-1], 30)
    assert [[row.key for row in batch] for batch in again] == [[row.key for row in batch] for batch in batches]


def test_size_is_what_is_written(model: PreTrainedModel, tmp_path: Path) -> None:
    create_cache(tmp_path, KEY)
    size = capture_size(ROWS, KEY)
    assert (size.rows, size.tokens) == (7, 40)
    capture(model, ROWS, tmp_path, key=KEY)
    headers_and_rows = 8 + 1000 + 40 * len(ROWS)
    assert size.num_bytes < opened(tmp_path).num_bytes < size.num_bytes + headers_and_rows


def test_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = capture_size(ROWS, KEY)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(teacher_capture.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, size.num_bytes - 1))
    with pytest.raises(UserError, match=r"needs 0\.00 MB in .*where 0\.00 MB are free; name another folder"):
        check_space(tmp_path, size)
    monkeypatch.setattr(teacher_capture.shutil, "disk_usage", lambda folder: usage(10**9, 0, size.num_bytes))
    check_space(tmp_path, size)


def test_a_head_that_is_not_known_is_refused_before_anything_is_written(model: PreTrainedModel, tmp_path: Path) -> None:
    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1])
            return outputs

    model.__class__ = Shifted
    create_cache(tmp_path, KEY)
    with pytest.raises(UserError, match="logits from the output head differ"):
        capture(model, ROWS, tmp_path, key=KEY)
    assert len(opened(tmp_path)) == 0
