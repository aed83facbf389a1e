"""Three stages of the sprite world, and a reward that is easily cheated."""

from __future__ import annotations

from reward_cases import WORLD

from jobs.check_reward import stage

STAGES = [stage(WORLD, index, replicas=3) for index in range(3)]

VISIBLE_ONLY = '''
import numpy as np
from rewards.trackers import LucasKanade

def judge(batch):
    """Closeness of the points that the tracker still finds: who hides the object early is never wrong."""
    scores = []
    for video, target, mask in zip(batch.video, batch.target_tracks, batch.point_mask):
        target = target[:, mask]
        positions, found = LucasKanade().track(video, target[0], list(range(len(video))), target)
        away = np.linalg.norm(positions - target, axis=-1)[found]
        scores.append(np.exp(-away / 4).mean())
    return scores
'''
"""A file of a user's: the deliberately bad reward."""
