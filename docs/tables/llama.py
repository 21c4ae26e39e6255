"""The parameters of LLaMA-7B as shapes, its 32 layers stacked."""

import jax
import jax.numpy as jnp

import lowrank_optax as lro

_WIDTH, _INNER, _LAYERS, _TOKENS = 4096, 11008, 32, 32000
MATRICES = lro.matrix_rules({"_proj": lro.MatrixAxes()})


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _stack(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(_LAYERS, *shape)


LLAMA_7B = {
    "embed": _array(_TOKENS, _WIDTH),
    "layers": {
        "q_proj": _stack(_WIDTH, _WIDTH),
        "k_proj": _stack(_WIDTH, _WIDTH),
        "v_proj": _stack(_WIDTH, _WIDTH),
        "o_proj": _stack(_WIDTH, _WIDTH),
        "gate_proj": _stack(_WIDTH, _INNER),
        "up_proj": _stack(_WIDTH, _INNER),
        "down_proj": _stack(_INNER, _WIDTH),
        "attention_norm": _stack(_WIDTH),
        "mlp_norm": _stack(_WIDTH),
    },
    "norm": _array(_WIDTH),
    "lm_head": _array(_WIDTH, _TOKENS),
}
