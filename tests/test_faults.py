"""One bad gradient leaves usable states, and no large updates after it."""

import functools

import pytest
from registry import METHODS

from benchmarks import faults

SETTINGS = faults.Settings(rank=4, period=3, after=6)
OPTIMIZERS = {
    k: x for k, x in faults.optimizers(SETTINGS).items() if not k.startswith("optax")
}


@functools.cache
def grads():
    return faults.gradients(SETTINGS)


# Other forms of these are looked at in the record.
@pytest.fixture(scope="module", params=[k for k in OPTIMIZERS if "," not in k])
def usual(request):
    tx = OPTIMIZERS[request.param]
    return tx, faults.run(tx, grads())[0]


@pytest.mark.parametrize("fault", faults.FAULTS.values(), ids=faults.FAULTS)
def test_updates_stay_within_ten_times_the_usual(usual, fault):
    tx, norms = usual
    when = SETTINGS.moments["between"]
    for leaf in ("q_proj", "bias"):
        found, state = faults.run(tx, grads(), when, leaf, fault)
        finite = faults.is_finite(fault(grads()[0][leaf]))
        assert faults.worst(norms, found, when, leaf, finite) < 10
        assert faults.is_finite(state) and faults.is_orthonormal(state)


def test_every_public_factory_is_in_the_table_or_has_a_reason():
    public = {method.name.partition("-")[0] for method in METHODS}
    rows = {name.partition(",")[0] for name in OPTIMIZERS}
    missing = public - rows - set(faults.ABSENT)
    assert not missing, f"Add {missing} to benchmarks/faults.py: a row, or a reason."
    assert set(faults.ABSENT) <= public
    assert not rows & set(faults.ABSENT) - {"i3s_subspace"}
