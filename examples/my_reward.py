"""A reward in ten lines: see the README."""


def calm(batch):
    """1 for a video that never flickers. batch.video is uint8 [B, T, H, W, 3]; return [B] or [B, T] in 0..1."""
    video = batch.video.astype("float32") / 255
    flicker = abs(video[:, 1:] - video[:, :-1]).mean((2, 3, 4))
    score = 1 - (flicker / 0.1).clip(0, 1)
    return score[:, [0, *range(score.shape[1])]]  # one score per frame
