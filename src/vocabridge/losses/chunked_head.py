"""Output heads whose logits exist for a few rows at a time.

Legend: N rows (supervised positions), n rows of one chunk, H hidden size, V vocabulary; both sizes may
differ from input to input.

A distillation loss on full logits holds about six ``[N, V]`` tensors in float32: 4.6 GiB each at N = 8192, V = 152k.
:func:`chunked_head_loss` walks over chunks of rows instead and knows two forms with the same result:

* ``one_pass`` computes loss *and* gradient inside the forward loop, so no logits are kept and no head is applied twice.
  A chunk is one matrix product a head; the row losses get a few rows of it at a time, and the gradient takes the place
  of those logits. Kept until the backward pass: one ``[N, H]`` gradient per hidden input, one ``[V, H]`` gradient per
  trained head, accumulated in float32, and one per row tensor with a gradient. The row losses must own no trained
  parameter: it would silently get no gradient, so it is refused.
* ``checkpoint`` recomputes each chunk in the backward pass. General, at the price of applying every head twice, of
  several logits-sized tensors and of summing the head's gradient over chunks in the head's own dtype.

:func:`head_rows` gives per-row numbers instead of a sum, for losses that join rows (a chunk's log-likelihood);
it computes logits again in the backward pass.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vocabridge.losses.head_pass import (
    Chunk,
    Gradients,
    RowLosses,
    Sums,
    accumulation_dtype,
    attach_gradients,
    chunk_products,
    logits_of,
    row_sums,
    scaled_and_capped,
    trained_tensors,
    walk,
    weighted_total,
)

DEFAULT_CHUNK_BYTES = 2**28
"""On CPU a matrix product loses speed below about 100 rows, where reading ``[V, H]`` dominates.

At V = 262144 this gives two inputs of one head 128 rows each, which are multiplied together.
"""

BLOCK_BYTES = {"cpu": 2**24}
"""Logits that row losses get at once, by device.

On CPU a few tensors of this size fit the cache, and the allocator reuses their pages; with smaller ones every operation
waits for all threads too often when other programs run beside.
"""

ACCELERATOR_BLOCK_BYTES = 2**26
"""Elsewhere: large enough that launching an operation takes less than running it."""

TENSORS_PER_INPUT = 3
"""Logits-sized tensors alive at once per input where a row function gets whole chunks: logits, log-probabilities and
probabilities or gradient."""

RowFunction = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
"""``(logits [n, V_i] of every input, rows [n, ...]) -> [n, ...]``, each row from that row only."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadInput:
    """Hidden states and the head to read them with; several inputs may share one head."""

    hidden: Tensor
    """``[N, H]``"""
    weight: Tensor
    """``[V, H]``"""
    bias: Tensor | None = None
    """``[V]``"""
    soft_cap: float | None = None
    """Logits become ``soft_cap * tanh(logits / soft_cap)`` (Gemma 2), after the scale."""
    logit_scale: float = 1.0
    """Factor on the logits (Cohere)."""
    train_head: bool = True
    """False detaches weight and bias: the gradient flows to ``hidden`` only."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkedLoss:
    """Sums over all rows of a chunked loss."""

    total: Tensor
    """Scalar, differentiable: the weighted sum of ``sums``."""
    sums: Tensor
    """``[K]``, detached: each loss summed over rows, unweighted."""
    metrics: Tensor
    """``[M]``, detached: each metric summed over rows."""


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, soft_cap: float | None, logit_scale: float
) -> Tensor:
    """Logits ``[..., V]`` in float32 (float64 stays) of ``hidden [..., H]``, scaled first and soft-capped second.

    The product runs in the autocast dtype where autocast is on, else in the weight's dtype.
    """
    dtype = _matmul_dtype(weight)
    with torch.autocast(weight.device.type, enabled=False):
        product = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return scaled_and_capped(product, soft_cap=soft_cap, logit_scale=logit_scale)


def chunked_head_loss(
    row_losses: RowLosses,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor],
    *,
    weights: Sequence[float],
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    mode: Literal["one_pass", "checkpoint"] = "one_pass",
    group_starts: Sequence[int] | None = None,
) -> ChunkedLoss:
    """Sum row losses over all rows without holding all logits.

    Args:
        row_losses: see :data:`RowLosses`. It runs with autocast off and, in ``checkpoint`` mode, twice per chunk.
        inputs: hidden states with their heads, all of N rows; row_losses gets their logits in this order.
        rows: further tensors of N rows, cut the same way; those that require a gradient get it.
        weights: factor of each loss in ``total``; a loss of weight 0 is only reported.
        chunk_bytes: bound on the logits of one chunk, all inputs together.
        mode: ``one_pass``, or ``checkpoint`` where row_losses reads trained parameters.
        group_starts: first rows of groups, ascending from 0, that no chunk may part: row_losses sees whole groups, in
            order, and may then let the losses of a group depend on all its rows. None: every row is its own group.

    Returns:
        Sums in float32 (float64 if the inputs are). With zero rows they are 0 and gradients are zeros.

    Raises:
        RuntimeError: in ``one_pass`` mode the loss depends on something trained other than inputs and rows.
    """
    _check_lengths(inputs, rows)
    if mode == "one_pass" and not group_starts:
        return _one_pass(row_losses, inputs, rows, weights, _in_blocks(inputs, chunk_bytes))
    # The row losses get whole chunks, so that what they make of the logits counts as well.
    chunks = _chunks(len(inputs[0].hidden), chunk_bytes // (TENSORS_PER_INPUT * _logits_bytes(inputs)))
    if group_starts:
        chunks = _whole_groups(chunks, group_starts)
    if mode == "checkpoint":
        return _checkpointed(row_losses, inputs, rows, weights, chunks)
    return _one_pass(row_losses, inputs, rows, weights, [Chunk(chunk, [chunk]) for chunk in chunks])


def head_rows(
    row_function: RowFunction,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor] = (),
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """Numbers of every row, differentiable, without holding all logits; each chunk is computed again in the backward.

    Args:
        row_function: see :data:`RowFunction`; runs with autocast off, and twice per chunk when there is a gradient.
        inputs: hidden states with their heads, all of N rows.
        rows: further tensors of N rows, cut the same way.
        chunk_bytes: bound on the logits of one chunk, all inputs together.

    Returns:
        ``[N, ...]`` in the function's dtype.
    """
    _check_lengths(inputs, rows)
    chunks = _in_blocks(inputs, chunk_bytes)
    tensors = trained_tensors(inputs, rows)
    result: Tensor = _HeadRows.apply(row_function, inputs, rows, chunks, *tensors)
    return result


def _check_lengths(inputs: Sequence[HeadInput], rows: Sequence[Tensor]) -> None:
    num_rows = inputs[0].hidden.shape[0]
    assert all(len(item.hidden) == num_rows for item in inputs), [len(item.hidden) for item in inputs]
    assert all(len(row) == num_rows for row in rows), (num_rows, [len(row) for row in rows])


def constant_logits(head: HeadInput) -> Callable[[slice], Tensor]:
    """``rows -> logits [n, V]`` of ``head`` without gradient, cast once to what autocast is now."""
    (operand,) = _cast_once([replace(head, hidden=head.hidden.detach(), train_head=False)])

    def of_rows(rows: slice) -> Tensor:
        with torch.no_grad():
            return _chunk_logits(operand, rows)

    return of_rows


@torch.no_grad()
def token_log_probs(head: HeadInput, labels: Tensor, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Tensor:
    """Log-probability ``[N]`` in nats, float32, of ``labels [N]`` (vocabulary ids) under ``head``; no gradient."""
    return head_rows(
        lambda logits, rows: -F.cross_entropy(logits[0], rows[0], reduction="none"),
        [head],
        [labels],
        chunk_bytes=chunk_bytes,
    )


def _one_pass(
    row_losses: RowLosses,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunks: Sequence[Chunk],
) -> ChunkedLoss:
    gradients = Gradients(inputs, rows) if torch.is_grad_enabled() else None
    with torch.no_grad():
        operands = _cast_once(inputs)
    sums = walk(row_losses, operands, rows, weights, chunks, gradients)
    result = ChunkedLoss(weighted_total(sums.losses, weights), *sums)
    if gradients is None or not gradients.tensors:
        return result
    return ChunkedLoss(attach_gradients(result.total, gradients), result.sums, result.metrics)


def _checkpointed(
    row_losses: RowLosses,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunks: Sequence[slice],
) -> ChunkedLoss:
    operands = _cast_once(inputs)

    def sums_of(chunk: slice) -> Sums:
        logits = tuple(_chunk_logits(operand, chunk) for operand in operands)
        return row_sums(row_losses, logits, tuple(row[chunk] for row in rows))

    parts = [checkpoint(sums_of, chunk, use_reentrant=False) for chunk in chunks]
    losses, metrics = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return ChunkedLoss(weighted_total(losses, weights), losses.detach(), metrics)


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_function: RowFunction,
        inputs: Sequence[HeadInput],
        rows: Sequence[Tensor],
        chunks: Sequence[Chunk],
        *tensors: Tensor,
    ) -> Tensor:
        operands = _cast_once(inputs)
        ctx.given = row_function, inputs, operands, rows, chunks
        result: Tensor | None = None
        with torch.autocast(operands[0].weight.device.type, enabled=False):
            for chunk, products in chunk_products(operands, chunks):
                for block in chunk.blocks:
                    logits = logits_of(operands, chunk.cut(products, block))
                    values = row_function(logits, tuple(row[block] for row in rows))
                    if result is None:
                        result = values.new_empty(len(operands[0].hidden), *values.shape[1:])
                    result[block] = values
        assert result is not None
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        row_function, inputs, operands, rows, chunks = ctx.given

        def row_losses(logits: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
            values = row_function(logits, parts[:-1]) * parts[-1]
            return [values.unsqueeze(1).flatten(1).sum(1)], []

        gradients = Gradients(inputs, rows)
        walk(row_losses, operands, [*rows, upstream], [1.0], chunks, gradients)
        return (None, None, None, None, *gradients.finished())


def _chunk_logits(operand: HeadInput, chunk: slice) -> Tensor:
    return head_logits(
        operand.hidden[chunk],
        operand.weight,
        operand.bias,
        soft_cap=operand.soft_cap,
        logit_scale=operand.logit_scale,
    )


def _cast_once(inputs: Sequence[HeadInput]) -> list[HeadInput]:
    """The inputs in their matmul dtype, untrained heads detached; a tensor shared by several inputs is cast once."""
    casts: dict[tuple[int, torch.dtype, bool], Tensor] = {}

    def cast(tensor: Tensor, dtype: torch.dtype, *, train: bool = True) -> Tensor:
        detach = not train and torch.is_grad_enabled()  # without a graph, inputs of one head keep one tensor
        key = (id(tensor), dtype, detach)
        if key not in casts:
            casts[key] = (tensor.detach() if detach else tensor).to(dtype)
        return casts[key]

    operands = []
    for item in inputs:
        dtype = _matmul_dtype(item.weight)
        operands.append(
            replace(
                item,
                hidden=cast(item.hidden, dtype),
                weight=cast(item.weight, dtype, train=item.train_head),
                bias=None if item.bias is None else cast(item.bias, dtype, train=item.train_head),
            )
        )
    return operands


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _in_blocks(inputs: Sequence[HeadInput], chunk_bytes: int) -> list[Chunk]:
    """Chunks whose products with the heads take at most ``chunk_bytes``, and their blocks."""
    block_bytes = BLOCK_BYTES.get(inputs[0].weight.device.type, ACCELERATOR_BLOCK_BYTES)
    rows_per_block = block_bytes // _logits_bytes(inputs)
    chunks = []
    for rows in _chunks(len(inputs[0].hidden), chunk_bytes // _bytes_per_row(inputs)):
        blocks = _chunks(rows.stop - rows.start, rows_per_block)
        chunks.append(Chunk(rows, [slice(rows.start + block.start, rows.start + block.stop) for block in blocks]))
    return chunks


def _bytes_per_row(inputs: Sequence[HeadInput]) -> int:
    """Of one row's products with all heads."""
    return sum(_matmul_dtype(item.weight).itemsize * len(item.weight) for item in inputs)


def _logits_bytes(inputs: Sequence[HeadInput]) -> int:
    """Of one row of all inputs."""
    return sum(accumulation_dtype(item.weight.dtype).itemsize * len(item.weight) for item in inputs)


def _chunks(num_rows: int, max_rows: int) -> list[slice]:
    """Even slices of at most ``max_rows`` rows (at least one row); one empty slice for zero rows."""
    num_chunks = max(1, math.ceil(num_rows / max(1, max_rows)))
    size = max(1, math.ceil(num_rows / num_chunks))
    return [slice(start, min(start + size, num_rows)) for start in range(0, max(1, num_rows), size)]


def _whole_groups(chunks: Sequence[slice], group_starts: Sequence[int]) -> list[slice]:
    """The chunks with each border moved to the first row of the group that it parts."""
    starts = {group_starts[bisect_right(group_starts, chunk.start) - 1] for chunk in chunks}
    return [slice(start, stop) for start, stop in pairwise([*sorted(starts), chunks[-1].stop])]
