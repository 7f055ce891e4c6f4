"""The data of a comparison: every dev target and some others, written once as a BEIR folder.

`config.data.max_targets` thins the judged targets with the rest, and with them the queries that a
comparison lives from; here all dev queries stay. Train queries stay with their targets. Test is
left out: it is for what a comparison has chosen.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from corrector_jax import paths
from corrector_jax.data import dataset, sources
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.report.words import json_of
from corrector_jax.types import UserError


def write(source: str, folder: Path, *, targets: int = 0) -> Path:
    """Writes train and dev of a data set; a folder that is complete is left as it is.

    Args:
      source: in any layout of docs/data.md.
      folder: where to.
      targets: how many to keep, all those that dev judges among them; 0 = all.

    Returns:
      The folder.

    Raises:
      UserError: the data has no train or dev split, dev judges more targets than are kept, or the
        folder holds other data.
    """
    made_from = {"source": str(paths.make(source)), "targets": targets}
    complete = folder / "made_from.json"
    if (before := json_of(complete)) is not None:
        if before != made_from:
            raise UserError(
                f"{folder} was made from {before}, not {made_from}: remove it and the runs beside "
                "it, or write another --name"
            )
        return folder
    data = sources.load(source, cache_dir=str(folder.parent / "prepared"))
    if missing := sorted({"train", "dev"} - data.splits.keys()):
        raise UserError(f"--data={source} has no {' and no '.join(missing)} split: add it")
    data = dataclasses.replace(data, splits={name: data.splits[name] for name in ("train", "dev")})
    if 0 < targets < len(data.target_ids):
        data = dataset.keep_targets(data, chosen(data, targets))
    texts = zip(data.target_ids, data.target_texts, strict=True)
    corpus = [json.dumps({"_id": name, "text": text}) for name, text in texts]
    queries = [
        json.dumps({"_id": name, "text": text})
        for split in data.splits.values()
        for name, text in zip(split.query_ids, split.texts, strict=True)
    ]
    paths.write(folder / "corpus.jsonl", "\n".join(corpus) + "\n")
    paths.write(folder / "queries.jsonl", "\n".join(queries) + "\n")
    for name in data.splits:
        paths.write(folder / "qrels" / f"{name}.tsv", judgements(data, name))
    paths.write(complete, json.dumps(made_from) + "\n")
    return folder


def chosen(data: RetrievalData, count: int) -> np.ndarray:
    """The sorted rows of `count` targets: those that dev judges, then by a hash of the id."""
    judged = np.zeros(len(data.target_ids), bool)
    judged[np.concatenate(data.splits["dev"].positives)] = True
    if judged.sum() > count:
        raise UserError(f"dev judges {judged.sum():,} targets, more than the {count:,} to be kept")
    hashes = np.array([dataset.stable_hash(name) for name in data.target_ids], np.uint64)
    return np.sort(np.lexsort((hashes, ~judged))[:count])


def has_negatives(folder: Path) -> bool:
    """Whether the training queries of data that was written have hard negatives."""
    with (folder / "qrels" / "train.tsv").open() as file:
        return any(line.endswith("\t0\n") for line in file)


def judgements(data: RetrievalData, name: str) -> str:
    """A split's positives with their grades, and its hard negatives as 0."""
    split = data.splits[name]
    lines = ["query-id\tcorpus-id\tscore"]
    for query, asked in enumerate(split.query_ids):
        rows, grades = split.positives[query].tolist(), split.grades[query].tolist()
        against = list(split.negatives[query]) if len(split.negatives) else []
        graded = [*zip(rows, grades, strict=True), *((row, 0) for row in against)]
        lines += [f"{asked}\t{data.target_ids[row]}\t{grade}" for row, grade in graded]
    return "\n".join(lines) + "\n"
