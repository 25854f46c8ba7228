"""Adversarial key-query matching (DSKD-CMA-GA, arXiv 2603.22056; after Alignment Attention, arXiv 2110.12567).

    max_D min_{P_q}  E_q[log D(q)] + E_k[log(1 - D(k))]

as one minimisation by gradient reversal: D descends on BCE(D(q), 1) + BCE(D(k), 0) while the gradient that reaches the
queries is reversed and scaled by the term's weight. D therefore learns at full rate whatever the weight is.

Unlike the published code: D is trained (there it is in no optimizer), only supervised positions enter (there padding
and prompts too), and the means over queries and keys keep their size whatever the number of tokens (there the term is
divided by the token count once more). ``train_discriminator: false`` and ``positions: all`` bring back the first two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from vocabridge.matching.config import GanConfig
from vocabridge.matching.layers import highway, reverse_gradient


class Discriminator(nn.Module):
    """Tells queries (high logit) from keys: a highway layer, then linear, leaky ReLU 0.1, dropout, linear to 1.

    ``x [N, F] -> logits [N]``.
    """

    def __init__(self, num_features: int, config: GanConfig):
        super().__init__()
        wrap = spectral_norm if config.spectral_norm else lambda layer: layer
        self.highway = wrap(nn.Linear(num_features, num_features))
        self.linear = wrap(nn.Linear(num_features, config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.output = wrap(nn.Linear(config.hidden_size, 1))
        self.requires_grad_(config.train_discriminator)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def forward(self, features: Tensor) -> Tensor:
        """Logit of "is a query" per row, in the parameters' dtype."""
        mixed = highway(features, self.highway)
        return self.output(self.dropout(leaky_relu(self.linear(mixed), 0.1))).squeeze(-1)


@dataclass(frozen=True, slots=True)
class GanSums:
    """Sums over the micro-batch's positions, which carry gradients, and which of them are told right."""

    query_loss: Tensor
    key_loss: Tensor
    queries_right: Tensor
    """``[N]`` bool."""
    keys_right: Tensor
    """``[M]`` bool."""


class GanMatching(nn.Module):
    """The discriminator together with the way it and the query projector are updated."""

    def __init__(self, num_features: int, config: GanConfig):
        super().__init__()
        self.config = config
        self.discriminator = Discriminator(num_features, config)
        self._step = 0

    def set_step(self, step: int) -> None:
        """Number of finished optimizer steps; decides whose turn it is under alternating updates."""
        self._step = step

    def forward(self, queries: Tensor, keys: Tensor, *, weight: float) -> GanSums:
        """BCE sums over ``queries [N, F]`` (target 1) and ``keys [M, F]`` (target 0), in nats.

        Args:
            queries: get the gradient of ``weight * BCE``, reversed.
            keys: constants of the frozen teacher; get no gradient.
            weight: of the term on the query projector; the discriminator always learns at full rate.
        """
        smooth = self.config.label_smoothing
        trains_discriminator, trains_queries = self._turn()
        seen = reverse_gradient(queries, weight) if trains_queries else queries.detach()
        query_logits, key_logits = self._discriminate(seen, keys.detach(), trains_discriminator)
        query_loss = binary_cross_entropy_with_logits(
            query_logits, torch.full_like(query_logits, 1 - smooth), reduction="sum"
        )
        key_loss = binary_cross_entropy_with_logits(key_logits, torch.full_like(key_logits, smooth), reduction="sum")
        if self.config.r1_penalty and trains_discriminator and torch.is_grad_enabled():
            key_loss = key_loss + self.config.r1_penalty * self._squared_gradient(keys.detach())
        return GanSums(query_loss, key_loss, query_logits > 0, key_logits <= 0)

    def _turn(self) -> tuple[bool, bool]:
        if self.config.updates == "reversal":
            return True, True
        query_turn = self._step % (self.config.discriminator_steps + 1) == self.config.discriminator_steps
        return not query_turn, query_turn

    def _discriminate(self, queries: Tensor, keys: Tensor, trains_discriminator: bool) -> tuple[Tensor, Tensor]:
        together = torch.cat([queries, keys]).to(self.discriminator.dtype)
        if trains_discriminator:
            logits = self.discriminator(together)
        else:
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            logits = torch.func.functional_call(self.discriminator, frozen, (together,))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits[: queries.shape[0]], logits[queries.shape[0] :]

    def _squared_gradient(self, keys: Tensor) -> Tensor:
        points = keys.to(self.discriminator.dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.discriminator(points).sum(), points, create_graph=True)
        return gradient.float().square().sum()
