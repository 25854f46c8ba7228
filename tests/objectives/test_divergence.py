import pytest
import torch

from vocabridge.losses import divergences
from vocabridge.objectives._divergence import row_divergence
from vocabridge.objectives.config import DivergenceConfig


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda p, q: divergences.forward_kl(p, q, temperature=2.0)),
        ({"divergence": "reverse", "temperature": 3.0}, lambda p, q: divergences.reverse_kl(p, q, temperature=3.0)),
        (
            {"divergence": "skewed_forward", "skew": 0.3},
            lambda p, q: divergences.skewed_forward_kl(p, q, skew=0.3, temperature=2.0),
        ),
        (
            {"divergence": "adaptive", "adaptive_alpha": 0.2},
            lambda p, q: divergences.adaptive_kl(p, q, alpha=0.2, temperature=2.0),
        ),
        (
            {"divergence": "generalised_jsd", "jsd_beta": 0.9},
            lambda p, q: divergences.generalised_jsd(p, q, beta=0.9, temperature=2.0),
        ),
    ],
)
def test_every_setting_reaches_the_row_loss(settings, expected):
    student, teacher = torch.randn(2, 5, 13, generator=torch.Generator().manual_seed(0)).unbind()
    rows = row_divergence(DivergenceConfig(**settings))(student, teacher)
    assert rows.abs().min() > 1e-4
    torch.testing.assert_close(rows, expected(student, teacher), rtol=0, atol=0)
