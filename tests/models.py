"""A model of Flax NNX with the parameters of `registry.example_params`."""

from flax import nnx


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
