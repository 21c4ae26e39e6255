"""The counts of `benchmarks.accelerators`, against numbers that were made by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import lowrank_optax as lro
from benchmarks.accelerators import (
    aims,
    check,
    counting,
    hlo,
    meshes,
    pallas,
    programs,
    table,
)
from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.counting import Cost, Counter
from benchmarks.accelerators.table import Key, Table

CONDITIONAL = """
HloModule jit_step, is_scheduled=true

%dear (p.0: (f32[1000])) -> f32[1000] {{
  %p.0 = (f32[1000]{{0}}) parameter(0)
  %x.0 = f32[1000]{{0}} get-tuple-element(%p.0), index=0
  %c.0 = f32[1000]{{0}} copy(%x.0)
  ROOT %n.0 = f32[1000]{{0}} negate(%c.0)
}}

%cheap (p.1: (f32[1000])) -> f32[1000] {{
  %p.1 = (f32[1000]{{0}}) parameter(0)
  %x.1 = f32[1000]{{0}} get-tuple-element(%p.1), index=0
  ROOT %n.1 = f32[1000]{{0}} negate(%x.1)
}}

ENTRY %main (due: pred[], x: f32[1000]) -> f32[1000] {{
  %due = pred[] parameter(0)
  %x = f32[1000]{{0}} parameter(1)
  %t = (f32[1000]{{0}}) tuple(%x)
  ROOT %r = f32[1000]{{0}} conditional(%due, %t, %t), {branches}, metadata={{{name}}}
}}
"""
NAMED = "true_computation=%dear, false_computation=%cheap"
LISTED = "branch_computations={%cheap, %dear}"


def cost(text, refresh=False, **more):
    return Counter(hlo.parse(text), more.pop("traffic", {}), refresh, **more).count()


@pytest.mark.parametrize("branches", [NAMED, LISTED])
@pytest.mark.parametrize(
    "path, marked",
    [
        ("jit(step)/refresh/cond", True),
        ("jit(step)/refresh/jit(body)/cond", True),
        ("jit(step)/vmap(refresh)/cond", True),
        ("jit(step)/refresh/cond/branch_1_fun/refresh/cond", True),
        ("jit(step)/refresh/cond/branch_1_fun/cond", False),
        ("jit(step)/refresh/while/body/cond", False),
        ("jit(step)/refreshed/cond", False),
        ("jit(step)/cond", False),
        ("", False),
    ],
)
def test_only_a_marked_conditional_counts_as_its_cheapest_branch(
    branches, path, marked
):
    text = CONDITIONAL.format(branches=branches, name=f'op_name="{path}"')
    # A look at the predicate, and 4000 bytes in and out for each operation.
    dear, cheap = Cost(launches=3, bytes=16000), Cost(launches=2, bytes=8000)
    assert cost(text) == (cheap if marked else dear)
    assert cost(text, refresh=True) == dear
    assert cost(text, rule="all") == cheap
    assert counting.conditionals(hlo.parse(text)) == (marked, not marked)


@pytest.mark.parametrize(
    "path, waits",
    [
        ("jit(step)/refresh/cond/branch_1_fun/jit(body)/waits/cond", True),
        ("jit(step)/vmap(refresh)/cond/branch_1_fun/vmap(waits)/cond", True),
        ("jit(step)/refresh/cond/branch_1_fun/waits/cond/branch_0_fun/cond", False),
        ("jit(step)/waits/cond", False),
    ],
)
def test_a_look_at_a_leaf_without_a_basis_is_not_part_of_a_refresh(path, waits):
    text = CONDITIONAL.format(branches=NAMED, name=f'op_name="{path}"')
    for refresh in (False, True):
        found = cost(text, refresh=refresh)
        assert found == Cost(launches=3 - waits, bytes=8000 * (2 - waits))


def loop(trips=""):
    return f"""
%body (p: f32[10]) -> f32[10] {{
  %p = f32[10]{{0}} parameter(0)
  ROOT %n = f32[10]{{0}} cosine(%p)
}}

%test (q: f32[10]) -> pred[] {{
  %q = f32[10]{{0}} parameter(0)
  ROOT %go = pred[] custom-call(%q), custom_call_target="go"
}}

ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %w = f32[10]{{0}} while(%x), condition=%test, body=%body{trips}
}}
"""


def test_a_loop_counts_as_often_as_it_runs():
    known = loop(', backend_config={"known_trip_count":{"n":"7"}}')
    assert cost(known) == Cost(launches=7, bytes=7 * 80)
    counting.check_bounded(cost(known))


def test_a_loop_of_unknown_length_is_refused_by_name():
    once = cost(loop())
    # Its body, and its condition, which reads 40 bytes and writes a truth value.
    assert once == Cost(launches=2, bytes=80 + 41, unbounded=frozenset({"body"}))
    with pytest.raises(ValueError, match="body"):
        counting.check_bounded(Cost(), once)


COUNTED = """
%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {{
  %one = s32[] constant({step})
  %p = (s32[], f32[10]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[10]{{0}} get-tuple-element(%p), index=1
  %j = s32[] {grow}(%i, %one)
  %n = f32[10]{{0}} cosine(%v)
  ROOT %t = (s32[], f32[10]{{0}}) tuple(%j, %n)
}}

%test (q: (s32[], f32[10])) -> pred[] {{
  %six = s32[] constant(6)
  %q = (s32[], f32[10]{{0}}) parameter(0)
  %k = s32[] get-tuple-element(%q), index={place}
  ROOT %go = pred[] compare(%k, %six), direction={direction}
}}

ENTRY %main (x: f32[10]) -> (s32[], f32[10]) {{
  %x = f32[10]{{0}} parameter(0)
  %two = s32[] constant(2)
  %from = s32[] copy(%two)
  %both = (s32[], f32[10]{{0}}) tuple(%from, %x)
  ROOT %w = (s32[], f32[10]{{0}}) while(%both), condition=%test, body=%body
}}
"""
FORM = {"step": 1, "grow": "add", "place": 0, "direction": "LT"}


def test_a_loop_with_a_counter_counts_as_often_as_that_says():
    counted = cost(COUNTED.format(**FORM))
    # From 2 to 5: each reads ten numbers and writes ten, and counts in 12 bytes.
    assert not counted.unbounded
    assert counted.bytes == 4 * (80 + 12) + 8  # and once copies the counter


@pytest.mark.parametrize(
    "other", [{"step": 2}, {"grow": "multiply"}, {"place": 1}, {"direction": "NE"}]
)
def test_what_does_not_count_by_one_to_a_number_is_unknown(other):
    assert cost(COUNTED.format(**FORM | other)).unbounded == {"body"}


FUSION = """
%copies (v: f32[64,8]) -> f32[64,8] {
  %v = f32[64,8]{1,0} parameter(0)
  ROOT %seen = f32[64,8]{1,0} bitcast(%v)
}

%slices (a: f32[64,8], b: f32[64,8], c: f32[64,8], i: s32[]) -> (f32[64,8], f32[1,8]) {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %c = f32[64,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%b, %i, %zero), dynamic_slice_sizes={1,8}
  %whole = f32[64,8]{1,0} fusion(%c), kind=kLoop, calls=%copies
  %sum = f32[8]{0} reduce(%whole, %zero), dimensions={0}, to_apply=%add
  %sums = f32[1,8]{1,0} bitcast(%sum)
  %new = f32[1,8]{1,0} add(%row, %sums)
  %put = f32[64,8]{1,0} dynamic-update-slice(%a, %new, %i, %zero)
  ROOT %both = (f32[64,8]{1,0}, f32[1,8]{1,0}) tuple(%put, %new)
}

ENTRY %main (a: f32[64,8], b: f32[64,8], c: f32[64,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %c = f32[64,8]{1,0:T(8,128)} parameter(2)
  %i = s32[] parameter(3)
  %f = (f32[64,8]{1,0}, f32[1,8]{1,0:T(8,128)S(1)}) fusion(%a, %b, %c, /*index=3*/%i), \
kind=kLoop, calls=%slices
  ROOT %r = f32[64,8]{1,0} get-tuple-element(%f), index=0
}
"""


def test_a_fusion_reads_its_slices_and_writes_in_place():
    # A row of b, all of c, the number i, a row into a; the other result is on the chip.
    assert cost(FUSION) == Cost(launches=1, bytes=32 + 2048 + 4 + 32)


def test_what_is_on_the_chip_costs_its_copies_only():
    text = """
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %s = (bf16[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %d = bf16[8,128]{1,0:T(8,128)S(1)} copy-done(%s)
  %y = bf16[8,128]{1,0:T(8,128)S(1)} negate(%d)
  ROOT %z = bf16[8,128]{1,0:T(8,128)} negate(%y)
}
"""
    assert cost(text) == Cost(launches=3, bytes=2048 + 0 + 2048)


@pytest.mark.parametrize(
    "target, calls",
    [
        ("cusolver_syevd_ffi", True),
        ("cusolver_potrf_ffi", True),
        ("__cublas$triangularSolve", True),
        ("lapack_sgesdd_ffi", True),
        ("EighTpu", True),
        ("Qr", True),
        ("__cublas$gemm", False),
        ("__cub$DeviceRadixSort", False),
        ("QrCode", False),
    ],
)
def test_calls_of_libraries_are_known_by_name(target, calls):
    text = f"""
ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  ROOT %c = f32[4,4]{{1,0}} custom-call(%x), custom_call_target="{target}"
}}
"""
    assert cost(text) == Cost(launches=1, calls=calls, bytes=128)


def test_a_program_compiled_here_is_counted():
    @jax.named_scope("refresh")
    def renew(due, x):
        return jax.lax.cond(due, lambda: jnp.sort(x), lambda: x)

    def step(due, x):
        x = renew(due, x)
        return jax.lax.scan(lambda c, _: (jnp.cos(c), None), x, length=5)[0]

    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((), bool), x).compile()
    module = hlo.parse(compiled.as_text())
    assert counting.conditionals(module) == (1, 0)
    ordinary, refresh = (Counter(module, {}, due).count() for due in (False, True))
    counting.check_bounded(ordinary, refresh)
    # Five cosines, 8000 bytes each, and little beside; the sort as much again.
    assert 40000 <= ordinary.bytes <= 60000
    assert refresh.bytes >= ordinary.bytes + 4000
    assert refresh.launches > ordinary.launches


def add_kernel(a, b, c, out):
    out[...] = a[...] + b[...] + c[...]


def test_mosaic_fetches_a_block_when_its_index_changes():
    def f(a, b, c):
        return pl.pallas_call(
            add_kernel,
            grid=(2, 3),
            in_specs=[
                pl.BlockSpec((8, 128), lambda i, j: (i, j)),
                pl.BlockSpec((8, 128), lambda i, j: (0, j)),
                pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((12, 384), jnp.bfloat16),
            name="adds",
        )(a, b, c)

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    shapes = bf16(12, 384), bf16(8, 384), bf16(12, 128)
    jaxpr = jax.jit(lambda *x: f(*x)).trace(*shapes).jaxpr.jaxpr
    # a and the result once, though the last blocks have but four rows; all of b for
    # each of two rows of blocks; c once, as it stays while j runs.
    moved = (2 * 12 * 384, 2 * 2 * 8 * 384, 2 * 12 * 128, 2 * 12 * 384)
    dims = (12, 384), (8, 384), (12, 128)
    traffic = pallas.traffic(jaxpr, "tpu")
    assert traffic == {("adds", dims, ((12, 384),)): moved}

    operands = "%a, %b, %c"
    text = f"""
ENTRY %main (a: bf16[12,384], b: bf16[8,384], c: bf16[12,128]) -> bf16[12,384] {{
  %a = bf16[12,384]{{1,0}} parameter(0)
  %b = bf16[8,384]{{1,0:T(8,128)S(1)}} parameter(1)
  %c = bf16[12,128]{{1,0}} parameter(2)
  ROOT %k = bf16[12,384]{{1,0}} custom-call({operands}), \
custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/adds/pallas_call"}}
}}
"""
    # What of b is read again is read on the chip.
    want = Cost(launches=1, bytes=sum(moved) - moved[1])
    assert cost(text, traffic=traffic) == want
    with pytest.raises(ValueError, match="no Pallas call"):
        cost(text)


def walk_kernel(x, y, out, sums):
    def step(i, total):
        at = pl.ds(i * 16, 16)
        block = triton.load(x.at[at, :])
        triton.store(out.at[at, :], block + y[...])
        return total + block

    total = jax.lax.fori_loop(0, 4, step, jnp.zeros((16, 32), jnp.float32))

    @pl.when(pl.program_id(0) == 0)
    def _():
        sums[...] = total


def traced_walk(kernel):
    def f(x, y):
        whole = pl.BlockSpec((None, 64, 32), lambda i: (i, 0, 0))
        one = pl.BlockSpec((16, 32), lambda i: (0, 0))
        return pl.pallas_call(
            kernel,
            grid=(3,),
            in_specs=[whole, one],
            out_specs=[whole, one],
            out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES],
            compiler_params=triton.CompilerParams(),
            name="walk",
        )(x, y)

    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES]
    return jax.jit(f).trace(*given).jaxpr.jaxpr


SHAPES = (3, 64, 32), (16, 32)


def test_triton_counts_each_load_and_store_of_each_program():
    tile, programs_, steps = 4 * 16 * 32, 3, 4
    moved = programs_ * steps * tile
    # y is read in every step of every walk; the first program alone stores its sums.
    want = (moved, moved, moved, tile)
    found = pallas.traffic(traced_walk(walk_kernel), "cuda")
    assert found == {("walk", SHAPES, SHAPES): want}


def test_a_tile_beyond_an_edge_counts_what_is_there():
    def kernel(x, y, out, sums):
        def step(i, total):
            # Tiles of 24 rows at 0, 24, 48, 72 and so on, of 64 rows that there are.
            at = pl.ds((pl.program_id(0) * 2 + i) * 24, 24)
            place = jax.lax.broadcasted_iota(jnp.int32, (24, 32), 0)
            mask = place < 64 - (pl.program_id(0) * 2 + i) * 24
            return total + triton.load(x.at[at, :], mask=mask, other=0.0).sum()

        total = jax.lax.fori_loop(0, 2, step, 0.0)
        old = y[...]
        sums[...] = jnp.where(old > total, old, sums[...])

    row, tile = 4 * 32, 4 * 16 * 32
    # 48, 16 and no rows by the three programs; sums are read and written by each.
    want = (64 * row, 3 * tile, 0.0, 2 * 3 * tile)
    found = pallas.traffic(traced_walk(kernel), "cuda")
    assert found == {("walk", SHAPES, SHAPES): want}


@pytest.mark.parametrize("known", [True, False])
def test_a_branch_of_a_kernel_counts_where_it_is_taken(known):
    def kernel(x, y, out, sums):
        first = pl.program_id(0) < 2 if known else y[0, 0] > 0

        @pl.when(first)
        def _():
            sums[...] = jnp.zeros((16, 32), jnp.float32)

    found = pallas.traffic(traced_walk(kernel), "cuda")
    ((_, y, _, sums),) = found.values()
    assert (y, sums) == ((0, 2 * 2048) if known else (3 * 4, 3 * 2048))


def test_a_kernel_with_a_loop_of_unknown_length_is_refused():
    def kernel(x, y, out, sums):
        steps = jnp.int32(y[0, 0])
        sums[...] = jax.lax.fori_loop(0, steps, lambda i, t: t + x[:16], y[...])

    with pytest.raises(ValueError, match="loop in walk"):
        pallas.traffic(traced_walk(kernel), "cuda")


def test_the_kernels_of_a_platform_count_for_it():
    tx = lro.mlorc_adamw(1e-3)
    params = {"w": jax.ShapeDtypeStruct((128, 512), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    with lro.kernels.dispatch("pallas"):
        traced = jax.jit(lambda g, s, p: tx.update(g, s, p)).trace(
            params, state, params
        )
    for platform in ("cuda", "tpu"):
        kernels = pallas.traffic(traced.jaxpr.jaxpr, platform).values()
        passes = [x for x in kernels if max(x) >= 4 * 128 * 512]
        assert len(passes) == 2
        for moved in passes:
            # Each reads the gradient once, whatever the tiles; the update is XLA's.
            assert [x for x in moved if x >= 4 * 128 * 512] == [4 * 128 * 512]
        # Of two matrices 8 x 8: the inverses, and eigenvalues with eigenvectors.
        small = sorted(x for x in kernels if x not in passes)
        assert small == {"cuda": [(512, 64, 512), (512, 512)], "tpu": []}[platform]
        assert not pallas.imprecise(traced.jaxpr.jaxpr, platform)


@pytest.mark.parametrize(
    "dtype, precision, low",
    [
        (jnp.float32, None, 1),
        (jnp.float32, "high", 1),
        (jnp.float32, "highest", 0),
        (jnp.bfloat16, None, 0),
    ],
)
def test_products_below_the_highest_precision_are_found(dtype, precision, low):
    x = jax.ShapeDtypeStruct((128, 128), dtype)
    lowered = jax.jit(lambda x: jnp.matmul(x, x, precision=precision)).lower(x)
    assert programs.products(lowered.as_text()) == (1, low)

    def kernel(x, out):
        out[...] = jnp.matmul(x[...], x[...], precision=precision)

    call = pl.pallas_call(kernel, out_shape=x, name="square")
    jaxpr = jax.jit(lambda x: call(x)).trace(x).jaxpr.jaxpr
    assert pallas.imprecise(jaxpr, "tpu") == ["square"] * low


def program(step, *shapes):
    traced = jax.jit(step).trace(*shapes)
    return programs.Program(traced.jaxpr, list(shapes), 1, 0, "cpu")


def test_without_refresh_only_marked_conditionals_are_fixed():
    @jax.jit
    def body(due, x):
        def renew():
            return jax.lax.cond(x[0] > 0, lambda: jnp.sort(x), lambda: -x)

        return jax.lax.cond(due, renew, lambda: x + 1)

    def step(due, sign, x):
        with jax.named_scope("refresh"):
            x = body(due, x)
        return jax.lax.cond(sign, lambda: x * 2, lambda: jnp.sort(x))

    flag, x = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((8,), jnp.float32)
    whole = program(step, flag, flag, x)
    never = programs.without_refresh(whole)
    run = jax.jit(jax.extend.core.jaxpr_as_fun(never.jaxpr))
    x = np.arange(8.0, dtype=np.float32)
    np.testing.assert_array_equal(run(True, True, x)[0], (x + 1) * 2)
    np.testing.assert_array_equal(run(True, False, -x)[0], np.sort(-x + 1))
    texts = [p.lower().compile().as_text() for p in (whole, never)]
    assert [t.count(" conditional(") for t in texts] == [3, 1]
    assert [t.count(" sort(") for t in texts] == [2, 1]


def test_a_program_without_marks_has_none_to_leave_out():
    flag, x = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((8,), jnp.float32)

    def step(due, x):
        return jax.lax.cond(due, lambda: x + 1, lambda: x)

    assert programs.without_refresh(program(step, flag, x)) is None


ROW = {
    "words": 7.0,
    "words_refresh": 9.0,
    "sizes": 7.0,
    "sizes_refresh": 9.0,
    "weights_mib": 1024.0,
    "launches": 100,
    "launches_refresh": 100,
    "library": 2,
    "library_refresh": 2,
    "temporaries_mib": 50.0,
    "temporaries_without_refresh_mib": None,
    "imprecise": 0,
    "conditionals": 0,
    "unbounded": 0,
    "rule": "marked",
    "compile_s": 1.0,
}
KEY = Key("mlorc_adamw", "h100", "leaf", "float32", "xla")


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({}, ""),
        ({"words": 7.3, "launches": 105, "temporaries_mib": 52.0}, ""),
        ({"words": 7.4}, "words: 7.0 in the table, 7.4 now (+6%), worse"),
        (
            {"launches": 94},
            "launches: 100 in the table, 94 now (-6%), better: record it",
        ),
        ({"library": 3}, "library: 2 in the table, 3 now (+50%), worse"),
        ({"temporaries_mib": 53.0}, "temporaries_mib: 50.0 in the table, 53.0 now"),
        ({"temporaries_without_refresh_mib": 1.0}, "None in the table, 1.0 now"),
        ({"imprecise": 1}, "1 products are not at the highest precision"),
        ({"error": "ValueError: no"}, "now: ValueError: no"),
        ({"as": "xla"}, "{'as': 'xla'"),
    ],
)
def test_the_check_says_what_differs(tmp_path, change, wrong):
    rows = Table(tmp_path / "t.json", {KEY: ROW})
    found = check.failures(KEY, rows, change if "as" in change else ROW | change)
    assert (wrong in found[0] and len(found) == 1) if wrong else not found


def test_a_row_that_is_missing_fails(tmp_path):
    rows = Table(tmp_path / "t.json", {})
    assert check.failures(KEY, rows, ROW) == ["not in the table: record it"]


IN_STEPS = """HloModule m

%begin (a: f32[4,8]) -> f32[32,8] {{
  %a = f32[4,8]{{1,0}} parameter(0)
  ROOT %g.0 = f32[32,8]{{1,0}} all-gather(%a), channel_id=7, dimensions={{0}}{first}
}}

%go_on (b: f32[4,8]) -> f32[32,8] {{
  %b = f32[4,8]{{1,0}} parameter(0)
  ROOT %g.1 = f32[32,8]{{1,0}} all-gather(%b), channel_id=7, dimensions={{0}}{second}
}}

ENTRY %main (x: f32[4,8]) -> f32[32,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %f.0 = f32[32,8]{{1,0}} fusion(%x), kind=kCustom, calls=%begin
  ROOT %f.1 = f32[32,8]{{1,0}} fusion(%x), kind=kCustom, calls=%go_on
}}
"""


@pytest.mark.parametrize(
    "first, second, count", [("0", "0", 1), ("0", "1", 2), (None, None, 2)]
)
def test_a_collective_in_steps_is_one(first, second, count):
    """XLA's TPU compiler takes one in several fusions, and gives these one chain."""
    chains = [
        "" if x is None else f', frontend_attributes={{chain_id="{x}"}}'
        for x in (first, second)
    ]
    module = hlo.parse(IN_STEPS.format(first=chains[0], second=chains[1]))
    found = meshes.moves(module, False)
    assert found == meshes.Moves(count, 256, count * 1024)


MOVED = {
    "ordinary": {"count": 40, "largest": 1000, "bytes": 100_000},
    "refresh": {"count": 60, "largest": 1000, "bytes": 200_000},
    "temporaries": 2**24,
    "compile_s": 1.0,
}


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({}, []),
        ({"compile_s": 9.0, "temporaries": 2**24 + 2**19}, []),
        ({"ordinary": {**MOVED["ordinary"], "count": 42}}, []),
        ({"ordinary": {**MOVED["ordinary"], "count": 43}}, ["ordinary count: 40 in"]),
        ({"refresh": {**MOVED["refresh"], "bytes": 189_000}}, ["refresh bytes: 20"]),
        ({"refresh": {**MOVED["refresh"], "largest": 2000}}, ["refresh largest: 1"]),
        ({"temporaries": 2**25}, ["temporaries: 16777216 in the table"]),
        ({"error": "ValueError: no"}, ["now: ValueError: no"]),
    ],
)
def test_the_check_says_what_moves_otherwise(monkeypatch, change, wrong):
    monkeypatch.setattr(check.mesh_table, "read", lambda: {"a|h100|7b|rows": MOVED})
    found = check.mesh_failures("a|h100|7b|rows", MOVED | change)
    assert all(x.startswith(y) for x, y in zip(found, wrong, strict=True))
    assert check.mesh_failures("b|h100|7b|rows", MOVED) == [
        "not in the record of meshes: keep it"
    ]


def test_the_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "accelerators.json"
    kept = Table.read(path)
    kept.put(KEY, ROW)
    kept.put(KEY._replace(tier="pallas"), {"as": "xla"})
    assert Table.read(path).rows == kept.rows
    assert json.loads(path.read_text())
    kept.write_markdown()
    # 7 GiB at 3.35 TB/s and 100 launches of 3 microseconds.
    time = 1e3 * (7 * 2**30 / 3.35e12 + 100 * 3e-6)
    line = next(x for x in table.markdown(kept).splitlines() if "9.00 |" in x)
    assert f"| {time:.2f} / " in line
    assert "No device was used" in path.with_suffix(".md").read_text()


def test_the_subset_of_ci_has_every_method_and_some_on_each_platform():
    found = check.ci()
    own = {name for name, case in CASES.items() if case.own}
    assert {k.case for k in found if k.target == "h100"} == own
    assert {k.case for k in found if k.target == "v5e"} > {"galore_adamw"}
    assert {k.case for k in found if k.tier == "pallas"} == {
        "adamw_8bit",
        "mlorc_adamw",
    }
    assert len(set(found)) == len(found) < 60
    assert programs.shapes("leaf-ordinary") == programs.shapes("leaf")
    assert any(k.shapes == "turned" for k in found)  # what lies as a leaf does not
    stacked = KEY._replace(shapes="7b-stacked")
    recorded = Table(Path("none"), {stacked: ROW, stacked._replace(target="v6e"): ROW})
    assert set(check.whole(recorded)) == {*found, stacked}


def test_what_was_aimed_at_stands_beside_what_is_reached():
    layer = KEY._replace(shapes="7b")
    rows = {
        layer: ROW | {"words": 8.28, "temporaries_mib": 174.0, "compile_s": 12.0},
        layer._replace(case="optax.adamw"): ROW | {"compile_s": 0.5},
        KEY._replace(target="v5e"): ROW | {"words": 7.5, "compile_s": 9.0},
        KEY._replace(target="v5e", case="optax.adamw"): ROW,
        layer._replace(case="ldadamw"): {"error": "ValueError: no"},
    }
    lines = [x for x in aims.section(rows).splitlines() if x.startswith("| ")]
    wanted = {
        "mlorc_adamw | words": "8.2 | 8.28 | 7.4 | **7.50**",
        "mlorc_adamw | temporaries": "172 MiB | **174 MiB** | 32 MiB | **50 MiB**",
        "mlorc_adamw | compile time, to `optax.adamw`'s": (
            "6 times | **24 times** | 8 times | **9 times**"
        ),
        "ldadamw | words": "9 | not counted | 9 | not counted",
    }
    for name, cells in wanted.items():
        assert f"| {name} | {cells} |" in lines
    assert {aim.case for aim in aims.AIMS} <= {k for k, x in CASES.items() if x.own}


def test_a_plan_has_kernels_for_own_methods_only():
    found = list(
        table.keys(("h100",), ("7b-stacked",), ("float32",), ("xla", "pallas"))
    )
    names = {(k.case, k.tier) for k in found}
    assert ("mlorc_adamw", "pallas") in names and ("optax.adamw", "xla") in names
    assert ("optax.adamw", "pallas") not in names
    assert not any(case == "optax.contrib.galore" for case, _ in names)
