"""Output heads whose logits exist for a few rows at a time.

Legend: N rows (supervised positions), n rows of one chunk, H hidden size, V vocabulary; both sizes may
differ from input to input.

A distillation loss on full logits holds about six ``[N, V]`` tensors in float32: 4.6 GiB each at N = 8192, V = 152k.
:func:`chunked_head_loss` walks over chunks of rows instead and knows two forms with the same result:

* ``one_pass`` computes loss *and* gradient inside the forward loop, so no logits are kept and no head is applied twice.
  Kept until the backward pass: one ``[N, H]`` gradient per hidden input, one ``[V, H]`` gradient per trained head,
  accumulated in float32, and one per row tensor with a gradient. The row losses must own no trained parameter: it would
  silently get no gradient, so it is refused.
* ``checkpoint`` recomputes each chunk in the backward pass. General, at the price of applying every head twice and of
  summing the head's gradient over chunks in the head's own dtype.

:func:`head_rows` gives per-row numbers instead of a sum, for losses that join rows (a chunk's log-likelihood).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK_BYTES = 2**30
"""On CPU the head's matrix products lose half their speed below about 100 rows, where reading ``[V, H]`` dominates.

At V = 262144 on both sides this gives 170 rows: one step costs 1.3 times its bare matrix products; at 256 MiB, 1.9.
"""

TENSORS_PER_INPUT = 3
"""Logits-sized tensors alive at once per input: logits, log-probabilities and probabilities or gradient."""

RowLosses = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[list[Tensor], list[Tensor]]]
"""``(logits [n, V_i] of every input, rows [n, ...]) -> (losses [n] each, metrics [n] each)``.

Each row's loss depends on that row only and is independent of the chunk it is in. Metrics carry no gradient.
"""

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
        logits = product.to(_accumulation_dtype(dtype))
        if logit_scale != 1.0:
            logits = logits * logit_scale
        if soft_cap is not None:
            logits = (logits / soft_cap).tanh_() * soft_cap
    return logits


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
        chunk_bytes: bound on the logits-sized tensors of one chunk, all inputs together.
        mode: ``one_pass``, or ``checkpoint`` where row_losses reads trained parameters.
        group_starts: first rows of groups, ascending from 0, that no chunk may part: row_losses sees whole groups, in
            order, and may then let the losses of a group depend on all its rows. None: every row is its own group.

    Returns:
        Sums in float32 (float64 if the inputs are). With zero rows they are 0 and gradients are zeros.

    Raises:
        RuntimeError: in ``one_pass`` mode the loss depends on something trained other than inputs and rows.
    """
    chunks = _row_chunks(inputs, rows, chunk_bytes)
    if group_starts:
        chunks = _whole_groups(chunks, group_starts)
    if mode == "checkpoint":
        return _checkpointed(row_losses, inputs, rows, weights, chunks)
    return _one_pass(row_losses, inputs, rows, weights, chunks)


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
        chunk_bytes: bound on the logits-sized tensors of one chunk, all inputs together.

    Returns:
        ``[N, ...]`` in the function's dtype.
    """
    operands = _cast_once(inputs)

    def of_chunk(chunk: slice) -> Tensor:
        logits = tuple(_chunk_logits(operand, chunk) for operand in operands)
        with torch.autocast(logits[0].device.type, enabled=False):
            return row_function(logits, tuple(row[chunk] for row in rows))

    chunks = _row_chunks(inputs, rows, chunk_bytes)
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(chunk) for chunk in chunks])
    return torch.cat([checkpoint(of_chunk, chunk, use_reentrant=False) for chunk in chunks])


def _row_chunks(inputs: Sequence[HeadInput], rows: Sequence[Tensor], chunk_bytes: int) -> list[slice]:
    num_rows = inputs[0].hidden.shape[0]
    assert all(len(item.hidden) == num_rows for item in inputs), [len(item.hidden) for item in inputs]
    assert all(len(row) == num_rows for row in rows), (num_rows, [len(row) for row in rows])
    return _chunks(num_rows, chunk_bytes // _bytes_per_row(inputs))


def constant_logits(head: HeadInput) -> Callable[[slice], Tensor]:
    """``rows -> logits [n, V]`` of ``head`` without gradient, cast once to what autocast is now."""
    (operand,) = _cast_once([replace(head, hidden=head.hidden.detach(), train_head=False)])

    def logits_of(rows: slice) -> Tensor:
        with torch.no_grad():
            return _chunk_logits(operand, rows)

    return logits_of


@torch.no_grad()
def token_log_probs(head: HeadInput, labels: Tensor, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Tensor:
    """Log-probability ``[N]`` in nats, float32, of ``labels [N]`` (vocabulary ids) under ``head``; no gradient."""
    (operand,) = _cast_once([head])
    parts = []
    for chunk in _chunks(len(labels), chunk_bytes // _bytes_per_row([head])):
        logits = _chunk_logits(operand, chunk)
        parts.append(logits.gather(-1, labels[chunk].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(parts)


def _one_pass(
    row_losses: RowLosses,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunks: Sequence[slice],
) -> ChunkedLoss:
    gradients = _Gradients(inputs, rows) if torch.is_grad_enabled() else None
    sums: list[_Sums] = []
    with torch.no_grad():
        operands = _cast_once(inputs)
        for chunk in chunks:
            sums.append(_one_pass_chunk(row_losses, operands, rows, weights, chunk, gradients))
    result = _add_up(sums, weights)
    if gradients is None or not gradients.tensors:
        return result
    total = _AttachGradients.apply(result.total, gradients.finished(), *gradients.tensors)
    return ChunkedLoss(total, result.sums, result.metrics)


def _one_pass_chunk(
    row_losses: RowLosses,
    operands: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunk: slice,
    gradients: _Gradients | None,
) -> _Sums:
    """Losses of one chunk; adds their gradient to ``gradients``. Its logits die with the call."""
    logits = tuple(_chunk_logits(operand, chunk) for operand in operands)
    parts = tuple(row[chunk].detach() for row in rows)
    if gradients is None:
        return _chunk_sums(row_losses, logits, parts)
    trained = [i for i in range(len(operands)) if gradients.wants(i)]
    trained_rows = [i for i, row in enumerate(rows) if row.requires_grad]
    leaves = [*(logits[i] for i in trained), *(parts[i] for i in trained_rows)]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        sums = _chunk_sums(row_losses, logits, parts)
        loss = _weighted_total(sums.losses, weights)
    if loss.requires_grad:
        _refuse_other_leaves(loss, leaves)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for i, gradient in zip(trained, found[: len(trained)], strict=True):
            if gradient is not None:
                gradients.add(i, operands[i], chunk, _through_cap_and_scale(gradient, logits[i].detach(), operands[i]))
        for i, gradient in zip(trained_rows, found[len(trained) :], strict=True):
            if gradient is not None:
                gradients.add_row(rows[i], chunk, gradient)
    return _Sums(sums.losses.detach(), sums.metrics)


def _checkpointed(
    row_losses: RowLosses,
    inputs: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunks: Sequence[slice],
) -> ChunkedLoss:
    operands = _cast_once(inputs)

    def sums_of(chunk: slice) -> _Sums:
        logits = tuple(_chunk_logits(operand, chunk) for operand in operands)
        return _chunk_sums(row_losses, logits, tuple(row[chunk] for row in rows))

    return _add_up([checkpoint(sums_of, chunk, use_reentrant=False) for chunk in chunks], weights)


class _Sums(NamedTuple):  # a tuple, because checkpoint() looks for tensors in tuples only
    losses: Tensor
    """``[K]``"""
    metrics: Tensor
    """``[M]``, detached"""


def _chunk_sums(row_losses: RowLosses, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> _Sums:
    with torch.autocast(logits[0].device.type, enabled=False):
        losses, metrics = row_losses(logits, rows)
        shape = logits[0].shape[:1]
        assert all(term.shape == shape for term in (*losses, *metrics)), "a row loss or metric is not [n]"
        metric_sums = [metric.detach().sum().to(logits[0].dtype) for metric in metrics]
        return _Sums(
            torch.stack([loss.sum() for loss in losses]),
            torch.stack(metric_sums) if metric_sums else logits[0].new_zeros(0),
        )


def _add_up(chunk_sums: Sequence[_Sums], weights: Sequence[float]) -> ChunkedLoss:
    sums = torch.stack([chunk.losses for chunk in chunk_sums]).sum(0)
    metrics = torch.stack([chunk.metrics for chunk in chunk_sums]).sum(0)
    return ChunkedLoss(_weighted_total(sums, weights), sums.detach(), metrics)


def _weighted_total(sums: Tensor, weights: Sequence[float]) -> Tensor:
    terms = [weight * loss for weight, loss in zip(weights, sums.unbind(), strict=True)]
    return torch.stack(terms).sum()


class _Gradients:
    """One gradient buffer per distinct trained tensor among inputs and rows."""

    def __init__(self, inputs: Sequence[HeadInput], rows: Sequence[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}
        self._inputs = inputs
        for item in inputs:
            self._track(item.hidden, item.hidden.dtype)  # every row is written once: nothing to accumulate
            for parameter in (item.weight, item.bias) if item.train_head else ():
                if parameter is not None:
                    self._track(parameter, _accumulation_dtype(parameter.dtype))
        for row in rows:
            self._track(row, row.dtype)

    def _track(self, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.requires_grad and id(tensor) not in self._buffers:
            self.tensors.append(tensor)
            self._buffers[id(tensor)] = torch.zeros_like(tensor, dtype=dtype)

    def _buffer(self, tensor: Tensor | None) -> Tensor | None:
        return self._buffers.get(id(tensor))

    def wants(self, index: int) -> bool:
        """Whether anything of this input is trained."""
        item = self._inputs[index]
        heads = (item.weight, item.bias) if item.train_head else ()
        return any(self._buffer(tensor) is not None for tensor in (item.hidden, *heads))

    def add(self, index: int, operand: HeadInput, chunk: slice, gradient: Tensor) -> None:
        """Add the gradient ``[n, V]`` with respect to ``hidden @ weight.T + bias`` of one chunk."""
        item = self._inputs[index]
        low = gradient.to(operand.weight.dtype)
        hidden_buffer = self._buffer(item.hidden)
        if hidden_buffer is not None:
            hidden_buffer[chunk] += low @ operand.weight
        if not item.train_head:
            return
        weight_buffer, bias_buffer = self._buffer(item.weight), self._buffer(item.bias)
        if weight_buffer is not None and weight_buffer.dtype == low.dtype:
            weight_buffer.addmm_(low.t(), operand.hidden[chunk])  # no [V, H] temporary
        elif weight_buffer is not None:
            weight_buffer += low.t() @ operand.hidden[chunk]
        if bias_buffer is not None:
            bias_buffer += gradient.sum(0)

    def add_row(self, row: Tensor, chunk: slice, gradient: Tensor) -> None:
        """Add the gradient of one chunk of a row tensor, which may be given twice."""
        self._buffers[id(row)][chunk] += gradient

    def finished(self) -> list[Tensor]:
        """The gradients of ``tensors``, each in its tensor's dtype."""
        return [self._buffers[id(tensor)].to(tensor.dtype) for tensor in self.tensors]


class _AttachGradients(torch.autograd.Function):
    """Gives a finished scalar the finished gradients of the tensors it was computed from."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Out of place: a second backward through a retained graph needs them unscaled.
        return (None, None, *(gradient * upstream for gradient in ctx.saved_tensors))


def _refuse_other_leaves(loss: Tensor, allowed: Sequence[Tensor]) -> None:
    """Raise if ``loss`` depends on a tensor with gradient other than the ``allowed`` leaves."""
    own = {id(item) for item in allowed}
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise RuntimeError(
                f"the row losses read a trained tensor of shape {tuple(leaf.shape)} that is no input of the chunked "
                'head and would get no gradient; use mode="checkpoint"'
            )
        pending.extend(parent for parent, _ in node.next_functions)


def _through_cap_and_scale(gradient: Tensor, logits: Tensor, operand: HeadInput) -> Tensor:
    """Carry ``[n, V]`` from the logits back to ``hidden @ weight.T + bias``; out of place, it may be shared."""
    if operand.soft_cap is not None:
        gradient = gradient * (1 - (logits / operand.soft_cap).square_())
    return gradient if operand.logit_scale == 1.0 else gradient * operand.logit_scale


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
        key = (id(tensor), dtype, train)
        if key not in casts:
            casts[key] = (tensor if train else tensor.detach()).to(dtype)
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


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bytes_per_row(inputs: Sequence[HeadInput]) -> int:
    return sum(
        TENSORS_PER_INPUT * _accumulation_dtype(item.weight.dtype).itemsize * len(item.weight) for item in inputs
    )


def _chunks(num_rows: int, max_rows: int) -> list[slice]:
    """Even slices of at most ``max_rows`` rows (at least one row); one empty slice for zero rows."""
    num_chunks = max(1, math.ceil(num_rows / max(1, max_rows)))
    size = max(1, math.ceil(num_rows / num_chunks))
    return [slice(start, min(start + size, num_rows)) for start in range(0, max(1, num_rows), size)]


def _whole_groups(chunks: Sequence[slice], group_starts: Sequence[int]) -> list[slice]:
    """The chunks with each border moved to the first row of the group that it parts."""
    starts = {group_starts[bisect_right(group_starts, chunk.start) - 1] for chunk in chunks}
    return [slice(start, stop) for start, stop in pairwise([*sorted(starts), chunks[-1].stop])]
