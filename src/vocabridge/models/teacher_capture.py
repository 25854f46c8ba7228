"""Running a teacher over rows once and writing its last hidden states into a cache.

Axes: B rows of a batch, L tokens of its longest row, N supervised positions of the batch, H hidden size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.models.cache_shards import SHARD_BYTES, ShardWriter
from vocabridge.models.forward import IGNORE_INDEX, check_head, teacher_side
from vocabridge.models.teacher_cache import CacheKey
from vocabridge.models.teacher_rows import TeacherRow

TOKENS_PER_BATCH = 8192
"""Tokens of a forward, padding included; no gradient is kept, so it is memory for one layer's activations."""

_INDEX_BYTES = 12
"""Of a token besides its state: id and byte span."""


@dataclass(frozen=True, slots=True)
class CaptureSize:
    """What a capture will write."""

    rows: int
    tokens: int
    """Supervised positions."""
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.tokens} tokens, {gigabytes(self.num_bytes)}"


def capture_size(rows: Sequence[TeacherRow], key: CacheKey) -> CaptureSize:
    """Size of these rows on disk, exact but for the file headers."""
    tokens = sum(row.num_supervised for row in rows)
    width = key.hidden_size * getattr(torch, key.storage_dtype).itemsize
    return CaptureSize(len(rows), tokens, tokens * (width + _INDEX_BYTES))


def check_space(folder: Path, size: CaptureSize) -> None:
    """Refuse a capture that the disk has no room for.

    Raises:
        UserError: it has none.
    """
    free = shutil.disk_usage(folder).free
    if size.num_bytes > free:
        raise UserError(
            f"the teacher cache needs {gigabytes(size.num_bytes)} in {folder}, where {gigabytes(free)} are free; name "
            "another folder in teacher.cache, or a smaller type in teacher.cache.dtype."
        )


def capture(
    model: PreTrainedModel,
    rows: Sequence[TeacherRow],
    folder: Path,
    *,
    key: CacheKey,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the states of ``rows``, or this rank's share of them, into a cache that exists.

    Args:
        model: a frozen causal language model in eval mode.
        rows: those the cache lacks, the same on every rank.
        folder: of the cache.
        key: its key.
        rank: of this process among those that write.
        world_size: number of those processes.
        progress: show a progress bar.
        shard_bytes: size of a shard.

    Raises:
        UserError: the model's head is not one we know, or its states are not finite, or writing failed.
    """
    _check(model, rows[0])
    batches: Iterable[list[TeacherRow]] = token_batches(rows, TOKENS_PER_BATCH)[rank::world_size]
    if progress:
        batches = track(batches, description="Running the teacher")
    with ShardWriter(folder, getattr(torch, key.storage_dtype), shard_bytes=shard_bytes) as writer:
        for batch in batches:
            for row, states in zip(batch, _states(model, batch), strict=True):
                writer.add(row, states)


def token_batches(rows: Sequence[TeacherRow], max_tokens: int) -> list[list[TeacherRow]]:
    """Rows of like length together, at most ``max_tokens`` with padding; the longest first, to fail at once if at all.

    The order depends on the rows alone, so that ranks can share the batches out without a word.
    """
    batches: list[list[TeacherRow]] = []
    for row in sorted(rows, key=lambda row: (-len(row.input_ids), row.key)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _states(model: PreTrainedModel, rows: Sequence[TeacherRow]) -> Sequence[torch.Tensor]:
    """``[R, H]`` of each row."""
    inputs = _padded(rows, model.device)
    with torch.autocast(model.device.type, enabled=False):
        packed = teacher_side(model, inputs.input_ids, inputs.attention_mask, inputs.labels).hidden_states
    return packed.cpu().split([row.num_supervised for row in rows])


def _check(model: PreTrainedModel, row: TeacherRow) -> None:
    inputs = _padded([row], model.device)
    check_head(model, inputs.input_ids, inputs.attention_mask, inputs.labels)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """``[B, L]`` each, int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def _padded(rows: Sequence[TeacherRow], device: torch.device) -> _Inputs:
    longest = max(len(row.input_ids) for row in rows)
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)  # padding is masked out, so any id will do
    attention_mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for index, row in enumerate(rows):
        end = len(row.input_ids)
        response = slice(end - row.num_supervised, end)
        input_ids[index, :end] = row.input_ids
        attention_mask[index, :end] = 1
        labels[index, response] = row.input_ids[response]
    return _Inputs(*(torch.from_numpy(array).to(device) for array in (input_ids, attention_mask, labels)))


def gigabytes(num_bytes: int) -> str:
    """``1234567890`` -> ``1.23 GB``; small sizes in MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
