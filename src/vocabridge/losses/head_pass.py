"""One pass over output heads: large matrix products, small blocks of logits, gradients in the logits' memory.

Legend: N rows, n rows of a chunk, b rows of a block, H hidden size, V vocabulary; K losses and M metrics.

A chunk is as many rows as make the products with ``[V, H]`` efficient; its logits exist once. A block is so few of its
rows that the dozen tensors which a row function makes of their logits stay in the cache. The gradient over a block's
logits takes the place of the logits, and one product a chunk carries it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vocabridge.losses.chunked_head import HeadInput

RowLosses = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[list[Tensor], list[Tensor]]]
"""``(logits [n, V_i] of every input, rows [n, ...]) -> (losses [n] each, metrics [n] each)``.

Each row's loss depends on that row only, not on the rows that it comes with. Metrics carry no gradient.
"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one matrix product, and the blocks of them that a row function gets at once."""

    rows: slice
    blocks: Sequence[slice]

    def cut(self, products: Sequence[Tensor], block: slice) -> list[Tensor]:
        """Rows ``block`` of the chunk's ``products [n, V]``."""
        start = self.rows.start
        return [product[block.start - start : block.stop - start] for product in products]


class Sums(NamedTuple):  # a tuple, because checkpoint() looks for tensors in tuples only
    """Of some rows."""

    losses: Tensor
    """``[K]``"""
    metrics: Tensor
    """``[M]``, detached"""


def walk(
    row_losses: RowLosses,
    operands: Sequence[HeadInput],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    chunks: Sequence[Chunk],
    gradients: Gradients | None,
) -> Sums:
    """Sums of the losses over all rows, without a graph.

    Args:
        row_losses: see :data:`RowLosses`; runs with autocast off.
        operands: inputs in their matmul dtype.
        rows: further tensors of N rows.
        weights: factor of each loss in what is differentiated.
        chunks: of the N rows.
        gradients: of the same inputs and rows, to be added to; None: no gradient is wanted.

    Raises:
        RuntimeError: the losses depend on something trained other than inputs and rows.
    """
    total: Sums | None = None
    with torch.no_grad():
        for chunk, products in chunk_products(operands, chunks):
            for block in chunk.blocks:
                pieces = chunk.cut(products, block)
                parts = tuple(row[block].detach() for row in rows)
                sums = _block_sums(row_losses, operands, pieces, parts, weights, block, gradients)
                # In place: small tensors that outlive a block would keep the C library from reusing what it freed.
                total = sums if total is None else Sums(*(a.add_(b) for a, b in zip(total, sums, strict=True)))
            if gradients is not None:
                for index, product in enumerate(products):
                    gradients.carry_on(index, operands[index], chunk.rows, product)
    assert total is not None
    return total


def chunk_products(operands: Sequence[HeadInput], chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Tensor]]]:
    """Each chunk with the bare products ``[n, V]`` of its rows and every head, valid until the next chunk.

    All chunks share the memory, as fresh pages cost about as much as a product. Inputs of one head are multiplied
    together, so that it is read once.
    """
    most = max(chunk.rows.stop - chunk.rows.start for chunk in chunks)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, operand in enumerate(operands):
        groups.setdefault((id(operand.weight), id(operand.bias)), []).append(index)
    heads = [operands[group[0]] for group in groups.values()]
    buffers = [
        head.weight.new_empty(len(group), most, len(head.weight))
        for head, group in zip(heads, groups.values(), strict=True)
    ]
    for chunk in chunks:
        found: dict[int, Tensor] = {}
        for head, group, buffer in zip(heads, groups.values(), buffers, strict=True):
            hidden = torch.cat([operands[index].hidden[chunk.rows] for index in group])
            product = buffer.flatten(0, 1)[: len(hidden)]
            if head.bias is None:
                torch.mm(hidden, head.weight.t(), out=product)
            else:
                torch.addmm(head.bias, hidden, head.weight.t(), out=product)
            found |= zip(group, product.unflatten(0, (len(group), len(hidden) // len(group))), strict=True)
        yield chunk, [found[index] for index in range(len(operands))]


def _block_sums(
    row_losses: RowLosses,
    operands: Sequence[HeadInput],
    products: Sequence[Tensor],
    rows: tuple[Tensor, ...],
    weights: Sequence[float],
    block: slice,
    gradients: Gradients | None,
) -> Sums:
    """Losses of one block; puts the gradient over the products ``[b, V]`` of trained inputs in their place."""
    logits = logits_of(operands, products)
    if gradients is None:
        return row_sums(row_losses, logits, rows)
    leaves = [*(logits[i] for i in gradients.trained_inputs), *(rows[i] for i in gradients.trained_rows)]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        sums = row_sums(row_losses, logits, rows)
        loss = weighted_total(sums.losses, weights)
    if loss.requires_grad:
        _refuse_other_leaves(loss, leaves)
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(leaf) for leaf in leaves)
    of_logits, of_rows = found[: len(gradients.trained_inputs)], found[len(gradients.trained_inputs) :]
    for i, gradient in zip(gradients.trained_inputs, of_logits, strict=True):
        products[i].copy_(_through_cap_and_scale(gradient, logits[i].detach(), operands[i]))
    for i, gradient in zip(gradients.trained_rows, of_rows, strict=True):
        gradients.add_row(i, block, gradient)
    return Sums(sums.losses.detach(), sums.metrics)


def row_sums(row_losses: RowLosses, logits: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> Sums:
    """Sums of the losses, differentiable where grad mode is on, and of the metrics."""
    with torch.autocast(logits[0].device.type, enabled=False):
        losses, metrics = row_losses(logits, rows)
        shape = logits[0].shape[:1]
        assert all(term.shape == shape for term in (*losses, *metrics)), "a row loss or metric is not [n]"
        metric_sums = [metric.detach().sum().to(logits[0].dtype) for metric in metrics]
        return Sums(
            torch.stack([loss.sum() for loss in losses]),
            torch.stack(metric_sums) if metric_sums else logits[0].new_zeros(0),
        )


def weighted_total(sums: Tensor, weights: Sequence[float]) -> Tensor:
    """Scalar from ``sums [K]``."""
    terms = [weight * loss for weight, loss in zip(weights, sums.unbind(), strict=True)]
    return torch.stack(terms).sum()


def logits_of(operands: Sequence[HeadInput], products: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits of every input from its bare product."""
    return tuple(
        scaled_and_capped(product, soft_cap=operand.soft_cap, logit_scale=operand.logit_scale)
        for operand, product in zip(operands, products, strict=True)
    )


def scaled_and_capped(product: Tensor, *, soft_cap: float | None, logit_scale: float) -> Tensor:
    """Logits in float32 (float64 stays) from a bare product; in its memory where nothing is to be done."""
    logits = product.to(accumulation_dtype(product.dtype))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if soft_cap is None else (logits / soft_cap).tanh_() * soft_cap


def _through_cap_and_scale(gradient: Tensor, logits: Tensor, operand: HeadInput) -> Tensor:
    """Carry ``[b, V]`` from the logits back to the product; out of place, it may be shared."""
    if operand.soft_cap is not None:
        gradient = gradient * (1 - (logits / operand.soft_cap).square_())
    return gradient if operand.logit_scale == 1.0 else gradient * operand.logit_scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def trained_tensors(inputs: Sequence[HeadInput], rows: Sequence[Tensor]) -> list[Tensor]:
    """What gets a gradient, each tensor once."""
    tensors = [item.hidden for item in inputs] + [*rows]
    for item in inputs:
        tensors += [tensor for tensor in (item.weight, item.bias) if tensor is not None and item.train_head]
    return list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())


class Gradients:
    """Sums of gradients, one for each trained tensor among inputs and rows."""

    def __init__(self, inputs: Sequence[HeadInput], rows: Sequence[Tensor]) -> None:
        self._inputs, self._rows = inputs, rows
        self.tensors = trained_tensors(inputs, rows)
        self.trained_inputs = [index for index, item in enumerate(inputs) if trained_tensors([item], [])]
        self.trained_rows = [index for index, row in enumerate(rows) if row.requires_grad]
        by_rows = {id(tensor) for tensor in [*(item.hidden for item in inputs), *rows]}
        self._sums = {id(tensor): torch.zeros_like(tensor) for tensor in self.tensors if id(tensor) in by_rows}

    def carry_on(self, index: int, operand: HeadInput, chunk: slice, gradient: Tensor) -> None:
        """Add what follows from the gradient ``[n, V]`` over ``hidden @ weight.T + bias`` of one chunk."""
        item = self._inputs[index]
        if item.hidden.requires_grad:
            self._sums[id(item.hidden)][chunk] += gradient @ operand.weight
        if item.train_head and item.weight.requires_grad:
            key = id(item.weight)
            self._sums[key] = _add_product(self._sums.get(key), gradient.t(), operand.hidden[chunk])
        if item.train_head and item.bias is not None and item.bias.requires_grad:
            key = id(item.bias)
            self._sums[key] = self._sums.get(key, 0) + gradient.sum(0, dtype=accumulation_dtype(gradient.dtype))

    def add_row(self, index: int, block: slice, gradient: Tensor) -> None:
        """Add the gradient of one block of a row tensor, which may be given twice."""
        self._sums[id(self._rows[index])][block] += gradient

    def finished(self) -> list[Tensor]:
        """The gradients of ``tensors``, each in its tensor's dtype."""
        return [self._sums[id(tensor)].to(tensor.dtype) for tensor in self.tensors]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right`` in float32 (float64 stays), in the total's memory."""
    if total is None:
        return torch.mm(left, right).to(accumulation_dtype(left.dtype))
    if total.dtype == left.dtype:
        return total.addmm_(left, right)  # without a temporary of that size
    return total.add_(left @ right)


def attach_gradients(total: Tensor, gradients: Gradients) -> Tensor:
    """The finished ``total``, differentiable, with the finished gradients of the tensors that it was computed from."""
    attached: Tensor = _AttachGradients.apply(total, gradients.finished(), *gradients.tensors)
    return attached


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # A second backward through a retained graph needs them unscaled; else a copy of a head's gradient would only
        # cost time and memory.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return (None, None, *(scale(gradient, upstream) for gradient in ctx.saved_tensors))


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
