"""Hidden states and attention projections of chosen layers, taken during a forward at the supervised positions only.

Layers count from 1 to n, the first and the last decoder layer. Hidden state k is what layer k gives to the next one,
hidden state 0 the embeddings that layer 1 reads, hidden state n the last one after the final norm; attention k is that
of layer k. A recipe may count from the end: -1 is n.

Axes: B rows, L tokens, N supervised positions of the whole batch, H width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from vocabridge.errors import UserError
from vocabridge.models.heads import base_model
from vocabridge.models.projections import AttentionProjections, ProjectionSite, find_projections, head_dim

_HIDDEN = "hidden state"


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """Which layers a forward shall capture, by their non-negative numbers; see :func:`resolve_layer`."""

    hidden_states: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hidden_states or self.attention)

    def __or__(self, other: LayerRequest) -> LayerRequest:
        """What two terms of one composition need together."""
        return LayerRequest(
            tuple(sorted({*self.hidden_states, *other.hidden_states})),
            tuple(sorted({*self.attention, *other.attention})),
        )


NO_LAYERS = LayerRequest()


@dataclass(frozen=True, slots=True, eq=False)
class CapturedLayers:
    """Packed supervised positions of the layers that were asked for, by layer; empty when none were."""

    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    """``[N, H]`` each, at position t - 1, which predicts the label at t."""
    attention: Mapping[int, AttentionProjections] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrunkShape:
    """Number and widths of a model's layers."""

    num_layers: int
    hidden_size: int
    """Width of the hidden states 0 to n - 1."""
    last_hidden_size: int
    """Width of hidden state n; OPT-350m's differs."""
    attention_size: int | None
    """Number of query heads times the width of one; None where there is no attention (Mamba)."""

    def width(self, layer: int) -> int:
        """H of hidden state ``layer`` (non-negative)."""
        return self.last_hidden_size if layer == self.num_layers else self.hidden_size


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has embeddings for; None where they are computed (rotary, ALiBi), without an end."""
    base = base_model(model)
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    tokens = base.get_input_embeddings()
    tables = (module for module in base.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    # OPT's table begins with two rows for padding.
    return most if most and any(most <= table.num_embeddings <= most + 2 for table in tables) else None


def trunk_shape(model: nn.Module) -> TrunkShape:
    """Shape of a causal language model, wrapped by PEFT or not."""
    base = base_model(model)
    config = base.config.get_text_config()
    embedding = base.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    num_heads = getattr(config, "num_attention_heads", None)
    return TrunkShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        last_hidden_size=embedding.embedding_dim,
        attention_size=num_heads * head_dim(config) if num_heads else None,
    )


def resolve_layer(layer: int, num_layers: int, *, first: Literal[0, 1], where: str) -> int:
    """The non-negative number of a layer that a recipe names.

    Args:
        layer: as written; negative counts from the end.
        num_layers: n.
        first: the smallest number there is, 0 for hidden states, 1 for attention.
        where: what the message names, such as ``objective hidden_state, layers: student layer``.

    Raises:
        UserError: there is no such layer.
    """
    resolved = layer + num_layers + 1 if layer < 0 else layer
    if not first <= resolved <= num_layers:
        raise UserError(
            f"{where} {layer} does not exist: the model has {num_layers} layers; give a number from {first} to "
            f"{num_layers}, or from -1 (the last layer) down to {first - num_layers - 1}."
        )
    return resolved


def check_layers(model: nn.Module, request: LayerRequest) -> None:
    """Start-up check that the model is built in a way that lets the layers be captured; runs nothing.

    Raises:
        UserError: its layers or their projections are not where we know them.
    """
    base = base_model(model)
    layers = decoder_layers(base) if request else nn.ModuleList()
    for layer in request.attention:
        find_projections(layers[layer - 1], base.config.get_text_config())


class LayerRecorder:
    """Hooks that live for one forward and pack what they see at once; without a request there are none.

    Use as a context around the forward, then ask for :meth:`captured`.

    Args:
        model: a causal language model, wrapped by PEFT or not.
        request: the layers.
        rows: ``[N]`` row of each supervised position.
        positions: ``[N]`` position t - 1 of each.
    """

    def __init__(self, model: nn.Module, request: LayerRequest, rows: Tensor, positions: Tensor):
        self._base = base_model(model)
        self._request = request
        self._rows, self._positions = rows, positions
        self._sites: dict[int, ProjectionSite] = {}
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._stack = ExitStack()
        self._with_gradient = False

    def __enter__(self) -> LayerRecorder:
        self._with_gradient = torch.is_grad_enabled()
        layers = decoder_layers(self._base) if self._request else nn.ModuleList()
        for layer in self._request.hidden_states:
            if layer < len(layers):
                before = layers[layer].register_forward_pre_hook(self._before_layer(layer), with_kwargs=True)
                self._stack.callback(before.remove)
        for layer in self._request.attention:
            self._sites[layer] = find_projections(layers[layer - 1], self._base.config.get_text_config())
            for name, module in self._sites[layer].modules.items():
                self._stack.callback(module.register_forward_hook(self._after_projection(layer, name)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def captured(self, last_hidden_states: Tensor) -> CapturedLayers:
        """Everything that was asked for, after the forward.

        Args:
            last_hidden_states: ``[N, H]`` hidden state n.

        Raises:
            UserError: a layer did not run, or the model's projections have unexpected widths.
        """
        num_layers = self._base.config.get_text_config().num_hidden_layers
        return CapturedLayers(
            hidden_states={
                layer: last_hidden_states if layer == num_layers else self._taken(layer, _HIDDEN)
                for layer in self._request.hidden_states
            },
            attention={
                layer: site.read({name: self._taken(layer, name) for name in site.modules})
                for layer, site in self._sites.items()
            },
        )

    def _before_layer(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(layer, _HIDDEN, args[0] if args else kwargs["hidden_states"])

        return hook

    def _after_projection(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._take(layer, name, output)

        return hook

    def _take(self, layer: int, name: str, states: Tensor) -> None:
        """Pack ``states [B, L, width]``, of which nothing else is kept."""
        if states.dim() != 3:
            raise UserError(
                f"model type '{self._model_type}': {name} of layer {layer} has {states.dim()} dimensions instead of "
                "row, token and channel; take an objective that reads no inner layers."
            )
        if self._with_gradient and not torch.is_grad_enabled():
            raise UserError(
                "activation checkpointing with use_reentrant: true hides the inner layers from the objective; set "
                "activation_checkpointing_kwargs: {use_reentrant: false}."
            )
        # Inside a checkpointed layer, what autograd saves for this indexing must not count among the tensors that the
        # recomputation has to produce again: by then the hooks are gone.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            packed = states[self._rows.to(states.device), self._positions.to(states.device)]
            self._seen[layer, name] = packed.to(self._rows.device)

    def _taken(self, layer: int, name: str) -> Tensor:
        if (layer, name) not in self._seen:
            raise UserError(
                f"model type '{self._model_type}': {name} of layer {layer} was not computed (layers dropped at random, "
                "or states shared between layers); choose another layer."
            )
        return self._seen[layer, name]

    @property
    def _model_type(self) -> str:
        return str(self._base.config.get_text_config().model_type)


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The layers themselves, in order.

    Raises:
        UserError: they are not where we know them.
    """
    config = base.config.get_text_config()
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise UserError(
        f"model type '{config.model_type}' keeps its {config.num_hidden_layers} decoder layers in a way that "
        "vocabridge does not know; take an objective that reads no inner layers, and no training.shard_teacher."
    )
