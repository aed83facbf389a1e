from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.transition import Kernel
from rollout.group import RolloutSettings
from rollout.plan import SELECTS, make_plan
from rollout.seeds import numpy_generator, seed_of, torch_generator

SHAPE = (2, 1, 2, 2)
requests = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "iteration": st.integers(0, 10**6),
        "prompt_id": st.text(max_size=12),
        "select": st.sampled_from(SELECTS),
        "blocks": st.integers(1, 8),
        "steps": st.integers(2, 6),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(requests)
def test_a_plan_selects_what_its_mode_says_and_never_the_last_step(request):
    plan = make_plan(**request)
    blocks, steps = request["blocks"], request["steps"]
    assert all(1 <= block <= blocks and 0 <= step < steps - 1 for block, step in plan.selected)
    per_block = {"trunk": [1] * blocks, "frame": [1] * blocks, "all": [steps - 1] * blocks}
    counts = [len(plan.steps(block)) for block in range(1, blocks + 1)]
    if request["select"] == "video":
        assert sum(counts) == 1
    else:
        assert counts == per_block[request["select"]]
    assert plan.steps(0) == ()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(requests)
def test_a_plan_is_a_function_of_seed_iteration_and_prompt(request):
    plan, again = make_plan(**request), make_plan(**request)
    assert plan == again
    assert torch.equal(plan.initial(1, SHAPE), again.initial(1, SHAPE))
    assert torch.equal(plan.renoise(1, 0, SHAPE), again.renoise(1, 0, SHAPE))
    first, second = (p.exploration(1, 0, 1).initial_seed() for p in (plan, again))
    assert first == second
    for changed in ({"seed": request["seed"] + 1}, {"iteration": request["iteration"] + 1},
                    {"prompt_id": request["prompt_id"] + "x"}):  # fmt: skip
        other = make_plan(**{**request, **changed})
        assert not torch.equal(plan.initial(1, SHAPE), other.initial(1, SHAPE))
        assert other.exploration(1, 0, 1).initial_seed() != first


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_no_two_draws_of_an_iteration_share_their_noise(seed):
    plans = [make_plan(seed, i, f"p{p}", "all", blocks=3, steps=4) for i in range(2) for p in range(3)]
    generators = [plan.exploration(block, step, g) for plan in plans for block, step in plan.selected for g in range(4)]
    shared = [draw for plan in plans for block in (1, 2, 3) for draw in
              (plan.initial(block, SHAPE), *(plan.renoise(block, step, SHAPE) for step in range(3)))]  # fmt: skip
    drawn = [torch.randn(SHAPE, generator=g) for g in generators] + shared
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == len(drawn) == 2 * 3 * 3 * (3 * 4 + 4)


def test_every_step_and_block_is_selected_about_equally_often():
    plans = [make_plan(0, i, "p", "video", blocks=3, steps=4) for i in range(1800)]
    counts = Counter(pair for plan in plans for pair in plan.selected)
    assert len(counts) == 9 and all(150 < count < 250 for count in counts.values())
    trunks = [make_plan(0, i, "p", "trunk", blocks=3, steps=4).selected for i in range(300)]
    assert len(set(trunks)) == 27  # the blocks of a video draw their steps independently


def test_plans_that_cannot_teach_are_refused():
    with pytest.raises(ValueError, match="at least two denoising steps"):
        make_plan(0, 0, "p", "trunk", blocks=2, steps=1)
    with pytest.raises(ValueError, match=r"rollout.group_size must be at least 2"):
        RolloutSettings("trunk", 1, "tangent", Kernel())
    with pytest.raises(ValueError, match=r"rollout.select='twig' is none of trunk, video, frame, all"):
        make_plan(0, 0, "p", "twig", blocks=2, steps=3)


def test_seeds_are_the_same_on_every_machine_and_tell_their_parts_apart():
    assert seed_of(0, "a", 1) == 2647677364940038951
    assert seed_of("ab", "c") != seed_of("a", "bc") != seed_of("abc")
    assert 0 <= seed_of("x") < 2**62
    first, second = (torch.randn(3, generator=torch_generator(1, part)) for part in ("a", "b"))
    assert not torch.equal(first, second)
    assert numpy_generator(1, "a").integers(10**9) == numpy_generator(1, "a").integers(10**9)
