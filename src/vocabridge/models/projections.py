"""Where the query, key and value projections of a decoder layer lie, and how to read them as heads.

Axes: N supervised positions, A query heads, G key-value heads (a divisor of A), D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vocabridge.errors import UserError

_SEPARATE = ("q_proj", "k_proj", "v_proj")

_Layout = Literal["separate", "blocks", "per_head"]

_FUSED: dict[str, tuple[str, _Layout]] = {
    "gpt2": ("c_attn", "blocks"),
    "phi3": ("qkv_proj", "blocks"),
    "gpt_neox": ("query_key_value", "per_head"),
    "bloom": ("query_key_value", "per_head"),
}
"""By model type, because one name has many layouts: the projection that gives all three, as ``[q | k | v]`` or as
``[q | k | v]`` of each head in turn."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionProjections:
    """What one layer's projections give at the supervised positions, before rotary embedding and query-key norms."""

    query: Tensor
    """``[N, A, D]``"""
    key: Tensor
    """``[N, G, D]``"""
    value: Tensor
    """``[N, G, D]``"""


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionSite:
    """The projections of one layer."""

    modules: Mapping[str, nn.Module]
    """By name; their outputs are ``[B, L, width]``."""
    layout: _Layout
    num_heads: int
    """A."""
    head_dim: int
    """D."""
    model_type: str

    def read(self, outputs: Mapping[str, Tensor]) -> AttentionProjections:
        """Heads from the packed outputs ``[N, width]`` of ``modules``, by name.

        Raises:
            UserError: a width is not what the model's config says.
        """
        heads = [self._heads(outputs[name]) for name in self.modules]
        if self.layout == "per_head":
            heads = list(heads[0].unflatten(1, (-1, 3)).unbind(2))
        elif self.layout == "blocks":
            num_groups = (heads[0].shape[1] - self.num_heads) // 2
            heads = list(heads[0].split([self.num_heads, num_groups, num_groups], dim=1))
        query, key, value = heads
        if query.shape[1] != self.num_heads or self.num_heads % key.shape[1] or key.shape != value.shape:
            raise self._unknown(f"to {query.shape[1]}, {key.shape[1]} and {value.shape[1]} heads")
        return AttentionProjections(query, key, value)

    def _heads(self, states: Tensor) -> Tensor:
        """``[N, width] -> [N, heads, D]``."""
        if states.shape[-1] % self.head_dim or (self.layout == "per_head" and states.shape[-1] % (3 * self.head_dim)):
            raise self._unknown(f"to width {states.shape[-1]}")
        return states.unflatten(-1, (-1, self.head_dim))

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"model type '{self.model_type}' projects {what}, where its config says {self.num_heads} query heads of "
            f"width {self.head_dim}; vocabridge cannot read its attention, so take an objective that does not."
        )


def find_projections(layer: nn.Module, config: Any) -> ProjectionSite:
    """The projections of a decoder layer; adapters around them are part of them.

    Args:
        layer: one decoder layer.
        config: the text config of its model.

    Raises:
        UserError: the layer has none that we know.
    """
    fused_name, layout = _FUSED.get(config.model_type, (None, None))
    for module in layer.modules():
        children = dict(module.named_children())
        if fused_name is not None and layout is not None and fused_name in children:
            return _site({fused_name: children[fused_name]}, layout, module, config)
        if all(name in children for name in _SEPARATE):
            return _site({name: children[name] for name in _SEPARATE}, "separate", module, config)
    raise UserError(
        f"model type '{config.model_type}': layer of class {type(layer).__name__} has no query, key and value "
        "projections that vocabridge knows; choose another layer, or an objective that reads no attention."
    )


def head_dim(config: Any, attention: nn.Module | None = None) -> int:
    """D; the attention module's own word comes first, because the layers of some models differ."""
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _site(modules: Mapping[str, nn.Module], layout: _Layout, attention: nn.Module, config: Any) -> ProjectionSite:
    return ProjectionSite(
        modules, layout, config.num_attention_heads, head_dim(config, attention), str(config.model_type)
    )
