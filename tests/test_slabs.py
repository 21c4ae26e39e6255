"""Passes in a loop over some rows, which a TPU's memory wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import random_like

import lowrank_optax as lro
from lowrank_optax._src.engines import in_bytes
from lowrank_optax._src.kernels.adam import Adam
from lowrank_optax._src.linalg import slabs
from lowrank_optax._src.parts.blocks import Blocks


@pytest.mark.parametrize("lead", [(64,), (200,), (20,), (3, 96), (2, 3, 40)])
def test_rows_are_renewed_as_all_at_once(lead, monkeypatch):
    monkeypatch.setattr(slabs, "_NUMBERS", 64 * 8)  # slabs of 64 rows
    shapes = {"fixed": (*lead, 8), "wide": (*lead, 6), "thin": (*lead, 1)}
    given = random_like(shapes, 0)

    def renew(fixed, renewed):
        (x,), (wide, thin) = fixed, renewed
        return [wide * thin + x[..., :6], thin + jnp.sum(x, axis=-1, keepdims=True)]

    arguments = [given["fixed"]], [given["wide"], given["thin"]]
    found = jax.jit(lambda *x: slabs.in_slabs(renew, *x))(*arguments)
    for x, expected in zip(found, renew(*arguments), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("part", [0, 32])
@pytest.mark.parametrize("shape", [(96, 512), (2, 72, 256)])
def test_adam_in_bytes_is_the_same_in_slabs(shape, part, monkeypatch):
    monkeypatch.setattr(slabs, "_NUMBERS", 32 * shape[-1])
    blocks = Blocks(shape, 256, part)
    numbers = Adam(0.9, 0.999, 1e-8, 0.0).numbers(jnp.asarray(3))
    rng = np.random.default_rng(0)
    codes = [jnp.asarray(rng.integers(0, 256, shape), jnp.uint8) for _ in range(2)]
    scales = jnp.asarray(rng.uniform(0.5, 2, (*shape[:-1], shape[-1] // 256)))
    grad = rng.normal(size=shape).astype(np.float32)
    grad[..., 5, 7] = np.nan  # its block keeps what it was
    given = *map(blocks.cut, (jnp.asarray(grad), *codes)), *[blocks.load(scales)] * 2
    expected, found = (
        jax.jit(lambda *x, f=f: f(blocks, x, numbers))(*given)
        for f in (in_bytes._in_passes, in_bytes._in_slabs)
    )
    for name, x, y in zip("update mu nu".split(), found, expected, strict=False):
        differ = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        if name == "update":
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        else:  # bytes: what lies between two numbers may go to the other
            assert np.max(differ) <= 1 and np.mean(differ > 0) < 1e-3
    for x, y in zip(found[3:], expected[3:], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_only_a_tpu_has_the_loop():
    params = {"w": jax.ShapeDtypeStruct((4096, 512), jnp.float32)}
    tx = lro.adamw_8bit(0.1)
    state = jax.eval_shape(tx.init, params)
    with lro.kernels.dispatch("xla"):
        traced = jax.jit(tx.update).trace(params, state, params)
    for platform, count in (("tpu", 1), ("cuda", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") == count
