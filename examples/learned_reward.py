"""A reward with state: a linear score of colour statistics, whose weights it reads once, when its worker starts."""

import numpy as np
from safetensors.numpy import load_file


class Colours:
    """sigmoid(weight . statistics + bias) of every frame, from the mean and the deviation of its red, green and blue.

    weights: a safetensors file with `weight` float32 [6] and `bias` float32 [1].
    """

    def __init__(self, weights, temperature=1.0):
        stored = load_file(weights)
        if stored["weight"].shape != (6,) or stored["bias"].shape != (1,):
            raise ValueError(f"{weights}: weight must be [6] and bias [1]")
        self.weight, self.bias, self.temperature = stored["weight"], stored["bias"], temperature

    def __call__(self, batch):
        pixels = batch.video.astype(np.float32) / 255
        statistics = np.concatenate((pixels.mean((2, 3)), pixels.std((2, 3))), -1)
        logit = (statistics @ self.weight + self.bias) / self.temperature
        return {"score": 1 / (1 + np.exp(-logit)), "logit": logit.mean(1)}  # [B, T], and a metric [B]
