"""Parts together: what combines does what it says, what makes no sense is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

ADAM, MOMENTUM = optax.scale_by_adam(), optax.trace(0.9)
GAUSSIAN, ORTHONORMAL = lro.RandomGaussian(), lro.RandomOrthonormal()
LATE = lro.Switch(4, lro.TopSingular(), GAUSSIAN)
INT8, UINT8 = lro.BlockInt8(signed=True), lro.BlockInt8(signed=False)


def project(inner=ADAM, rank=2, **parts):
    return lro.project_gradients(inner, rank=rank, **parts)


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: project(subspace=GAUSSIAN, recovery=lro.FiraResidual()),
            "FiraResidual with RandomGaussian: FiraResidual requires a basis with "
            "orthonormal columns, RandomGaussian does not provide it",
        ),
        (
            lambda: project(subspace=GAUSSIAN, recovery=lro.SparseResidual()),
            "SparseResidual with RandomGaussian: .* orthonormal",
        ),
        (
            lambda: project(subspace=LATE, recovery=lro.FiraResidual()),
            "FiraResidual with Switch: .* orthonormal",
        ),
        (
            lambda: project(subspace=GAUSSIAN, refresh=lro.WhenDrifted(3)),
            "WhenDrifted with RandomGaussian: .* orthonormal",
        ),
        (
            lambda: project(subspace=ORTHONORMAL, refresh=lro.WhenDrifted(3)),
            "WhenDrifted with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: project(subspace=ORTHONORMAL, refresh=lro.OnConvergence(0.5)),
            "OnConvergence with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: lro.CrossHead(2, ORTHONORMAL),
            "CrossHead with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: project(subspace=lro.CrossHead(2)),
            "CrossHead with side='short': .* requires side='left' or 'right'",
        ),
        (
            lambda: project(subspace=lro.Hybrid(3)),
            "Hybrid with rank 2: Hybrid requires a rank of at least 3",
        ),
        (
            lambda: project(subspace=lro.Switch(4, lro.EnergyRank(3), ORTHONORMAL)),
            "EnergyRank with rank 2: .* at least 3",
        ),
        (
            lambda: project(subspace=lro.ImportanceSampled(pool=1)),
            "ImportanceSampled with rank 2: .* at most 1",
        ),
        (
            lambda: lro.compress_state(ADAM, {"nu": lro.LowRank(2)}),
            "LowRank with the state field 'nu': it requires numbers that are never "
            "negative, LowRank does not provide it",
        ),
        (
            lambda: lro.compress_state(ADAM, {"mu": lro.LowRank(2, nonnegative=True)}),
            "LowRank with the state field 'mu': .* both signs",
        ),
        (
            lambda: lro.compress_state(ADAM, {"0/mu": UINT8}),
            "BlockInt8 with the state field '0/mu': .* both signs",
        ),
        (
            lambda: lro.compress_state(project(), {"basis": lro.LowRank(2)}),
            "LowRank with the state field 'basis': .* independent",
        ),
    ],
)
def test_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match="Cannot use " + message):
        make()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            lro.flora_project(MOMENTUM, rank=2, transfer=lro.Keep()),
            "Keep with RandomGaussian: Keep requires basis vectors with the signs",
        ),
        (
            project(subspace=GAUSSIAN, transfer=lro.Rotate()),
            "Rotate with RandomGaussian: .* orthonormal",
        ),
        (
            project(subspace=lambda view: GAUSSIAN, recovery=lro.FiraResidual()),
            "FiraResidual with RandomGaussian: .* orthonormal",
        ),
        (
            project(subspace=lro.CrossHead(2), side=lambda path: "long"),
            "CrossHead with side='long'",
        ),
        (
            project(optax.scale_by_rms(), recovery=lro.SparseResidual()),
            "SparseResidual .* requires a first moment, .* fields nu",
        ),
        (
            lro.galore_project(lro.mlorc_compress(ADAM), rank=4, transfer=lro.Rotate()),
            r"Rotate around compressed state: .* requires moments as matrices, and "
            r"'inner_state/mu.left' does not provide one",
        ),
        (
            lro.mlorc_compress(optax.scale_by_factored_rms()),
            "LowRank with the fields v_row, v_col, v: LowRank requires moments with "
            "rows and columns",
        ),
    ],
)
def test_refused_once_the_parameters_are_known(tx, message):
    params = {"w": jax.ShapeDtypeStruct((128, 130), jnp.float32)}
    with pytest.raises(ValueError, match="Cannot use " + message):
        jax.eval_shape(tx.init, params)
    # Where nothing is a matrix, nothing is combined.
    jax.eval_shape(tx.init, {"b": jnp.ones(3)})


class Given:
    """A subspace of one's own that says nothing about itself."""

    def select(self, key, grad, old, step):
        return jnp.eye(old.shape[-2], old.shape[-1])


@pytest.mark.parametrize(
    "tx",
    [
        lro.apollo_scale(ADAM, rank=2),  # only norms of the direction count
        project(subspace=GAUSSIAN, transfer=lro.Reset()),
        project(optax.identity(), subspace=GAUSSIAN),  # no moments to keep
        project(
            subspace=lro.Switch(4, lro.TopSingular(), ORTHONORMAL),
            refresh=lro.WhenDrifted(3),
            recovery=lro.FiraResidual(),
        ),
        project(
            subspace=Given(),
            refresh=lro.WhenDrifted(3),
            transfer=lro.Rotate(),
            recovery=lro.SparseResidual(),
        ),
        project(subspace=lro.CrossHead(2, lro.ImportanceSampled(2)), side="right"),
        lro.compress_state(ADAM, {"mu": INT8, "nu": INT8}),  # coarser, but it has 0
        lro.mlorc_compress(optax.chain(optax.scale_by_factored_rms(), MOMENTUM)),
        lro.mlorc_compress(optax.masked(MOMENTUM, {"w": False, "b": True})),
    ],
)
def test_not_refused(tx):
    params = {"w": jnp.ones((128, 130)), "b": jnp.ones(130)}
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_a_lazy_refresh_compares_the_ranks_in_use():
    # A steady gradient of rank 1 is a steady subspace, though three columns are zero.
    grads = {"w": jnp.outer(jnp.arange(1.0, 7), jnp.arange(1.0, 6))}
    tx = project(rank=4, subspace=lro.EnergyRank(), refresh=lro.WhenDrifted(1, 0.9))
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(6):
        _, state = update(grads, state)
    assert np.sum(np.any(state.basis["w"] != 0, axis=0)) == 1
    assert state.refresh["w"].stretch == 2
