"""Staleness as pictures: where a few targets went, and what a few queries miss.

The files are those that `corrector_jax.staleness` keeps; a run without them has no such pictures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from corrector_jax.paths import AnyPath
from corrector_jax.report.plots import Theme, bare, percent_axis, title
from corrector_jax.report.words import number
from corrector_jax.types import UserError, brief

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 4
"""Steps that are drawn side by side, the last one among them."""


class Sample(NamedTuple):
    """The same targets at one step.

    Attributes:
      step: steps done.
      stale: [S, D] float32 rows of the cache.
      corrected: [S, D] float32, put through the corrector.
      fresh: [S, D] float32, embedded at that step.
    """

    step: int
    stale: np.ndarray
    corrected: np.ndarray
    fresh: np.ndarray


def read_samples(workdir: AnyPath) -> list[Sample]:
    """What `drift/` holds, by step; nothing where there is no such folder.

    Raises:
      UserError: a file is not what a run wrote.
    """
    folder = workdir / "drift"
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            continue
        try:
            rows = safetensors.numpy.load(path.read_bytes())
            sample = Sample(int(path.stem), rows["stale"], rows["corrected"], rows["fresh"])
            shapes = {part.shape for part in sample[1:]}
            if len(shapes) != 1 or sample.stale.ndim != 2 or not sample.stale.size:
                raise ValueError(f"arrays of shapes {', '.join(map(str, sorted(shapes)))}")
            if any(part.dtype != np.float32 for part in sample[1:]):
                raise ValueError("values that are not float32")
        except (safetensors.SafetensorError, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not what a run wrote ({brief(error, 160)}): remove it"
            ) from error
        if all(np.isfinite(part).all() for part in sample[1:]):  # training can go wrong
            found.append(sample)
    if len({sample.stale.shape[1] for sample in found}) > 1:
        raise UserError(f"{folder} holds samples of several widths: remove those of other runs")
    return sorted(found, key=lambda sample: sample.step)


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """So many as are drawn, spread over the run."""
    if len(samples) <= PANELS:
        return list(samples)
    places = np.linspace(0, len(samples) - 1, PANELS).round().astype(int)
    return [samples[place] for place in places]


def projection(samples: Sequence[Sample]) -> list[Sample]:
    """Samples in two dimensions, in which the last one's stale and fresh rows differ most.

    Args:
      samples: one or more, arrays [S, D].

    Returns:
      The same with arrays [S, 2], all on one pair of axes: the two principal components of the
      last sample's stale and fresh rows together.
    """
    last = samples[-1]
    both = np.concatenate([last.stale, last.fresh]).astype(np.float64)
    centre = both.mean(axis=0)
    _, _, directions = np.linalg.svd(both - centre, full_matrices=False)
    # A direction's sign is arbitrary: its largest part is positive, so that pictures agree.
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(len(directions)), largest])
    axes = np.zeros((2, both.shape[1]))
    axes[: min(2, len(directions))] = (directions * signs[:, None])[:2]
    return [
        Sample(sample.step, *((rows - centre) @ axes.T for rows in sample[1:]))
        for sample in samples
    ]


def draw_samples(samples: Sequence[Sample], theme: Theme, shown: int | None = None) -> Figure:
    """A panel a step: where the targets are, where the cache has them, where h puts them.

    Args:
      samples: one or more.
      theme: colours.
      shown: how many of the first get a panel; None = all. The others only set the axes.
    """
    flat = projection(samples)
    columns = shown or len(samples)
    figure, axes = bare(theme, width=2.9 * columns + 0.4, height=3.5, columns=columns)
    points = np.concatenate([rows for sample in flat for rows in sample[1:]])
    low, high = points.min(axis=0), points.max(axis=0)
    room = 0.06 * np.maximum(high - low, 1e-6)
    for ax, full, sample in zip(axes, samples, flat, strict=False):
        for stale, fresh in zip(sample.stale, sample.fresh, strict=True):
            ax.plot(*zip(stale, fresh, strict=True), color=theme.veil, linewidth=0.8, zorder=1)
        for rows, colour, style in (
            (sample.fresh, theme.ink, {"s": 26, "facecolors": "none", "linewidths": 1.0}),
            (sample.stale, theme.stale, {"s": 12, "marker": "s"}),
            (sample.corrected, theme.corrected, {"s": 9}),
        ):
            ax.scatter(*rows.T, color=colour, zorder=2, **style)
        ax.set_xlim(low[0] - room[0], high[0] + room[0])
        ax.set_ylim(low[1] - room[1], high[1] + room[1])
        ax.set_xticks([])
        ax.set_yticks([])
        drift, left = (_error(rows, full.fresh) for rows in (full.stale, full.corrected))
        title(
            ax,
            theme,
            f"step {sample.step:,}",
            f"drift {number(drift, 2)}, corrected {number(left, 2)}",
        )
    handles = [
        axes[0].scatter([], [], color=theme.stale, s=16, marker="s", label="stale (cache)"),
        axes[0].scatter([], [], color=theme.corrected, s=14, label="corrected, h(cache)"),
        axes[0].scatter([], [], color=theme.ink, s=30, facecolors="none", label="fresh (truth)"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False,
        labelcolor=theme.ink, fontsize=9,
    )  # fmt: skip
    return figure


def draw_softmaxes(record: Mapping[str, Any], theme: Theme) -> Figure:
    """A panel a query: the heaviest targets of its fresh softmax, and what the others give them.

    Args:
      record: what `softmax.json` holds, with one query or more.
      theme: colours.
    """
    queries = record["queries"]
    columns = min(3, len(queries))
    rows = -(-len(queries) // columns)
    figure, axes = bare(theme, width=11.6, height=2.5 * rows + 0.4, columns=columns, rows=rows)
    for ax in axes[len(queries) :]:
        ax.set_axis_off()
    for ax, query in zip(axes, queries, strict=False):
        heaviest = query["heaviest"]
        at = np.arange(len(heaviest))
        for name, colour, place, width in (
            ("fresh", theme.veil, 0.0, 0.86),
            ("stale", theme.stale, -0.19, 0.3),
            ("corrected", theme.corrected, 0.19, 0.3),
        ):
            ax.bar(
                at + place, [target[name] for target in heaviest], width, color=colour, label=name
            )
        words = textwrap.shorten(query["query"], 46, placeholder=" …").replace("$", r"\$")
        stale, corrected = (100 * query["missed"][name] for name in ("stale", "corrected"))
        title(ax, theme, words, f"missed: stale {stale:.0f} %, corrected {corrected:.0f} %")
        ax.set_xticks([])
        percent_axis(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False,
        labelcolor=theme.ink, fontsize=9,
    )  # fmt: skip
    return figure


def _error(rows: np.ndarray, fresh: np.ndarray) -> float:
    """|rows - fresh|^2 / |fresh|^2, sums over the targets."""
    return float(np.square(rows - fresh).sum() / max(np.square(fresh).sum(), 1e-12))
