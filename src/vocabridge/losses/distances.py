"""Distances between two samples of vectors, as training terms and as diagnostics.

Legend: ``x [n, d]`` and ``y [m, d]`` are samples of two distributions, say attention queries and keys. All distances
are computed in float32 (float64 stays), autocast or not, and are symmetric, zero for equal samples and differentiable
in both arguments.

A distance near zero says that the two samples lie alike, not that the right rows meet: read it next to the share of
attention that falls into the right chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the Gaussian kernels, times a median distance."""

MAX_REPORT_ROWS = 512
MAX_MEDIAN_ROWS = 512
TEST_SHARE = 0.4
"""Share of the groups that the two-sample classifier of a report is tested on."""


def mmd_squared(x: Tensor, y: Tensor, *, bandwidths: Sequence[float] | None = None) -> Tensor:
    """Squared maximum mean discrepancy under the mean of several Gaussian kernels, in [0, 2].

    The kernel is the mean over bandwidths b of ``exp(-|u - v|^2 / (2 b^2))``. The estimate is the biased one, which
    includes each point's kernel with itself: never negative, hence safe to minimise, but of the order of 1/n + 1/m for
    two different samples of one distribution.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.
        bandwidths: the b, in the units of the data; by default the median distance within the pooled sample (a constant
            to the gradient) times :data:`BANDWIDTH_FACTORS`.
    """
    x, y = _centred(x, y)
    if bandwidths is None:
        scales = _median_distance(torch.cat([x, y]).detach()) * x.new_tensor(BANDWIDTH_FACTORS)
    else:
        scales = x.new_tensor(bandwidths)
    kernels = _KernelMeans.of(x, y, scales)
    return kernels.within_x.mean() + kernels.within_y.mean() - 2 * kernels.between.mean()


def mmd_squared_by_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """``[K]`` squared maximum mean discrepancies, one for each of :data:`BANDWIDTH_FACTORS`; of y's own scale.

    The unit of the bandwidths is the median distance within ``y`` alone. While y stays as it is (keys over training),
    so do the kernels, and values of different moments can be compared; :func:`mmd_squared` widens its kernels with x.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.
    """
    x, y = _centred(x, y)
    kernels = _KernelMeans.of(x, y, _median_distance(y.detach()) * x.new_tensor(BANDWIDTH_FACTORS))
    return kernels.within_x + kernels.within_y - 2 * kernels.between


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, num_projections: int = 128, generator: torch.Generator | None = None
) -> Tensor:
    """Squared 2-Wasserstein distance of one-dimensional projections, mean over random unit directions.

    Exact for each direction also where n != m: the two quantile functions are step functions, integrated over the
    union of their steps.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.
        num_projections: number of directions.
        generator: source of the directions, on the device of ``x``.
    """
    x, y = _floats(x), _floats(y)
    directions = torch.randn(x.shape[1], num_projections, generator=generator, device=x.device, dtype=x.dtype)
    directions = directions / directions.norm(dim=0)
    with torch.autocast(x.device.type, enabled=False):
        sorted_x, sorted_y = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    n, m = len(x), len(y)
    steps = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
    ends = steps.unique()  # in units of 1 / (n m), so that equal steps are found exactly
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    gaps = sorted_x[starts // m] - sorted_y[starts // n]
    widths = (ends - starts).to(x.dtype) / (n * m)
    return (gaps.square() * widths.unsqueeze(1)).sum(0).mean()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Energy distance ``2 E|x - y| - E|x - x'| - E|y - y'|`` in the units of the data; its root is not taken."""
    x, y = _centred(x, y)

    def mean_distance(u: Tensor, v: Tensor) -> Tensor:
        # Through a matrix product the distance of a point to itself would be about 1e-3 of its norm, not 0.
        return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def coral_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the means plus squared Frobenius distance of the covariances (n - 1), 0 where both agree.

    After CORAL, Sun & Saenko 2016, arXiv 1607.01719, whose loss is the second part over 4 d^2. The means are included
    because covariances do not see a shift. Without the divisor both parts are of order 1 for samples of norm 1,
    whatever their dimension. The d x d covariances are never formed.

    Args:
        x: ``[n, d]``, n >= 2.
        y: ``[m, d]``, m >= 2.
    """
    x, y = _floats(x), _floats(y)
    x_mean, y_mean = x.mean(0), y.mean(0)
    # |X^T X|_F = |X X^T|_F, and <X^T X, Y^T Y>_F = |X Y^T|_F^2: n x m matrices instead of d x d ones.
    x, y = (x - x_mean) / math.sqrt(len(x) - 1), (y - y_mean) / math.sqrt(len(y) - 1)
    with torch.autocast(x.device.type, enabled=False):
        within = (x @ x.t()).square().sum() + (y @ y.t()).square().sum()
        covariances = within - 2 * (x @ y.t()).square().sum()
    return (x_mean - y_mean).square().sum() + covariances


def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between the mean of ``x`` and the mean of ``y``: a similarity in [-1, 1], blind to all but the means."""
    return torch.cosine_similarity(_floats(x).mean(0), _floats(y).mean(0), dim=0)


def classifier_two_sample(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, seed: int) -> float:
    """Accuracy with which a logistic regression tells held-out rows of the two samples apart; 0.5 is chance.

    The features are standardised. In both splits the larger side is cut, at random by ``seed``, to the size of the
    smaller one, so the accuracy is balanced.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(seed)

    def labelled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        size = min(len(x), len(y))
        rows = torch.cat([_subsample(x, size, generator), _subsample(y, size, generator)])
        return rows.detach().double().cpu(), torch.arange(2).repeat_interleave(size)

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    features, classes = labelled(x_train, y_train)
    classifier.fit(features.numpy(), classes.numpy())
    features, classes = labelled(x_test, y_test)
    return float(classifier.score(features.numpy(), classes.numpy()))


@torch.no_grad()
def distribution_report(x: Tensor, y: Tensor, *, x_groups: Tensor, y_groups: Tensor, seed: int = 0) -> dict[str, float]:
    """All distances between two samples, each side cut at random to at most :data:`MAX_REPORT_ROWS` rows.

    Args:
        x: ``[n, d]``.
        y: ``[m, d]``.
        x_groups: ``[n]`` the example that each row comes from. The two-sample classifier is tested on examples that it
            was not trained on, since rows of one example resemble each other.
        y_groups: ``[m]`` the same for ``y``.
        seed: seed of the cut, the split and the projections; the report is a function of the arguments alone.

    Returns:
        ``mmd_squared``, ``mmd_squared_x0.25`` to ``mmd_squared_x4`` (of :func:`mmd_squared_by_bandwidth`),
        ``sliced_wasserstein``, ``energy_distance``, ``mean_cosine`` and ``two_sample_accuracy``, the last NaN where a
        split lacks rows of a side.
    """
    generator = torch.Generator().manual_seed(seed)
    x, x_groups = _report_rows(x, x_groups, generator)
    y, y_groups = _report_rows(y, y_groups, generator)
    by_bandwidth = zip(BANDWIDTH_FACTORS, mmd_squared_by_bandwidth(x, y).tolist(), strict=True)
    return {
        "mmd_squared": mmd_squared(x, y).item(),
        **{f"mmd_squared_x{factor:g}": value for factor, value in by_bandwidth},
        "sliced_wasserstein": sliced_wasserstein(x, y, generator=generator).item(),
        "energy_distance": energy_distance(x, y).item(),
        "mean_cosine": mean_cosine(x, y).item(),
        "two_sample_accuracy": _held_out_accuracy(x, y, x_groups, y_groups, seed, generator),
    }


def _held_out_accuracy(
    x: Tensor, y: Tensor, x_groups: Tensor, y_groups: Tensor, seed: int, generator: torch.Generator
) -> float:
    groups = torch.cat([x_groups, y_groups]).unique()
    order = torch.randperm(len(groups), generator=generator)
    test_groups = groups[order[: max(1, round(TEST_SHARE * len(groups)))]]
    x_test, y_test = torch.isin(x_groups, test_groups), torch.isin(y_groups, test_groups)
    parts = (x[~x_test], y[~y_test], x[x_test], y[y_test])
    return classifier_two_sample(*parts, seed=seed) if all(map(len, parts)) else math.nan


def _report_rows(rows: Tensor, groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most :data:`MAX_REPORT_ROWS` rows and their groups, on the CPU: equal results whatever the device."""
    kept = _subsample(torch.arange(len(rows)), MAX_REPORT_ROWS, generator)
    return _floats(rows[kept.to(rows.device)]).cpu(), groups[kept.to(groups.device)].cpu()


def _subsample(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if len(rows) <= size:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]


def _floats(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples moved by the pooled mean, which changes no distance but saves digits."""
    x, y = _floats(x), _floats(y)
    centre = torch.cat([x, y]).detach().mean(0)
    return x - centre, y - centre


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """``[n, m]``, without the root whose derivative is infinite at 0."""
    squares = u.square().sum(1).unsqueeze(1) + v.square().sum(1)
    with torch.autocast(u.device.type, enabled=False):
        return torch.addmm(squares, u, v.t(), alpha=-2).clamp_min(0)


def _median_distance(points: Tensor) -> Tensor:
    """Median distance between two points of a sample, on at most :data:`MAX_MEDIAN_ROWS` even-spaced rows."""
    points = points[:: math.ceil(len(points) / MAX_MEDIAN_ROWS)]
    if len(points) < 2:
        return points.new_ones(())
    median = torch.pdist(points).median()
    return median.clamp_min(torch.finfo(median.dtype).tiny ** 0.25)  # its square is divided by


@dataclass(frozen=True, slots=True, eq=False)
class _KernelMeans:
    """Mean Gaussian kernels of all pairs, ``[K]`` each for K bandwidths."""

    within_x: Tensor
    within_y: Tensor
    between: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, scales: Tensor) -> _KernelMeans:
        def means(u: Tensor, v: Tensor) -> Tensor:
            squared = _squared_distances(u, v)
            return torch.stack([torch.exp(squared / (-2 * scale.square())).mean() for scale in scales])

        return cls(means(x, x), means(y, y), means(x, y))
