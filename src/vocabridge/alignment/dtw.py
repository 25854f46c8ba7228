"""Dynamic time warping: the cheapest monotone pairing of two sequences in which every element has a partner."""

from __future__ import annotations

import numpy as np


def warping_path(costs: np.ndarray) -> np.ndarray:
    """Pairs on the path of least total cost from the first pair of elements to the last.

    Each step advances the first sequence, the second or both. Of equally cheap predecessors the pair before both is
    taken, then the one before in the first sequence. One vectorised pass per row, so pass the shorter sequence first
    where the ties do not matter.

    Args:
        costs: ``[n, m]``, at least 0, of every pair; integers keep ties exact.

    Returns:
        int64 ``[k, 2]``, ascending, max(n, m) <= k < n + m; no pair if either sequence is empty.
    """
    num_rows, num_columns = costs.shape
    if not num_rows or not num_columns:
        return np.empty((0, 2), dtype=np.int64)
    totals = _total_costs(costs)
    row, column = num_rows - 1, num_columns - 1
    path = [(row, column)]
    while row or column:
        if row and column:
            before = (totals[row - 1, column - 1], totals[row - 1, column], totals[row, column - 1])
            step = before.index(min(before))
        else:
            step = 1 if row else 2
        row, column = row - (step != 2), column - (step != 1)
        path.append((row, column))
    return np.array(path[::-1], dtype=np.int64)


def _total_costs(costs: np.ndarray) -> np.ndarray:
    """``[n, m]``: cost of the cheapest path from the first pair to each.

    Within a row the path enters from the row above at some column k and goes right to column j, so with S the running
    sum of the row's costs the total is S_j + min_(k <= j) (entry_k - S_(k - 1)).
    """
    totals = np.empty(costs.shape, dtype=np.promote_types(costs.dtype, np.int64))
    totals[0] = np.cumsum(costs[0], dtype=totals.dtype)
    for row in range(1, len(costs)):
        entry = totals[row - 1].copy()
        np.minimum(entry[1:], totals[row - 1, :-1], out=entry[1:])
        sums = np.cumsum(costs[row], dtype=totals.dtype)
        totals[row] = sums + np.minimum.accumulate(entry - (sums - costs[row]))
    return totals
