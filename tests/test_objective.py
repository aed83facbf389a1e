import math
from itertools import pairwise

import pytest
import torch
from tiny import difference, noise
from torch.distributions import Normal, kl_divergence

from policy.explore import tangent_basis
from policy.transition import KERNELS, Kernel, shifted_schedule, transition
from rl.objective import (
    adapt_beta,
    behaviour_weight,
    clipped_ratio_loss,
    gradient_scale,
    ratio_norm,
    spread,
    velocity_divergence,
)

STEPS = list(pairwise(shifted_schedule(4, 3.0)))[:-1]


def test_before_an_update_the_gradient_is_minus_the_advantage():
    old, advantage = noise(2, 5), noise(2, 5, seed=1)
    logp = old.clone().requires_grad_()
    loss, ratio = clipped_ratio_loss(logp, old, advantage, clip=0.1)
    assert torch.equal(ratio, torch.ones(2, 5)) and difference(loss, -advantage) < 1e-6
    assert difference(torch.autograd.grad(loss.sum(), logp)[0], -advantage) < 1e-6


def test_a_stale_group_weighs_by_how_much_likelier_it_has_become_up_to_the_cap():
    behaviour = torch.tensor([0.0, 0.0, 0.0])
    now = torch.log(torch.tensor([1.0, 0.5, 9.0])).requires_grad_()
    weight = behaviour_weight(now, behaviour, cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 0.5, 2.0]) and not weight.requires_grad
    # Without a cap and before the update, its gradient is that of the plain importance-sampled objective.
    advantage = noise(3)
    loss = behaviour_weight(now, behaviour, cap=99.0) * clipped_ratio_loss(now, now.detach(), advantage, clip=0.1)[0]
    plain = -(now - behaviour).exp() * advantage
    decoupled, expected = (torch.autograd.grad(one.sum(), now)[0] for one in (loss, plain))
    assert difference(decoupled, expected) < 1e-6
    # The coupled ratio would learn nothing from a good action that is likelier by more than the clip already.
    coupled = clipped_ratio_loss(now, behaviour, advantage.abs(), clip=0.1)[0]
    assert torch.autograd.grad(coupled.sum(), now)[0].tolist()[2] == 0 != decoupled.tolist()[2]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "learns"),
    [
        (1.05, 1.0, -1.05, True),
        (1.30, 1.0, -1.10, False),  # good and likelier by enough
        (1.30, -1.0, 1.30, True),  # bad and likelier: pushed back
        (0.70, 1.0, -0.70, True),
        (0.70, -1.0, 0.90, False),
        (1.30, 0.0, 0.0, False),
    ],
)
def test_the_ratio_is_clipped_where_it_has_gone_far_enough(ratio, advantage, loss, learns):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    value, got = clipped_ratio_loss(logp, torch.zeros(1), torch.tensor([advantage]), clip=0.1)
    assert got.item() == pytest.approx(ratio) and value.item() == pytest.approx(loss, abs=1e-6)
    assert bool(torch.autograd.grad(value.sum(), logp)[0].abs() > 1e-3) == learns


def test_the_divergence_is_the_kl_of_unit_gaussians_around_the_velocities():
    v, reference = noise(3, 4, 2, 5, 5), noise(3, 4, 2, 5, 5, seed=1)
    kl = kl_divergence(Normal(v, 1.0), Normal(reference, 1.0))
    assert difference(velocity_divergence(v, reference), kl.flatten(1).mean(1)) < 1e-5
    assert not velocity_divergence(v, v).any() and (velocity_divergence(v, reference) > 0.1).all()


def score_lengths(kernel, z):
    """Length of d log p / d v at the same noise z [1, 1, 4] in four directions, per step of the schedule."""
    x, v = noise(1, 3, 2, 4, 4), noise(1, 3, 2, 4, 4, seed=1)
    subspace = tangent_basis(v, noise(1, 4, 3, 2, 4, 4, seed=2), torch.ones(1, 4, dtype=torch.bool))
    for s, s2 in STEPS:
        at = v.clone().requires_grad_()
        coordinates, _ = transition(kernel, subspace, x, v, s, s2, noise=z)
        _, logp = transition(kernel, subspace, x, at, s, s2, coordinates=coordinates)
        yield s, s2, torch.autograd.grad(logp.sum(), at)[0].norm().item()


@pytest.mark.parametrize("amplitude", [1.0, 4.0])
@pytest.mark.parametrize("name", KERNELS)
def test_the_scale_makes_the_gradients_of_all_steps_equally_long(name, amplitude):
    kernel, z = Kernel(name, 0.5, amplitude), noise(1, 1, 4, seed=3)
    lengths = list(score_lengths(kernel, z))
    for s, s2, length in lengths:
        assert length * gradient_scale(kernel, s, s2) == pytest.approx(z.norm().item() / 4, rel=1e-3)
    plain = [length for _, _, length in lengths]
    assert max(plain) / min(plain) > 1.15


def ratios(kernel, move, z):
    """Per step: log rho after v has moved by `move`, its RatioNorm, and z (mu - mu_old); z [1, M, 4] drawn before."""
    x, v = noise(1, 3, 2, 4, 4), noise(1, 3, 2, 4, 4, seed=1)
    subspace = tangent_basis(v, noise(1, 4, 3, 2, 4, 4, seed=2), torch.ones(1, 4, dtype=torch.bool))
    for s, s2 in STEPS:
        coordinates, old = transition(kernel, subspace, x, v, s, s2, noise=z)
        _, logp = transition(kernel, subspace, x, v + move, s, s2, coordinates=coordinates)
        means = [subspace.project(kernel.inside(x, at, s, s2)[0]) for at in (v + move, v)]
        moved, std = (means[0] - means[1]).unsqueeze(1), spread(kernel, s, s2)
        drift = moved.square().mean(-1) / (2 * std**2)
        yield logp - old, ratio_norm(logp - old, drift, torch.tensor([[std]])), (z * moved).mean(-1), drift


@pytest.mark.parametrize("name", KERNELS)
def test_the_normalised_ratio_is_centred_and_knows_no_spread_of_its_step(name):
    kernel, z = Kernel(name, 0.5), noise(1, 4000, 4, seed=3)
    for plain, normalised, expected, drift in ratios(kernel, 0.5 * noise(1, 3, 2, 4, 4, seed=4), z):
        assert difference(normalised, expected) < 1e-4 * expected.abs().max() + 1e-5
        assert abs(normalised.mean() / normalised.std()) < 4 / math.sqrt(4000)
        assert plain.mean() == pytest.approx(-drift.item(), abs=4 * plain.std().item() / math.sqrt(4000))
        assert plain.mean() < -0.5 * drift


def test_scaled_the_normalised_ratios_of_all_steps_spread_alike():
    kernel, z, move = Kernel(eta=0.5), noise(1, 500, 4, seed=3), 0.01 * noise(1, 3, 2, 4, 4, seed=4)
    found = list(ratios(kernel, move, z))
    scaled = [gradient_scale(kernel, *step, True) * one[1].std().item() for step, one in zip(STEPS, found)]
    plain = [one[0].std().item() for one in found]
    assert max(scaled) / min(scaled) < 1.001 < 1.15 < max(plain) / min(plain)


def test_the_weight_of_the_divergence_follows_its_target():
    assert adapt_beta(2.0, 0.03, target=0.03) == 2.0
    assert adapt_beta(2.0, 0.033, target=0.03) == pytest.approx(2.0 * 1.01)
    assert adapt_beta(2.0, 9.0, target=0.03) == pytest.approx(2.0 * 1.02)
    assert adapt_beta(2.0, 0.0, target=0.03) == pytest.approx(2.0 * 0.98)
    beta = 1.0
    for _ in range(2000):  # a policy whose divergence is 1 / beta
        beta = adapt_beta(beta, 1 / beta, target=0.1)
    assert beta == pytest.approx(10, rel=1e-3)
