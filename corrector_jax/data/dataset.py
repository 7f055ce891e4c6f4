"""What every data source gives: targets, and queries with their known positives per split.

`sources.load` reads any of them; the rest of the package knows only `RetrievalData`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from corrector_jax.data.tables import digest
from corrector_jax.types import UserError

SPLITS = ("train", "dev", "test")


class Split(NamedTuple):
    """The queries of one split; entry i of each list belongs to query i.

    Attributes:
      query_ids: n unique ids.
      texts: n texts.
      positives: n arrays int32, the sorted unique rows of the query's known positives, one or more.
      grades: n arrays int32, parallel to `positives`; 1 in data without grades.
      negatives: n arrays int32, rows of the query's hard negatives, none of them a known positive;
        empty where the source has none for any query.
      answers: n lists of short answers; empty where the source has none for any query.
    """

    query_ids: Sequence[str]
    texts: Sequence[str]
    positives: Sequence[np.ndarray]
    grades: Sequence[np.ndarray]
    negatives: Sequence[np.ndarray] = ()
    answers: Sequence[Sequence[str]] = ()


class Refused(NamedTuple):
    """A row that was skipped: what kind of mistake it is, and the sentence about it."""

    kind: str
    message: str


class Reading(NamedTuple):
    """What happened while a source was read.

    Attributes:
      layout: the word of config.data.layout.
      rows: of all files together, refused ones included.
      refused: the rows that were skipped.
      without_positives: split -> queries that were left out since nothing is positive for them.
    """

    layout: str
    rows: int
    refused: tuple[Refused, ...]
    without_positives: dict[str, int]


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """A corpus of N targets and the queries judged against it.

    Attributes:
      name: a word for reports and file names.
      target_ids: N unique ids; a target's row is its place here. Large corpora stay on the disk.
      target_texts: N texts, as they are tokenized.
      splits: `train`, `dev`, `test`, as far as the source has them; none is empty.
      reading: what happened while the source was read; None for data that was made.
    """

    name: str
    target_ids: Sequence[str]
    target_texts: Sequence[str]
    splits: dict[str, Split]
    reading: Reading | None = None

    def known_positives(self, split: str) -> np.ndarray:
        """K_i of every query of a split: [n, K] int32, K the largest count there, -1 pads."""
        positives = self.splits[split].positives
        counts = np.array([len(rows) for rows in positives])
        known = np.full((len(positives), counts.max()), -1, np.int32)
        known[np.arange(known.shape[1])[None, :] < counts[:, None]] = np.concatenate(positives)
        return known

    def fingerprint(self) -> str:
        """Sha256, in hex, of the corpus: every id and text, in order."""
        return hashlib.sha256(digest(self.target_ids) + digest(self.target_texts)).hexdigest()


def eval_split(data: RetrievalData, wanted: str = "auto") -> str:
    """The split the final evaluation uses.

    Args:
      data: the data at hand.
      wanted: 'dev', 'test', or 'auto': test if present, else dev.

    Raises:
      UserError: the split is not there, or `wanted` is none of the three words.
    """
    if wanted not in ("auto", "dev", "test"):
        raise UserError(f"data.eval_split is {wanted!r}: write 'auto', 'dev' or 'test'.")
    for split in ("test", "dev") if wanted == "auto" else (wanted,):
        if split in data.splits:
            return split
    asked = "a test or dev split" if wanted == "auto" else f"a {wanted} split"
    only_train = wanted != "test" and data.splits.keys() == {"train"}
    or_hold_out = ", or hold out a tenth of the train queries with --config.data.holdout=0.1"
    raise UserError(
        f"{data.name} has no queries for {asked}, which the evaluation needs; "
        f"it has: {', '.join(data.splits) or 'no split at all'}; add one, such as dev.jsonl or "
        f"qrels/dev.tsv{or_hold_out if only_train else ''}."
    )


def hold_out(data: RetrievalData, share: float) -> RetrievalData:
    """Makes a dev split of some train queries, where the data have neither dev nor test.

    They are chosen by a hash of their text, the same on every machine: queries that ask the same,
    but for case and blanks, stay on one side, and those of a smaller share are among those of a
    larger one.

    Args:
      data: the whole.
      share: of the train queries, from 0 (none) to 0.5.

    Raises:
      UserError: no two train queries differ.
    """
    train = data.splits.get("train")
    if not share or train is None or {"dev", "test"} & data.splits.keys():
        return data
    hashes = np.array([stable_hash(normalised(text)) for text in train.texts], np.uint64)
    asked, counts = np.unique(hashes, return_counts=True)
    if len(asked) < 2:
        raise UserError(
            f"{data.name} has no two different train queries, so none can be held out "
            "(config.data.holdout): add a dev split."
        )
    cut = np.searchsorted(np.cumsum(counts), share * len(hashes), side="right")
    held = hashes < asked[np.clip(cut, 1, len(asked) - 1)]
    kept, dev = (keep_queries(train, np.flatnonzero(rows).tolist()) for rows in (~held, held))
    return dataclasses.replace(data, splits={"train": kept, "dev": dev})


def subset(data: RetrievalData, *, max_targets: int = 0, max_queries: int = 0) -> RetrievalData:
    """A smaller task of the same kind, the same on every machine.

    Targets are chosen by a hash of their id, so that the smaller of two subsets lies inside the
    larger; they keep their order. A query stays if one of its positives does, and is judged against
    those that stay. Then the queries of dev and test are thinned likewise; train keeps all its own.

    Args:
      data: the whole.
      max_targets: how many targets to keep, 0 for all.
      max_queries: how many queries of dev and of test each to keep, 0 for all.

    Raises:
      UserError: a negative number, or no query is left.
    """
    for key, value in (("max_targets", max_targets), ("max_queries", max_queries)):
        if value < 0:
            raise UserError(f"data.{key} is {value}: write 0 for all, or a positive number.")
    if 0 < max_targets < len(data.target_ids):
        data = keep_targets(data, _smallest(data.target_ids, max_targets))
        if not data.splits:
            raise UserError(
                f"data.max_targets={max_targets} leaves no query of {data.name} with a positive: "
                "write a larger number."
            )
    if max_queries:
        thinned = {
            name: keep_queries(split, _smallest(split.query_ids, max_queries).tolist())
            for name, split in data.splits.items()
            if name != "train"
        }
        data = dataclasses.replace(data, splits=data.splits | thinned)
    return data


def render_target(template: str, *, title: str, text: str) -> str:
    """A target's text: the template filled in, without leading or trailing blanks."""
    return template.format(title=title, text=text).strip()


def normalised(text: str) -> str:
    """A text without what does not make it another question: case, and how blanks are set."""
    return " ".join(text.casefold().split())


def stable_hash(text: str) -> int:
    """A 64-bit hash of a text that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _smallest(ids: Sequence[str], count: int) -> np.ndarray:
    """The sorted rows of the `count` ids with the smallest hashes, [<= count] int64."""
    hashes = np.array([stable_hash(identifier) for identifier in ids], np.uint64)
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def keep_queries(split: Split, rows: Sequence[int]) -> Split:
    """Some of a split's queries, in the order of `rows`."""
    return Split(
        query_ids=[split.query_ids[row] for row in rows],
        texts=[split.texts[row] for row in rows],
        positives=[split.positives[row] for row in rows],
        grades=[split.grades[row] for row in rows],
        negatives=[split.negatives[row] for row in rows] if len(split.negatives) else (),
        answers=[split.answers[row] for row in rows] if len(split.answers) else (),
    )


def keep_targets(data: RetrievalData, rows: np.ndarray) -> RetrievalData:
    """The task over some of the targets; a query stays if one of its positives does.

    Args:
      data: the whole.
      rows: [n] sorted rows of the targets to keep.

    Returns:
      The smaller task, without splits that have no query left.
    """
    new_row = np.full(len(data.target_ids), -1, np.int32)
    new_row[rows] = np.arange(len(rows), dtype=np.int32)
    splits = {}
    for name, split in data.splits.items():
        judged = [new_row[positives] for positives in split.positives]
        split = split._replace(
            positives=[kept[kept >= 0] for kept in judged],
            grades=[grades[kept >= 0] for grades, kept in zip(split.grades, judged, strict=True)],
            negatives=[kept[kept >= 0] for kept in (new_row[rows] for rows in split.negatives)],
        )
        split = keep_queries(split, [i for i, kept in enumerate(split.positives) if len(kept)])
        if split.query_ids:
            splits[name] = split
    return dataclasses.replace(
        data,
        target_ids=[data.target_ids[row] for row in rows],
        target_texts=[data.target_texts[row] for row in rows],
        splits=splits,
    )
