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
from corrector_jax.report.words import get, json_of, made_by_a_run, read_metrics
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
    queries = [_queries(workdir) for workdir in workdirs]
    measured = [
        _per_query(workdir, len(found)) for workdir, found in zip(workdirs, queries, strict=True)
    ]
    for label, other, found in zip(labels[1:], results[1:], queries[1:], strict=True):
        _require_same(labels[0], results[0], label, other, queries[0] == found)
    gains: list[dict[str, Interval]] = [{}]
    for label, other in zip(labels[1:], measured[1:], strict=True):
        same = len(measured[0]["mrr@10"]) == len(other["mrr@10"])
        _require_same(labels[0], {}, label, {}, same)
        pairs = {metric: (measured[0][metric], other[metric]) for metric in METRICS}
        gains.append({metric: paired_bootstrap(*pair) for metric, pair in pairs.items()})
    series = [read_metrics(workdir / "metrics.jsonl")[0] for workdir in workdirs]
    runs = list(map(Compared, labels, results, series, gains))
    with made_by_a_run(" and ".join(map(str, workdirs))):
        page, text = comparison.page(runs), comparison.text(runs)
    paths.write(output, page.encode("utf-8", errors="replace"))
    say(text)
    say(f"\ncomparison: {output}")
    return output


def _finished(workdir: AnyPath) -> Any:
    """What results.json holds."""
    results = json_of(workdir / "results.json")
    after = workdir / "eval" / "after.json"
    if not isinstance(results, dict) or not after.is_file():
        raise UserError(
            f"{workdir} holds no results.json and eval/after.json: name a finished run's folder"
        )
    return results


def _queries(workdir: AnyPath) -> list[str]:
    """The queries of the last evaluation, in order, as its TREC run names them."""
    path = workdir / "runs" / "after.trec"
    try:
        with path.open("r", encoding="utf-8") as file:
            return [name for name, _ in itertools.groupby(line.split(" ", 1)[0] for line in file)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): put the run's own back") from error


def _per_query(workdir: AnyPath, count: int) -> dict[str, np.ndarray]:
    """Measure -> [count] float64, what each query of the last evaluation got."""
    path = workdir / "eval" / "after.json"
    with made_by_a_run(path):
        per_query = json_of(path)["per_query"]
        found = {metric: np.array(per_query[metric], np.float64) for metric in METRICS}
        # A query for which nothing was found has no line in the run, but it was measured.
        shapes = {values.shape for values in found.values()}
        if len(shapes) != 1 or len(found["mrr@10"].shape) != 1 or len(found["mrr@10"]) < count:
            raise ValueError(f"measures of {shapes} queries for a run of {count}")
    return found


def _require_same(one: str, first: Any, label: str, other: Any, same_queries: bool) -> None:
    for key in _SAME:
        values = [get(results, "dataset", key) for results in (first, other)]
        if None not in values and values[0] != values[1]:
            shown = " and ".join(str(value)[:16] for value in values)
            raise UserError(
                f"{one} and {label} were evaluated on different data ({key} of results.json: "
                f"{shown}): compare runs of the same data and split"
            )
    if not same_queries:
        raise UserError(
            f"{one} and {label} were evaluated on different queries (runs/after.trec): compare "
            "runs of the same data and split"
        )


def _labels(workdirs: Sequence[AnyPath]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [str(workdir).rstrip("/").split("/") for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(map(str, workdirs))
