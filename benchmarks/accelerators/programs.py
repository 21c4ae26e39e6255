"""The step that is compiled: the update, and its application to the parameters."""

import dataclasses
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.sharding import Sharding

import lowrank_optax as lro
from benchmarks.accelerators.counting import opens_refresh

Params = dict[str, dict[str, jax.ShapeDtypeStruct]]

SHAPES = ("leaf", "leaf-ordinary", "turned", "7b", "7b-stacked", "60m")
_ORDINARY = "-ordinary"


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The matrices of a LLaMA, by path.

    Args:
      name: "7b" is one layer of LLaMA-7B, "7b-stacked" all 32 in seven stacks, "60m"
        all eight of LLaMA-60M, "leaf" one matrix of LLaMA-7B, "turned" one whose
        columns are its short side and one that belongs to heads. With "-ordinary" they
        are the same, see `is_ordinary`.
    """
    name = name.removesuffix(_ORDINARY)
    d, hidden, layers = (512, 1376, 8) if name == "60m" else (4096, 11008, 1)
    if name == "leaf":
        return {"layer0/up_proj": (d, hidden)}
    matrices = {f"{x}_proj": (d, d) for x in "qkvo"}
    matrices |= {"gate_proj": (d, hidden), "up_proj": (d, hidden)}
    matrices |= {"down_proj": (hidden, d)}
    if name == "turned":
        return {f"layer0/{k}": matrices[k] for k in ("q_proj", "down_proj")}
    if name == "7b-stacked":
        return {f"layers/{k}": (32, *shape) for k, shape in matrices.items()}
    return {
        f"layer{i}/{k}": shape for i in range(layers) for k, shape in matrices.items()
    }


def is_ordinary(name: str) -> bool:
    """Whether only the program without its refresh is compiled, for some shapes.

    Whatever a refresh needs (on TPU, decompositions that take minutes to compile) is
    not in it.
    """
    return name.endswith(_ORDINARY)


def parameters(name: str, dtype: str, where: Sharding) -> Params:
    """The shapes as a tree of parameters on a device."""
    tree: Params = {}
    for path, shape in shapes(name).items():
        layer, leaf = path.split("/")
        array = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
        tree.setdefault(layer, {})[leaf] = array
    return tree


@dataclass(frozen=True)
class Program:
    """A traced step.

    Attributes:
      jaxpr: of parameters, state and gradients, flat.
      arrays: the shapes of what it takes.
      parameters: how many of them, from the first, are the parameters.
      donated: how many of them, from the first, it may write over.
      platform: what it is for.
    """

    jaxpr: core.ClosedJaxpr
    arrays: list[jax.ShapeDtypeStruct]
    parameters: int
    donated: int
    platform: str

    def lower(self) -> jax.stages.Lowered:
        step = jax.jit(
            core.jaxpr_as_fun(self.jaxpr), donate_argnums=tuple(range(self.donated))
        )
        traced = step.trace(*self.arrays)
        return traced.lower(lowering_platforms=(self.platform,))


def trace(
    tx: optax.GradientTransformation, params: Params, platform: str, tier: str
) -> Program:
    """A step of an optimizer on parameters of some shapes."""

    def at(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    where = jax.tree.leaves(params)[0].sharding
    state = jax.tree.map(at, jax.eval_shape(tx.init, params))
    with lro.kernels.dispatch(tier):
        traced = jax.jit(step).trace(params, state, params)
    arrays = jax.tree.leaves((params, state, params))
    sizes = (len(jax.tree.leaves(x)) for x in (params, (params, state)))
    return Program(traced.jaxpr, arrays, *sizes, platform)


def without_refresh(program: Program) -> Program | None:
    """The same step of which no refresh is ever due; None if no conditional is marked.

    The predicate of each marked conditional becomes a constant, and XLA drops the
    branch that is never taken.
    """
    never = _Never({}, 0)
    jaxpr = never.closed(program.jaxpr, False)
    if not never.found:
        return None
    return dataclasses.replace(program, jaxpr=jaxpr)


@dataclass
class _Never:
    """Rewrites programs; each part once, so that what is shared stays so."""

    known: dict[tuple[int, bool], core.Jaxpr]
    found: int

    def closed(self, x: core.ClosedJaxpr, inside: bool) -> core.ClosedJaxpr:
        return x.replace(jaxpr=self.jaxpr(x.jaxpr, inside))

    def jaxpr(self, x: core.Jaxpr, inside: bool) -> core.Jaxpr:
        key = id(x), inside
        if key not in self.known:
            self.known[key] = x.replace(eqns=[self.eqn(e, inside) for e in x.eqns])
        return self.known[key]

    def eqn(self, eqn: core.JaxprEqn, inside: bool) -> core.JaxprEqn:
        inside = opens_refresh(str(eqn.source_info.name_stack), inside)
        kind = eqn.primitive.name
        if kind == "pallas_call":
            return eqn
        if kind == "cond" and inside and "branches_platforms" not in eqn.params:
            self.found += 1
            return self._first(eqn)
        within = inside and kind not in ("cond", "while", "scan")
        params = {k: self._part(x, within) for k, x in eqn.params.items()}
        return eqn.replace(params=params)

    def _first(self, eqn: core.JaxprEqn) -> core.JaxprEqn:
        """A conditional that takes its first branch, that of a false predicate."""
        index = eqn.invars[0].aval
        zero = core.Literal(np.zeros((), index.dtype), index)
        params = {k: self._part(x, False) for k, x in eqn.params.items()}
        return eqn.replace(invars=[zero, *eqn.invars[1:]], params=params)

    def _part(self, x: object, inside: bool) -> object:
        if isinstance(x, core.ClosedJaxpr):
            return self.closed(x, inside)
        if isinstance(x, core.Jaxpr):
            return self.jaxpr(x, inside)
        if isinstance(x, tuple):
            parts = [self._part(y, inside) for y in x]
            return (
                x
                if all(a is b for a, b in zip(parts, x, strict=True))
                else tuple(parts)
            )
        return x


@dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      text: XLA's, optimized.
      lowered: StableHLO, before XLA.
      seconds: that lowering and compiling took.
      temporaries: bytes that it needs besides what it takes and gives.
      accessed: bytes by XLA's own count, in which all branches count; 0 on GPU.
    """

    text: str
    lowered: str
    seconds: float
    temporaries: int
    accessed: float


def compile_program(program: Program) -> Compiled:
    """Compile a step for the device that its shapes are on."""
    start = time.perf_counter()
    lowered = program.lower()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Compiled(
        compiled.as_text() or "",
        lowered.as_text(),
        seconds,
        memory.temp_size_in_bytes,
        float(cost.get("bytes accessed", 0.0)),
    )


def products(lowered: str) -> tuple[int, int]:
    """How many products a StableHLO text has, and how many are not precise enough.

    Those count of which an operand is float32, at less than the highest precision. What
    is narrower is multiplied exactly, and summed in float32.
    """
    found = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    low = [
        line
        for line in found
        if "precision = [HIGHEST, HIGHEST]" not in line
        and "xf32>" in line.rpartition(" : ")[2].partition("->")[0]
    ]
    return len(found), len(low)
