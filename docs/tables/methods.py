"""What the site says of every method: names, defaults, and its state, checked."""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from tables.llama import LLAMA_7B, MATRICES


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table of methods.

    Attributes:
      title: as people call it.
      page: of the site, in `methods`.
      transformation, optimizer: public names, "" for none.
      state: numbers of float32 for an m x n matrix, in m, n, s, l (the shorter and the
        longer side), r; a product is written with a blank.
      ranks: at which LLaMA-7B is reckoned; the first is that of the method's page.
      make: from a rank to the transformation.
      leaf: name of the matrix by which `state` is checked.
    """

    title: str
    page: str
    transformation: str
    optimizer: str
    state: str
    ranks: tuple[int, ...]
    make: Callable[[int], optax.GradientTransformation]
    leaf: str = "up_proj"


def _optimizer(name: str, **options: Any) -> Callable[[int], Any]:
    factory = getattr(lro, name)
    names = list(inspect.signature(factory).parameters)
    takes = next((x for x in ("rank", "max_rank") if x in names), None)

    def make(rank):
        ranks = {takes: rank} if takes else {}
        matrices = {"matrices": MATRICES} if "matrices" in names else {}
        return factory(1e-2, **ranks, **matrices, **options)

    return make


def _around(factory: Callable[..., Any], inner: Any, **options: Any) -> Any:
    return lambda rank: factory(inner, rank=rank, matrices=MATRICES, **options)


_GALORE, _THIN = (128, 1024), (4, 128)
_EMA = optax.ema(0.9, debias=False)

METHODS = (
    Method("MLorc-AdamW", "mlorc", "mlorc_scale_by_adam", "mlorc_adamw",
           "2 r (m + n)", _THIN, _optimizer("mlorc_adamw")),
    Method("MLorc-Lion", "mlorc", "mlorc_scale_by_lion", "mlorc_lion",
           "r (m + n)", _THIN, _optimizer("mlorc_lion")),
    Method("MLorc around momentum SGD", "mlorc", "mlorc_compress", "",
           "r (m + n)", _THIN, _around(lro.mlorc_compress, optax.trace(0.9))),
    Method("GaLore", "galore", "galore_project", "galore_adamw",
           "s r + 2 l r", _GALORE, _optimizer("galore_adamw")),
    Method("GaLore, least state", "galore", "galore_project", "galore_adamw",
           "l r + 2 s r", _GALORE, _optimizer("galore_adamw", side="long")),
    Method("GaLore with Adafactor", "adafactor", "", "galore_adafactor",
           "s r + l + r", _GALORE, _optimizer("galore_adafactor")),
    Method("GaLore with Adam-mini", "adam_mini", "", "galore_adam_mini",
           "s r + l r + l", _GALORE, _optimizer("galore_adam_mini")),
    Method("GaLore in 8 bits", "quantized", "", "galore_adamw_8bit",
           "s r + 65/256 2 l r", _GALORE, _optimizer("galore_adamw_8bit")),
    Method("Fira", "fira", "fira_project", "fira_adamw",
           "s r + 2 l r + 1", _GALORE, _optimizer("fira_adamw")),
    Method("I3S", "i3s", "i3s_subspace", "i3s_adamw",
           "s r + 2 l r", _GALORE, _optimizer("i3s_adamw")),
    Method("I3S, hybrid, with momentum SGD", "i3s", "hybrid_subspace", "",
           "s r + l r", _GALORE, _around(lro.hybrid_subspace, _EMA, leading=8)),
    Method("GoLore", "golore", "golore_project", "golore_adamw",
           "s r + 2 l r", _GALORE, _optimizer("golore_adamw", switch_step=8000)),
    Method("GaLore+, queries and keys", "galore_plus", "galore_plus_project",
           "galore_plus_adamw", "m r + 2 n r + 0.036 m n", _GALORE,
           _optimizer("galore_plus_adamw", num_heads=32), leaf="q_proj"),
    Method("AdaRankGrad", "adarankgrad", "adaptive_rank", "adarankgrad_adamw",
           "l r + 2 s r + 3", _GALORE, _optimizer("adarankgrad_adamw")),
    Method("AdaRankGrad in 8 bits", "quantized", "", "adarankgrad_adamw_8bit",
           "l r + 65/256 2 s r + 3", _GALORE, _optimizer("adarankgrad_adamw_8bit")),
    Method("APOLLO", "apollo", "apollo_scale", "apollo_adamw",
           "2 l r + 1", (128, 256), _optimizer("apollo_adamw")),
    Method("APOLLO-Mini", "apollo", "apollo_scale", "apollo_adamw",
           "2 l + 1", (1,), _optimizer("apollo_adamw", per="tensor")),
    Method("Flora with Adafactor", "flora", "flora_project", "flora",
           "l r + m + n", (128, 256), _optimizer("flora")),
    Method("LDAdamW", "ldadam", "scale_by_ldadam", "ldadamw",
           "s r + 2 l r + m n", (16,), _optimizer("ldadamw")),
    Method("LDAdamW without its error", "ldadam", "scale_by_ldadam", "ldadamw",
           "s r + 2 l r", (16,), _optimizer("ldadamw", error_feedback=False)),
    Method("Q-GaLore", "q_galore", "q_galore_project", "q_galore_adamw_8bit",
           "33/256 s r + 65/256 2 l r + 7", _GALORE,
           _optimizer("q_galore_adamw_8bit")),
    Method("Adam in 8 bits", "quantized", "quantize_state", "adamw_8bit",
           "65/256 2 m n", (), _optimizer("adamw_8bit")),
    Method("Adam-mini", "adam_mini", "scale_by_adam_mini", "adam_mini",
           "m n + l", (), _optimizer("adam_mini")),
    Method("Adafactor", "adafactor", "scale_by_adafactor", "",
           "m + n", (), lambda rank: lro.scale_by_adafactor()),
    Method("AdamW of Optax", "", "", "",
           "2 m n", (), lambda rank: optax.adamw(1e-2)),
)  # fmt: skip


def check(method: Method) -> None:
    """Raises ValueError if the state of a matrix is not what the table says."""
    shape, rank = (1024, 2048), min([*method.ranks, 128])
    params = {method.leaf: jax.ShapeDtypeStruct(shape, jnp.float32)}
    (row,) = lro.describe(method.make(rank), params)
    found, expected = row.state_bytes / 4, numbers(method.state, *shape, rank)
    # Counters are counted where they belong to the leaf; kept entries are rounded.
    if abs(found - expected) > 2:
        raise ValueError(
            f"{method.title}: the state of {shape} at rank {rank} has {found} numbers, "
            f"and {method.state!r} says {expected}."
        )


def numbers(state: str, m: int, n: int, r: int) -> float:
    """A formula's value."""
    code = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", state)
    known = {"m": m, "n": n, "r": r, "s": min(m, n), "l": max(m, n)}
    return eval(code, {"__builtins__": {}}, known)


@functools.cache
def llama_bytes(method: Method, rank: int | None) -> int:
    """Bytes of the state of LLaMA-7B."""
    return lro.state_bytes(method.make(rank or 0), LLAMA_7B)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _code(name: str) -> str:
    return f"{{py:obj}}`~lowrank_optax.{name}`" if name else ""


def _formula(state: str) -> str:
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", r" \, ", state)
    text = re.sub(r"(\d+)/(\d+)", r"\\tfrac{\1}{\2}", text)
    return f"${{{text}}}$"  # in braces, so that no line ends inside


def table() -> str:
    """All methods, with the state of a matrix and of LLaMA-7B."""
    lines = [
        "| method | without and with a rate | state of a matrix | LLaMA-7B, GB |"
        " at a higher rank |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        check(method)
        title = method.title
        if method.page:
            title = f"[{title}](/methods/{method.page}.md)"
        sizes = [
            f"{gigabytes(llama_bytes(method, rank))}"
            + (f" (r\u00a0=\u00a0{rank})" if rank else "")
            for rank in method.ranks or (None,)
        ]
        names = filter(None, (method.transformation, method.optimizer))
        cells = (
            title,
            " ".join(map(_code, names)),
            _formula(method.state),
            *(sizes + [""])[:2],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Arguments that mean the same in every method: the page `Concepts` explains them.
_COMMON = {"inner", "learning_rate", "weight_decay", "mask", "matrices", "key"}


def _own(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(lro, name)).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.name not in _COMMON and p.default is not p.empty
    }


def defaults(name: str, beside: str) -> str:
    """A factory's own arguments with their defaults, and those of the one beside it."""
    shown = _shown(_own(name))
    other = {k: v for k, v in _own(beside).items() if v != _own(name).get(k, v)}
    return f"{shown}; of `{beside}` {_shown(other)}" if other else shown


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"`{k}={_default(v)}`" for k, v in arguments.items())


def _default(value: Any) -> str:
    if isinstance(value, float) and value and abs(math.log10(abs(value))) >= 4:
        return f"{value:g}".replace("e-0", "e-")
    return repr(value)


def facts(page: str) -> str:
    """The head of a method's page: names, state, bytes, defaults."""
    own = [x for x in METHODS if x.page == page]
    factories = [x.transformation for x in own] + [x.optimizer for x in own]
    names = list(dict.fromkeys(filter(None, factories)))
    lines = [f"| public names | {', '.join(map(_code, names))} |", "|---|---|"]
    for method in own:
        lines.append(
            f"| state of {method.title} | {_formula(method.state)} numbers a matrix |"
        )
        sizes = [
            f"{gigabytes(llama_bytes(method, rank))} GB"
            + (f" at rank {rank}" if rank else "")
            for rank in method.ranks or (None,)
        ]
        lines.append(f"| the same for LLaMA-7B | {', '.join(sizes)} |")
    pairs = {x.optimizer or x.transformation: x.transformation for x in own}
    for name, beside in pairs.items():
        shown = defaults(name, beside or name)
        lines.append(f"| defaults of `{name}` | {shown or 'none of its own'} |")
    return "\n".join(lines)
