"""The state of one transformation as another of its kind keeps it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src import linalg
from lowrank_optax._src.engines.compress import CompressState
from lowrank_optax._src.engines.project_state import ProjectState
from lowrank_optax._src.leaves.box import is_variable, rebox, unbox
from lowrank_optax._src.leaves.context import limited_ranks
from lowrank_optax._src.leaves.fields import abstract_state
from lowrank_optax._src.leaves.paths import Path, flatten, path_parts
from lowrank_optax._src.leaves.roles import Role, role_of
from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.parts.codec import BlockInt8, BlockInt8Code
from lowrank_optax._src.parts.factors import LowRankCode
from lowrank_optax._src.report.compare import differences
from lowrank_optax._src.training.shrink import leading


def convert_state(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, *, block: int = 256
) -> Any:
    """A state of a larger rank, or of moments (not) in 8 bits, as ``tx`` keeps it.

    Training goes on from it. Of a basis that is kept, the leading columns stay, and
    their moments; of MLorc's factors, the best approximation of their product. Where a
    basis is drawn again (APOLLO, Flora), the size of its entries goes by the rank, and
    another rank is refused. Numbers become bytes as `quantize_state` rounds them: they
    move by half a step of its map at most, 0.7% of the largest of their block, or 0.4%
    without signs. Bytes become the numbers that they stand for.

    Args:
      tx: the transformation that is to go on.
      opt_state: of arrays, in the containers that its own transformation made.
      params: arrays or abstract ones.
      block: numbers that share a scale, as of `quantize_state`; of both, if both are in
        bytes.

    Returns:
      A state like ``tx.init(params)``. On a mesh, compile this with ``out_shardings``
      by `state_shardings`.

    Raises:
      ValueError: for what differs in more, with parameter, field and both shapes of
        each such array; for bytes in other blocks; and for moments of which nothing
        tells whether they have signs.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"w": jnp.ones((64, 256))}
    >>> old = lro.galore_adamw(1e-2, rank=32)
    >>> _, state = old.update(params, old.init(params), params)
    >>> tx = lro.galore_adamw_8bit(1e-2, rank=16)
    >>> state = lro.convert_state(tx, state, params)
    >>> state[0].inner_state.inner_state.mu["w"].index.shape
    (16, 256)
    >>> updates, state = tx.update(params, state, params)
    """
    boxed = abstract_state(tx, params)
    wanted = unbox(boxed)
    with limited_ranks(dict.fromkeys(flatten(params)[0], 1)):
        lowest, _ = jax.tree_util.tree_flatten_with_path(
            unbox(abstract_state(tx, params))
        )
    at_rank_1 = {path_parts(key): x.shape for key, x in lowest}
    state = unbox(opt_state)
    if not isinstance(state, (dict, list)):
        state = _Conversion(at_rank_1, block).convert(wanted, state)
        lines, _ = differences(tx, state, params)
        if lines:
            what = "Cannot convert a state that differs in more than ranks and bytes:"
            raise ValueError("\n".join([what, *lines]))
    if jax.tree.structure(state) != jax.tree.structure(wanted):
        raise ValueError(
            "Cannot convert a state in other containers than its transformation makes, "
            "as of a checkpoint that is restored without them. Restore it into "
            "jax.eval_shape(old.init, params), of the transformation that made it."
        )
    return jax.tree.map(
        lambda box, x: rebox(box, x) if is_variable(box) else x,
        boxed,
        state,
        is_leaf=is_variable,
    )


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """What is known while two states are followed side by side.

    Attributes:
      at_rank_1: the shapes of the state if all ranks were 1, by which the axes of ranks
        are known.
      block: of the bytes.
    """

    at_rank_1: Mapping[Path, tuple[int, ...]]
    block: int

    def convert(
        self, want: Any, have: Any, path: Path = (), role: Role | None = None
    ) -> Any:
        """``have``, which stands at a path, in the form of ``want`` as far as it goes.

        The role is that of the field around it, if there is one.
        """
        if _depth(want) > _depth(have):
            have = CompressState(_steps(have), have, {})
        elif _depth(want) < _depth(have):
            have = have.inner_state
        if isinstance(want, ProjectState) and _is_drawn(want.basis):
            inside = dataclasses.replace(self, at_rank_1={})
        else:
            inside = self
        both = isinstance(have, BlockInt8Code) and isinstance(want, BlockInt8Code)
        if both and jax.tree.map(jnp.shape, have) == jax.tree.map(jnp.shape, want):
            return have
        if isinstance(have, BlockInt8Code):
            x = self._codec(have, path, role).decode(have)
            x = x.astype(getattr(want, "dtype", x.dtype))
            have = x[0] if getattr(want, "ndim", 2) == 1 else x
        if isinstance(want, BlockInt8Code):
            return self._encoded(want, have, path, role)
        if isinstance(want, LowRankCode) and isinstance(have, LowRankCode):
            return _truncated(have, want.left.shape[-1])

        ours, treedef = jax.tree_util.tree_flatten_with_path(
            want, is_leaf=lambda x: x is not want
        )
        if any(x is want for _, x in ours):
            return self._cut(have, want.shape, path)
        try:
            theirs = treedef.flatten_up_to(have)
        except ValueError:
            return have  # which is said by paths, once all is looked at
        new = []
        for (key, w), h in zip(ours, theirs, strict=True):
            (part,) = path_parts(key)
            own = role or _role(want, path, part)
            new.append(inside.convert(w, h, (*path, part), own))
        return treedef.unflatten(new)

    def _cut(self, x: Any, shape: tuple[int, ...], path: Path) -> Any:
        """The leading part of an array along its rank, where it is but larger there."""
        # An array so small is in no code.
        places = (path, (*path, "index"), path[:-1])
        known = (self.at_rank_1[p] for p in places if p in self.at_rank_1)
        lowest = next(known, shape)
        found = getattr(x, "shape", shape)
        if found == shape or not len(found) == len(shape) == len(lowest):
            return x
        # Ranks are among the rows and columns, never an axis of stacked matrices.
        rows, sizes = len(shape) - 2, zip(found, shape, lowest, strict=True)
        larger = all(
            i == j or (i > j and rank == 1 and axis >= rows)
            for axis, (i, j, rank) in enumerate(sizes)
        )
        return leading(x, shape) if larger else x

    def _encoded(
        self, want: BlockInt8Code, x: Any, path: Path, role: Role | None
    ) -> Any:
        codec = self._codec(want, path, role)
        if hasattr(x, "ndim"):
            x = self._cut(x if x.ndim > 1 else x[None], want.index.shape, path)
        if np.shape(x) != want.index.shape:
            return x
        return codec.encode_by(codec.measure(x), x)

    def _codec(self, code: Any, path: Path, role: Role | None) -> BlockInt8:
        """What a code is of, if that is known."""
        cannot = f"Cannot convert the bytes of '{'/'.join(path)}'"
        if role is None:
            raise ValueError(
                f"{cannot}: nothing tells whether they have signs. Restore the state "
                "with the transformation that made it."
            )
        codec = BlockInt8(role == "first", self.block)
        index = jax.ShapeDtypeStruct(code.index.shape, jnp.float32)
        scales = jax.eval_shape(codec.measure, index).shape
        if scales != code.largest.shape:
            raise ValueError(
                f"{cannot} in blocks of {self.block}: their scales have shape "
                f"{code.largest.shape}, and would have {scales}. Give the `block` that "
                "they were made with."
            )
        return codec


def _role(state: Any, path: Path, name: str) -> Role | None:
    """The role of what a state, which stands at a path, has by this name."""
    last = path[-1] if path and isinstance(state, dict) else ""
    if last == "inner_states":  # the names are labels, of `optax.partition`
        return None
    # A rule's fields in a dict are those of the state around it.
    return role_of(CompressState if last == "own" else type(state), name)


def _truncated(code: LowRankCode, rank: int) -> LowRankCode:
    """The best approximation of a lower rank, by the singular values."""
    if code.left.shape[-1] <= rank:
        return code
    basis, rest = linalg.one_by_one(jnp.linalg.qr)(code.left)
    u, s, right = linalg.svd(matmul(rest, code.right))
    left = matmul(basis, u * s[..., None, :])
    return LowRankCode(left[..., :rank], right[..., :rank, :])


def _steps(state: Any) -> Any:
    """The updates that a state counts, none if it does not."""
    counted = [
        x
        for name in ("step", "count")
        for _, x in optax.tree.get_all_with_path(state, name)
        if getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.integer)
    ]
    # A copy: a buffer that stands in two places cannot be donated.
    return jnp.array(counted[0]) if counted else jnp.zeros([], jnp.int32)


def _depth(state: Any) -> int:
    """How many states of compressed ones stand one within the other."""
    return 1 + _depth(state.inner_state) if isinstance(state, CompressState) else 0


def _is_drawn(basis: Any) -> bool:
    """Whether only the step is kept at which each basis was drawn."""
    return any(x.dtype == jnp.int32 for x in jax.tree.leaves(basis))
