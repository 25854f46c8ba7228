import random

import pytest
import torch

from vocabridge.losses.chunk_rows import chunk_rows, segment_mean, segment_sum


def random_side(rng, num_chunks):
    """Chunk ids of one side of one example: each chunk one to three times, tokens without a chunk anywhere."""
    ids = []
    for chunk in range(num_chunks):
        ids += [-1] * (rng.random() < 0.2) + [chunk] * rng.randint(1, 3)
    return ids + [-1] * (rng.random() < 0.3)


def padded(sides):
    longest = max(map(len, sides), default=0)
    return torch.tensor([side + [-1] * (longest - len(side)) for side in sides], dtype=torch.long)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_by_loops(seed):
    rng = random.Random(seed)
    numbers = [rng.choice([0, 1, 2, 5]) for _ in range(rng.randint(1, 4))]
    sides = [[random_side(rng, number) for number in numbers] for _ in range(2)]
    rows = [torch.tensor([i for i, side in enumerate(each) for _ in side], dtype=torch.long) for each in sides]
    result = chunk_rows(rows[0], padded(sides[0]), rows[1], padded(sides[1]))
    assert result.num_chunks == sum(numbers)
    assert result.rows.tolist() == [i for i, number in enumerate(numbers) for _ in range(number)]
    for ranges, examples in ((result.student, sides[0]), (result.teacher, sides[1])):
        flat = [(i, chunk) for i, side in enumerate(examples) for chunk in side]
        order = {key: n for n, key in enumerate((i, c) for i, number in enumerate(numbers) for c in range(number))}
        assert ranges.chunks.tolist() == [order.get(key, -1) for key in flat]
        for key, number in order.items():
            positions = [n for n, other in enumerate(flat) if other == key]
            assert positions == list(range(int(ranges.starts[number]), int(ranges.ends[number])))
            assert int(ranges.last[number]) == positions[-1]
    expected = [
        len([c for c in sides[0][i] if c == chunk]) == len([c for c in sides[1][i] if c == chunk]) == 1
        for i, number in enumerate(numbers)
        for chunk in range(number)
    ]
    assert result.one_to_one.tolist() == expected
    assert result.covered == sum(chunk >= 0 for side in sides[0] for chunk in side)


def test_segment_sums_leave_out_what_is_in_no_segment():
    values = torch.arange(8.0).view(4, 2).requires_grad_()
    segments = torch.tensor([1, -1, 1, 0])
    assert segment_sum(values, segments, 3).tolist() == [[6.0, 7.0], [4.0, 6.0], [0.0, 0.0]]
    means = segment_mean(values, segments, 3)
    assert means.tolist() == [[6.0, 7.0], [2.0, 3.0], [0.0, 0.0]]
    means.sum().backward()
    assert values.grad.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
