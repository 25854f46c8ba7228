import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linprog
from scipy.spatial.distance import cdist, pdist
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vocabridge.losses import distances
from vocabridge.losses.distances import (
    classifier_two_sample,
    coral_distance,
    distribution_report,
    energy_distance,
    mean_cosine,
    mmd_squared,
    mmd_squared_by_bandwidth,
    sliced_wasserstein,
)


def sample(rows, width=4, *, shift=0.0, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def sliced(x, y, **settings):
    return sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(3), **settings)


TERMS = {"mmd": mmd_squared, "sliced": sliced, "energy": energy_distance, "coral": coral_distance}


def loop_mmd(x, y, bandwidths):
    def mean_kernel(a, b):
        return np.mean(
            [[np.mean([math.exp(-(math.dist(u, v) ** 2) / (2 * s * s)) for s in bandwidths]) for v in b] for u in a]
        )

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_mmd_matches_a_loop():
    x, y = sample(7, shift=100.0), sample(9, shift=100.5, seed=1)
    expected = loop_mmd(x.tolist(), y.tolist(), (0.5, 3.0))
    assert mmd_squared(x, y, bandwidths=(0.5, 3.0)).item() == pytest.approx(expected, rel=1e-9)


def test_mmd_takes_bandwidths_from_the_median_distance():
    x, y = sample(7), sample(9, shift=0.5, seed=1)
    points = [*x.tolist(), *y.tolist()]
    lengths = sorted(math.dist(a, b) for i, a in enumerate(points) for b in points[:i])
    assert len(lengths) == 120
    median = lengths[59]  # torch's median is the lower of the two middle values
    expected = loop_mmd(x.tolist(), y.tolist(), [median * factor for factor in (0.25, 0.5, 1, 2, 4)])
    assert mmd_squared(x, y).item() == pytest.approx(expected, rel=1e-9)
    # ... hence the unit of length does not matter.
    assert mmd_squared(x * 1000, y * 1000).item() == pytest.approx(expected, rel=1e-9)


def rbf_mmd(x, y, bandwidth):
    gamma = 1 / (2 * bandwidth**2)
    return rbf_kernel(x, x, gamma).mean() + rbf_kernel(y, y, gamma).mean() - 2 * rbf_kernel(x, y, gamma).mean()


def test_mmd_is_that_of_scikit_learns_kernels():
    x, y = sample(30), sample(21, shift=0.4, scale=2.0, seed=1)
    expected = np.mean([rbf_mmd(x.numpy(), y.numpy(), bandwidth) for bandwidth in (0.5, 1.5, 3.0)])
    assert mmd_squared(x, y, bandwidths=(0.5, 1.5, 3.0)).item() == pytest.approx(expected, rel=1e-9)


def test_mmd_by_bandwidth_is_in_units_of_the_second_sample():
    x, y = sample(7, shift=3.0), sample(12, scale=2.0, seed=1)
    lengths = sorted(math.dist(a, b) for i, a in enumerate(y.tolist()) for b in y.tolist()[:i])
    assert len(lengths) == 66
    median = lengths[32]
    factors = (0.25, 0.5, 1, 2, 4)
    found = mmd_squared_by_bandwidth(x, y).tolist()
    assert found == pytest.approx([loop_mmd(x.tolist(), y.tolist(), [median * factor]) for factor in factors], rel=1e-9)
    assert median == pytest.approx(np.median(pdist(y.numpy())), rel=0.1)
    assert found == pytest.approx([rbf_mmd(x.numpy(), y.numpy(), median * factor) for factor in factors], rel=1e-9)
    # Far away in units of y nothing of x is left to see at the smaller bandwidths: the kernels have not grown with x.
    far = mmd_squared_by_bandwidth(x + 1000, y)
    near_itself = [rbf_kernel(x, gamma=1 / (2 * (median * f) ** 2)).mean() for f in factors]
    of_y = [rbf_kernel(y, gamma=1 / (2 * (median * f) ** 2)).mean() for f in factors]
    assert far.tolist() == pytest.approx(np.add(near_itself, of_y).tolist(), rel=1e-6)


def test_default_bandwidths_are_bounded_in_cost(monkeypatch):
    seen, pdist = [], torch.pdist
    monkeypatch.setattr(torch, "pdist", lambda points: (seen.append(len(points)), pdist(points))[1])
    mmd_squared(sample(900), sample(1300, seed=1))
    assert seen
    assert max(seen) <= distances.MAX_MEDIAN_ROWS


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 17), (6, 4), (1, 5)])
def test_one_dimensional_wasserstein_matches_repeated_samples(n, m):
    """Repeating points to a common size turns the distance into the mean square over sorted pairs."""
    x, y = sample(n, 1), sample(m, 1, shift=0.5, seed=1)
    common = math.lcm(n, m)
    sorted_x = np.sort(np.repeat(x.numpy().ravel(), common // n))
    sorted_y = np.sort(np.repeat(y.numpy().ravel(), common // m))
    expected = np.mean((sorted_x - sorted_y) ** 2)
    assert sliced(x, y, num_projections=3).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (7, 4)])
def test_sliced_wasserstein_is_the_cheapest_transport_along_each_direction(n, m):
    x, y = sample(n, 3), sample(m, 3, shift=0.5, seed=1)
    directions = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).numpy()
    costs = []
    for direction in directions.T:
        squared = cdist((x.numpy() @ direction)[:, None], (y.numpy() @ direction)[:, None], "sqeuclidean")
        rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
        weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
        costs.append(linprog(squared.ravel(), A_eq=np.vstack([rows, columns]), b_eq=weights).fun)
    assert sliced(x, y, num_projections=5).item() == pytest.approx(np.mean(costs), rel=1e-6)


def test_sliced_wasserstein_of_a_shift():
    """A shift by s moves every projection by the cosine to it: |s|^2 / d on average."""
    x = sample(200, 3)
    moved = x + torch.tensor([3.0, 0.0, 0.0])
    assert sliced(x, moved, num_projections=4000).item() == pytest.approx(3.0, rel=0.05)


def test_energy_distance_matches_scipy_in_one_dimension():
    x, y = sample(30, 1), sample(21, 1, shift=0.7, seed=1)
    expected = stats.energy_distance(x.numpy().ravel(), y.numpy().ravel()) ** 2
    assert energy_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_energy_distance_matches_a_loop():
    x, y = sample(12).tolist(), sample(9, shift=0.3, seed=1).tolist()

    def mean_distance(a, b):
        return np.mean([[math.dist(u, v) for v in b] for u in a])

    expected = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    assert energy_distance(torch.tensor(x).double(), torch.tensor(y).double()).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_coral_matches_numpy_covariances():
    x, y = sample(12, shift=3.0), sample(9, shift=3.3, scale=2.0, seed=1)
    covariances = np.cov(x.numpy().T) - np.cov(y.numpy().T)
    expected = np.sum(covariances**2) + np.sum((x.mean(0) - y.mean(0)).numpy() ** 2)
    assert coral_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_coral_sees_a_shift_alone_and_a_rotation_alone():
    x = sample(200, 2) * torch.tensor([3.0, 1.0])
    assert coral_distance(x, x + 2).item() == pytest.approx(8.0)
    turned = (x - x.mean(0)) @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=x.dtype) + x.mean(0)
    variances = x.var(0)
    covariance = ((x - x.mean(0))[:, 0] * (x - x.mean(0))[:, 1]).sum() / 199
    expected = 2 * (variances[0] - variances[1]) ** 2 + 2 * (2 * covariance) ** 2
    assert coral_distance(x, turned).item() == pytest.approx(expected.item(), rel=1e-9)


def test_coral_forms_no_covariance_matrix():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    x, y = sample(5, 1000), sample(6, 1000, seed=1)
    with Largest() as largest:
        coral_distance(x, y)
    assert 5000 <= largest.numel <= 6000


def test_mean_cosine():
    x = torch.tensor([[2.0, 1.0], [2.0, -1.0]])
    y = torch.tensor([[3.0, 3.0]])
    assert mean_cosine(x, y).item() == pytest.approx(math.sqrt(0.5))
    assert mean_cosine(x, -x).item() == pytest.approx(-1)
    x, y = sample(20, shift=0.5), sample(30, shift=0.2, seed=1)
    expected = cosine_similarity(x.mean(0, keepdim=True).numpy(), y.mean(0, keepdim=True).numpy()).item()
    assert mean_cosine(x, y).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", TERMS)
def test_same_sample_is_zero_in_any_order_and_a_shift_is_not(name):
    x = sample(60, dtype=torch.float32, shift=5.0)
    term = TERMS[name]
    assert term(x, x.clone()).item() == 0
    assert abs(term(x, x.flip(0)).item()) < 1e-6
    near, far = term(x, sample(60, shift=5.0, seed=1, dtype=torch.float32)), term(x, x + 3)
    assert 0 < near.item() < 0.1 * far.item()
    torch.testing.assert_close(term(x, x + 3), term(x + 3, x))


@pytest.mark.parametrize("name", TERMS)
def test_gradcheck(name):
    x, y = sample(5).requires_grad_(), sample(4, shift=0.5, seed=1).requires_grad_()
    settings = {"bandwidths": (1.0, 2.0)} if name == "mmd" else {}
    assert torch.autograd.gradcheck(lambda a, b: TERMS[name](a, b, **settings), (x, y))


@pytest.mark.parametrize("name", TERMS)
def test_gradient_of_equal_samples_is_finite(name):
    x = torch.ones(8, 4, requires_grad=True)
    TERMS[name](x, torch.ones(8, 4)).backward()
    assert x.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", TERMS)
def test_descent_brings_the_sample_over(name):
    target = sample(80, shift=2.0, dtype=torch.float32, seed=1)
    x = sample(80, dtype=torch.float32).requires_grad_()
    term, optimizer = TERMS[name], torch.optim.Adam([x], lr=0.1)
    start = term(x, target)
    start.backward()
    assert (x.grad.mean(0) < 0).all()  # a step against the gradient moves towards the target
    for _ in range(40):
        optimizer.zero_grad()
        term(x, target).backward()
        optimizer.step()
    assert term(x, target) < 0.1 * start
    assert (x.mean(0) - 2).abs().max() < 0.6


@pytest.mark.parametrize("name", TERMS)
def test_low_precision_and_autocast_are_computed_in_float32(name):
    x, y = sample(20, dtype=torch.bfloat16), sample(20, shift=1.0, seed=1, dtype=torch.bfloat16)
    plain = TERMS[name](x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TERMS[name](x, y), plain)
        assert torch.equal(TERMS[name](x.float(), y.float()), plain)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain.double(), TERMS[name](x.double(), y.double()), rtol=0.05, atol=1e-5)


def test_classifier_is_at_chance_on_one_distribution_and_sure_on_two():
    same = [sample(300, seed=seed) for seed in range(4)]
    assert classifier_two_sample(*same, seed=0) == pytest.approx(0.5, abs=0.06)
    apart = [same[0], same[1] + 3, same[2], same[3] + 3]
    assert classifier_two_sample(*apart, seed=0) > 0.99


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_classifier_is_about_as_good_as_can_be(shift):
    """Two Gaussians a distance s apart can be told apart with accuracy Phi(s / 2), by Bayes and by Fisher's rule."""
    move = torch.tensor([shift, 0.0, 0.0, 0.0], dtype=torch.float64)
    parts = [sample(3000), sample(3000, seed=1) + move, sample(3000, seed=2), sample(3000, seed=3) + move]
    found = classifier_two_sample(*parts, seed=0)
    assert found == pytest.approx(stats.norm.cdf(shift / 2), abs=0.025)
    classes = np.repeat([0, 1], 3000)
    fisher = LinearDiscriminantAnalysis().fit(np.concatenate(parts[:2]), classes)
    assert found == pytest.approx(fisher.score(np.concatenate(parts[2:]), classes), abs=0.005)


def test_classifier_is_balanced():
    """Nine in ten rows of one side: guessing that side would be right in nine of ten unbalanced rows."""
    accuracy = classifier_two_sample(sample(900), sample(100, seed=1), sample(900, seed=2), sample(100, seed=3), seed=0)
    assert accuracy == pytest.approx(0.5, abs=0.12)


def report(x, y, **settings):
    groups = {"x_groups": torch.arange(len(x)) // 5, "y_groups": torch.arange(len(y)) // 5}
    return distribution_report(x, y, **{**groups, **settings})


def test_report_tells_equal_from_shifted_and_is_deterministic():
    x, y = sample(300, shift=1.0, dtype=torch.float32), sample(250, shift=1.0, seed=1, dtype=torch.float32)
    equal, shifted = report(x, y), report(x, y + 2)
    torch.manual_seed(99)
    assert report(x, y) == equal
    assert report(x, y, seed=1) != equal
    by_bandwidth = [f"mmd_squared_x{factor}" for factor in ("0.25", "0.5", "1", "2", "4")]
    others = ["sliced_wasserstein", "energy_distance", "mean_cosine", "two_sample_accuracy"]
    assert list(equal) == ["mmd_squared", *by_bandwidth, *others]
    assert [shifted[name] for name in by_bandwidth] == pytest.approx(mmd_squared_by_bandwidth(x, y + 2).tolist())
    for key in ("mmd_squared", "sliced_wasserstein", "energy_distance"):
        assert 0 < equal[key] < 0.1 * shifted[key]
    assert equal["mean_cosine"] > 0.95
    assert equal["two_sample_accuracy"] == pytest.approx(0.5, abs=0.1)
    assert shifted["two_sample_accuracy"] > 0.9


def test_report_looks_at_a_bounded_number_of_rows(monkeypatch):
    seen, original = [], distances.mmd_squared
    monkeypatch.setattr(distances, "mmd_squared", lambda x, y: (seen.append((len(x), len(y))), original(x, y))[1])
    report(sample(3000), sample(40, seed=1))
    assert seen == [(512, 40)]


def test_report_tests_on_examples_it_was_not_trained_on():
    """Each example has a fingerprint per side that says nothing about other examples: held-out rows are at chance."""
    num_groups, rows = 60, 8
    fingerprints = sample(2 * num_groups, 200, seed=4)
    x, y = (part.repeat_interleave(rows, 0) for part in fingerprints.split(num_groups))
    groups = torch.arange(num_groups).repeat_interleave(rows)
    honest = distribution_report(x, y, x_groups=groups, y_groups=groups)["two_sample_accuracy"]
    leaky_groups = torch.arange(len(x))
    leaky = distribution_report(x, y, x_groups=leaky_groups, y_groups=leaky_groups)["two_sample_accuracy"]
    assert leaky > 0.9
    assert honest < 0.7


def test_report_of_one_example_has_no_held_out_accuracy():
    x, y = sample(10), sample(12, seed=1)
    result = distribution_report(x, y, x_groups=torch.zeros(10).long(), y_groups=torch.zeros(12).long())
    assert math.isnan(result["two_sample_accuracy"])
    assert result["mmd_squared"] > 0


def test_report_leaves_the_graph_and_the_global_generator_alone():
    x, y = sample(20).requires_grad_(), sample(20, seed=1)
    state = torch.get_rng_state()
    report(x, y)
    assert torch.equal(torch.get_rng_state(), state)
