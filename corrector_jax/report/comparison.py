"""`compare.html`: several runs on the same queries, in one file that asks for no other."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corrector_jax.ranking import METRICS, Interval
from corrector_jax.report.parts import drawn, picture, table, whole
from corrector_jax.report.plots import Theme, bare, line
from corrector_jax.report.words import Series, count, duration, finite, get, number, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Compared(NamedTuple):
    """A finished run.

    Attributes:
      label: its name here.
      results: what `results.json` holds.
      series: what it logged.
      gains: measure -> this run minus the first one; empty for the first one itself.
    """

    label: str
    results: Mapping[str, Any]
    series: Series
    gains: Mapping[str, Interval]


def page(runs: Sequence[Compared]) -> str:
    """The page.

    Args:
      runs: two or more; the others are held against the first.
    """
    first = runs[0]
    dataset = first.results.get("dataset") or {}
    title = escape(f"{len(runs)} runs on {dataset.get('name')}")
    setting = (
        f"{count(dataset.get('eval_queries'))} queries of the {dataset.get('eval_split')} split "
        f"against {count(dataset.get('targets'))} targets. Differences are from {first.label}, "
        "query by query; intervals hold 95 % of 2,000 draws of the queries. Another seed would "
        "give another difference: an interval of one run each says nothing of that."
    )
    figures = [
        _figure(
            "What changes",
            "This run minus the first. An interval across 0 does not tell them apart.",
            functools.partial(_draw_gains, runs),
        ),
        _figure(
            "Distance from the fresh softmax",
            "KL, on the probe, of the softmax that negatives are drawn from: corrected where there "
            "is a corrector.",
            functools.partial(_draw_kl, runs),
        ),
    ]
    return whole(
        title,
        f"""<header>
<p class="kind">Comparison</p>
<h1>{title}</h1>
<p class="lede">{escape(" ".join(sentences(runs)))}</p>
<p class="note">{escape(setting)}</p>
</header>
<section>
<h2>Retrieval</h2>
{table("Retrieval measures", ["", *METRICS], _measures(runs))}
<h2>Differences</h2>
{table("Differences", ["", *METRICS], _gains(runs))}
</section>
<section>
<h2>What it cost</h2>
{
            table(
                "Cost",
                ["", "strategy", "re-embedded", "encoded", "KL, stale", "KL, corrected", "time"],
                _costs(runs),
            )
        }
</section>
<section>
<h2>Plots</h2>
<div class="plots">
{"".join(figures)}
</div>
</section>""",
    )


def sentences(runs: Sequence[Compared]) -> list[str]:
    """What mrr@10 says of each run against the first one.

    Args:
      runs: two or more.
    """
    said = []
    for run in runs[1:]:
        gain = run.gains["mrr@10"]
        verdict = "these queries cannot tell them apart"
        if gain.low > 0 or gain.high < 0:
            verdict = f"{run.label if gain.low > 0 else runs[0].label} is better on these queries"
        said.append(
            f"MRR@10 of {run.label} minus {runs[0].label}: {signed(gain.difference)} (95 % "
            f"interval {signed(gain.low)} to {signed(gain.high)}): {verdict}."
        )
    return said


def text(runs: Sequence[Compared]) -> str:
    """The same as plain text.

    Args:
      runs: two or more.
    """
    width = max(len(run.label) for run in runs) + 2
    lines = [" " * width + "".join(f"{metric:>11}" for metric in METRICS) + "  re-embedded"]
    for run in runs:
        cells = [number(finite(run.results, "eval", "after", metric)) for metric in METRICS]
        refreshed = count(finite(run.results, "ledger", "refresh"))
        lines.append(
            f"{run.label:<{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"{refreshed:>13}"
        )
    return "\n".join([*lines, "", *sentences(runs)])


def _measures(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    values = [
        [round(finite(run.results, "eval", "after", metric) or 0, 3) for metric in METRICS]
        for run in runs
    ]
    best = [max(column) for column in zip(*values, strict=True)]
    return [
        (
            escape(run.label),
            [
                f"<b>{number(value)}</b>" if value == top > 0 else number(value)
                for value, top in zip(row, best, strict=True)
            ],
        )
        for run, row in zip(runs, values, strict=True)
    ]


def _gains(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    return [
        (
            escape(f"{run.label} minus {runs[0].label}"),
            [
                f"{signed(gain.difference)}<small>{signed(gain.low)} to {signed(gain.high)}</small>"
                for gain in (run.gains[metric] for metric in METRICS)
            ],
        )
        for run in runs[1:]
    ]


def _costs(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    rows = []
    for run in runs:
        ledger = run.results.get("ledger") or {}
        encoded = sum(v for k, v in ledger.items() if k not in ("corpus_passes", "evaluation"))
        cells = [
            escape(str(get(run.results, "strategy"))),
            count(finite(run.results, "ledger", "refresh")),
            count(encoded),
            number(finite(run.results, "distribution", "kl_stale")),
            number(finite(run.results, "distribution", "kl_corrected")),
            duration(finite(run.results, "wall_seconds")),
        ]
        rows.append((escape(run.label), cells))
    return rows


def _figure(title: str, caption: str, draw: Callable[[Theme], Figure]) -> str:
    light, dark = drawn(title, draw)
    first, second = (base64.b64encode(content).decode() for content in (light, dark))
    return picture(title, caption, first, second)


def _draw_gains(runs: Sequence[Compared], theme: Theme) -> Figure:
    figure, (ax,) = bare(theme, width=5.6, height=1.2 + 0.22 * len(METRICS) * len(runs[1:]))
    ax.axvline(0, color=theme.faint, linewidth=1)
    colours = _colours(runs, theme)
    for i, (run, colour) in enumerate(zip(runs[1:], colours[1:], strict=True)):
        gains = [run.gains[metric] for metric in METRICS]
        at = np.arange(len(METRICS)) + 0.7 * (i - (len(runs) - 2) / 2) / max(1, len(runs) - 1)
        middle = np.array([gain.difference for gain in gains])
        ends = np.array([[gain.low, gain.high] for gain in gains])
        reach = np.abs(ends - middle[:, None]).T
        ax.errorbar(
            middle, at, xerr=reach, fmt="o", color=colour, capsize=3, label=_safe(run.label)
        )
    ax.set_yticks(range(len(METRICS)), METRICS)
    ax.invert_yaxis()
    ax.grid(axis="x", color=theme.grid)
    ax.set_xlabel(f"minus {_safe(runs[0].label)}", color=theme.ink, fontsize=10)
    _legend(figure, theme)
    return figure


def _draw_kl(runs: Sequence[Compared], theme: Theme) -> Figure:
    figure, (ax,) = bare(theme, width=5.6, height=3.4)
    drawn = False
    for run, colour in zip(runs, _colours(runs, theme), strict=True):
        if "probe/kl_corrected" in run.series:
            steps, values = run.series["probe/kl_corrected"]
            line(ax, steps, values, color=colour, linewidth=2, label=_safe(run.label))
            drawn = True
    ax.grid(color=theme.grid)
    ax.set_xlabel("training step", color=theme.ink, fontsize=10)
    ax.set_ylabel("KL (nats)", color=theme.ink, fontsize=10)
    ax.set_ylim(bottom=0)
    if drawn:
        _legend(figure, theme)
    else:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no run has a cache", color=theme.faint, ha="center")
    return figure


def _legend(figure: Figure, theme: Theme) -> None:
    figure.legend(
        loc="outside lower center", ncols=2, frameon=False, labelcolor=theme.ink, fontsize=9
    )


def _colours(runs: Sequence[Compared], theme: Theme) -> list[str]:
    """Okabe and Ito's, in an order that neighbours stay apart in."""
    more = ["#009e73", "#cc79a7", "#56b4e9", "#f0e442"]
    known = [theme.faint, theme.corrected, theme.stale, *more]
    return [known[i % len(known)] for i in range(len(runs))]


def _safe(label: str) -> str:
    """A label that begins no formula."""
    return label.replace("$", r"\$")
