"""What a finished run leaves: results.json, examples.json, the report, the last lines printed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from corrector_jax import paths
from corrector_jax.checkpoint import Position
from corrector_jax.export import write_final
from corrector_jax.job import Job
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import paired_bootstrap, read_trec
from corrector_jax.report import staleness
from corrector_jax.report.page import write_report
from corrector_jax.report.plots import LIGHT, png
from corrector_jax.report.words import made_by_a_run, summary_table
from corrector_jax.types import PyTree
from corrector_jax.writer import say, write_pictures

EXAMPLES = 5
"""Queries whose results before and after are shown in the report."""

FIRST = 3
"""Results shown of each."""


def finish(job: Job, params: PyTree, workdir: AnyPath, position: Position, started: float) -> None:
    """Writes everything that is made of the run's evaluations, and prints the summary.

    Args:
      job: the job.
      params: the trained encoders' parameters, for `final`.
      workdir: the run's folder, with its evaluations.
      position: the ledger and the times.
      started: when the run began, by `time.monotonic()`.
    """
    log = job.config.log
    paths.write(workdir / "examples.json", json.dumps(examples(job, workdir)) + "\n")
    final = write_final(job, params, workdir, position)
    summary = results(job, workdir, position)
    # The report shows wall_seconds up to itself; results.json then counts the report too.
    stamp(summary, workdir, started)
    report = write_report(workdir) if log.report else None
    if report and log.tensorboard:
        write_pictures(workdir, pictures(workdir, position.step))
    stamp(summary, workdir, started)
    say("\n" + summary_table(summary))
    say(f"\nencoders: {final}")
    if report:
        say(f"report: {report}")


def pictures(workdir: AnyPath, step: int) -> Iterator[tuple[int, str, bytes]]:
    """The report's pictures for TensorBoard, and each sample of targets at its own step.

    Args:
      workdir: the run's folder, with its report.
      step: steps done.

    Yields:
      (step, name, content of a PNG file).
    """
    drawn = {path.name: path.read_bytes() for path in (workdir / "plots").iterdir()}
    for name in sorted(drawn):
        yield step, f"report/{name.removesuffix('.png')}", drawn[name]
    samples = staleness.read_samples(workdir)
    # Each on the axes of the last, so that the slider shows targets moving.
    for sample in staleness.chosen(samples):
        panel = staleness.draw_samples([sample, samples[-1]], LIGHT, shown=1)
        yield sample.step, "drift/targets", png(panel)


def stamp(summary: dict[str, Any], workdir: AnyPath, started: float) -> None:
    """Writes results.json with the wall-clock seconds up to now."""
    summary["wall_seconds"] = round(time.monotonic() - started, 1)
    paths.write(workdir / "results.json", json.dumps(summary, indent=2) + "\n")


def results(job: Job, workdir: AnyPath, position: Position) -> dict[str, Any]:
    """What results.json holds but for wall_seconds, from the workdir's evaluations.

    Args:
      job: the job.
      workdir: the run's folder.
      position: the ledger and the times.

    Returns:
      A JSON-able dict.
    """
    records = {
        name: _record(workdir, name)
        for name in ("before", "after", "bm25", "pretrained")
        if (workdir / "eval" / f"{name}.json").exists()
    }
    passes = (position.ledger["initial"] + position.ledger["refresh"]) / job.size
    distribution = records["after"]["distribution"]
    nothing = dict.fromkeys(("kl_stale", "kl_corrected", "drift", "corrected_error"))
    before, after = (records[name]["per_query"] for name in ("before", "after"))
    answered: dict[str, Any] = {}
    if job.questions:
        loaded, read = job.questions.loaded, records["after"]["read"]
        answered = {"reader": {"source": loaded.source, "read": read}}
    return {
        "strategy": job.config.strategy,
        "seed": job.config.seed,
        "steps": position.step,
        "dataset": {
            "name": job.data.name,
            "targets": job.size,
            "train_queries": len(job.data.splits["train"].texts),
            "eval_queries": records["after"]["queries"],
            "eval_split": job.final_split,
            "corpus": job.made_by["corpus"],
        },
        "encoder": {
            "source": job.origin.source,
            "layers": job.model.encoder.config.num_layers,
            "dim": job.model.dim,
        },
        **answered,
        "eval": {name: record["metrics"] for name, record in records.items()},
        "comparison": {
            name: paired_bootstrap(
                np.array(before[name]), np.array(after[name]), seed=job.config.seed
            )._asdict()
            for name in after
            if name in before
        },
        "distribution": distribution or nothing,
        "ledger": {**position.ledger, "corpus_passes": round(passes, 4)},
        "times": {purpose: round(spent, 2) for purpose, spent in position.times.items()},
        "wall_seconds": 0.0,
        "examples_per_second": round(
            position.step * job.config.train.batch_size / max(position.train_seconds, 1e-9), 2
        ),
    }


def _record(workdir: AnyPath, name: str) -> dict[str, Any]:
    """What an evaluation left."""
    path = workdir / "eval" / f"{name}.json"
    with made_by_a_run(path):
        return dict(paths.read_json(path))


def examples(job: Job, workdir: AnyPath) -> list[dict[str, Any]]:
    """A few queries with their first results before and after, spread evenly over the split.

    Args:
      job: the job.
      workdir: the run's folder, with its runs.

    Returns:
      What examples.json holds.
    """
    split = job.data.splits[job.final_split]
    chosen = np.unique(np.linspace(0, len(split.texts) - 1, EXAMPLES).astype(int))
    found = {
        name: read_trec(workdir / "runs" / f"{name}.trec", split, job.data.target_ids)
        for name in ("before", "after")
    }
    answers = {name: _record(workdir, name).get("answers") for name in found}

    def shown(name: str, query: int) -> list[dict[str, Any]]:
        """The first results, and below them the first known positive if it comes later."""
        rows, scores = found[name].rows[query], found[name].scores[query]
        relevant = np.isin(rows, split.positives[query])
        ranks = [rank for rank in range(min(FIRST, len(rows))) if rows[rank] >= 0]
        ranks += [int(rank) for rank in np.flatnonzero(relevant)[:1] if rank >= FIRST]
        return [
            {
                "rank": rank + 1,
                "score": round(float(scores[rank]), 4),
                "text": job.data.target_texts[rows[rank]],
                "relevant": bool(relevant[rank]),
            }
            for rank in ranks
        ]

    def answered(query: int) -> dict[str, Any]:
        """What was answered, and what is right, where there is a reader."""
        said = {name: texts[query] for name, texts in answers.items() if texts}
        return {"answers": {"right": list(split.answers[query]), **said}} if said else {}

    return [
        {
            "query": split.texts[query],
            "positives": [job.data.target_texts[row] for row in split.positives[query]],
            "before": shown("before", query),
            "after": shown("after", query),
            **answered(int(query)),
        }
        for query in chosen
    ]
