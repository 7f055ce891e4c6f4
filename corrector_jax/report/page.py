"""`report.html`: one file, its pictures inlined, which asks for no other file and no script.

Everything is a function of the files in the workdir. Whatever a run did not log is named in words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from corrector_jax import paths
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import METRICS
from corrector_jax.report import staleness
from corrector_jax.report.parts import figure, table, whole
from corrector_jax.report.plots import PLOTS, bars
from corrector_jax.report.words import (
    ANSWERS,
    answer_sentence,
    answered,
    baseline_sentence,
    cache_sentence,
    count,
    duration,
    finite,
    get,
    json_of,
    kl_sentence,
    made_by_a_run,
    measured,
    number,
    read_metrics,
    recall_sentence,
    signed,
)
from corrector_jax.types import UserError

# (key in results["ledger"], words in the table).
_LEDGER = (
    ("initial", "first snapshot of the cache, which the first evaluation shares"),
    ("refresh", "re-embedded by refreshes of the cache"),
    ("encoded_with_grad", "encoded in training steps, with gradient"),
    ("encoded_without_grad", "encoded without gradient: drift loss and probe"),
    ("evaluation", "encoded for the other evaluations"),
)
_LONGEST_TEXT = 1200  # characters of an example; a page is for reading


def write_report(workdir: AnyPath) -> AnyPath:
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
    results = json_of(workdir / "results.json")
    if results is None:
        raise UserError(f"{workdir} holds no results.json, name the folder of a finished run.")
    config = json_of(workdir / "config.json") or {}
    examples = json_of(workdir / "examples.json") or []
    series, unreadable = read_metrics(workdir / "metrics.jsonl")

    with made_by_a_run(workdir):
        figures = [
            figure(
                workdir, plot.name, plot.title, plot.caption,
                functools.partial(plot.draw, series, results),
            )
            for plot in PLOTS
        ]  # fmt: skip
        if profile := json_of(workdir / "profile.json"):
            figures.append(_profile(workdir, profile))
        looked_at = _staleness(workdir)
        page = _page(results, config, examples, figures, looked_at, unreadable)
    path = workdir / "report.html"
    paths.write(path, page.encode("utf-8", errors="replace"))
    return path


def _profile(workdir: AnyPath, profile: Mapping[str, Any]) -> str:
    """The picture of a trace of some steps."""
    first, end = profile["steps"]
    caption = (
        f"Device time of a step by parts of the method, means over steps {first:,} to {end - 1:,} "
        "and all threads or devices together: from the trace in profile/, which TensorBoard opens."
    )
    parts = list(profile["seconds_per_step"].items())
    draw = functools.partial(bars, parts=parts, unit="seconds of a step", missing="profile")
    return figure(workdir, "step", "Where a step's time goes", caption, draw)


def _staleness(workdir: AnyPath) -> str:
    """The pictures of what `corrector_jax.staleness` kept; empty where nothing was."""
    parts = []
    if samples := staleness.chosen(staleness.read_samples(workdir)):
        caption = (
            f"{len(samples[-1].fresh)} targets of the probe in two dimensions, the same in every "
            "panel: the two principal components of the stale and the fresh rows of the last step. "
            "A line joins what the cache holds of a target to where the encoder puts it now. Two "
            "dimensions show less than all: the figures above a panel are squared errors over the "
            "full vectors."
        )
        parts.append(
            figure(
                workdir, "targets", "Where the targets went", caption,
                functools.partial(staleness.draw_samples, samples), wide=True,
            )
        )  # fmt: skip
    softmaxes = json_of(workdir / "softmax.json")
    if softmaxes and softmaxes.get("queries"):
        caption = (
            "The softmax of held-out queries at the end, exactly over all targets: its heaviest "
            "targets from the left. Grey: fresh. Coloured: what the cache gives the same target. "
            "Missed is the share of the fresh softmax that lies elsewhere, the total variation "
            "distance: so many of the draws go to the wrong targets."
        )
        parts.append(
            figure(
                workdir, "softmax", "What the cache misses", caption,
                functools.partial(staleness.draw_softmaxes, softmaxes), wide=True,
            )
        )  # fmt: skip
        rows = [
            (escape(query["query"]), [f"{100 * query['missed'][name]:.1f} %" for name in _CACHES])
            for query in softmaxes["queries"]
        ]
        label = "Softmax mass that is missed"
        parts.append(table(label, ["query", "missed, stale", "missed, corrected"], rows))
    return f'<div class="pictures">\n{"".join(parts)}\n</div>' if parts else ""


_CACHES = ("stale", "corrected")


def _page(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
    looked_at: str,
    unreadable: int,
) -> str:
    """The whole page."""
    dataset = str(get(results, "dataset", "name") or "unnamed data")
    strategy = str(results.get("strategy") or "unnamed strategy")
    title = escape(f"{dataset} · {strategy}")
    sentences = [
        recall_sentence(results),
        answer_sentence(results),
        baseline_sentence(results),
        cache_sentence(results),
        kl_sentence(results),
    ]
    skipped = f" Unreadable lines of metrics.jsonl left out: {unreadable}." if unreadable else ""
    return whole(
        title,
        f"""<header>
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
{_answers(results)}<section>
<h2>Staleness</h2>
<p class="note">How far the cache is from fresh embeddings at the end, over all targets: the KL
divergence from the fresh softmax to the one over the cache, and the squared error of the embeddings
relative to their squared norm.</p>
{_distribution_table(results)}
{looked_at}
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
</footer>""",
    )


def _setting(results: Mapping[str, Any]) -> str:
    encoder = results.get("encoder") or {}
    parts = [
        f"encoder {encoder['source']}" if encoder.get("source") else "",
        f"{encoder['layers']} layers" if encoder.get("layers") else "",
        f"{encoder['dim']} dimensions" if encoder.get("dim") else "",
        f"{count(results['steps'])} steps" if results.get("steps") is not None else "",
        f"seed {results['seed']}" if results.get("seed") is not None else "",
    ]
    return " · ".join(filter(None, parts))


def _split_words(results: Mapping[str, Any]) -> str:
    dataset = results.get("dataset") or {}
    queries, targets = (count(dataset.get(key)) for key in ("eval_queries", "targets"))
    trained = count(dataset.get("train_queries"))
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
    }.get(get(config, "eval", "corpus"))
    return f"Evaluations during training ranked {words}." if words else ""


def _tiles(results: Mapping[str, Any]) -> str:
    """The few numbers a reader came for."""
    before, after = (finite(results, "eval", when, "recall@20") for when in ("before", "after"))
    gain, low, high = (
        signed(finite(results, "comparison", "recall@20", part))
        for part in ("difference", "low", "high")
    )
    tiles = [
        (
            "recall@20, before → after",
            f"{number(before)} → {number(after)}",
            f"{gain} (95 %: {low} to {high})",
        )
    ]
    stale, corrected = (
        finite(results, "distribution", key) for key in ("kl_stale", "kl_corrected")
    )
    if stale is not None:
        pair = f"{number(stale)} → {number(corrected)}"
        tiles.append(("KL, stale → corrected", pair, "nats, over all targets"))
        refreshed = count(finite(results, "ledger", "refresh"))
        targets = count(finite(results, "dataset", "targets"))
        tiles.append(("re-embedded by refreshes", refreshed, f"the corpus has {targets} targets"))
    rate = finite(results, "examples_per_second")
    tiles.append(
        (
            "whole run",
            duration(finite(results, "wall_seconds")),
            f"{rate:,.1f} training queries a second" if rate is not None else "",
        )
    )
    cells = "\n".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">\n{cells}\n</dl>'


def _results_table(results: Mapping[str, Any]) -> str:
    systems = measured(results)
    # As shown: what the digits do not tell apart is equally good.
    shown = [[round(finite(row, metric) or 0, 3) for metric in METRICS] for _, row in systems]
    best = [max(column) for column in zip(*shown, strict=True)]
    rows = []
    for (label, metrics), values in zip(systems, shown, strict=True):
        cells = [number(finite(metrics, metric)) for metric in METRICS]
        bold = [value == top > 0 for value, top in zip(values, best, strict=True)]
        marked = [f"<b>{cell}</b>" if b else cell for cell, b in zip(cells, bold, strict=True)]
        rows.append((escape(label), marked))
    if results.get("comparison"):
        gains = [(results["comparison"].get(metric) or {}) for metric in METRICS]
        cells = [
            f"{signed(finite(gain, 'difference'))}<small>{signed(finite(gain, 'low'))} to "
            f"{signed(finite(gain, 'high'))}</small>"
            for gain in gains
        ]
        rows.append(("after minus before, 95 % interval", cells))
    return table("Retrieval measures", ["", *METRICS], rows)


def _answers(results: Mapping[str, Any]) -> str:
    """The section on answers; empty where there is no reader."""
    systems = answered(results)
    if not systems:
        return ""
    rows = [
        (escape(label), [number(finite(metrics, metric)) for metric in ANSWERS])
        for label, metrics in systems
    ]
    return (
        "<section>\n<h2>Answers</h2>\n"
        '<p class="note">Exact match and F1 as SQuAD counts them; answer recall: the share of '
        "questions for which one of the best targets holds an answer. Below, what the trained "
        "reader answers from other passages than those found.</p>\n"
        f"{table('Answers', ['', *ANSWERS], rows)}\n</section>\n"
    )


def _distribution_table(results: Mapping[str, Any]) -> str:
    names = ("kl_stale", "kl_corrected", "drift", "corrected_error")
    values = {name: finite(results, "distribution", name) for name in names}
    if all(value is None for value in values.values()):
        return f"<p>{escape(cache_sentence(results))}</p>"

    def left(corrected: float | None, stale: float | None) -> str:
        return f"{100 * corrected / stale:.1f} %" if stale and corrected is not None else "-"

    rows = [
        ("stale cache", [number(values["kl_stale"]), number(values["drift"])]),
        ("corrected cache", [number(values["kl_corrected"]), number(values["corrected_error"])]),
        (
            "left after correction",
            [
                left(values["kl_corrected"], values["kl_stale"]),
                left(values["corrected_error"], values["drift"]),
            ],
        ),
    ]
    return table("Staleness", ["", "KL (nats)", "squared error"], rows)


def _ledger_table(results: Mapping[str, Any]) -> str:
    ledger = {key: finite(results, "ledger", key) for key, _ in _LEDGER}
    total = sum(value or 0 for value in ledger.values())
    targets = finite(results, "dataset", "targets")

    def cells(value: float | None) -> list[str]:
        share = f"{100 * value / total:.1f} %" if total and value is not None else "-"
        passes = f"{value / targets:.2f}" if targets and value is not None else "-"
        return [count(value), passes, share]

    rows = [(words, cells(ledger[key])) for key, words in _LEDGER]
    rows.append(("all", cells(total)))
    head = ["", "targets", "times the corpus", "share"]
    passes = number(finite(results, "ledger", "corpus_passes"), 2)
    return (
        table("Targets encoded", head, rows, total="all")
        + f'\n<p class="note">Passes over the corpus for the cache (first snapshot and refreshes): '
        f"{passes}.</p>"
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
    said = _said(example.get("answers") or {})
    return f"""<article class="card example">
<h3>{escape(_cut(example.get("query", "")))}</h3>{said}
<p class="note">First relevant target: {escape(_first(before))} before, {escape(_first(after))}
after.</p>
<details class="positives"><summary>{known}</summary>
{texts}
</details>
<div class="sides">
{sides}
</div>
</article>"""


def _said(answers: Mapping[str, Any]) -> str:
    """What was answered before and after training, and what is right; empty without a reader."""
    if not answers:
        return ""
    right = " or ".join(map(str, answers.get("right") or []))
    before, after = (str(answers.get(name, "-")) for name in ("before", "after"))
    return (
        f'\n<p class="note">Answered before: <b>{escape(before)}</b>; after: '
        f"<b>{escape(after)}</b>; right: {escape(right)}.</p>"
    )


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
            f"score {number(finite(hit, 'score'))}</span>{badge}\n"
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
