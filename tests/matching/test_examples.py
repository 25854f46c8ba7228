import math

import numpy as np
import pytest
import torch

from vocabridge.matching.examples import MatchedExamples


def select(queries, keys, query_counts, key_counts):
    def rows(counts):
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    return MatchedExamples.select(
        queries, keys, query_rows=rows(query_counts), key_rows=rows(key_counts), num_examples=len(query_counts)
    )


def test_examples_short_of_two_positions_on_a_side_are_left_out():
    queries, keys = torch.arange(9.0).reshape(9, 1), torch.ones(12, 1)
    examples = select(queries, keys, [3, 0, 1, 2, 3], [2, 4, 3, 2, 1])
    assert examples.num_examples == 2
    assert examples.queries.flatten().tolist() == [0, 1, 2, 4, 5]
    assert examples.query_rows.tolist() == [0, 0, 0, 1, 1]
    assert examples.key_rows.tolist() == [0, 0, 1, 1]
    assert [(len(q), len(k)) for q, k in examples.pairs()] == [(3, 2), (2, 2)]
    assert (examples.num_queries.tolist(), examples.num_keys.tolist()) == ([3, 2], [2, 2])


def test_the_unit_is_the_root_mean_square_norm_of_the_examples_keys():
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]])
    queries = torch.ones(4, 2, requires_grad=True)
    examples = select(queries, keys.requires_grad_(), [2, 2], [2, 2])
    unit = math.sqrt((25 + 1) / 2)
    assert examples.queries[:, 0].tolist() == pytest.approx([1 / unit, 1 / unit, 0.5, 0.5])
    assert examples.keys[0].tolist() == pytest.approx([3 / unit, 4 / unit])
    assert not examples.keys.requires_grad
    examples.queries.sum().backward()
    assert queries.grad[:, 0].tolist() == pytest.approx([1 / unit, 1 / unit, 0.5, 0.5])


def test_keys_of_zeros_do_not_divide_by_zero():
    examples = select(torch.zeros(2, 3), torch.zeros(2, 3), [2], [2])
    assert (examples.queries == 0).all()
    assert all(torch.isfinite(ratio.sum) for ratio in examples.diagnostics().values())


def test_dtypes():
    for given, computed in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        examples = select(torch.ones(2, 3, dtype=given), torch.ones(2, 3), [2], [2])
        assert examples.queries.dtype == examples.keys.dtype == computed


def test_diagnostics_match_numpy():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(7, 4, generator=generator, dtype=torch.float64) * 0.1 + 1
    keys = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    cosines, ratios = 0.0, 0.0
    for q, k in [(queries[:3], keys[:5]), (queries[4:], keys[6:])]:  # the middle example has one position
        q, k = q.numpy(), k.numpy()
        means = q.mean(0), k.mean(0)
        cosines += len(q) * means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
        ratios += len(q) * math.sqrt(q.var(0).sum() / k.var(0).sum())
    metrics = select(queries.requires_grad_(), keys, [3, 1, 3], [5, 1, 2]).diagnostics()
    assert {name: int(ratio.count) for name, ratio in metrics.items()} == {
        "matching_mean_cosine": 6,
        "matching_spread_ratio": 6,
    }
    assert float(metrics["matching_mean_cosine"].sum) == pytest.approx(cosines)
    assert float(metrics["matching_spread_ratio"].sum) == pytest.approx(ratios)
    assert not metrics["matching_spread_ratio"].sum.requires_grad
