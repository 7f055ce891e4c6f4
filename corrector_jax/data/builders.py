"""The published data sets as TFDS data: `RetrievalCorpus` and `RetrievalQueries`.

    ROOT/published/NAME/                    the publishers' files, fetched or put there by hand
    ROOT/retrieval_corpus/CORPUS/VERSION    the passages, in their publisher's order
    ROOT/retrieval_queries/NAME/VERSION     questions; passages are named by their ids

Files are ArrayRecord, which is read by random access and without TensorFlow, with
`tfds.data_source` or `layouts/tfds.py`. Both builders write shard by shard: TFDS' other builders
keep a whole split in memory, or need TensorFlow to put it on the disk.

A file that is downloaded is kept. A folder of records appears once it is whole: what a killed
process loses is the folder it was at, and the file it was downloading.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from corrector_jax import paths
from corrector_jax.data import rows as row
from corrector_jax.data.layouts import inline
from corrector_jax.data.layouts.beir import Beir
from corrector_jax.data.layouts.msmarco import MsMarco
from corrector_jax.data.prepared import alone
from corrector_jax.data.published import CORPORA, QUERIES, File, fetch, missing_files
from corrector_jax.data.rows import Judged, Query, Reader, Rows, Target
from corrector_jax.types import UserError
from corrector_jax.writer import progress, say

SHARD = 2**16
"""Records of a file; TFDS keeps as many in memory while it writes."""

RECORD_BYTES, TEXT_SHARE = 130, 0.8
"""A record takes so many bytes and this share of its text, at most.

Measured on paragraphs of Wikipedia and on three other English corpora of 111 to 1,296 bytes a row:
beside 130 bytes, 0.48 to 0.77 of the text, 0.61 of Wikipedia's.
"""

Example = dict[str, Any]


class _Builder(tfds.core.ShardBasedBuilder):
    """What both builders share.

    Attributes:
      folder: where the publisher's files are.
      verify: whether they must have the published checksum and number of rows.
      max_bad_rows: how many bad rows are skipped; one more is an error.
    """

    VERSION = tfds.core.Version("1.0.0")

    # Where TFDS would look for checksums, with a package that it does not ask for.
    code_path = None

    folder: Path
    verify: bool
    max_bad_rows: int

    def __init__(
        self,
        *,
        folder: Path | None = None,
        verify: bool = True,
        max_bad_rows: int = 0,
        **arguments: Any,
    ) -> None:
        """Takes also what every builder of TFDS takes."""
        super().__init__(**arguments)
        self.folder = folder or Path()
        self.verify, self.max_bad_rows = verify, max_bad_rows

    @property
    def config_name(self) -> str:
        """Which of the published data sets it is."""
        return str(self.builder_config.name)

    def fetch(self, files: tuple[File, ...], manager: tfds.download.DownloadManager) -> None:
        """Brings files to `folder`."""

        def download(url: str) -> Path:
            try:
                return Path(manager.download(url))
            except Exception as error:  # TFDS has no common class of them
                raise OSError(str(error)) from error

        fetch(files, self.folder, download, verify=self.verify)

    def note(self, files: Iterable[paths.AnyPath], skipped: int) -> None:
        """Notes beside the records what they were made of; see `_refuse_another`."""
        sizes = {os.path.relpath(str(path), self.folder): path.stat().st_size for path in files}
        self.info.metadata.update(verify=self.verify, skipped=skipped, sizes=sizes)

    def _log_download_bytes(self) -> None:
        """Says nothing: sizes are not known to TFDS."""

    def _log_download_done(self) -> None:
        """Says nothing."""


class RetrievalCorpus(_Builder):
    """Passages: id, title, text."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CORPORA]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"id": text, "title": text, "text": text}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, Example]]]]]:
        corpus = CORPORA[self.config_name]
        self.fetch(corpus.files, manager)
        path, read = self._passages()
        total = self._count(path, read)
        if self.verify and total != corpus.passages:
            raise UserError(
                f"{path} holds {total:,} passages where {corpus.passages:,} were published: "
                "remove the file to have it fetched again, or write --config.data.verify=False to "
                "take it as it is."
            )
        targets = _shown(f"writing {self.config_name}", read(Rows(self.max_bad_rows)), total)
        examples = ({"id": t.id, "title": t.title, "text": t.text} for t in targets)
        return {"targets": _shards(examples, total)}

    def _passages(self) -> tuple[paths.AnyPath, Callable[[Rows], Iterator[Target]]]:
        """The file of the passages, and what reads it."""
        if self.config_name == "wikipedia":
            path = row.needed(self.folder, "psgs_w100.tsv", "DPR's Wikipedia")
            return path, functools.partial(inline.tsv_corpus, path)
        reader = _reader(self.config_name, self.folder)
        return reader.files[0], reader.targets

    def _count(self, path: paths.AnyPath, read: Callable[[Rows], Iterator[Target]]) -> int:
        """How many passages there are: a bad row is found before anything is written."""
        with _reading(self.config_name, (path,), self.max_bad_rows) as rows:
            total = sum(1 for _ in read(rows))
        self.note([path], len(rows.refused))
        return total


class RetrievalQueries(_Builder):
    """Questions: id, text, answers, and the ids of positives (with grades) and hard negatives.

    The splits are train, dev and test, as far as there are judgements. dev_answers and test_answers
    hold all questions of the publisher's dev and test set with short answers, and no judgements.
    """

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in QUERIES]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        several = tfds.features.Sequence(text)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "text": text,
                    "answers": several,
                    "positives": several,
                    "grades": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                    "negatives": several,
                }
            ),
            metadata=tfds.core.MetadataDict(corpus=QUERIES[self.config_name].corpus),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, Example]]]]]:
        queries = QUERIES[self.config_name]
        self.fetch((*queries.files, *queries.answers.values()), manager)
        reader = _reader(self.config_name, self.folder)
        answers = {
            split: row.needed(self.folder, file.contents[0], f"the folder of {self.config_name}")
            for split, file in queries.answers.items()
        }
        corpus = {"collection.tsv", "corpus.jsonl"}
        files = [path for path in reader.files if row.plain_name(path) not in corpus]
        splits = {}
        with _reading(self.config_name, (*files, *answers.values()), self.max_bad_rows) as rows:
            for split in reader.splits:
                # A question without a positive says nothing about passages; DPR leaves it out too.
                found = [_example(one) for one in reader.queries(split, rows) if one.positives]
                splits[split] = _shards(found, len(found))
            for split, path in answers.items():
                found = [_example(one) for one in _answered(path, rows)]
                splits[split] = _shards(found, len(found))
        self.note([*files, *answers.values()], len(rows.refused))
        return splits


def prepare(name: str, root: Path, *, verify: bool = True, max_bad_rows: int = 0) -> None:
    """Fetches a published data set and writes it as TFDS data, unless that was done before.

    Args:
      name: one of `published.QUERIES`.
      root: the folder of everything, on a local disk; see `published.folder_of`.
      verify: whether files must have the published checksum and number of rows.
      max_bad_rows: how many bad rows are skipped; one more is an error.

    Raises:
      UserError: a file cannot be had or is malformed, the disk is full, or what is there was made
        with less care or of other files.
    """
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    with _alone(root):
        for kind, config in ((RetrievalCorpus, QUERIES[name].corpus), (RetrievalQueries, name)):
            builder = kind(
                folder=root / "published" / config,
                verify=verify,
                max_bad_rows=max_bad_rows,
                data_dir=root,
                config=config,
                file_format="array_record",
            )
            if builder.data_path.exists():
                _refuse_another(builder)
                continue
            builder.download_and_prepare(download_dir=root / "downloads", download_config=settings)
            say(f"wrote {builder.data_path}")


def _refuse_another(builder: _Builder) -> None:
    """Refuses records that were made with less care than is asked for, or of other files.

    Files that are not there any more say nothing.
    """
    made = builder.info.metadata or {}
    skipped, sizes = made.get("skipped", 0), made.get("sizes", {})
    changed = [
        name
        for name, size in sizes.items()
        if (builder.folder / name).exists() and (builder.folder / name).stat().st_size != size
    ]
    if builder.verify and not made.get("verify", True):
        what = "without config.data.verify"
    elif skipped > builder.max_bad_rows:
        what = f"without {skipped:,} bad row(s), of which {builder.max_bad_rows:,} may be skipped"
    elif changed:
        what = f"of another {changed[0]}"
    else:
        return
    raise UserError(
        f"{builder.data_path} was made {what}: remove that folder to have it made anew, or write "
        "the settings it was made with."
    )


def disk_needed(name: str, root: Path) -> dict[str, int]:
    """What `prepare` will still write below `root`: in words -> bytes, at most."""
    queries = QUERIES[name]
    corpus = CORPORA[queries.corpus]
    version = str(_Builder.VERSION)
    files, written = [], 0
    if not (root / "retrieval_queries" / name / version).exists():
        files += missing_files(queries.files, root / "published" / name)
    if not (root / "retrieval_corpus" / queries.corpus / version).exists():
        of_corpus = missing_files(corpus.files, root / "published" / queries.corpus)
        files += [file for file in of_corpus if file not in files]
        written = corpus.passages * RECORD_BYTES + int(corpus.text_bytes * TEXT_SHARE)
    # JSON lines hold addresses and keys beside the text: half as much again is more than enough.
    archives = any(file.members for file in files)
    return {
        "downloads": sum(file.size for file in files),
        "unpacked archives": int(corpus.text_bytes * 1.5) if archives else 0,
        "records": written,
    }


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """While `root` is filled: nobody else fills it, and what a killed process left is removed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / ".lock"):
            left = root.glob("downloads/*/*.tmp.*"), root.glob("retrieval_*/*/incomplete.*")
            for path in itertools.chain(*left):
                paths.remove(path)
            yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the second
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(
            f"{root} cannot be written ({reason}): free some of that disk, or write a folder on "
            "another in config.data.path; what is whole there is kept."
        ) from error


def _reader(name: str, folder: Path) -> Reader:
    """What reads the publisher's files."""
    kinds: dict[str, Callable[[Path], Reader]] = {"msmarco": MsMarco, "hotpotqa": Beir}
    return kinds.get(name, inline.Dpr)(folder)


def _answered(path: paths.AnyPath, rows: Rows) -> Iterator[Query]:
    """DPR's .qa.csv: a question and a Python list of its answers, separated by a tab."""

    def query(line: str, where: str) -> Query:
        text, listed = inline.csv_columns(line, ["question", "answers"], where)
        try:
            answers = ast.literal_eval(listed)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            answers = None
        if not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
            raise UserError(
                f"{where}: the answers are {listed[:40]!r}: write a list of texts, as in "
                "['one', 'two']."
            )
        return Query(where, "", row.query_text(text, where), (), answers=tuple(answers))

    return rows.parse(rows.lines(path), query)


def _example(query: Query) -> Example:
    return {
        "id": query.id,
        "text": query.text,
        "answers": list(query.answers),
        "positives": [_named(judged) for judged in query.positives],
        "grades": np.array([judged.grade for judged in query.positives], np.int32),
        "negatives": [_named(judged) for judged in query.negatives],
    }


def _named(judged: Judged) -> str:
    if not judged.id:
        raise UserError(f"{judged.where}: a passage has no passage_id: fetch the file again.")
    return judged.id


def _shards(
    examples: Iterable[Example], total: int
) -> list[Callable[[], Iterator[tuple[int, Example]]]]:
    """Generators of one shard each, which take the examples in turn."""
    stream = enumerate(examples)
    return [
        functools.partial(itertools.islice, stream, SHARD) for _ in range(0, max(total, 1), SHARD)
    ]


def _shown(label: str, found: Iterable[Target], total: int) -> Iterator[Target]:
    with progress(label, total, "passages") as advance:
        for number, one in enumerate(found, 1):
            yield one
            if number % 4096 == 0:
                advance(4096)
        advance(total % 4096)


@contextlib.contextmanager
def _reading(label: str, files: tuple[paths.AnyPath, ...], max_bad_rows: int) -> Iterator[Rows]:
    """Rows of files, with progress by their size; says which were skipped."""
    size = sum(path.stat().st_size for path in files) >> 20
    with progress(f"reading {label}", size, "MiB") as advance:
        read = 0

        def count(more: int) -> None:
            nonlocal read
            before, read = read >> 20, read + more
            if read >> 20 > before:
                advance((read >> 20) - before)

        rows = Rows(max_bad_rows, count)
        yield rows
    for refused in rows.refused.values():
        say(f"skipped: {refused.message}")
