import numpy as np
import pytest
from reward_cases import WORLD, film

from rewards.corruptions import HELD_OUT, REACH, TRAINED, Scene, discs, fill

KINDS = {**TRAINED, **HELD_OUT}
LOCAL = ("smear", "bloat", "fade", "hole")


def frame_and_scene(index=0, t=12):
    tracks = WORLD.prompt("heldout", index).tracks
    return film(index)[t].astype(np.float32) / 255, Scene(tracks[t], tracks[0])


@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_leaves_the_frame_alone_and_more_level_changes_more(kind):
    change = []
    for level in (0.0, 0.3, 0.6, 1.0):
        per_scene = []
        for index in range(6):
            frame, scene = frame_and_scene(index)
            changed = KINDS[kind](frame, level, np.random.default_rng(3), scene)
            assert changed.shape == frame.shape and changed.dtype == np.float32
            per_scene.append(np.sqrt(np.square(changed - frame).mean()))
        change.append(np.mean(per_scene))
    assert change[0] < 1e-6 and np.all(np.diff(change) > 0) and change[-1] > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_neither_writes_into_its_input_nor_draws_beyond_its_generator(kind):
    frame, scene = frame_and_scene()
    before = frame.copy()
    one, two = (KINDS[kind](frame, 0.7, np.random.default_rng(1), scene) for _ in range(2))
    np.testing.assert_array_equal(frame, before)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_corruption_stays_local(kind):
    frame, scene = frame_and_scene()
    changed = KINDS[kind](frame, 1.0, np.random.default_rng(1), scene)
    near = discs(frame.shape, np.concatenate(scene), REACH * WORLD.size + 2) > 0
    assert np.abs(changed - frame)[~near].max() < 1e-6 < np.abs(changed - frame)[near].max()


def test_filling_continues_a_smooth_picture_through_the_hole():
    y, x = np.mgrid[:64, :64].astype(np.float32) / 64
    picture = np.stack([x, y, (x + y) / 2], -1)
    mask = discs(picture.shape, [(30, 34)], 10)
    broken = picture + mask[..., None] * (1 - picture)
    assert np.abs(fill(broken, mask) - picture).max() < 0.2 < 0.5 < np.abs(broken - picture).max()
