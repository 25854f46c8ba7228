"""Key-query matching by conditional transport, with a learned cost and learned plans.

Zheng & Zhou 2021, arXiv 2012.14100, as used for attention by Zhang et al. 2021 (Alignment Attention, arXiv 2110.12567)
and named as the ``ct`` variant of DSKD-CMA-GA (arXiv 2603.22056). With critic g and navigator f, within each example:

    c(q, k) = 1 - cos(g(q), g(k))            pi(k | q) = softmax_k s cos(f(q), f(k))     pi(q | k) = softmax_q (same)
    C = 1/2 mean_q sum_k pi(k | q) c(q, k) + 1/2 mean_k sum_q pi(q | k) c(q, k)
    max_g min_{f, s, P_q} C

One backward trains all: the critic's gradient is reversed, the navigator's is not, and neither depends on the term's
weight, which scales what reaches the queries.

What we do differently, and why:
- The published code puts the navigator behind the gradient reversal together with the critic, against the papers. Here
  only the critic maximises.
- The published code measures cost between hidden units with positions as coordinates, which needs equal lengths and
  counts padding. Here positions are the points, supervised ones only, and lengths are free.
- The published code trains neither critic nor navigator and has layers that nothing uses. Here every parameter learns.
- One critic and one navigator serve both directions, as in the papers; the published code has two of each.
- The navigator's affinity is a cosine times a learned factor s. A cosine alone, as in the published code, cannot leave
  [-1, 1], so its plans stay near uniform and pull every query to the mean of the keys.
- No dropout: noise in the critic's features would enter the cost itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize

from vocabridge.losses.cross_attention import Padding
from vocabridge.losses.transport import conditional_costs
from vocabridge.matching.config import TransportConfig
from vocabridge.matching.examples import MatchedExamples
from vocabridge.matching.layers import highway, reverse_gradient, scale_gradient

START_SHARPNESS = 10.0
"""The navigator's factor s at the start of training."""


class Critic(nn.Module):
    """Features in which cost is measured: a highway layer, linear, leaky ReLU 0.1, linear, unit length.

    ``x [N, F] -> [N, output_size]``, in float32 (float64 stays).
    """

    def __init__(self, num_features: int, config: TransportConfig):
        super().__init__()
        self.highway = nn.Linear(num_features, num_features)
        self.linear = nn.Linear(num_features, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)

    def forward(self, features: Tensor) -> Tensor:
        """Unit vectors, one per row."""
        mixed = highway(features.to(self.linear.weight.dtype), self.highway)
        return _unit(self.output(leaky_relu(self.linear(mixed), 0.1)))


class Navigator(nn.Module):
    """Features whose cosines say what goes where: linear, leaky ReLU 0.1, linear, unit length; and the factor s.

    ``x [N, F] -> [N, output_size]``, in float32 (float64 stays).
    """

    def __init__(self, num_features: int, config: TransportConfig):
        super().__init__()
        self.linear = nn.Linear(num_features, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.output_size)
        self.log_sharpness = nn.Parameter(torch.full((1,), math.log(START_SHARPNESS)))

    def forward(self, features: Tensor) -> Tensor:
        """Unit vectors, one per row."""
        hidden = leaky_relu(self.linear(features.to(self.linear.weight.dtype)), 0.1)
        return _unit(self.output(hidden))


@dataclass(frozen=True, slots=True)
class TransportSums:
    """Sums over the micro-batch's positions; only the costs carry gradients."""

    query_cost: Tensor
    """Half the expected cost of sending each query to the keys."""
    key_cost: Tensor
    """Half the expected cost of sending each key to the queries."""
    query_entropy: Tensor
    """Of each query's plan over the keys, in nats."""
    key_entropy: Tensor
    uniform_cost: Tensor
    """Half the cost under uniform plans, summed over queries: how far apart the critic sees the two samples."""


class ConditionalTransport(nn.Module):
    """Critic and navigator, and the costs between queries and keys under them."""

    def __init__(self, num_features: int, config: TransportConfig):
        super().__init__()
        self.critic = Critic(num_features, config)
        self.navigator = Navigator(num_features, config)

    def forward(self, examples: MatchedExamples, *, weight: float) -> TransportSums:
        """Cost sums of both directions; the queries get ``weight`` times their gradient.

        The critic's features are reversed twice: after the critic, which turns the gradient of its parameters, and
        before it, which turns the gradient of the queries back.
        """
        queries = _elementwise_unit(scale_gradient(examples.queries, weight))
        keys = _elementwise_unit(examples.keys)
        seen = torch.cat([reverse_gradient(queries, 1.0), keys])
        features = reverse_gradient(self.critic(seen), 1.0)
        guides = self.navigator(torch.cat([queries, keys]))
        x = Padding.of(examples.query_rows, examples.num_examples)
        y = Padding.of(examples.key_rows, examples.num_examples)
        num_queries = queries.shape[0]
        with torch.autocast(queries.device.type, enabled=False):
            cost = 1 - _products(features, num_queries, x, y)
            affinity = self.navigator.log_sharpness.exp() * _products(guides, num_queries, x, y)
        costs = conditional_costs(cost, affinity, x_mask=x.mask, y_mask=y.mask)
        uniform = (cost.detach() * y.mask[:, None, :]).sum(-1) / examples.num_keys[:, None]
        return TransportSums(
            query_cost=costs.x_costs.sum() / 2,
            key_cost=costs.y_costs.sum() / 2,
            query_entropy=costs.x_entropies.sum(),
            key_entropy=costs.y_entropies.sum(),
            uniform_cost=(uniform * x.mask).sum() / 2,
        )


def _products(features: Tensor, num_queries: int, x: Padding, y: Padding) -> Tensor:
    """``[E, n, m]`` inner products of the features ``[N + M, K]`` of queries and keys within each example."""
    return x.pad(features[:num_queries]) @ y.pad(features[num_queries:]).transpose(1, 2)


def _elementwise_unit(values: Tensor) -> Tensor:
    """Vectors of norm about 1 to elements of size about 1, for which linear layers are initialised."""
    return values * values.shape[-1] ** 0.5


def _unit(features: Tensor) -> Tensor:
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
