"""Several finished runs on the same queries, in one page: `--mode=compare DIR DIR ...`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from corrector_jax import paths
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import METRICS, Interval, paired_bootstrap
from corrector_jax.report import comparison
from corrector_jax.report.comparison import Compared
from corrector_jax.report.words import get, read_json, read_metrics
from corrector_jax.types import UserError
from corrector_jax.writer import say

_SAME = ("eval_split", "eval_queries", "targets", "corpus")
"""Of a run's data: what must be equal for queries to be paired. A run that lacks one is trusted."""


def compare(workdirs: Sequence[AnyPath], output: AnyPath) -> AnyPath:
    """Compares runs with the first one, query by query.

    Args:
      workdirs: folders of finished runs.
      output: the page to write.

    Returns:
      The path of the page.

    Raises:
      UserError: there are fewer than two, one is not finished, or they are not of the same queries.
    """
    if len(workdirs) < 2 or len(set(map(str, workdirs))) < len(workdirs):
        raise UserError(
            "--mode=compare takes two or more folders of runs, all different: write "
            "--mode=compare runs/one runs/other"
        )
    labels = _labels(workdirs)
    results = [_finished(workdir) for workdir in workdirs]
    measured = [read_json(workdir / "eval" / "after.json") for workdir in workdirs]
    queries = [_queries(workdir) for workdir in workdirs]
    for label, other, found in zip(labels[1:], results[1:], queries[1:], strict=True):
        _require_same(labels[0], results[0], label, other, queries[0] == found)
    gains: list[dict[str, Interval]] = [{}]
    for other in measured[1:]:
        gains.append(
            {
                metric: paired_bootstrap(
                    *(np.array(one["per_query"][metric]) for one in (measured[0], other))
                )
                for metric in METRICS
            }
        )
    series = [read_metrics(workdir / "metrics.jsonl")[0] for workdir in workdirs]
    runs = list(map(Compared, labels, results, series, gains))
    paths.write(output, comparison.page(runs).encode("utf-8", errors="replace"))
    say(comparison.text(runs))
    say(f"\ncomparison: {output}")
    return output


def _finished(workdir: AnyPath) -> Any:
    """What results.json holds."""
    results = read_json(workdir / "results.json")
    if results is None or not (workdir / "eval" / "after.json").is_file():
        raise UserError(
            f"{workdir} holds no results.json and eval/after.json: name a finished run's folder"
        )
    return results


def _queries(workdir: AnyPath) -> list[str]:
    """The queries of the last evaluation, in order, as its TREC run names them."""
    with (workdir / "runs" / "after.trec").open("r") as file:
        return [name for name, _ in itertools.groupby(line.split(" ", 1)[0] for line in file)]


def _require_same(one: str, first: Any, label: str, other: Any, same_queries: bool) -> None:
    for key in _SAME:
        values = [get(results, "dataset", key) for results in (first, other)]
        if None not in values and values[0] != values[1]:
            shown = " and ".join(str(value)[:16] for value in values)
            raise UserError(
                f"{one} and {label} were evaluated on different data ({key} {shown}): compare runs "
                "of the same data and split"
            )
    if not same_queries:
        raise UserError(
            f"{one} and {label} were evaluated on different queries: compare runs of the same data "
            "and split"
        )


def _labels(workdirs: Sequence[AnyPath]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [str(workdir).rstrip("/").split("/") for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(map(str, workdirs))
