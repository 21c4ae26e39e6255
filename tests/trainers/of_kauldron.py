"""What the configuration of Kauldron names: a model and its data."""

import numpy as np
from flax import linen as nn
from kauldron import kd


class Model(nn.Module):
    x: kd.kontext.Key = "batch.x"

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(48, name="up")(x))
        return {"y": nn.Dense(16, name="down")(hidden)}


def data():
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    return {"x": x, "y": x[:, ::-1].copy()}
