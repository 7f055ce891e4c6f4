"""`report.html`: one file, its pictures inlined, which asks for no other file and no script.

Everything is a function of the files in the workdir. Whatever a run did not log is named in words.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from corrector_jax import paths
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import METRICS
from corrector_jax.report.plots import DARK, LIGHT, PLOTS, Plot, png
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
    kl_sentence,
    measured,
    number,
    read_json,
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
    results = read_json(workdir / "results.json")
    if results is None:
        raise UserError(f"{workdir} holds no results.json, name the folder of a finished run.")
    config = read_json(workdir / "config.json") or {}
    examples = read_json(workdir / "examples.json") or []
    series, unreadable = read_metrics(workdir / "metrics.jsonl")

    figures = []
    for plot in PLOTS:
        light, dark = (png(plot.draw(series, results, theme)) for theme in (LIGHT, DARK))
        paths.write(workdir / "plots" / f"{plot.name}.png", light)
        figures.append(_figure_html(plot, light, dark))
    page = _page(results, config, examples, figures, unreadable)
    path = workdir / "report.html"
    paths.write(path, page.encode("utf-8", errors="replace"))
    return path


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
{_answers(results)}<section>
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
    systems = measured(results)
    # As shown: what the digits do not tell apart is equally good.
    table = [[round(finite(row, metric) or 0, 3) for metric in METRICS] for _, row in systems]
    best = [max(column) for column in zip(*table, strict=True)]
    rows = []
    for (label, metrics), values in zip(systems, table, strict=True):
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
    return _table("Retrieval measures", ["", *METRICS], rows)


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
        f"{_table('Answers', ['', *ANSWERS], rows)}\n</section>\n"
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
    return _table("Staleness", ["", "KL (nats)", "squared error"], rows)


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
        _table("Targets encoded", head, rows, total="all")
        + f'\n<p class="note">Passes over the corpus for the cache (first snapshot and refreshes): '
        f"{passes}.</p>"
    )


def _figure_html(plot: Plot, light: bytes, dark: bytes) -> str:
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
