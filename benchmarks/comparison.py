"""What the runs of a comparison say together: summary, tables, plots, and which goals are met."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import paired
from benchmarks.grids import Grid
from corrector_jax import paths
from corrector_jax.report.plots import LIGHT
from corrector_jax.report.words import READ, json_of
from corrector_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "mrr@10": "MRR@10",
    "recall@20": "R@20",
    "em": "EM",
    "exact_loss": "full-softmax loss",
}
KL, FEWER = 0.05, 4
"""Goals: nats from the true softmax with no refresh, and how many times fewer re-embeddings."""

PLOTS = {
    "recall": "Recall@20 against targets encoded for training",
    "kl": "KL from the true softmax over steps; diamonds: at the end, over all targets",
}
"""Name of a picture's file -> what it shows."""

COLOURS = ("#000000", "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#5d6670")
"""Okabe and Ito's: the hues stay apart for colour-blind eyes."""

Record = Mapping[str, Any]
Records = Mapping[str, Sequence[Record]]
"""Cell -> its records by rising seed; cells in the order of the grid, none empty."""


def read(grid: Grid, folder: Path) -> dict[str, list[Record]]:
    """The records that are there.

    Raises:
      UserError: two of them are of different queries.
    """
    records: dict[str, list[Record]] = {}
    for cell in grid.cells:
        for seed in sorted(grid.seeds):
            if found := json_of(folder / f"{cell}-{seed}.json"):
                records.setdefault(cell, []).append(found)
    every = [one for of in records.values() for one in of]
    if len({(one["queries"], one["dataset"]["targets"]) for one in every}) > 1:
        raise UserError(f"{folder} holds runs on different data: write another --name for some")
    return records


def write(grid: Grid, name: str, results: Path) -> None:
    """Writes the summary and the plots of what is there.

    Args:
      grid: the grid.
      name: of the results.
      results: the folder that holds `strategies/NAME`, or that of the grid it shares runs with.
    """
    records = read(grid, results / "strategies" / grid.folder(name))
    if not records:
        return
    summary = summarise(grid, name, records)
    paths.write(results / f"strategies_{name}_summary.json", json.dumps(summary, indent=1) + "\n")
    for plot, draw in zip(PLOTS, (draw_recall, draw_kl), strict=True):
        draw(records).savefig(results / f"strategies_{name}_{plot}.png")


def summarise(grid: Grid, name: str, records: Records) -> dict[str, Any]:
    """Means and spreads over seeds, paired differences, and which goals are met.

    Args:
      grid: the grid.
      name: of the results.
      records: what is there.

    Returns:
      A JSON-able dict.
    """
    every = [one for of in records.values() for one in of]
    some = every[0]
    return {
        "name": name,
        "metrics": list(grid.metrics),
        "setting": {
            key: value
            for key, value in some["settings"].items()
            if all(one["settings"].get(key) == value for one in every)
        },
        **{key: some[key] for key in ("dataset", "encoder", "steps", "devices", "cores", "jax")},
        "before": _short(some["eval"]["before"]),
        "bm25": _short(some["eval"].get("bm25", {})),
        "read": {
            name: _short({"em": float(np.mean([one["read"][name]["em"] for one in every]))})
            for name in some.get("read", ())
        },
        "missing": [
            f"{cell}-{seed}"
            for cell in grid.cells
            for seed in grid.seeds
            if seed not in [one["seed"] for one in records.get(cell, ())]
        ],
        "cells": {cell: _cell(of) for cell, of in records.items()},
        "differences": differences(grid, records),
        "goals": goals(grid, records),
    }


def differences(grid: Grid, records: Records) -> list[dict[str, Any]]:
    """Every cell against the references, each pair once, over the seeds that both have."""
    found = []
    for number, against in enumerate(grid.references):
        for cell in records:
            if cell in grid.references[: number + 1] or against not in records:
                continue
            for metric in grid.metrics:
                one, other = _paired(records[cell], records[against], metric)
                if len(one):
                    interval = paired.difference(one, other)
                    named = {"cell": cell, "against": against, "metric": metric, "seeds": len(one)}
                    found.append(named | _short(interval._asdict()))
    return found


def goals(grid: Grid, records: Records) -> list[dict[str, Any]]:
    """The goals that were decided in advance, for every corrected cell that can be judged."""
    found: list[dict[str, Any]] = []
    metric = grid.metrics[0]
    title = TITLES[metric]

    def judge(cell: str, goal: str, value: float, met: bool) -> None:
        found.append({"cell": cell, "goal": goal, "value": round(value, 4), "met": met})

    for cell in grid.corrected:
        own = records.get(cell, ())
        fresh = _paired(own, records.get(grid.fresh, ()), metric)
        if len(fresh[0]):
            interval = paired.difference(*fresh)
            good = paired.is_non_inferior(interval)
            goal = f"as good as {grid.fresh}: {title} interval above -{paired.MARGIN}"
            judge(cell, goal, interval.low, good)
            fewer = _embedded(records[grid.fresh]) / _embedded(own)
            goal = f"as good as {grid.fresh}, re-embedding {FEWER} times fewer targets or better"
            judge(cell, goal, fewer, good and fewer >= FEWER)
        for other in (one for one in grid.references if one != grid.fresh):
            pair = _paired(own, records.get(other, ()), metric)
            if len(pair[0]):
                interval = paired.difference(*pair)
                goal = f"better than {other}: {title} interval above 0"
                judge(cell, goal, interval.low, paired.is_superior(interval))
        if own and not any(one["ledger"]["refresh"] for one in own):
            kl = float(np.mean([one["distribution"]["kl_corrected"] for one in own]))
            goal = f"{KL} nats or less from the true softmax (KL), without a refresh"
            judge(cell, goal, kl, kl <= KL)
    return found


def trained_on(record: Record) -> int:
    """Targets encoded for training: everything in the ledger but evaluation."""
    counted = ("initial", "refresh", "encoded_with_grad", "encoded_without_grad")
    return sum(record["ledger"][name] for name in counted)


def tables(summary: Record) -> str:
    """The summary as Markdown: a table of cells, one of differences, one of goals."""
    metrics = summary["metrics"]
    titles = " | ".join(TITLES[metric] for metric in metrics)
    lines = [
        f"| strategy | {titles} | KL at the end | targets encoded | re-embedded | minutes |",
        "|---" * (5 + len(metrics)) + "|",
    ]
    beside = {"BM25": summary["bm25"], "before training": summary["before"]}
    beside |= {f"the reader {READ[name]}": values for name, values in summary["read"].items()}
    for name, values in beside.items():
        if values:
            shown = [f"{values[metric]:.3f}" if metric in values else "" for metric in metrics]
            lines.append(f"| {name} | {' | '.join(shown)} | | | | |")
    for cell, found in summary["cells"].items():
        shown = [f"`{cell}`", *(_spread(found.get(name), 3) for name in (*metrics, "kl"))]
        shown += [f"{found[name]['mean']:,.0f}" for name in ("encoded", "re-embedded")]
        lines.append("| " + " | ".join([*shown, f"{found['seconds']['mean'] / 60:.1f}"]) + " |")
    lines += ["", f"| difference | {titles} |", "|---" * (1 + len(metrics)) + "|"]
    rows: dict[str, dict[str, Record]] = {}
    for one in summary["differences"]:
        rows.setdefault(f"`{one['cell']}` - `{one['against']}`", {})[one["metric"]] = one
    for name, by_metric in rows.items():
        shown = [
            f"{one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
            for one in (by_metric[metric] for metric in metrics)
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    if summary["goals"]:
        lines += ["", "| goal | for | found | met |", "|---|---|---|---|"]
    lines += [
        f"| {one['goal']} | `{one['cell']}` | {one['value']:g} | {'yes' if one['met'] else 'no'} |"
        for one in summary["goals"]
    ]
    if summary["missing"]:
        lines += ["", f"Not run yet: {', '.join(summary['missing'])}."]
    return "\n".join(lines)


def fill_in(document: Path, results: Path) -> None:
    """Writes the tables between `<!-- strategies NAME -->` and `<!-- end -->` of a document anew.

    Args:
      document: Markdown.
      results: holds the summaries; where one is missing, nothing is written.

    Raises:
      UserError: a summary is not JSON.
    """

    def filled(found: re.Match[str]) -> str:
        summary = json_of(results / f"strategies_{found['name']}_summary.json")
        inside = ""
        if summary:
            beside = Path(os.path.relpath(results, document.parent)).as_posix()
            plots = [
                f"![{shown}]({beside}/strategies_{found['name']}_{plot}.png)"
                for plot, shown in PLOTS.items()
            ]
            inside = "\n".join(["", tables(summary), "", *plots, ""])
        return f"{found['start']}\n{inside}{found['end']}"

    marked = r"(?P<start><!-- strategies (?P<name>[\w.-]+) -->)\n.*?(?P<end><!-- end -->)"
    paths.write(document, re.sub(marked, filled, document.read_text(), flags=re.DOTALL))


def draw_recall(records: Records) -> Figure:
    """Recall@20 against targets encoded for training; bars are standard deviations over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, ax = canvas()
    for (cell, of), colour in zip(records.items(), itertools.cycle(COLOURS), strict=False):
        recall = [one["eval"]["after"]["recall@20"] for one in of]
        encoded = float(np.mean([trained_on(one) for one in of]))
        bar = np.std(recall, ddof=1) if len(recall) > 1 else None
        ax.errorbar(
            encoded,
            np.mean(recall),
            bar,
            fmt="o",
            color=colour,
            capsize=3,
            markersize=6,
            label=cell,
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("targets encoded for training")
    ax.set_ylabel("recall@20 on dev")
    ax.legend(frameon=False, fontsize=9)
    return figure


def draw_kl(records: Records) -> Figure:
    """KL(P||P') of what selection uses over steps, on the probe; diamonds: exact, at the end."""
    figure, ax = canvas()
    for (cell, of), colour in zip(records.items(), itertools.cycle(COLOURS), strict=False):
        lines = [line for line in map(in_use, of) if line is not None]
        if not lines:
            continue
        steps = lines[0][0]
        values = np.mean([values for _, values in lines], axis=0)
        ax.plot(steps, values, "-o", color=colour, markersize=3, label=cell)
        end = np.mean([one["distribution"]["kl_corrected"] for one in of])
        ax.plot(of[0]["steps"], end, "D", color=colour, markersize=7, markeredgecolor=LIGHT.ink)
    if ax.lines:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(frameon=False, fontsize=9)
    ax.set_xlabel("training step")
    ax.set_ylabel("KL from the true softmax, nats")
    return figure


def in_use(record: Record) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [n] and KL [n] of a run's probes, stale until the gate opens; None without a cache."""
    series = record["series"]
    if "probe/kl_stale" not in series:
        return None
    steps, stale = map(np.array, series["probe/kl_stale"])
    corrected, gate = (np.array(series[f"probe/{name}"][1]) for name in ("kl_corrected", "gate"))
    return steps, np.where(gate > 0, corrected, stale)


def _cell(of: Sequence[Record]) -> dict[str, Any]:
    values = {name: [one["eval"]["after"][name] for one in of] for name in of[0]["eval"]["after"]}
    for name in ("kl", "kl_stale", "drift", "corrected_error"):
        key = "kl_corrected" if name == "kl" else name
        values[name] = [one["distribution"][key] for one in of]
    values["encoded"] = [trained_on(one) for one in of]
    values["re-embedded"] = [one["ledger"]["initial"] + one["ledger"]["refresh"] for one in of]
    values |= {name: [one["ledger"][name] for one in of] for name in of[0]["ledger"]}
    values["seconds"] = [one["wall_seconds"] for one in of]
    known = {name: each for name, each in values.items() if None not in each}
    return {"seeds": [one["seed"] for one in of]} | {
        name: {
            "mean": round(float(np.mean(each)), 4),
            "sd": round(float(np.std(each, ddof=1)), 4) if len(each) > 1 else None,
        }
        for name, each in known.items()
    }


def _paired(
    one: Sequence[Record], other: Sequence[Record], metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """A measure [S, Q] of two cells under the seeds that both have; S may be 0."""
    by_seed = [
        {record["seed"]: record["per_query"][metric] for record in of} for of in (one, other)
    ]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    first, second = (np.array([of[seed] for seed in both], np.float64) for of in by_seed)
    return first, second


def _embedded(of: Sequence[Record]) -> float:
    return float(np.mean([one["ledger"]["initial"] + one["ledger"]["refresh"] for one in of]))


def _short(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def _spread(found: Record | None, digits: int) -> str:
    if found is None:
        return ""
    spread = "" if found["sd"] is None else f" ± {found['sd']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{spread}"


def canvas(width: float = 5.6, height: float = 3.8) -> tuple[Figure, Axes]:
    """An empty picture and its axes; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, facecolor=LIGHT.paper, layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=LIGHT.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure, ax
