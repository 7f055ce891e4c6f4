"""What a run leaves for people: the plots, `report.html`, and the last lines on the terminal.

Everything is a function of the files in the workdir. The page is one file: its pictures are inlined
and it asks for no other file and no script. Whatever a run did not log is named in words.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corrector_jax.ranking import METRICS
from corrector_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, tuple[np.ndarray, np.ndarray]]

# (key in results["eval"], name in the tables), weakest claim first.
_SYSTEMS = (
    ("bm25", "BM25"),
    ("pretrained", "full encoder, untouched"),
    ("before", "encoder before training"),
    ("after", "encoder after training"),
)
_LEDGER = (
    ("initial", "first snapshot of the cache, which the first evaluation shares"),
    ("refresh", "re-embedded by refreshes of the cache"),
    ("encoded_with_grad", "encoded in training steps, with gradient"),
    ("encoded_without_grad", "encoded without gradient: drift loss and probe"),
    ("evaluation", "encoded for the other evaluations"),
)
_LONGEST_TEXT = 1200  # characters of an example; a page is for reading


def write_report(workdir: Path) -> Path:
    """Draws `plots/*.png` and writes `report.html`, each file whole or not at all.

    Reads `results.json`, and where they exist `config.json`, `metrics.jsonl` and `examples.json`.
    The same files give the same bytes.

    Args:
      workdir: the folder of a run.

    Returns:
      The path of the page.

    Raises:
      UserError: `results.json` is missing, or one of the JSON files cannot be read.
    """
    results = _read_json(workdir / "results.json")
    if results is None:
        raise UserError(f"{workdir} holds no results.json, name the folder of a finished run.")
    config = _read_json(workdir / "config.json") or {}
    examples = _read_json(workdir / "examples.json") or []
    series, unreadable = _read_metrics(workdir / "metrics.jsonl")

    (workdir / "plots").mkdir(exist_ok=True)
    figures = []
    for plot in _PLOTS:
        light, dark = (_png(plot.draw(series, results, theme)) for theme in (_LIGHT, _DARK))
        _replace(workdir / "plots" / f"{plot.name}.png", light)
        figures.append(_figure_html(plot, light, dark))
    page = _page(results, config, examples, figures, unreadable)
    path = workdir / "report.html"
    _replace(path, page.encode("utf-8", errors="replace"))
    return path


def summary_table(results: Mapping[str, Any]) -> str:
    """The results as plain text, at most 80 columns wide.

    Args:
      results: what `results.json` holds.
    """
    systems = _measured(results)
    lines = [" " * 24 + "".join(f"{metric:>11}" for metric in METRICS)]
    for label, metrics in systems:
        cells = "".join(f"{_number(metrics.get(metric)):>11}" for metric in METRICS)
        lines.append(f"{label:<24}{cells}")
    comparison = results.get("comparison") or {}
    if comparison:
        gains = [_signed(_finite(comparison, metric, "difference")) for metric in METRICS]
        lines.append(f"{'after minus before':<24}" + "".join(f"{gain:>11}" for gain in gains))
    sentences = [
        _recall_sentence(results),
        _kl_sentence(results) or _cache_sentence(results),
        "Targets encoded: "
        + ", ".join(
            f"{_count(_finite(results, 'ledger', key))} {words}"
            for key, words in (
                ("initial", "first snapshot"),
                ("refresh", "refreshes"),
                ("encoded_with_grad", "with gradient"),
                ("encoded_without_grad", "without"),
                ("evaluation", "evaluation"),
            )
        )
        + f"; {_number(_finite(results, 'ledger', 'corpus_passes'), 2)} corpus passes.",
    ]
    for sentence in sentences:
        lines += textwrap.wrap(sentence, 80, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


# Reading.


def _read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): put back the one the run wrote.") from None


def _read_metrics(path: Path) -> tuple[Series, int]:
    """{key: (steps, values)} of the finite numbers, and how many lines could not be read.

    A killed run can leave half a line, and a resumed one writes some steps again: the last counts.
    """
    found: dict[str, dict[int, float]] = {}
    unreadable = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            unreadable += bool(line.strip())
            continue
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(key, {})[step] = float(value)
    return {
        key: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for key, values in found.items()
    }, unreadable


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _get(tree: Mapping[str, Any], *keys: str) -> Any:
    """The value under nested keys, None where one of them is missing."""
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _finite(tree: Mapping[str, Any], *keys: str) -> float | None:
    """The number under nested keys, None where there is none."""
    value = _get(tree, *keys)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _measured(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """(name, metrics) of the systems that were evaluated."""
    systems = [(label, _get(results, "eval", key)) for key, label in _SYSTEMS]
    return [(label, metrics) for label, metrics in systems if metrics]


# Numbers and words.


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return _number(value) if value is None or value < 0 else f"+{_number(value)}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(share: float) -> str:
    """A share in whole percent that never rounds to nothing or to everything."""
    if 0 < share < 0.01:
        return "less than 1 %"
    if 0.99 < share < 1:
        return "more than 99 %"
    return f"{100 * share:.0f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _recall_sentence(results: Mapping[str, Any]) -> str:
    """How recall@20 changed; a rise or a fall is claimed only where the interval excludes 0."""
    before = _finite(results, "eval", "before", "recall@20")
    after = _finite(results, "eval", "after", "recall@20")
    if before is None or after is None:
        return "Recall@20 was not measured both before and after training."
    low, high = (_finite(results, "comparison", "recall@20", end) for end in ("low", "high"))
    ends = f"{_number(before)} before and {_number(after)} after training"
    if low is None or high is None:
        return f"Recall@20 was {ends}; without an interval that is no evidence of a change."
    gain = f"{_signed(after - before)}, 95 % interval {_signed(low)} to {_signed(high)}"
    if low > 0 or high < 0:
        verb = "rose" if low > 0 else "fell"
        return f"Recall@20 {verb} from {_number(before)} to {_number(after)} ({gain})."
    return f"Recall@20 was {ends}: these queries cannot tell the difference from none ({gain})."


def _cache_sentence(results: Mapping[str, Any]) -> str:
    """What was re-embedded."""
    if _finite(results, "distribution", "kl_stale") is None:
        return "No negatives came from a cache, so none went stale."
    refreshed = _finite(results, "ledger", "refresh")
    if refreshed is None:
        return ""
    if not refreshed:
        return "The cache was never refreshed: 0 targets were re-embedded after the first snapshot."
    targets = _finite(results, "dataset", "targets")
    passes = f", {refreshed / targets:.1f} times the corpus" if targets else ""
    return f"The cache was refreshed: {_count(refreshed)} targets were re-embedded{passes}."


def _kl_sentence(results: Mapping[str, Any]) -> str:
    """What staleness cost and what the corrector gave back; empty where nothing was measured."""
    stale = _finite(results, "distribution", "kl_stale")
    corrected = _finite(results, "distribution", "kl_corrected")
    if stale is None:
        return ""
    start = f"The softmax over the stale cache is {_number(stale)} nats (KL) from the fresh one"
    if corrected is None:
        return f"{start}; no corrected figure was recorded."
    if math.isclose(stale, corrected, rel_tol=1e-6, abs_tol=1e-9):
        return f"{start}, with the corrector and without it."
    start = f"{start}, {_number(corrected)} nats once corrected"
    if corrected > stale:
        return f"{start}: the corrector made it worse."
    return f"{start}: the corrector removed {_percent(1 - corrected / stale)} of the KL."


def _baseline_sentence(results: Mapping[str, Any]) -> str:
    """What the same queries get without any training; empty where nothing was measured."""
    bm25 = _finite(results, "eval", "bm25", "recall@20")
    pretrained = _finite(results, "eval", "pretrained", "recall@20")
    parts = [
        f"BM25 reaches {_number(bm25)}" if bm25 is not None else "",
        f"the full pretrained encoder, untouched, {_number(pretrained)}"
        if pretrained is not None
        else "",
    ]
    return f"On the same queries {' and '.join(filter(None, parts))}." if any(parts) else ""


# Plots.


class _Theme(NamedTuple):
    """Colours of a picture; the three hues stay apart for colour-blind eyes (Okabe and Ito)."""

    paper: str
    ink: str
    faint: str
    grid: str
    corrected: str
    stale: str
    reference: str


_LIGHT = _Theme("#ffffff", "#1d2126", "#5d6670", "#e4e7eb", "#0072b2", "#d55e00", "#5d6670")
_DARK = _Theme("#171a1f", "#e6e9ed", "#9aa4af", "#2d333b", "#56b4e9", "#e69f00", "#9aa4af")


class _Plot(NamedTuple):
    """A picture of the report: the file's name, what it shows, how to read it, how to draw it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Series, Mapping[str, Any], _Theme], Figure]


def _canvas(theme: _Theme, panels: int = 1) -> tuple[Figure, list[Axes]]:
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


def _line(ax: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line, with markers where the points are few enough to be seen."""
    ax.plot(steps, values, marker="o" if len(steps) <= 40 else None, markersize=4, **style)


def _diamonds(
    ax: Axes, steps: Sequence[float], values: Sequence[float | None], theme: _Theme, **style: Any
) -> None:
    """The figures of `results.json` among the logged ones; None is left out."""
    known = [math.nan if value is None else value for value in values]
    ax.plot(steps, known, "D", markersize=7, markeredgecolor=theme.ink, **style)


def _legend(ax: Axes, theme: _Theme) -> None:
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


def _say_missing(ax: Axes, theme: _Theme, missing: Sequence[str], *, empty: bool) -> None:
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


def _draw_loss(series: Series, results: Mapping[str, Any], theme: _Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("task loss (nats)", color=theme.ink, fontsize=10)
    if "train/loss" in series:
        steps, loss = series["train/loss"]
        kernel = np.ones(2 * (len(loss) // 40) + 1)  # a twentieth of the run, centred
        if len(kernel) == 1:
            _line(ax, steps, loss, color=theme.corrected, linewidth=2, label="as logged")
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


def _draw_drift(series: Series, results: Mapping[str, Any], theme: _Theme) -> Figure:
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
            _line(ax, steps, values, color=colour, linewidth=2, label=f"{name}, probe")
            drawn.append(values)
    if drawn:
        _log_if_wide(ax, drawn)
        _legend(ax, theme)
    wanted = ("train/drift", "train/corrected_error", "probe/drift", "probe/corrected_error")
    _say_missing(ax, theme, [key for key in wanted if key not in series], empty=not drawn)
    return figure


def _draw_kl(series: Series, results: Mapping[str, Any], theme: _Theme) -> Figure:
    figure, (ax,) = _canvas(theme)
    ax.set_ylabel("KL from the fresh softmax (nats)", color=theme.ink, fontsize=10)
    drawn, missing = [], []
    for key, name, colour in (
        ("kl_stale", "stale cache", theme.stale),
        ("kl_corrected", "corrected cache", theme.corrected),
    ):
        if f"probe/{key}" in series:
            steps, values = series[f"probe/{key}"]
            _line(ax, steps, values, color=colour, linewidth=2, label=f"{name}, probe")
            drawn.append(values)
        else:
            missing.append(f"probe/{key}")
        exact = _finite(results, "distribution", key)
        if exact is not None:
            end = _finite(results, "steps") or 0
            label = f"{name}, all targets: {_number(exact)}"
            _diamonds(ax, [end], [exact], theme, color=colour, label=label)
            drawn.append(np.array([exact]))
        else:
            missing.append(f"{key} over all targets")
    if drawn:
        _log_if_wide(ax, drawn)
        _legend(ax, theme)
    _say_missing(ax, theme, missing, empty=not drawn)
    return figure


def _draw_recall(series: Series, results: Mapping[str, Any], theme: _Theme) -> Figure:
    figure, axes = _canvas(theme, panels=4)
    ends = (0, _finite(results, "steps") or 0)
    dataset = _evaluated(series, results)
    final, during = (
        split.replace("$", r"\$")  # which would start a formula
        for split in (
            str(_get(results, "dataset", "eval_split")),
            dataset.removeprefix(f"{_get(results, 'dataset', 'name')}-"),
        )
    )
    for ax, metric in zip(axes, ("recall@1", "recall@20", "recall@100", "mrr@10"), strict=True):
        ax.set_title(metric, color=theme.ink, fontsize=10, loc="left")
        ax.margins(y=0.12)
        for key, label, dashes in (
            ("bm25", f"BM25 ({final})", (0, (5, 2))),
            ("pretrained", f"full encoder, untouched ({final})", (0, (1, 1.5))),
        ):
            level = _finite(results, "eval", key, metric)
            if level is not None:
                ax.axhline(level, color=theme.reference, linestyle=dashes, label=label)
        if f"eval/{dataset}/{metric}" in series:
            steps, values = series[f"eval/{dataset}/{metric}"]
            label = f"during training ({during})"
            _line(ax, steps, values, color=theme.corrected, linewidth=2, label=label)
        exact = [_finite(results, "eval", when, metric) for when in ("before", "after")]
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


_PLOTS = (
    _Plot(
        "recall",
        "Retrieval during training",
        "Share of the known positives among the first 1, 20 and 100 targets, and the mean "
        "reciprocal rank of the first one within 10. The legend names the split of each.",
        _draw_recall,
    ),
    _Plot(
        "kl",
        "Distance from the fresh softmax",
        "KL divergence from the softmax over fresh embeddings to the one over the cache, as it is "
        "and corrected. Lines: the probe. Diamonds: exactly, over all targets, at the end.",
        _draw_kl,
    ),
    _Plot(
        "drift",
        "Drift and what is left of it",
        "How far the cached embeddings are from the fresh ones, before and after correction, "
        "relative to their squared norm. Thick: the probe. Thin: the rows drawn in each step.",
        _draw_drift,
    ),
    _Plot(
        "loss",
        "Task loss",
        "The loss of the training batches, as logged and smoothed.",
        _draw_loss,
    ),
)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()


# The page.

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f5f6f8; --ink: #1d2126;
  --faint: #5d6670; --line: #dde1e6; --accent: #0072b2; --mark: #e7f3ea; --mark-ink: #1b6b3a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a1f; --ground: #0f1114;
  --ink: #e6e9ed; --faint: #9aa4af; --line: #2d333b; --accent: #56b4e9; --mark: #16281d;
  --mark-ink: #7fd6a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: 0; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
p { max-width: 46rem; margin: .5rem 0; }
.kind, .note, figcaption, .side, dt { color: var(--faint); font-size: .875rem; }
.kind { margin: 0 0 .25rem; }
.lede { font-size: 1.125rem; margin: 1.25rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem;
  margin: 2rem 0 0; }
.tiles > div, figure, .card { background: var(--paper); border: 1px solid var(--line);
  border-radius: .6rem; }
.tiles > div { padding: .9rem 1.1rem; }
.tiles dd { margin: 0; }
.tiles dd.value { font-size: 1.5rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--faint); font-weight: 500; font-size: .875rem; }
th:first-child { text-align: left; font-weight: 400; }
tbody th.words { white-space: normal; min-width: 15rem; }
tr.total > * { font-weight: 600; }
td b { color: var(--accent); }
td small { display: block; color: var(--faint); font-size: .75rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; padding: 1rem; }
figure img { display: block; width: 100%; height: auto; margin: .5rem 0; }
.example { padding: 1rem 1.1rem; margin: 1rem 0; }
.example h3 { white-space: pre-wrap; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.25rem; margin-top: .75rem; }
.sides > section { min-width: 0; }
h4 { font-size: .875rem; margin: 0 0 .4rem; font-weight: 600; }
ol { list-style: none; margin: 0; padding: 0; }
li { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .75rem; margin: 0 0 .75rem; }
li.relevant { border-color: var(--mark-ink); }
.badge { background: var(--mark); color: var(--mark-ink); border-radius: 1rem;
  padding: .05rem .55rem; font-size: .8125rem; font-weight: 600; margin-left: .4rem; }
.side { font-variant-numeric: tabular-nums; }
pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  margin: .15rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 11.5rem;
  overflow-y: auto; }
details { padding: .9rem 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
details pre { max-height: none; margin-top: .75rem; }
details.positives { padding: 0; margin-top: .25rem; }
details.positives summary { font-weight: 400; font-size: .875rem; color: var(--faint); }
footer { margin-top: 3rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .lede { font-size: 1.0625rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .tiles > div { padding: .7rem .8rem; }
  .tiles dd.value { font-size: 1.125rem; white-space: nowrap; }
  th, td, thead th { padding: .4rem .5rem; font-size: .8125rem; }
  tbody th.words { min-width: 7rem; }
  th:first-child { position: sticky; left: 0; background: var(--paper); }
  td small { white-space: normal; width: 4.5rem; margin-left: auto; }
}
""".strip()


def _page(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
    unreadable: int,
) -> str:
    """The whole page."""
    dataset = str(_get(results, "dataset", "name") or "unnamed data")
    strategy = str(results.get("strategy") or "unnamed strategy")
    title = escape(f"{dataset} · {strategy}")
    sentences = [
        _recall_sentence(results),
        _baseline_sentence(results),
        _cache_sentence(results),
        _kl_sentence(results),
    ]
    skipped = f" Unreadable lines of metrics.jsonl left out: {unreadable}." if unreadable else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<main>
<header>
<p class="kind">Training report</p>
<h1>{title}</h1>
<p class="note">{escape(_setting(results))}</p>
<p class="lede">{escape(" ".join(filter(None, sentences)))}</p>
{_tiles(results)}
</header>
<section>
<h2>Retrieval</h2>
<p class="note">{escape(_split_words(results))} The best of each column is bold.</p>
{_results_table(results)}
</section>
<section>
<h2>Staleness</h2>
<p class="note">How far the cache is from fresh embeddings at the end, over all targets: the KL
divergence from the fresh softmax to the one over the cache, and the squared error of the embeddings
relative to their squared norm.</p>
{_distribution_table(results)}
</section>
<section>
<h2>Targets encoded</h2>
<p class="note">Every target that passed through the encoder, and why.</p>
{_ledger_table(results)}
</section>
<section>
<h2>Plots</h2>
<p class="note">{escape(_corpus_words(config))}</p>
<div class="plots">
{"".join(figures)}
</div>
</section>
<section>
<h2>Examples</h2>
{_examples(examples)}
</section>
<section>
<h2>Configuration</h2>
<details class="card"><summary>{len(_flat(config))} keys</summary>
<pre>
{escape(_listing(config))}</pre>
</details>
</section>
<footer>
<p class="note">Drawn from the files of this folder alone.{skipped} The method: A Fresh Take on
Stale Embeddings, arXiv 2409.01890.</p>
</footer>
</main>
</body>
</html>
"""


def _setting(results: Mapping[str, Any]) -> str:
    encoder = results.get("encoder") or {}
    parts = [
        f"encoder {encoder['source']}" if encoder.get("source") else "",
        f"{encoder['layers']} layers" if encoder.get("layers") else "",
        f"{encoder['dim']} dimensions" if encoder.get("dim") else "",
        f"{_count(results['steps'])} steps" if results.get("steps") is not None else "",
        f"seed {results['seed']}" if results.get("seed") is not None else "",
    ]
    return " · ".join(filter(None, parts))


def _split_words(results: Mapping[str, Any]) -> str:
    dataset = results.get("dataset") or {}
    queries, targets = (_count(dataset.get(key)) for key in ("eval_queries", "targets"))
    trained = _count(dataset.get("train_queries"))
    split = dataset.get("eval_split") or "evaluation"
    return (
        f"{queries} queries of the {split} split against {targets} targets, after training on "
        f"{trained} queries."
    )


def _corpus_words(config: Mapping[str, Any]) -> str:
    """What the evaluations in the middle of training ranked; the others always rank everything."""
    words = {
        "full": "all targets, freshly embedded",
        "sample": "freshly embedded judged targets and a uniform sample of the others",
        "corrected": "the corrected cache, embedding nothing",
    }.get(_get(config, "eval", "corpus"))
    return f"Evaluations during training ranked {words}." if words else ""


def _tiles(results: Mapping[str, Any]) -> str:
    """The few numbers a reader came for."""
    before, after = (_finite(results, "eval", when, "recall@20") for when in ("before", "after"))
    gain, low, high = (
        _signed(_finite(results, "comparison", "recall@20", part))
        for part in ("difference", "low", "high")
    )
    tiles = [
        (
            "recall@20, before → after",
            f"{_number(before)} → {_number(after)}",
            f"{gain} (95 %: {low} to {high})",
        )
    ]
    stale, corrected = (
        _finite(results, "distribution", key) for key in ("kl_stale", "kl_corrected")
    )
    if stale is not None:
        pair = f"{_number(stale)} → {_number(corrected)}"
        tiles.append(("KL, stale → corrected", pair, "nats, over all targets"))
        refreshed = _count(_finite(results, "ledger", "refresh"))
        targets = _count(_finite(results, "dataset", "targets"))
        tiles.append(("re-embedded by refreshes", refreshed, f"the corpus has {targets} targets"))
    rate = _finite(results, "examples_per_second")
    tiles.append(
        (
            "whole run",
            _duration(_finite(results, "wall_seconds")),
            f"{rate:,.1f} training queries a second" if rate is not None else "",
        )
    )
    cells = "\n".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">\n{cells}\n</dl>'


def _table(
    label: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], total: str = ""
) -> str:
    """A table of HTML cells; the first column names the row, `total` is the row to set apart."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr class="{"total" if name == total else ""}"><th scope="row" class="words">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll card" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _results_table(results: Mapping[str, Any]) -> str:
    systems = _measured(results)
    # As shown: what the digits do not tell apart is equally good.
    table = [[round(_finite(row, metric) or 0, 3) for metric in METRICS] for _, row in systems]
    best = [max(column) for column in zip(*table, strict=True)]
    rows = []
    for (label, metrics), values in zip(systems, table, strict=True):
        cells = [_number(_finite(metrics, metric)) for metric in METRICS]
        bold = [value == top > 0 for value, top in zip(values, best, strict=True)]
        marked = [f"<b>{cell}</b>" if b else cell for cell, b in zip(cells, bold, strict=True)]
        rows.append((escape(label), marked))
    if results.get("comparison"):
        gains = [(results["comparison"].get(metric) or {}) for metric in METRICS]
        cells = [
            f"{_signed(_finite(gain, 'difference'))}<small>{_signed(_finite(gain, 'low'))} to "
            f"{_signed(_finite(gain, 'high'))}</small>"
            for gain in gains
        ]
        rows.append(("after minus before, 95 % interval", cells))
    return _table("Retrieval measures", ["", *METRICS], rows)


def _distribution_table(results: Mapping[str, Any]) -> str:
    names = ("kl_stale", "kl_corrected", "drift", "corrected_error")
    values = {name: _finite(results, "distribution", name) for name in names}
    if all(value is None for value in values.values()):
        return f"<p>{escape(_cache_sentence(results))}</p>"

    def left(corrected: float | None, stale: float | None) -> str:
        return f"{100 * corrected / stale:.1f} %" if stale and corrected is not None else "-"

    rows = [
        ("stale cache", [_number(values["kl_stale"]), _number(values["drift"])]),
        ("corrected cache", [_number(values["kl_corrected"]), _number(values["corrected_error"])]),
        (
            "left after correction",
            [
                left(values["kl_corrected"], values["kl_stale"]),
                left(values["corrected_error"], values["drift"]),
            ],
        ),
    ]
    return _table("Staleness", ["", "KL (nats)", "squared error"], rows)


def _ledger_table(results: Mapping[str, Any]) -> str:
    ledger = {key: _finite(results, "ledger", key) for key, _ in _LEDGER}
    total = sum(value or 0 for value in ledger.values())
    targets = _finite(results, "dataset", "targets")

    def cells(value: float | None) -> list[str]:
        share = f"{100 * value / total:.1f} %" if total and value is not None else "-"
        passes = f"{value / targets:.2f}" if targets and value is not None else "-"
        return [_count(value), passes, share]

    rows = [(words, cells(ledger[key])) for key, words in _LEDGER]
    rows.append(("all", cells(total)))
    head = ["", "targets", "times the corpus", "share"]
    passes = _number(_finite(results, "ledger", "corpus_passes"), 2)
    return (
        _table("Targets encoded", head, rows, total="all")
        + f'\n<p class="note">Passes over the corpus for the cache (first snapshot and refreshes): '
        f"{passes}.</p>"
    )


def _figure_html(plot: _Plot, light: bytes, dark: bytes) -> str:
    first, second = (base64.b64encode(content).decode() for content in (light, dark))
    width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))
    return (
        f"<figure>\n<h3>{escape(plot.title)}</h3>\n<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{second}">'
        f'<img alt="{escape(plot.title)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{first}">'
        f"</picture>\n<figcaption>{escape(plot.caption)}</figcaption>\n</figure>\n"
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return '<p class="note">No examples were recorded.</p>'
    return "\n".join(map(_example, examples))


def _example(example: Mapping[str, Any]) -> str:
    before, after = example.get("before") or [], example.get("after") or []
    sides = "\n".join(
        f"<section>\n<h4>{name}</h4>\n{_hits(hits)}\n</section>"
        for name, hits in (("Before training", before), ("After training", after))
    )
    positives = example.get("positives") or []
    texts = "\n".join(f"<pre>\n{escape(_cut(text))}</pre>" for text in positives)
    known = "1 known positive" if len(positives) == 1 else f"{len(positives)} known positives"
    return f"""<article class="card example">
<h3>{escape(_cut(example.get("query", "")))}</h3>
<p class="note">First relevant target: {escape(_first(before))} before, {escape(_first(after))}
after.</p>
<details class="positives"><summary>{known}</summary>
{texts}
</details>
<div class="sides">
{sides}
</div>
</article>"""


def _first(hits: Sequence[Mapping[str, Any]]) -> str:
    ranks = [hit["rank"] for hit in hits if hit.get("relevant")]
    return f"rank {min(ranks)}" if ranks else "not among those shown"


def _hits(hits: Sequence[Mapping[str, Any]]) -> str:
    if not hits:
        return '<p class="note">Nothing was found.</p>'
    items = []
    for hit in hits:
        kind, badge = ' class="relevant"', '<span class="badge">relevant</span>'
        if not hit.get("relevant"):
            kind = badge = ""
        # Browsers drop a line break right after <pre>; this one goes, the text's own stay.
        items.append(
            f'<li{kind}><span class="side">{escape(str(hit.get("rank", "-")))}. '
            f"score {_number(_finite(hit, 'score'))}</span>{badge}\n"
            f'<pre tabindex="0">\n{escape(_cut(hit.get("text", "")))}</pre></li>'
        )
    return "<ol>\n" + "\n".join(items) + "\n</ol>"


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} more characters)"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested dict."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def _listing(config: Mapping[str, Any]) -> str:
    lines = (
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in _flat(config).items()
    )
    return "\n".join(lines) or "No config.json in this folder."
