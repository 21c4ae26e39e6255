"""The examples' metrics file, report and probe."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

from examples.common import report
from examples.common.gaps import gap_rows
from examples.common.metrics import MetricsLog, read_metrics
from examples.common.probe import Probe
from examples.common.report import Run, table, write_report

# Metrics


def test_records_are_on_disk_as_soon_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 0, "loss": 1.5})
        log.write({"step": 1, "loss": 1.25})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 1.25}]


def test_a_new_log_replaces_the_old_and_a_resumed_one_drops_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(10):
            log.write({"step": step})
    with MetricsLog(path, keep=6) as log:
        log.write({"step": 7, "again": True})
    expected = [{"step": step} for step in range(7)] + [{"step": 7, "again": True}]
    assert read_metrics(path) == expected
    with MetricsLog(path):
        pass
    assert read_metrics(path) == []


def test_a_line_cut_short_by_a_kill_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    with MetricsLog(path, keep=5) as log:
        log.write({"step": 6})
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 6]


def test_there_are_no_metrics_before_a_run(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# Report


def make_run(method, seed=0, rank=None, moments=False):
    """A run of 100 steps, validated every 25, with a falling loss."""
    noise = np.random.default_rng(seed).normal(size=101) * 0.1
    records = [{"step": 0, "validation_loss": 7.0, "probe": {"gradient": 0.5}}]
    for step in range(1, 101):
        loss = 3 + 4 * math.exp(-step / 30) + noise[step]
        records.append({"step": step, "loss": loss, "seconds": 0.1 + step % 3 * 0.1})
        if step % 25 == 0:
            records[-1]["validation_loss"] = 3 + 4 * math.exp(-step / 30)
            records[-1]["probe"] = {"gradient": 0.6, "overlap": 0.4 + seed / 20}
            if moments:
                records[-1]["probe"] |= {"first_moment": 0.7, "second_moment": 0.9}
    return Run(method, rank, 1e-3, 3e-2, 400_000, 3_000_000, 1_200_000, 1024, records)


def test_a_run_is_summed_up_by_its_records():
    run = make_run("adamw")
    final = 3 + 4 * math.exp(-100 / 30)
    assert run.initial_validation_loss == 7.0
    assert run.validation_loss == final
    assert run.perplexity == pytest.approx(math.exp(final))
    assert run.step_seconds == pytest.approx(0.2)
    assert run.tokens_per_second == pytest.approx(5120)
    assert run.series("validation_loss")[0] == [0, 25, 50, 75, 100]
    assert run.series("probe", "gradient")[1] == [0.5, 0.6, 0.6, 0.6, 0.6]
    assert run.series("probe", "overlap")[0] == [25, 50, 75, 100]
    assert run.series("probe", "first_moment") == ([], [])


def test_the_gap_to_full_rank_is_that_of_the_papers_table():
    # I3S, Table 1, 60M; with Fira at 130M full rank is not the best.
    rows = gap_rows(
        {"adamw": 27.71, "i3s_adamw": 30.47, "galore_adamw": 31.50, "lion": 1.0}
        | {"i3s_adam_mini": 31.66, "galore_adam_mini": 32.08, "i3s_adafactor": 30.06}
    )
    assert [row[-1] for row in rows] == ["27.2%", "9.6%"]
    assert rows[0][1:4] == ["30.47", "31.50", "27.71"]
    fira = {"adamw": 23.27, "fira_i3s_adamw": 22.22, "fira_adamw": 22.37}
    assert [row[-1] for row in gap_rows(fira)] == [""]
    assert gap_rows({"i3s_adamw": 2.0, "galore_adamw": 3.0}) == []


def test_a_report_has_the_gap_where_both_subspaces_were_run(tmp_path):
    runs = [make_run(x) for x in ("adamw", "galore_adamw", "i3s_adamw")]
    write_report(tmp_path, "Comparison", {}, runs)
    assert "| `i3s_adamw`, `galore_adamw` |" in (tmp_path / "report.md").read_text()
    write_report(tmp_path, "Comparison", {}, runs[:2])
    assert "Gap to full rank" not in (tmp_path / "report.md").read_text()


def test_the_summary_keeps_times_apart():
    first, second = make_run("adamw"), make_run("adamw")
    for record in second.records[1:]:
        record["seconds"] *= 2
    summaries = [first.summary(), second.summary()]
    timings = [summary.pop("timing") for summary in summaries]
    assert summaries[0] == summaries[1]
    assert timings[1]["step_seconds"] == pytest.approx(2 * timings[0]["step_seconds"])
    assert json.loads(json.dumps(summaries[0])) == summaries[0]


def test_the_table_has_a_row_a_run():
    lines = table([make_run("adamw"), make_run("mlorc_adamw", rank=4)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:2] == ["method", "rank"]
    assert set("".join(cells[1])) == {"-", ":"}
    assert cells[2] == [
        "`adamw`",
        "",
        "0.001",
        "0.03",
        "7.000 → 3.143",
        "23.2",
        "400,000",
        "3,000,000 B",
        "1,200,000 B (40%)",
        "200.0 ms",
        "5,120",
    ]
    assert cells[3][:2] == ["`mlorc_adamw`", "4"]


def test_the_report_shows_every_plot(tmp_path):
    runs = [make_run("adamw", moments=True), make_run("mlorc_adamw", 1, rank=4)]
    paths = write_report(tmp_path, "A title", {"text": "some text"}, runs)
    page = paths[0].read_text()
    assert page.startswith("# A title\n")
    assert "- text: some text" in page
    assert table(runs) in page
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert len(paths) == 5
    for path in paths[1:]:
        assert f"({path.name})" in page
        pixels = plt.imread(path)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 600
        assert np.std(pixels) > 0.02  # not blank
    assert plt.get_fignums() == []


MANY = [
    "adamw",
    "galore_adafactor",
    "galore_adamw_8bit",
    "galore_plus_adamw",
    "adarankgrad_adamw",
    "mlorc_adamw",
    "mlorc_lion",
    "q_galore_adamw_8bit",
]
PLOTS = [
    report.loss_curves,
    report.memory_bars,
    report._overlap,
    report._singular_values,
]


def drawn_text(figure):
    """Boxes of all text in a drawn figure."""
    ticks = {}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                # matplotlib keeps labels for ticks outside the view, undrawn.
                shown = low <= tick.get_loc() <= high
                ticks |= {label: shown for label in (tick.label1, tick.label2)}
    renderer = figure.canvas.get_renderer()
    return {
        text: text.get_window_extent(renderer)
        for text in figure.findobj(plt.Text)
        if text.get_visible() and text.get_text().strip() and ticks.get(text, True)
    }


@pytest.mark.parametrize("names", [["adamw"], MANY[:3], MANY], ids=len)
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_plots_are_labelled_and_no_text_overlaps(plot, names):
    runs = [make_run(n, i, moments=i == 0) for i, n in enumerate(names)]
    with plt.rc_context(report.STYLE):
        figure, caption = plot(runs)
        figure.canvas.draw()
    assert caption.endswith(".")
    for axes in figure.axes:
        assert axes.get_xlabel()
        shared = axes.get_shared_y_axes().get_siblings(axes)
        assert any(a.get_ylabel() for a in shared) or plot is report.memory_bars
    shown = {text.get_text() for text in figure.findobj(plt.Text)}
    assert set(names) <= shown

    boxes = drawn_text(figure)
    inside = figure.bbox.padded(1)
    for text, box in boxes.items():
        assert inside.contains(*box.min) and inside.contains(*box.max), text
    for (a, box), (b, other) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (a, b)
    plt.close(figure)


def test_many_methods_have_lines_to_tell_apart():
    with plt.rc_context(report.STYLE):
        figure, _ = report._overlap([make_run(n, i) for i, n in enumerate(MANY)])
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert len(set(colors)) == len(MANY)
    plt.close(figure)


def test_smoothing_keeps_a_constant_and_has_no_bias_at_the_start():
    assert report.smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert report.smooth([5.0, 1.0])[0] == 5.0
    assert 1.0 < report.smooth([5.0, 1.0])[1] < 5.0


# Probe


def params_of(matrices):
    return {
        "embed": jnp.ones((20, 16)),
        "layers": {str(i): {"kernel": m} for i, m in enumerate(matrices)},
        "norm": jnp.ones(16),
    }


def orthonormal(seed, rows, columns):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    return np.linalg.qr(matrix)[0]


def test_the_probe_takes_matrices_spread_over_the_layers():
    params = params_of([jnp.ones((16, 12))] * 20)
    probe = Probe.of(params, rank=4)
    names = [jax.tree_util.keystr(path, simple=True) for path in probe.paths]
    assert 4 <= len(names) <= 8
    assert all("kernel" in name for name in names)
    assert [basis.shape for basis in probe.start(params)] == [(16, 4)] * len(names)


def test_the_probe_measures_overlap_and_spectra_as_numpy_does():
    singular_values = np.array([8.0, 7, 6, 5, 1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])
    right = orthonormal(9, 12, 12)
    bases = [orthonormal(seed, 16, 12) for seed in (1, 2)]
    grads = [
        params_of([jnp.asarray(b * singular_values @ right.T, jnp.float32)])
        for b in bases
    ]
    probe = Probe.of(grads[0], rank=4)
    tx = optax.adam(1e-3)
    state = tx.init(grads[0])

    first, kept = probe.measure(grads[0], state, probe.start(grads[0]))
    assert first["overlap"] == 0 and first["first_moment"] == 0
    assert first["gradient"] == pytest.approx(30 / 31.5, rel=1e-4)

    again, _ = probe.measure(grads[0], state, kept)
    assert again["overlap"] == pytest.approx(1, abs=1e-5)

    _, state = tx.update(grads[0], state)
    second, _ = probe.measure(grads[1], state, kept)
    u, v = (basis[:, :4] for basis in bases)
    assert second["overlap"] == pytest.approx(np.sum((u.T @ v) ** 2) / 4, abs=1e-4)
    assert second["first_moment"] == pytest.approx(30 / 31.5, rel=1e-4)
    squares = np.linalg.svd(
        np.asarray(grads[0]["layers"]["0"]["kernel"], np.float64) ** 2, compute_uv=False
    )
    expected = squares[:8].sum() / squares.sum()
    assert second["second_moment"] == pytest.approx(expected, rel=1e-4)


def test_the_probe_is_silent_about_moments_that_are_not_kept():
    params = params_of([jnp.eye(16, 12)])
    probe = Probe.of(params, rank=4)
    state = optax.sgd(1e-2).init(params)
    record, _ = probe.measure(params, state, probe.start(params))
    assert set(record) == {"overlap", "gradient"}
