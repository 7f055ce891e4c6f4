"""The drawings of a report, from the logged series and `results.json`.

What a run did not log is named in words where it would have been drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corrector_jax.report.words import Series, finite, get, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    """Colours of a picture; the three hues stay apart for colour-blind eyes (Okabe and Ito).

    Attributes:
      paper: the ground.
      ink: texts that name something.
      faint: axes, asides, single points behind a smoothed line.
      grid: the grid.
      corrected: what was corrected, and the trained encoder.
      stale: the cache as it is.
      reference: systems to compare with.
      veil: what stands behind something else, and must be seen all the same.
    """

    paper: str
    ink: str
    faint: str
    grid: str
    corrected: str
    stale: str
    reference: str
    veil: str


LIGHT = Theme(
    "#ffffff", "#1d2126", "#5d6670", "#e4e7eb", "#0072b2", "#d55e00", "#5d6670", "#c6ccd3"
)
DARK = Theme("#171a1f", "#e6e9ed", "#9aa4af", "#2d333b", "#56b4e9", "#e69f00", "#9aa4af", "#4a535e")
"""The themes; `plots/*.png` are light."""


class Plot(NamedTuple):
    """A picture of the report.

    Attributes:
      name: of the file, without `.png`.
      title: what it shows.
      caption: how to read it.
      draw: draws it from the logged series, what `results.json` holds, and the colours.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Series, Mapping[str, Any], Theme], Figure]


def _canvas(theme: Theme, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of 1 or 2 x 2 panels. No pyplot: a figure that nothing global holds on to."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.8), dpi=170, facecolor=theme.paper, layout="constrained")
    side = math.isqrt(panels)
    axes = list(np.ravel(figure.subplots(side, side, sharex=True)))
    for ax in axes:
        ax.set_facecolor(theme.paper)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.faint)
        ax.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=9)
        ax.grid(color=theme.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for ax in axes[-side:]:
        ax.set_xlabel("training step", color=theme.ink, fontsize=10)
    return figure, axes


def bare(
    theme: Theme, *, width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure whose panels share no axis.

    Args:
      theme: colours.
      width: inches.
      height: inches.
      columns: panels side by side.
      rows: of them, one below the other.

    Returns:
      The figure, and its panels row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor=theme.paper, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for ax in axes:
        ax.set_facecolor(theme.paper)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.faint)
        ax.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=9)
        ax.set_axisbelow(True)
    return figure, axes


def title(ax: Axes, theme: Theme, words: str, aside: str) -> None:
    """What a panel shows, and below it a figure or two."""
    ax.set_title(f"{words}\n", color=theme.ink, fontsize=9.5, loc="left", linespacing=1.35)
    ax.text(0, 1.03, aside, color=theme.faint, fontsize=9, transform=ax.transAxes)


def percent_axis(ax: Axes) -> None:
    """Shares along the upright axis, as whole percents."""
    from matplotlib.ticker import MaxNLocator

    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def line(ax: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line through values [n] at steps [n], with markers where they are few enough to be seen."""
    ax.plot(steps, values, marker="o" if len(steps) <= 40 else None, markersize=4, **style)


def _diamonds(
    ax: Axes, steps: Sequence[float], values: Sequence[float | None], theme: Theme, **style: Any
) -> None:
    """The figures of `results.json` among the logged ones; None is left out."""
    known = [math.nan if value is None else value for value in values]
    ax.plot(steps, known, "D", markersize=7, markeredgecolor=theme.ink, **style)


def _legend(ax: Axes, theme: Theme) -> None:
    ax.legend(frameon=False, labelcolor=theme.ink, fontsize=9)


def _log_if_wide(ax: Axes, values: Iterable[np.ndarray]) -> None:
    """A logarithmic axis where the values span more than a factor of 20.

    What is below 1e-5 of the largest is rounding (step 0 has no drift) and off the axis.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    joined = np.concatenate(list(values))
    top = joined.max()
    low = joined[joined > 1e-5 * top].min(initial=top)
    if top > 20 * low:
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(bottom=low / 1.5)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=20))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)


def _say_missing(ax: Axes, theme: Theme, missing: Sequence[str], *, empty: bool) -> None:
    """Names what was not logged: across an empty plot, or in a line above a drawn one."""
    if not missing:
        return
    if not empty:
        words = textwrap.fill(f"not logged: {', '.join(missing)}", 64, break_on_hyphens=False)
        ax.set_title(words, color=theme.faint, fontsize=9, loc="left")
        return
    ax.set_axis_off()
    words = "\n".join(["nothing to draw, not logged:", *missing])
    ax.text(0.5, 0.5, words, color=theme.faint, ha="center", va="center", transform=ax.transAxes)


def _draw_loss(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("task loss (nats)", color=theme.ink, fontsize=10)
    if "train/loss" in series:
        steps, loss = series["train/loss"]
        kernel = np.ones(2 * (len(loss) // 40) + 1)  # a twentieth of the run, centred
        if len(kernel) == 1:
            line(ax, steps, loss, color=theme.corrected, linewidth=2, label="as logged")
        else:
            kept = np.convolve(np.ones(len(loss)), kernel, "same")  # fewer at both ends
            smooth = np.convolve(loss, kernel, "same") / kept
            label = f"mean of {len(kernel)} neighbours"
            ax.plot(steps, loss, color=theme.faint, alpha=0.5, linewidth=0.9, label="as logged")
            ax.plot(steps, smooth, color=theme.corrected, linewidth=2, label=label)
        _legend(ax, theme)
    else:
        _say_missing(ax, theme, ["train/loss"], empty=True)
    return figure


def _draw_drift(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("squared error / squared norm", color=theme.ink, fontsize=10)
    drawn = []
    for key, name, colour in (
        ("drift", "stale cache (drift)", theme.stale),
        ("corrected_error", "corrected cache", theme.corrected),
    ):
        if f"train/{key}" in series:
            steps, values = series[f"train/{key}"]
            label = f"{name}, rows of the step"
            ax.plot(steps, values, color=colour, alpha=0.45, linewidth=0.9, label=label)
            drawn.append(values)
        if f"probe/{key}" in series:
            steps, values = series[f"probe/{key}"]
            line(ax, steps, values, color=colour, linewidth=2, label=f"{name}, probe")
            drawn.append(values)
    if drawn:
        _log_if_wide(ax, drawn)
        _legend(ax, theme)
    wanted = ("train/drift", "train/corrected_error", "probe/drift", "probe/corrected_error")
    _say_missing(ax, theme, [key for key in wanted if key not in series], empty=not drawn)
    return figure


def _draw_kl(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("KL from the fresh softmax (nats)", color=theme.ink, fontsize=10)
    drawn, missing = [], []
    for key, name, colour in (
        ("kl_stale", "stale cache", theme.stale),
        ("kl_corrected", "corrected cache", theme.corrected),
    ):
        if f"probe/{key}" in series:
            steps, values = series[f"probe/{key}"]
            line(ax, steps, values, color=colour, linewidth=2, label=f"{name}, probe")
            drawn.append(values)
        else:
            missing.append(f"probe/{key}")
        exact = finite(results, "distribution", key)
        if exact is not None:
            end = finite(results, "steps") or 0
            label = f"{name}, all targets: {number(exact)}"
            _diamonds(ax, [end], [exact], theme, color=colour, label=label)
            drawn.append(np.array([exact]))
        else:
            missing.append(f"{key} over all targets")
    if drawn:
        _log_if_wide(ax, drawn)
        _legend(ax, theme)
    _say_missing(ax, theme, missing, empty=not drawn)
    return figure


def _draw_overlap(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("share of the fresh first 10", color=theme.ink, fontsize=10)
    missing = []
    for key, name, colour in (
        ("overlap_stale", "stale cache, probe", theme.stale),
        ("overlap_corrected", "corrected cache, probe", theme.corrected),
    ):
        if f"probe/{key}" in series:
            steps, values = series[f"probe/{key}"]
            line(ax, steps, values, color=colour, linewidth=2, label=name)
        else:
            missing.append(f"probe/{key}")
    if len(missing) < 2:
        ax.set_ylim(0, 1.02)
        _legend(ax, theme)
    _say_missing(ax, theme, missing, empty=len(missing) == 2)
    return figure


def _draw_ledger(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    parts = [(words, finite(results, "ledger", key)) for key, words in LEDGER]
    return bars(theme, parts, "targets encoded", missing="ledger")


def _draw_times(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    spent = results.get("times") or {}
    parts = [(words, finite(spent, words)) for words in spent]
    whole = finite(results, "wall_seconds")
    if parts and whole is not None:
        rest = whole - sum(value or 0 for _, value in parts)
        parts.append(("loading, compiling, reporting", max(rest, 0.0)))
    return bars(theme, parts, "seconds", missing="times")


def bars(
    theme: Theme, parts: Sequence[tuple[str, float | None]], unit: str, *, missing: str
) -> Figure:
    """Lying bars, each with its figure and its share of all.

    Args:
      theme: colours.
      parts: (words, value); None is left out.
      unit: of the values.
      missing: named where there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (ax,) = _canvas(theme)
    known = [(words, value) for words, value in parts if value is not None]
    total = sum(value for _, value in known)
    if not total:
        _say_missing(ax, theme, [missing], empty=True)
        return figure
    names = [textwrap.fill(words, 20) for words, _ in known][::-1]
    values = [value for _, value in known][::-1]
    drawn = ax.barh(names, values, color=theme.corrected, height=0.62)
    shown = [f"{_short(value)}  ({100 * value / total:.0f} %)" for value in values]
    ax.bar_label(drawn, shown, padding=4, color=theme.ink, fontsize=9)
    ax.set_xlim(0, 1.42 * max(values))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(unit, color=theme.ink, fontsize=10)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(lambda value, _: _short(value))
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


LEDGER = (
    ("initial", "first snapshot"),
    ("refresh", "refreshes"),
    ("encoded_with_grad", "steps, with gradient"),
    ("encoded_without_grad", "drift loss and probe"),
    ("evaluation", "other evaluations"),
)
"""Key of the ledger -> words beside its bar."""


def _draw_recall(series: Series, results: Mapping[str, Any], theme: Theme) -> Figure:
    figure, axes = _canvas(theme, panels=4)
    ends = (0, finite(results, "steps") or 0)
    dataset = _evaluated(series, results)
    final, during = (
        split.replace("$", r"\$")  # which would start a formula
        for split in (
            str(get(results, "dataset", "eval_split")),
            dataset.removeprefix(f"{get(results, 'dataset', 'name')}-"),
        )
    )
    for ax, metric in zip(axes, ("recall@1", "recall@20", "recall@100", "mrr@10"), strict=True):
        ax.set_title(metric, color=theme.ink, fontsize=10, loc="left")
        ax.margins(y=0.12)
        for key, label, dashes in (
            ("bm25", f"BM25 ({final})", (0, (5, 2))),
            ("pretrained", f"full encoder, untouched ({final})", (0, (1, 1.5))),
        ):
            level = finite(results, "eval", key, metric)
            if level is not None:
                ax.axhline(level, color=theme.reference, linestyle=dashes, label=label)
        if f"eval/{dataset}/{metric}" in series:
            steps, values = series[f"eval/{dataset}/{metric}"]
            label = f"during training ({during})"
            line(ax, steps, values, color=theme.corrected, linewidth=2, label=label)
        exact = [finite(results, "eval", when, metric) for when in ("before", "after")]
        if exact != [None, None]:
            label = f"before and after ({final})"
            _diamonds(ax, ends, exact, theme, color=theme.corrected, label=label)
    shown: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        shown = {**dict(zip(labels, handles, strict=True)), **shown}
        _say_missing(ax, theme, [] if labels else [ax.get_title(loc="left")], empty=True)
    if shown:
        figure.legend(
            shown.values(),
            shown.keys(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
            labelcolor=theme.ink,
            fontsize=9,
        )
    return figure


def _evaluated(series: Series, results: Mapping[str, Any]) -> str:
    """The DATASET-SPLIT of eval/DATASET-SPLIT/METRIC that was evaluated most often, '' for none."""
    counts = {
        key.removeprefix("eval/").rpartition("/")[0]: len(steps)
        for key, (steps, _) in series.items()
        if key.startswith("eval/") and key.endswith("/recall@20")
    }
    dataset = results.get("dataset") or {}
    final = f"{dataset.get('name')}-{dataset.get('eval_split')}"
    return max(counts, key=lambda name: (counts[name], name == final), default="")


PLOTS = (
    Plot(
        "recall",
        "Retrieval during training",
        "Share of the known positives among the first 1, 20 and 100 targets, and the mean "
        "reciprocal rank of the first one within 10. The legend names the split of each.",
        _draw_recall,
    ),
    Plot(
        "kl",
        "Distance from the fresh softmax",
        "KL divergence from the softmax over fresh embeddings to the one over the cache, as it is "
        "and corrected. Lines: the probe. Diamonds: exactly, over all targets, at the end.",
        _draw_kl,
    ),
    Plot(
        "overlap",
        "How much of the fresh first ten is found",
        "Share of the probe's ten best targets by fresh embeddings that are among the ten best by "
        "the cache, as it is and corrected; means over the probe's queries.",
        _draw_overlap,
    ),
    Plot(
        "drift",
        "Drift and what is left of it",
        "How far the cached embeddings are from the fresh ones, before and after correction, "
        "relative to their squared norm. Thick: the probe. Thin: the rows drawn in each step.",
        _draw_drift,
    ),
    Plot(
        "loss",
        "Task loss",
        "The loss of the training batches, as logged and smoothed.",
        _draw_loss,
    ),
    Plot(
        "ledger",
        "Targets encoded, and what for",
        "Every target that passed through the encoder. What is never refreshed has no bar there.",
        _draw_ledger,
    ),
    Plot(
        "times",
        "Where the time went",
        "Wall-clock seconds of the run. `step` is the device at work, the compilation of the step "
        "among it; `wait for the batch` is time the device could have worked.",
        _draw_times,
    ),
)
"""In the order of the page."""


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file; the same figure gives the same bytes.

    Args:
      figure: what was drawn.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a character that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
