"""What is drawn, and what a drawing says of what it lacks."""

from __future__ import annotations

import numpy as np
import pytest

from corrector_jax.report.plots import LIGHT, PLOTS
from corrector_jax.report.words import read_metrics
from tests.report.made_up import write


def drawn(figure):
    """{label: (x, y)} of the lines of a figure, and its texts."""
    lines = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            lines[line.get_label()] = (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    return lines, " ".join(texts + [ax.get_title(loc="left") for ax in figure.axes])


@pytest.fixture
def draw(tmp_path):
    """A function from files and a plot's name to what is drawn."""

    def from_files(run, name):
        series, _ = read_metrics(write(tmp_path, run) / "metrics.jsonl")
        plot = next(plot for plot in PLOTS if plot.name == name)
        return drawn(plot.draw(series, run["results.json"], LIGHT))

    return from_files


def test_a_step_written_twice_counts_once(run, draw):
    run["metrics.jsonl"].append({"step": 0, "train/loss": 7.5})
    steps, loss = draw(run, "loss")[0]["as logged"]
    assert (np.diff(steps) > 0).all()
    assert loss[0] == 7.5


def test_the_smoothed_loss_is_a_mean_of_neighbours(run, draw):
    lines, _ = draw(run, "loss")
    loss, smooth = lines["as logged"][1], lines["mean of 5 neighbours"][1]
    assert smooth[50] == pytest.approx(loss[48:53].mean())
    assert smooth[0] == pytest.approx(loss[:3].mean())
    assert smooth[-1] == pytest.approx(loss[-3:].mean())


def test_the_exact_kl_is_marked_at_the_end(run, draw):
    lines, said = draw(run, "kl")
    assert lines["corrected cache, all targets: 0.152"] == ([400], [0.1521])
    assert lines["stale cache, probe"][0].tolist() == list(range(0, 401, 40))
    assert said.strip() == ""


def test_recall_is_drawn_with_the_split_it_belongs_to(run, draw):
    lines, _ = draw(run, "recall")
    assert set(lines) >= {"BM25 (test)", "during training (dev)", "before and after (test)"}
    assert lines["BM25 (test)"][1].tolist() == [0.3122] * 2  # of mrr@10, the last panel
    assert lines["before and after (test)"][1].tolist() == [0.2743, 0.3921]
    run["metrics.jsonl"] += [{"step": step, "eval/code-test/recall@20": 0.5} for step in (0, 400)]
    assert "during training (dev)" in draw(run, "recall")[0]  # the one evaluated more often


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "train/loss"),
        ("drift", "train/drift train/corrected_error probe/drift probe/corrected_error"),
        ("kl", "probe/kl_stale kl_stale over all targets"),
        ("overlap", "probe/overlap_stale probe/overlap_corrected"),
        ("ledger", "ledger"),
        ("times", "times"),
        ("recall", "recall@100"),
    ],
)
def test_a_plot_without_data_says_what_is_missing(run, draw, page, name, words):
    run["metrics.jsonl"] = [{"step": 0, "other": 1.0, "train/loss": float("nan")}]
    for key in ("eval", "distribution", "ledger", "times"):
        run["results.json"][key] = {}
    lines, said = draw(run, name)
    assert lines == {}
    assert "nothing to draw, not logged:" in said
    assert words in " ".join(said.split())
    assert "Recall@20 was not measured both before and after training." in page(run).words


def test_a_plot_names_the_series_it_lacks(run, draw):
    for row in run["metrics.jsonl"]:
        row.pop("probe/kl_corrected", None)
    lines, said = draw(run, "kl")
    assert "stale cache, probe" in lines
    assert said.strip() == "not logged: probe/kl_corrected"


def bars(figure):
    """{words: (width, what is written beside it)} of lying bars."""
    (ax,) = figure.axes
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    shown = [text.get_text() for text in ax.texts]
    widths = [bar.get_width() for bar in ax.patches]
    return dict(zip(labels, zip(widths, shown, strict=True), strict=True))


def test_every_target_and_every_second_has_its_bar(run):
    figures = {
        name: next(plot for plot in PLOTS if plot.name == name).draw({}, run["results.json"], LIGHT)
        for name in ("ledger", "times")
    }
    ledger = bars(figures["ledger"])
    assert ledger["steps, with gradient"] == (115200, "115,200  (70 %)")
    assert ledger["refreshes"] == (0, "0  (0 %)")
    times = bars(figures["times"])
    assert times["step"] == (201.5, "202  (65 %)")
    assert times["loading, compiling, reporting"][0] == pytest.approx(312.4 - 205.25)


@pytest.mark.parametrize("first", [0.0, 3e-15])
def test_no_drift_is_off_the_logarithmic_axis(run, first):
    steps = np.arange(5)
    series = {
        "probe/drift": (steps, np.array([first, 0.1, 0.4, 0.5, 0.6])),
        "probe/corrected_error": (steps, np.array([first, 0.01, 0.01, 0.02, 0.02])),
    }
    plot = next(plot for plot in PLOTS if plot.name == "drift")
    figure = plot.draw(series, run["results.json"], LIGHT)
    (ax,) = figure.axes
    figure.draw_without_rendering()
    assert ax.get_yscale() == "log"
    assert 0.001 < ax.get_ylim()[0] < 0.01
    assert not np.isfinite(ax.yaxis.get_transform().transform(np.zeros(1)))
    labels = {text.get_text() for text in ax.get_yticklabels()}
    assert labels >= {"0.01", "0.03", "0.1", "0.3"}


def test_one_step_is_enough(run, draw):
    run["metrics.jsonl"] = run["metrics.jsonl"][:1]
    run["results.json"]["steps"] = 1
    assert list(draw(run, "loss")[0]) == ["as logged"]
    assert draw(run, "drift")[0]["stale cache (drift), probe"][1] == [0]
    assert draw(run, "recall")[0]["during training (dev)"][0] == [0]
