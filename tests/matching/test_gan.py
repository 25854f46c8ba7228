import pytest
import torch
from torch import nn

from vocabridge.losses.distances import mmd_squared
from vocabridge.matching.config import GanConfig
from vocabridge.matching.gan import Discriminator, GanMatching
from vocabridge.matching.layers import reverse_gradient

FEATURES = 8


def shifted_gaussians(seed=0, size=256):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(size, FEATURES, generator=generator)
    inputs = torch.randn(size, FEATURES, generator=generator) + 2.0
    return inputs, keys


def train(*, train_discriminator, steps=200):
    """Train a projector by the adversarial term alone; MMD^2 between projected inputs and keys before and after."""
    torch.manual_seed(0)
    inputs, keys = shifted_gaussians()
    projector = nn.Linear(FEATURES, FEATURES)
    with torch.no_grad():
        projector.weight.copy_(torch.eye(FEATURES))
        projector.bias.zero_()
    config = GanConfig(hidden_size=32, dropout=0.0, train_discriminator=train_discriminator)
    gan = GanMatching(FEATURES, config)
    groups = [{"params": projector.parameters(), "lr": 1e-3}]
    if train_discriminator:
        groups.append({"params": gan.parameters(), "lr": 5e-3})
    optimizer = torch.optim.Adam(groups, betas=(0.0, 0.9))
    before = float(mmd_squared(projector(inputs), keys).detach())
    for _ in range(steps):
        sums = gan(projector(inputs), keys, weight=1.0)
        (sums.query_loss / len(inputs) + sums.key_loss / len(keys)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, float(mmd_squared(projector(inputs), keys).detach())


def test_a_trained_discriminator_halves_the_distance_and_an_untrained_one_does_not():
    before, after = train(train_discriminator=True)
    assert before > 0.2
    assert after < 0.5 * before
    before, after = train(train_discriminator=False)
    assert after > before


def test_the_two_sides_pull_in_opposite_directions():
    """Finite differences: the discriminator's gradient lowers the loss, the one the queries receive raises it."""
    torch.manual_seed(0)
    inputs, keys = shifted_gaussians(size=16)
    gan = GanMatching(FEATURES, GanConfig(hidden_size=16, dropout=0.0)).double()
    queries = inputs.double().requires_grad_(True)
    gan(queries, keys.double(), weight=1.0).query_loss.backward()
    step = 1e-6

    def loss(at):
        return float(gan(at, keys.double(), weight=1.0).query_loss.detach())

    direction = torch.randn_like(inputs.double())
    slope = (loss(queries.detach() + step * direction) - loss(queries.detach() - step * direction)) / (2 * step)
    assert slope == pytest.approx(-float((queries.grad * direction).sum()), rel=1e-5)
    weight = gan.discriminator.linear.weight
    before = loss(queries.detach())
    with torch.no_grad():
        weight -= 1e-3 * weight.grad
    assert loss(queries.detach()) < before


def test_keys_get_no_gradient_and_reversal_scales():
    values = torch.ones(3, requires_grad=True)
    reverse_gradient(values, 0.5).sum().backward()
    assert values.grad.tolist() == [-0.5] * 3
    inputs, keys = shifted_gaussians(size=8)
    keys.requires_grad_(True)
    gan = GanMatching(FEATURES, GanConfig(hidden_size=4))
    sums = gan(inputs, keys, weight=1.0)
    (sums.query_loss + sums.key_loss).backward()
    assert keys.grad is None


def test_alternating_steps_belong_to_one_side_each():
    inputs, keys = shifted_gaussians(size=8)
    gan = GanMatching(FEATURES, GanConfig(hidden_size=4, dropout=0.0, updates="alternating", discriminator_steps=2))
    turns = []
    for step in range(6):
        gan.set_step(step)
        gan.zero_grad()
        queries = inputs.clone().requires_grad_(True)
        sums = gan(queries, keys, weight=1.0)
        total = sums.query_loss + sums.key_loss
        if total.requires_grad:
            total.backward()
        turns.append((gan.discriminator.linear.weight.grad is not None, queries.grad is not None))
    assert turns == [(True, False), (True, False), (False, True)] * 2


def test_label_smoothing_moves_the_targets():
    inputs, keys = shifted_gaussians(size=8)
    torch.manual_seed(0)
    gan = GanMatching(FEATURES, GanConfig(hidden_size=4, dropout=0.0, label_smoothing=0.2))
    logits = gan.discriminator(inputs).detach()
    expected = -(0.8 * logits.sigmoid().log() + 0.2 * (1 - logits.sigmoid()).log()).sum()
    torch.testing.assert_close(gan(inputs, keys, weight=1.0).query_loss.detach(), expected)


def test_r1_penalty_is_the_squared_gradient_at_the_keys():
    inputs, keys = shifted_gaussians(size=5)
    torch.manual_seed(0)
    plain = GanMatching(FEATURES, GanConfig(hidden_size=4, dropout=0.0)).double()
    penalised = GanMatching(FEATURES, GanConfig(hidden_size=4, dropout=0.0, r1_penalty=0.7)).double()
    penalised.load_state_dict(plain.state_dict())
    keys, step, expected = keys.double(), 1e-6, 0.0
    for row in range(len(keys)):
        for column in range(FEATURES):
            up, down = keys.clone(), keys.clone()
            up[row, column] += step
            down[row, column] -= step
            slope = (plain.discriminator(up)[row] - plain.discriminator(down)[row]).detach() / (2 * step)
            expected += 0.7 * float(slope) ** 2
    difference = (
        penalised(inputs.double(), keys, weight=1.0).key_loss - plain(inputs.double(), keys, weight=1.0).key_loss
    )
    assert float(difference.detach()) == pytest.approx(expected, rel=1e-5)
    difference.backward()
    assert float(penalised.discriminator.linear.weight.grad.abs().max()) > 0


def test_spectral_norm_bounds_the_slope():
    torch.manual_seed(0)
    discriminator = Discriminator(FEATURES, GanConfig(hidden_size=16, dropout=0.0, spectral_norm=True))
    for _ in range(30):  # power iteration runs in training forwards
        discriminator(torch.randn(4, FEATURES))
    for layer in (discriminator.highway, discriminator.linear, discriminator.output):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, abs=0.05)


def test_dropout_zero_discriminator_against_the_formula():
    torch.manual_seed(0)
    discriminator = Discriminator(3, GanConfig(hidden_size=2, dropout=0.0))
    x = torch.tensor([0.3, -1.2, 0.8])
    h = discriminator.highway.weight @ x + discriminator.highway.bias
    mixed = h.sigmoid() * h.clamp(min=0) + (1 - h.sigmoid()) * x
    hidden = discriminator.linear.weight @ mixed + discriminator.linear.bias
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    expected = discriminator.output.weight @ hidden + discriminator.output.bias
    torch.testing.assert_close(discriminator(x[None]), expected)
