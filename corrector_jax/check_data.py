"""`--mode=check_data`: what is in a source, and what would make training on it wrong."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from corrector_jax import job, paths
from corrector_jax.data.dataset import RetrievalData, Split, normalised, stable_hash
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.paths import AnyPath
from corrector_jax.writer import say

TOLERATED = 0.01
"""Share of a split's queries that may be leaked, or have a false negative: real data has some."""

_MOST_REFUSED = 10_000  # rows counted before reading stops after all
_SAMPLE = 200_000  # texts whose lengths are measured, evenly spaced
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
      what: was counted.
      count: how many there are.
      of: among how many.
      wrong: whether training or its evaluation would be wrong.
      examples: a few of them, in words.
    """

    what: str
    count: int
    of: int
    wrong: bool = False
    examples: Sequence[str] = ()


def check_data(config: ConfigDict, workdir: AnyPath) -> bool:
    """Reads the source a configuration names, prints what is in it and leaves check_data.json.

    Args:
      config: validated; model.weights names the tokenizer.
      workdir: where check_data.json goes.

    Returns:
      Whether training on it is right as far as can be seen.

    Raises:
      UserError: the source cannot be read to its end.
    """
    data = job.load_data(config, max_bad_rows=_MOST_REFUSED)
    texts, *_ = job.load_encoder(config)
    lengths = {
        "targets": _lengths(
            data.target_texts, texts.tokenizer, texts.target_prefix, texts.target_max_len
        )
    }
    for split, queries in data.splits.items():
        lengths[f"{split} queries"] = _lengths(
            queries.texts, texts.tokenizer, texts.query_prefix, texts.query_max_len
        )
    findings = [
        *_rows(data, config.data.max_bad_rows),
        *_splits(data),
        *_leakage(data),
        *_duplicates(data),
    ]
    wrong = [finding for finding in findings if finding.wrong]
    for line in _table(data, lengths, findings):
        say(line)
    record = {
        "data": data.name,
        "layout": data.reading.layout if data.reading else "embedded",
        "fingerprint": data.fingerprint(),
        "targets": len(data.target_ids),
        "queries": {name: _counts(split) for name, split in data.splits.items()},
        "lengths": lengths,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "right": not wrong,
    }
    path = workdir / "check_data.json"
    paths.write(path, json.dumps(record, indent=1) + "\n")
    said = f"{len(wrong)} finding(s) would make training wrong" if wrong else "nothing is wrong"
    say(f"{said}: {path}")
    return not wrong


def _rows(data: RetrievalData, allowed: int) -> Iterator[Finding]:
    if data.reading is None:
        return
    kinds = collections.Counter(row.kind for row in data.reading.refused)
    too_many = len(data.reading.refused) > allowed
    for kind in ("malformed row", "empty text", "duplicate id", "missing target"):
        examples = [row.message for row in data.reading.refused if row.kind == kind][:_EXAMPLES]
        count = kinds[kind]
        yield Finding(
            f"rows refused: {kind}", count, data.reading.rows, bool(count) and too_many, examples
        )
    for split, count in data.reading.without_positives.items():
        left = len(data.splits[split].texts) if split in data.splits else 0
        yield Finding(f"{split} queries without a positive, left out", count, left + count)


def _splits(data: RetrievalData) -> Iterator[Finding]:
    missing = [] if "train" in data.splits else ["train"]
    if not {"dev", "test"} & set(data.splits):
        missing.append("dev or test")
    yield Finding("splits missing", len(missing), 2, bool(missing), missing)


def _leakage(data: RetrievalData) -> Iterator[Finding]:
    """Queries that are evaluated on and were trained on: the same but for case and blanks."""
    train = data.splits.get("train")
    trained = {normalised(text) for text in train.texts} if train else set()
    for name, split in data.splits.items():
        if name != "train":
            leaked = [text for text in split.texts if normalised(text) in trained]
            count = len(split.texts)
            yield Finding(
                f"{name} queries that are train queries too",
                len(leaked),
                count,
                len(leaked) > TOLERATED * count,
                leaked[:_EXAMPLES],
            )


def _duplicates(data: RetrievalData) -> Iterator[Finding]:
    """Targets of one text; where only one of them is known as a positive, the other is drawn."""
    hashes = np.fromiter(map(stable_hash, data.target_texts), np.uint64, len(data.target_texts))
    _, first, group, sizes = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    examples = [data.target_texts[row][:100] for row in first[sizes > 1][:_EXAMPLES]]
    twins = len(hashes) - len(sizes)
    yield Finding("targets whose text another target has", twins, len(hashes), False, examples)
    for name, split in data.splits.items():
        hit = [
            text
            for text, rows in zip(split.texts, split.positives, strict=True)
            if sizes[np.unique(group[rows])].sum() > len(rows)
        ]
        yield Finding(
            f"{name} queries with a false negative, the text of a positive",
            len(hit),
            len(split.texts),
            name == "train" and len(hit) > TOLERATED * len(split.texts),
            hit[:_EXAMPLES],
        )


def _lengths(
    texts: Sequence[str], tokenizer: TextTokenizer, prefix: str, limit: int
) -> dict[str, Any]:
    """Tokens of the texts against their limit."""
    every = -(-len(texts) // _SAMPLE)
    found = tokenizer.count(texts[::every], prefix=prefix)
    return {
        "measured": len(found),
        "mean": round(float(found.mean()), 1),
        "p95": int(np.quantile(found, 0.95, method="higher")),
        "longest": int(found.max()),
        "limit": limit,
        "truncated": round(float((found > limit).mean()), 4),
    }


def _counts(split: Split) -> dict[str, Any]:
    positives = [len(rows) for rows in split.positives]
    return {
        "queries": len(split.texts),
        "positives": sum(positives),
        "most_positives": max(positives),
        "hard_negatives": sum(len(rows) for rows in split.negatives),
    }


def _table(
    data: RetrievalData, lengths: dict[str, dict[str, Any]], findings: list[Finding]
) -> Iterator[str]:
    yield f"{data.name}: {len(data.target_ids):,} targets"
    yield f"{'':16}{'queries':>12}{'positives':>12}{'most':>6}{'hard negatives':>16}"
    for name, split in data.splits.items():
        counts = list(_counts(split).values())
        yield f"{name:16}{counts[0]:>12,}{counts[1]:>12,}{counts[2]:>6,}{counts[3]:>16,}"
    yield f"{'tokens':16}{'mean':>12}{'95 %':>12}{'most':>6}{'limit':>7}{'cut':>9}"
    for name, found in lengths.items():
        yield (
            f"{name:16}{found['mean']:>12,}{found['p95']:>12,}{found['longest']:>6,}"
            f"{found['limit']:>7,}{found['truncated']:>9.1%}"
        )
    for finding in findings:
        share = finding.count / max(finding.of, 1)
        mark = "WRONG" if finding.wrong else "ok" if not finding.count else "look"
        yield f"{mark:6}{finding.count:>10,} of {finding.of:<12,}{share:>7.1%}  {finding.what}"
        if finding.count:
            for example in finding.examples:
                line = " ".join(example.split())
                yield f"{'':18}{line if len(line) <= 160 else line[:158] + ' …'}"
