"""One side's forward pass: last hidden states at the supervised positions, and no logits.

Axes: B rows, L tokens, N supervised positions of the whole batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from vocabridge.errors import UserError
from vocabridge.models.capture import NO_LAYERS, CapturedLayers, LayerRecorder, LayerRequest
from vocabridge.models.heads import OutputHead, base_model, output_head

IGNORE_INDEX = -100

# The model rounds its logits to its own dtype, we do not; relative to the largest logit.
_HEAD_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True, eq=False)
class SupervisedTokens:
    """The token ids of the packed supervised positions of a batch, ordered by row, then position."""

    input_ids: torch.Tensor
    """``[N]`` the token read at position t - 1."""
    labels: torch.Tensor
    """``[N]`` the token at position t."""
    rows: torch.Tensor
    """``[N]`` row of the batch that the position belongs to, int64."""


@dataclass(frozen=True, slots=True, eq=False)
class SideForward:
    """What an objective sees of one model: packed supervised positions, ordered by row, then position."""

    hidden_states: torch.Tensor
    """``[N, H]`` last hidden state at position t - 1, which predicts the label at t."""
    input_ids: torch.Tensor
    """``[N]`` the token read at position t - 1."""
    labels: torch.Tensor
    """``[N]`` the token at position t."""
    rows: torch.Tensor
    """``[N]`` row of the batch that the position belongs to, int64."""
    head: OutputHead
    """From hidden states to logits."""
    embedding: nn.Module
    """The input embeddings; call it, do not index its weight: Gemma's scales by sqrt(H)."""
    layers: CapturedLayers = field(default_factory=CapturedLayers)
    """Of the layers that were asked for."""

    @property
    def tokens(self) -> SupervisedTokens:
        """The token ids alone."""
        return SupervisedTokens(self.input_ids, self.labels, self.rows)


def supervised_tokens(input_ids: torch.Tensor, labels: torch.Tensor) -> SupervisedTokens:
    """The supervised positions of ``input_ids [B, L]`` and ``labels [B, L]``, as :func:`forward_side` packs them."""
    rows, previous = _supervised_positions(labels)
    return SupervisedTokens(input_ids[rows, previous], labels[rows, previous + 1], rows)


def forward_side(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    layers: LayerRequest = NO_LAYERS,
) -> SideForward:
    """Run the trunk and pack its supervised positions; the head is left to the objective.

    Position ids come from the attention mask, so the side on which a row is padded changes nothing.

    Args:
        model: a causal language model, wrapped by PEFT or not.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 1 on tokens, 0 on padding.
        labels: ``[B, L]``, -100 outside the response; ``labels[:, 0]`` is always -100.
        vocab_size: rows of the head to keep; see :func:`output_head`.
        layers: inner layers to capture on the way.

    Raises:
        UserError: the model does not let these layers be captured.
    """
    base = base_model(model)
    rows, previous = _supervised_positions(labels)
    with LayerRecorder(model, layers, rows, previous) as recorder:
        outputs = base.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
    hidden_states = outputs.last_hidden_state[rows, previous]
    return SideForward(
        hidden_states=hidden_states,
        input_ids=input_ids[rows, previous],
        labels=labels[rows, previous + 1],
        rows=rows,
        head=output_head(model, vocab_size),
        embedding=base.get_input_embeddings(),
        layers=recorder.captured(hidden_states),
    )


def teacher_side(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    layers: LayerRequest = NO_LAYERS,
) -> SideForward:
    """:func:`forward_side` of a frozen model: no gradient, and dropout must be off.

    Not ``torch.inference_mode``: the student's graph saves these hidden states as constants, which autograd refuses of
    inference tensors, and it is no faster (Gemma-3-270M, 4 x 256 tokens on one core: 3.04 s, and 3.01 s so).
    """
    assert not model.training, "the teacher must be in eval mode: dropout would make its targets random"
    with torch.no_grad():
        return forward_side(model, input_ids, attention_mask, labels, vocab_size=vocab_size, layers=layers)


def _supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position t - 1 of every label at t that counts."""
    rows, previous = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, previous


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """``[B, L]`` index of each token among its row's tokens; padding gets some valid index."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_head(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
) -> float:
    """Start-up check that our head on our hidden states gives the model's own logits, on one small batch.

    Costs two forwards with full logits ``[B, L, V]``, so pass a row or two.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        UserError: the logits differ (the model does something to them that we do not know), or the model looks ahead.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _check_head(model, input_ids, attention_mask, labels, vocab_size=vocab_size)
    finally:
        model.train(was_training)


def _check_head(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None,
) -> float:
    base = base_model(model)
    name = type(base).__name__ + (f" ({base.name_or_path})" if base.name_or_path else "")
    side = forward_side(model, input_ids, attention_mask, labels, vocab_size=vocab_size)
    assert len(side.labels), "check_head needs at least one supervised position"
    logits = side.head(side.hidden_states)
    own = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    ).logits
    own = own[_supervised_positions(labels)][:, : logits.shape[-1]].to(logits.dtype)
    if not torch.isfinite(own).all():
        raise UserError(f"{name}: the model's own logits are not finite; its weights are broken, load others.")
    difference = float((logits - own).abs().max() / own.abs().max().clamp(min=1e-6))
    tolerance = _HEAD_TOLERANCE[side.head.weight.dtype]
    if not difference <= tolerance:  # also true for NaN
        raise UserError(
            f"{name}: logits from the output head differ from the model's own by {difference:.2g} of the largest logit "
            f"(allowed {tolerance:.0e}), so the model changes its logits in a way that vocabridge does not know; use "
            "another model or add the rule to vocabridge.models.heads.output_head."
        )
    _check_causal(model, input_ids, attention_mask, side.head, name=name, tolerance=tolerance)
    return difference


def _check_causal(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    head: OutputHead,
    *,
    name: str,
    tolerance: float,
) -> None:
    """An encoder loaded as a decoder (BERT) sees the token it should predict; its loss would fall to nothing."""
    ids = input_ids[:1][attention_mask[:1].bool()][None]
    if ids.shape[1] < 2:
        return
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % head.weight.shape[0]
    before, after = (
        base_model(model)(input_ids=each, use_cache=False).logits[0, :-1].float() for each in (ids, changed)
    )
    if float((before - after).abs().max()) > tolerance * float(before.abs().max()):
        raise UserError(
            f"{name} looks ahead: changing the last token of a text changes the logits before it, so it is not a "
            "causal language model; choose a decoder-only model."
        )
