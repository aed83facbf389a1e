import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import difference, noise

from policy.explore import Cells
from policy.transition import KERNELS, Kernel, check_schedule, ode_step, place, shifted_schedule, transition

SIGMAS = shifted_schedule(3, 3.0)
STEPS = list(pairwise(SIGMAS))[:-1]


def white(shape):
    """All of the space [P, C, f, h, w]."""
    return Cells(1, shape[1], torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool))


def state(shape=(2, 3, 2, 2, 2)):
    return noise(*shape, seed=0), noise(*shape, seed=1), white(shape)


def normal(subspace, members):
    return subspace.noise([[torch.Generator().manual_seed(997 * p + g) for g in range(members)]
                           for p in range(len(subspace.inside))])  # fmt: skip


def sampled(kernel, subspace, x, v, s, s2, members):
    """States [P, members, C, f, h, w] after the selected transition."""
    coordinates, _ = transition(kernel, subspace, x, v, s, s2, noise=normal(subspace, members))
    return place(subspace, ode_step(x, v, s, s2), coordinates)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("s", "s2"), STEPS)
def test_samples_have_the_mean_and_the_spread_of_the_kernel(name, s, s2):
    kernel, (x, v, subspace), members = Kernel(name, 0.7), state(), 4000
    after = sampled(kernel, subspace, x, v, s, s2, members)
    mean, std = kernel.moments(x, v, s, s2)
    error = (after.mean(1) - mean).abs().max() / std
    assert error < 5 / math.sqrt(members) < 0.1
    assert (after.std(1) / std - 1).abs().max() < 5 / math.sqrt(2 * members)
    other = Kernel(name, 0.2).moments(x, v, s, s2)
    assert (after.mean(1) - other[0]).abs().max() / std > 0.1 and abs(other[1] / std - 1) > 0.1


@pytest.mark.parametrize("name", KERNELS)
def test_the_log_prob_is_the_mean_gaussian_density_and_scoring_agrees_with_sampling(name):
    (s, s2), kernel, (x, v, subspace) = STEPS[1], Kernel(name, 0.5), state()
    coordinates, logp = transition(kernel, subspace, x, v.requires_grad_(), s, s2, noise=normal(subspace, 5))
    assert logp.requires_grad and not coordinates.requires_grad
    mean, std = kernel.moments(x, v, s, s2)
    density = torch.distributions.Normal(mean.unsqueeze(1), std).log_prob(coordinates)
    assert difference(logp, density.flatten(2).mean(2)) < 1e-5
    again, scored = transition(kernel, subspace, x, v, s, s2, coordinates=coordinates)
    assert torch.equal(scored, logp) and again is coordinates
    _, moved = transition(kernel, subspace, x, v + 0.1, s, s2, coordinates=coordinates)
    assert difference(moved, logp) > 1e-3


@pytest.mark.parametrize(("s", "s2"), STEPS)
@pytest.mark.parametrize("eta", [0.1, 0.5, 0.7, 1.0])
def test_cps_keeps_the_marginal_spread(s, s2, eta):
    assert spread_after(Kernel("cps", eta), s, s2) == pytest.approx(s2, rel=0.01)


def spread_after(kernel, s, s2, samples=200_000):
    """Total std of the noise in x_s' for the exact velocity of one data point: its next step expects s'."""
    x0, eps, fresh = 0.3, noise(samples, seed=0), noise(samples, seed=1)
    mean, std = kernel.moments((1 - s) * x0 + s * eps, eps - x0, s, s2)
    return (mean + std * fresh).std().item()


@pytest.mark.parametrize(
    ("name", "eta", "s", "s2", "reached"),
    [
        ("flow_sde", 0.7, 1.0, 0.755, 0.866),
        ("flow_sde", 0.7, 0.755, 0.522, 0.660),
        ("flow_sde", 0.3, 1.0, 0.755, 0.771),
        ("flow_sde", 0.3, 0.755, 0.522, 0.542),
        ("dance", 0.3, 1.0, 0.755, 0.759),
        ("dance", 0.3, 0.755, 0.522, 0.528),
    ],
)
def test_the_other_kernels_overshoot_the_marginal_spread_in_few_steps(name, eta, s, s2, reached):
    assert spread_after(Kernel(name, eta), s, s2) == pytest.approx(reached, rel=0.005)
    assert reached > 1.004 * s2 and (eta < 0.7 or reached > 1.14 * s2)


@pytest.mark.parametrize(("s", "s2"), STEPS)
def test_the_other_kernels_are_the_published_steps(s, s2):
    """Flow-GRPO's step as its code has it, and DanceGRPO's with the score of the predicted data."""
    (x, v, _), eta, step = state(), 0.7, s2 - s
    sigma = eta * math.sqrt(s / (1 - (s if s < 1 else s2)))
    flow = x * (1 + sigma**2 / (2 * s) * step) + v * (1 + sigma**2 * (1 - s) / (2 * s)) * step
    mean, std = Kernel("flow_sde", eta).moments(x, v, s, s2)
    assert difference(mean, flow) < 1e-5 and std == pytest.approx(sigma * math.sqrt(-step))
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean, std = Kernel("dance", eta).moments(x, v, s, s2)
    assert difference(mean, x + v * step - 0.5 * eta**2 * score * step) < 1e-5
    assert std == pytest.approx(eta * math.sqrt(-step))
    assert difference(mean, flow) > 1e-2


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("s", "s2"), STEPS)
def test_without_noise_every_kernel_is_the_ode_step(name, s, s2):
    x, v, _ = state()
    mean, std = Kernel(name, 0.0).moments(x, v, s, s2)
    assert std == 0 and difference(mean, ode_step(x, v, s, s2)) < 1e-6
    near, far = (difference(Kernel(name, eta).moments(x, v, s, s2)[0], mean) for eta in (1e-3, 0.5))
    assert near < 1e-4 < 1e-2 < far


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("eta", [0.01, 1.0])
def test_everything_is_finite_at_pure_noise(name, eta):
    kernel, (x, v, subspace) = Kernel(name, eta), state()
    coordinates, logp = transition(kernel, subspace, x, v, 1.0, SIGMAS[1], noise=normal(subspace, 3))
    assert coordinates.isfinite().all() and logp.isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_the_last_step_refuses_to_be_selected(name):
    x, v, subspace = state()
    with pytest.raises(ValueError, match=r"last transition .* cannot be selected"):
        transition(Kernel(name), subspace, x, v, SIGMAS[-2], 0.0, noise=normal(subspace, 2))


def test_the_schedule_and_both_ends_of_eta_are_those_of_the_diffusers_scheduler():
    for stochastic, eta in ((False, 0.0), (True, 1.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=stochastic)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        sigmas = shifted_schedule(4, 5.0)
        assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas, atol=1e-6)
        x, v, _ = state()
        for k, (s, s2) in enumerate(pairwise(sigmas)):
            torch.manual_seed(100 + k)
            expected = scheduler.step(v, scheduler.timesteps[k], x, return_dict=False)[0]
            torch.manual_seed(100 + k)
            drawn = torch.randn_like(x)
            if stochastic and s2 > 0:
                mean, std = Kernel("cps", eta).moments(x, v, s, s2)
                assert difference(mean + std * drawn, expected) < 1e-6
                assert difference(ode_step(x, v, s, s2), expected) > 1e-3
            else:
                assert difference(ode_step(x, v, s, s2), expected) < 1e-6
            x = expected


def test_outside_the_subspace_the_transition_is_the_ode_step():
    (s, s2), kernel, (x, v, _) = STEPS[0], Kernel(eta=0.5), state(shape=(2, 3, 2, 4, 4))
    inside = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    inside[:, :, 0, 1, 1] = True
    coarse = Cells(2, 3, inside)
    moved = sampled(kernel, coarse, x, v, s, s2, 4) - ode_step(x, v, s, s2).unsqueeze(1)
    assert difference(moved, coarse.lift(coarse.project(moved))) < 1e-6
    assert moved[..., 0, 2:, 2:].abs().min() > 0
    moved[..., 0, 2:, 2:] = 0
    assert not moved.any()
    everywhere = sampled(kernel, white(x.shape), x, v, s, s2, 4)
    assert ((everywhere - ode_step(x, v, s, s2).unsqueeze(1)).abs() > 0).all()


def test_outside_the_subspace_a_state_is_where_an_unselected_step_leads():
    (s, s2), (x, v, _) = STEPS[0], state((2, 3, 2, 4, 4))
    inside = torch.zeros(2, 1, 2, 2, 2, dtype=torch.bool)
    inside[:, :, 0, 1, 1] = True
    coarse, renoised = Cells(2, 3, inside), (1 - s2) * (x - s * v) + s2 * noise(*x.shape, seed=9)
    coordinates, _ = transition(Kernel(eta=1.0), coarse, x, v, s, s2, noise=normal(coarse, 4))
    after = place(coarse, renoised, coordinates)
    assert difference(coarse.project(after), coordinates) < 1e-5
    rest = after - renoised.unsqueeze(1)
    assert difference(coarse.lift(coarse.project(rest)), rest) < 1e-6
    assert difference(renoised, ode_step(x, v, s, s2)) > 0.1


def test_an_amplitude_widens_the_spread_around_the_ode_step():
    (s, s2), (x, v, _) = STEPS[0], state()
    mean, std = Kernel(eta=0.5, amplitude=4.0).inside(x, v, s, s2)
    plain_mean, plain_std = Kernel(eta=0.5).inside(x, v, s, s2)
    assert std == pytest.approx(4 * plain_std) and torch.equal(mean, ode_step(x, v, s, s2))
    assert difference(plain_mean, mean) > 1e-2


@pytest.mark.parametrize("sigmas", [(), (1.0,), (0.9, 0.0), (1.0, 0.5), (1.0, 0.5, 0.5, 0.0), (1.0, 0.2, 0.6, 0.0)])
def test_a_schedule_must_fall_from_one_to_zero(sigmas):
    check_schedule(SIGMAS)
    with pytest.raises(ValueError, match="must fall strictly from 1 to 0"):
        check_schedule(sigmas)


def test_a_kernel_without_meaning_is_refused():
    with pytest.raises(ValueError, match="cps, flow_sde, dance"):
        Kernel("sde")
    with pytest.raises(ValueError, match=r"eta must lie in 0..1, not 1.5"):
        Kernel(eta=1.5)
