"""The terms together, as a run uses them: no way of cheating one of them pays under all."""

import cv2
import numpy as np
import pytest
from reward_cases import WORLD, batch_of, duplicated, film, panned, shifted, static, vanished

from rewards.degradation import Degradation
from rewards.guards import Background, Gated
from rewards.terms import Term, score
from rewards.trajectory import Trajectory

SCENES = [i for i in range(40) if WORLD.prompt("heldout", i).visible.all()][:10]


def softened(index):
    return np.stack([film(index)[0], *(cv2.GaussianBlur(frame, (0, 0), 1.2) for frame in film(index)[1:])])


def vanished_halfway(index):
    return np.concatenate([film(index)[:7], film(index, vanished)[7:]])


CHEATS = {
    "one pixel off": lambda i: film(i, shifted((0.6, -0.8))),
    "static": static,
    "vanished": lambda i: film(i, vanished),
    "vanished halfway": vanished_halfway,
    "panned": panned,
    "duplicated": lambda i: film(i, duplicated),
    "soft": softened,
}


@pytest.fixture(scope="module")
def mix():
    terms = [
        Term("trajectory", Trajectory(), 1.0),
        Term("background", Background(), 0.3),
        Term("degradation", Gated(Degradation(), Trajectory()), 0.5),
    ]

    def weighted(make):
        outputs, faults = score(terms, batch_of([make(i) for i in SCENES], SCENES))
        assert not faults
        return sum(term.weight * outputs[term.name].score for term in terms)

    return weighted


@pytest.mark.parametrize("cheat", CHEATS)
def test_the_true_video_outscores_every_cheat_in_nearly_every_scene(mix, cheat):
    better = mix(film) - mix(CHEATS[cheat])
    assert (better > 0).mean() >= 0.9 and better.mean() > 0.02


def test_a_static_video_earns_less_than_one_that_moves_two_pixels_off(mix):
    assert (mix(lambda i: film(i, shifted((1.2, -1.6)))) > mix(static)).all()
