"""What one bad gradient does: every optimizer, kinds of faults, moments of a run.

    python -m benchmarks.faults

One leaf's gradient is spoiled once; ordinary ones follow. A cell is the largest norm
of that leaf's updates from then on, in multiples of what it is in the run without the
fault: over a matrix of queries, one of an MLP, a bias and an embedding, and over four
moments of the run. The spoiled step itself does not count where the gradient is not
finite: what it gives is the caller's to refuse (`optax.apply_if_finite`). A mark says
in how many of the 16 runs the last state is not finite, or a basis not orthonormal, if
any is. Written to ``benchmarks/records/faults.md``, with the reason for each cell above
3 and for each public factory that is not in the table; what has no reason is an error.
"""

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from benchmarks.record import about, write_record

Grads = dict[str, jax.Array]
Norms = dict[str, np.ndarray]  # of a leaf's updates, one a step

SHAPES = {"q_proj": (48, 96), "up_proj": (96, 48), "bias": (96,), "embed": (64, 48)}


def _entry(x: jax.Array) -> Any:
    return x.at[(3,) * x.ndim]


def _six(x: jax.Array) -> Any:
    """Entries of different rows and columns."""
    return x.at[tuple(7 * np.arange(6) % n for n in x.shape)]


FAULTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "NaN": lambda x: _entry(x).set(jnp.nan),
    "Inf": lambda x: _entry(x).set(jnp.inf),
    "1e19": lambda x: _entry(x).set(1e19),
    "an entry by 1e6": lambda x: _entry(x).multiply(1e6),
    "six entries by 1e3": lambda x: _six(x).multiply(1e3),
    "a row by 1e4": lambda x: x.at[3].multiply(1e4),
    "a row by 1e6": lambda x: x.at[3].multiply(1e6),
    "all by 1e4": lambda x: 1e4 * x,
    "zero": jnp.zeros_like,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long the runs are.

    Attributes:
      rank: of all methods.
      period: steps between refreshes.
      after: steps that follow the last fault.
      seed: of the gradients.
    """

    rank: int = 8
    period: int = 10
    after: int = 30
    seed: int = 0

    @property
    def moments(self) -> dict[str, int]:
        """The steps of the faults."""
        t = self.period
        return {"first": 0, "between": t + 4, "last": 2 * t - 1, "refresh": 2 * t}


# Why a cell is above 3, by the names of optimizers and the faults.
REASONS: dict[tuple[str, str], str] = {
    ("optax", "NaN|Inf"): (
        "Optax keeps what is not finite in its moments; "
        "`optax.apply_if_finite` is for that."
    ),
    ("apollo_adamw, mini", "1e19|an entry|six entries"): (
        "One random direction may by chance see little of a gradient that is nearly "
        "one entry, and the step by it is longer by as much. The ones after it are not."
    ),
    ("(fira_adamw|i3s_subspace, of Fira)$", "1e19|six entries"): (
        "A first gradient that is spoiled chooses the basis. Until the next refresh "
        "nearly all of a gradient is residual, which Fira moves by a whole step of "
        "Adam, and not by one of low rank."
    ),
    ("i3s_subspace, of Fira", "zero"): (
        "A zero gradient leaves the limiter without a norm, so that the next residual, "
        "here that of a new basis, is not limited."
    ),
    ("flora", "1e19|an entry|six entries|a row"): (
        "Updates are cut off at a root mean square of 1, which ordinary ones come to "
        "after some steps. The first are a tenth of that, as the momentum starts at "
        "zero and is not corrected for it."
    ),
    ("mlorc_adamw, of mu", "a row"): (
        "At low rank, the first moment has an error as large as an outlier's, also "
        "where the second, which is whole, is small. Entries are cut off at the most "
        "that Adam's own moments allow, 10.5."
    ),
    ("mlorc_adamw$", "an entry|six entries|a row"): (
        "Nothing tells of a first gradient what in it is an outlier. At low rank, and "
        "in the precision of floats, the second moment has lost what stands beside it. "
        "Until it has left, entries are cut off at the most that Adam's own moments "
        "allow, 10.5."
    ),
    ("mlorc_adamw, of nu", "1e19|an entry|six entries|a row"): (
        "At low rank, and in the precision of floats, the second moment has lost what "
        "stands beside an outlier, until that has left it. Until then entries are cut "
        "off at the most that Adam's own moments allow, 10.5."
    ),
}

# Why a public factory is not in the table.
ABSENT = {
    "adaptive_rank": "it is adarankgrad_adamw without a learning rate",
    "apollo_scale": "it is apollo_adamw without a learning rate",
    "average_gradients": "it is what it wraps, by the mean of the devices' gradients",
    "compress_state": "mlorc_compress and quantize_state are made by it; low-rank "
    "moments of Adam have no bound here, and in mlorc_adamw they have",
    "fira_project": "it is fira_adamw without a learning rate",
    "flora_project": "around a momentum it is in flora; that of plain gradients has no "
    "bound, as theirs has none",
    "galore_plus_project": "it is galore_plus_adamw without a learning rate",
    "galore_project": "it is galore_adamw without a learning rate",
    "golore_project": "it is golore_adamw without a learning rate",
    "i3s_subspace": "it is i3s_adamw without a learning rate",
    "leafwise": "mlorc_adamw, mlorc_lion and ldadamw are made by it",
    "mlorc_scale_by_adam": "it is mlorc_adamw without a learning rate",
    "mlorc_scale_by_lion": "it is mlorc_lion without a learning rate",
    "q_galore_project": "it is q_galore_adamw_8bit without a learning rate",
    "quantize_state": "around Adam it is adamw_8bit without a learning rate",
    "scale_by_adam_mini": "it is adam_mini without a learning rate",
    "scale_by_ldadam": "it is ldadamw without a learning rate",
    "two_rates": "it runs two of a factory's transformations, which are rows",
}


def optimizers(
    settings: Settings, rate: optax.ScalarOrSchedule = 1e-3
) -> dict[str, optax.GradientTransformation]:
    """Every public method, and Optax's to compare with."""
    wanted = {"rank": settings.rank, "max_rank": settings.rank, "num_heads": 4}
    wanted |= {"update_every": settings.period, "switch_step": 25}
    found: dict[str, optax.GradientTransformation] = {
        "optax.adamw": optax.adamw(rate),
        "optax.lion": optax.lion(rate),
    }
    for name in sorted(lro.__all__):
        factory = getattr(lro, name)
        known = inspect.signature(factory).parameters if callable(factory) else {}
        if next(iter(known), None) == "learning_rate":
            given = {k: v for k, v in wanted.items() if k in known}
            found[name] = factory(rate, **given)
    return found | _forms(settings.rank, settings.period, rate)


def _forms(
    rank: int, period: int, rate: optax.ScalarOrSchedule
) -> dict[str, optax.GradientTransformation]:
    """What is no whole optimizer, or is in another form than by default."""
    adam, every = optax.scale_by_adam(), {"rank": rank, "update_every": period}
    without_rate = {
        "project_gradients, rotated": lro.project_gradients(
            adam,
            rank=rank,
            subspace=lro.TopSingular("gram_eigh"),
            refresh=lro.Staggered(period),
            transfer=lro.Rotate(),
            side="long",
        ),
        "mlorc_compress, of Lion": lro.mlorc_compress(optax.scale_by_lion(), rank=rank),
        "hybrid_subspace": lro.hybrid_subspace(adam, leading=rank // 2, **every),
        "i3s_subspace, of Fira": lro.i3s_subspace(
            adam, recovery=lro.FiraResidual(), **every
        ),
        "scale_by_adafactor": lro.scale_by_adafactor(),
        "accumulate_gradients": lro.accumulate_gradients(
            lro.galore_project(adam, **every), 1
        ),
    }
    times_rate = optax.scale_by_learning_rate(rate)
    return {k: optax.chain(tx, times_rate) for k, tx in without_rate.items()} | {
        "apollo_adamw, mini": lro.apollo_adamw(
            rate, 1, update_every=period, per="tensor"
        ),
        "fira_adamw, reference": lro.fira_adamw(rate, reference=(0.9, 0.999), **every),
        "ldadamw, no error": lro.ldadamw(rate, rank, error_feedback=False),
        "mlorc_adamw, of mu": lro.mlorc_adamw(rate, rank, compress=("mu",)),
        "mlorc_adamw, of nu": lro.mlorc_adamw(rate, rank, compress=("nu",)),
    }


def gradients(settings: Settings) -> list[Grads]:
    """A signal of few directions that turns slowly, in noise."""
    rng = np.random.default_rng(settings.seed)
    starts, ends = ({k: _signal(rng, s) for k, s in SHAPES.items()} for _ in range(2))

    def at(step):
        turn = step / 40
        return {
            k: jnp.asarray(
                np.cos(turn) * starts[k]
                + np.sin(turn) * ends[k]
                + 0.5 * rng.standard_normal(shape),
                jnp.float32,
            )
            for k, shape in SHAPES.items()
        }

    return [at(t) for t in range(2 * settings.period + settings.after + 1)]


def _signal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.standard_normal(shape)
    sides = (rng.standard_normal((size, 6)) for size in shape)
    left, right = sides
    return left * 2.0 ** -np.arange(6) @ right.T


def run(
    tx: optax.GradientTransformation,
    grads: list[Grads],
    when: int = -1,
    leaf: str = "",
    fault: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[Norms, Any]:
    """The norms of all updates, and the last state."""
    given = list(grads)
    if leaf:
        given[when] = grads[when] | {leaf: fault(grads[when][leaf])}
    given = jax.tree.map(lambda *x: np.stack(x), *given)
    state, norms = _steps(tx)(given)
    return jax.device_get(norms), state


@functools.cache
def _steps(tx: optax.GradientTransformation) -> Callable[..., Any]:
    params = {k: jnp.full(s, 0.1) for k, s in SHAPES.items()}
    start = tx.init(params)

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, jax.tree.map(jnp.linalg.norm, updates)

    return jax.jit(lambda grads: jax.lax.scan(step, start, grads))


def worst(usual: Norms, norms: Norms, when: int, leaf: str, finite: bool) -> float:
    """The largest update of the leaf since the fault, in multiples of the usual."""
    since = when if finite else when + 1
    ratios = norms[leaf][since:] / usual[leaf][since:]
    return float(np.max(ratios)) if np.isfinite(ratios).all() else np.inf


def is_finite(tree: Any) -> bool:
    """Whether all numbers of a tree are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(np.isfinite(np.asarray(x)).all() for x in floats)


def skew(state: Any) -> jax.Array:
    """How far the columns of the bases are from orthonormal, or zero, at most."""
    worst = jnp.zeros([])
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        # What stands below a parameter's place is a code, what has no axes a step.
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if names[-2:-1] == ["basis"] and x.ndim > 1:
            gram = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
            used = jnp.diag(jnp.diagonal(gram) > 0.5)
            worst = jnp.maximum(worst, jnp.max(jnp.abs(gram - used)))
    return worst


def is_orthonormal(state: Any) -> bool:
    """Whether the columns of each basis are orthonormal, or zero."""
    return bool(skew(state) <= 1e-4)


def figures(settings: Settings, only: str) -> dict[str, dict[str, dict[str, float]]]:
    """By optimizer and fault: the worst ratio, and how many states were spoiled."""
    grads, found = gradients(settings), {}
    for name, tx in optimizers(settings).items():
        if not re.search(only, name):
            continue
        usual, _ = run(tx, grads)
        found[name] = {}
        for label, fault in FAULTS.items():
            ratios, bad, skewed = [], 0, 0
            for leaf in SHAPES:
                finite = is_finite(fault(grads[0][leaf]))
                for when in settings.moments.values():
                    norms, state = run(tx, grads, when, leaf, fault)
                    ratios.append(worst(usual, norms, when, leaf, finite))
                    bad += not is_finite(state)
                    skewed += not is_orthonormal(state)
            found[name][label] = {
                "worst": max(ratios),
                "spoiled": bad,
                "skewed": skewed,
            }
        print(
            name, {k: round(x["worst"], 2) for k, x in found[name].items()}, flush=True
        )
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The record in Markdown."""
    lines = [
        "# One bad gradient",
        "",
        about(__doc__),
        "",
        "| | " + " | ".join(FAULTS) + " |",
        "|---" * (1 + len(FAULTS)) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(x) for x in row.values()) + " |"
        for name, row in found.items()
    ]
    lines += ["", "## Why cells are above 3", ""]
    lines += [
        f"- {name}, {' and '.join(labels)}: {reason}"
        for (name, reason), labels in explained(found).items()
    ]
    lines += ["", "## Not in the table", ""]
    lines += [f"- `{name}`: {why}." for name, why in ABSENT.items()]
    return "\n".join(lines) + "\n"


def cell(x: Mapping[str, float]) -> str:
    """What one fault did to one optimizer."""
    text = f"{x['worst']:.1f}" if x["worst"] < 1e3 else f"{x['worst']:.0e}"
    text += f" ({x['spoiled']} states)" if x["spoiled"] else ""
    return text + (f" ({x['skewed']} bases)" if x["skewed"] else "")


def explained(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[tuple[str, str], list[str]]:
    """The faults of each optimizer with the same reason for a cell above 3.

    Raises:
      ValueError: for a cell without a reason, above 10, or with a mark, but for
        Optax's own.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in found.items():
        for label, x in row.items():
            marked = x["spoiled"] or x["skewed"]
            if x["worst"] <= 3 and not marked:
                continue
            known = [
                reason
                for (names, labels), reason in REASONS.items()
                if re.match(names, name) and re.match(labels, label)
            ]
            bad = marked or x["worst"] > 10
            if not known or (bad and not name.startswith("optax")):
                raise ValueError(f"Nothing explains {name} after {label}: {x}.")
            reasons.setdefault((name, known[0]), []).append(label)
    return reasons


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression of names")
    only = parser.parse_args().only
    settings = Settings()
    found = figures(settings, only)
    explained(found)
    if not only:
        write_record("faults", settings, found, table(found))


if __name__ == "__main__":
    main()
