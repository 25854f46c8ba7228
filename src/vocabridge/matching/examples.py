"""The examples of a micro-batch whose queries and keys can be matched, each taken by itself.

Statistics are taken within an example, never over the micro-batch: the sum over examples is then the same however the
examples are split over micro-batches and ranks, and queries are asked to lie like the keys of their own text, which is
what attention compares them with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vocabridge.losses.chunk_rows import segment_mean
from vocabridge.losses.terms import Ratio

MIN_POSITIONS = 2
"""An example with fewer queries or keys has no distribution to match and is left out."""


@dataclass(frozen=True, slots=True)
class MatchedExamples:
    """Queries ``[N', F]`` and keys ``[M', F]`` of the examples left, packed in their order.

    Both are divided by the root mean square norm of their example's keys (a constant), so that every distance, and
    with it the term's weight, means the same whatever the scale of the embeddings.
    """

    queries: Tensor
    keys: Tensor
    """Constants."""
    query_rows: Tensor
    """[N'] example of each query, counted among those left."""
    key_rows: Tensor
    """[M']"""
    num_queries: Tensor
    """[E] queries of each example left."""
    num_keys: Tensor
    """[E]"""

    @classmethod
    def select(
        cls, queries: Tensor, keys: Tensor, *, query_rows: Tensor, key_rows: Tensor, num_examples: int
    ) -> MatchedExamples:
        """Those of ``num_examples`` examples with :data:`MIN_POSITIONS` queries and keys, in fp32 (fp64 stays).

        Args:
            queries: ``[N, F]``.
            keys: ``[M, F]``.
            query_rows: ``[N]`` example of each query, sorted.
            key_rows: ``[M]`` example of each key, sorted.
            num_examples: in the micro-batch.
        """
        num_queries = torch.bincount(query_rows, minlength=num_examples)
        num_keys = torch.bincount(key_rows, minlength=num_examples)
        left = torch.minimum(num_queries, num_keys) >= MIN_POSITIONS
        index = left.cumsum(0) - 1
        kept_queries, kept_keys = left[query_rows], left[key_rows]
        query_rows, key_rows = index[query_rows[kept_queries]], index[key_rows[kept_keys]]
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        queries, keys = queries[kept_queries].to(dtype), keys[kept_keys].detach().to(dtype)
        unit = segment_mean(keys.square().sum(-1), key_rows, num_examples).sqrt().clamp(min=1e-12)[:, None]
        return cls(
            queries / unit[query_rows], keys / unit[key_rows], query_rows, key_rows, num_queries[left], num_keys[left]
        )

    @property
    def num_examples(self) -> int:
        """E, the number of examples left."""
        return self.num_queries.shape[0]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Queries ``[n, F]`` and keys ``[m, F]`` of each example."""
        queries = self.queries.split(self.num_queries.tolist())
        return list(zip(queries, self.keys.split(self.num_keys.tolist()), strict=True))

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Ratio]:
        """Means over queries of two numbers of their example.

        ``matching_mean_cosine``: cosine between the mean query and the mean key. ``matching_spread_ratio``: root mean
        square distance of the queries from their mean over that of the keys; towards 0 the queries collapse.
        """
        query_means, query_spreads = _moments(self.queries, self.query_rows, self.num_examples)
        key_means, key_spreads = _moments(self.keys, self.key_rows, self.num_examples)
        cosines = torch.cosine_similarity(query_means, key_means, dim=-1)
        ratios = query_spreads / key_spreads.clamp(min=1e-6)
        count = self.num_queries.sum()
        return {
            "matching_mean_cosine": Ratio((cosines * self.num_queries).sum(), count),
            "matching_spread_ratio": Ratio((ratios * self.num_queries).sum(), count),
        }


def _moments(values: Tensor, rows: Tensor, num_examples: int) -> tuple[Tensor, Tensor]:
    """Mean ``[E, F]`` and root mean square distance from it ``[E]`` by example."""
    means = segment_mean(values, rows, num_examples)
    return means, segment_mean((values - means[rows]).square().sum(-1), rows, num_examples).sqrt()
