"""TFDS: what `builders.prepare` wrote, the folder of the queries.

    retrieval_queries/NAME/VERSION      ArrayRecord files and what TFDS knows about them
    retrieval_corpus/CORPUS/VERSION     the passages that it names, two folders further up

Records are read by random access, without TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from corrector_jax import paths
from corrector_jax.data.dataset import SPLITS
from corrector_jax.data.rows import Judged, Query, Rows, Target
from corrector_jax.paths import AnyPath
from corrector_jax.types import UserError, brief, shown

_CHUNK = 1024  # records decoded at once
_FIELDS = {
    "corpus": {"id", "title", "text"},
    "queries": {"id", "text", "answers", "positives", "grades", "negatives"},
}


def library() -> ModuleType:
    """`tensorflow_datasets`: everything else works without it.

    Raises:
      UserError: it cannot be imported.
    """
    try:
        import tensorflow_datasets
    except Exception as error:  # beside other versions of what it needs it is no ImportError
        raise UserError(
            f"tensorflow_datasets, which published data are kept with, cannot be imported "
            f"({brief(error)}): pip install tensorflow-datasets"
        ) from error
    return tensorflow_datasets


class Tfds:
    """A `Reader` of this layout."""

    layout = "tfds"

    def __init__(self, path: AnyPath) -> None:
        """Opens both folders.

        Raises:
          UserError: one is missing, or holds other data.
        """
        queries = _open(path, "queries")
        try:
            named = (queries.info.metadata or {}).get("corpus")
        except Exception as error:  # read only now, by the same parsers
            raise _unreadable(path, error) from error
        if not isinstance(named, str) or not paths.is_plain(named):
            raise _unreadable(path, ValueError(f"its corpus is {shown(named)}"))
        corpus = path.parent.parent / "retrieval_corpus" / named
        self._folders = {"queries": path, "corpus": corpus}
        self._queries, self._corpus = queries, _open(corpus, "corpus")
        self.splits = tuple(split for split in SPLITS if split in queries.info.splits)
        try:
            self.files = tuple(
                paths.make(str(file))
                for builder, splits in ((self._corpus, ("targets",)), (queries, self.splits))
                for split in splits
                for file in builder.info.splits[split].filepaths
            )
        except (KeyError, ValueError) as error:  # it says nothing of its records
            raise _unreadable(path, error) from error

    @staticmethod
    def found_in(path: AnyPath) -> bool:
        """Whether the path looks like this layout."""
        return path.is_dir() and path.parent.name == "retrieval_queries" and bool(_versions(path))

    def targets(self, rows: Rows) -> Iterator[Target]:
        """The passages."""
        for where, record in _records(self._corpus, "targets", self._folders["corpus"], rows):
            yield Target(where, *(_text(record[key], where) for key in ("id", "title", "text")))

    def queries(self, split: str, rows: Rows) -> Iterator[Query]:
        """The questions of a split."""
        for where, record in _records(self._queries, split, self._folders["queries"], rows):
            positives, negatives, answers = (
                [_text(one, where) for one in record[key]]
                for key in ("positives", "negatives", "answers")
            )
            grades = record["grades"].tolist()
            if len(grades) != len(positives):
                raise UserError(f"{where} is damaged: make the data anew with --mode=prepare_data.")
            yield Query(
                where,
                _text(record["id"], where),
                _text(record["text"], where),
                tuple(
                    Judged(where, name, grade=grade)
                    for name, grade in zip(positives, grades, strict=True)
                ),
                tuple(Judged(where, name, grade=0) for name in negatives),
                tuple(answers),
            )


def _versions(path: AnyPath) -> list[AnyPath]:
    """The versions of a data set that are whole, the oldest first."""
    found = [file.parent for file in path.glob("*/dataset_info.json")]
    return sorted(folder for folder in found if "incomplete" not in folder.name)


def _open(path: AnyPath, kind: str) -> Any:
    versions = _versions(path)
    if not versions:
        raise UserError(
            f"{path} holds no TFDS data: make it with --mode=prepare_data, as in "
            "--config=configs/nq.py."
        )
    tfds = library()
    try:
        builder = tfds.builder_from_directory(str(versions[-1]))
        found = set(builder.info.features)
    except Exception as error:  # whatever the parsers below raise
        raise _unreadable(versions[-1], error) from error
    if found != _FIELDS[kind]:
        raise UserError(
            f"{versions[-1]} holds {', '.join(sorted(found))} and not "
            f"{', '.join(sorted(_FIELDS[kind]))}: give data made by --mode=prepare_data."
        )
    return builder


def _records(
    builder: Any, split: str, folder: AnyPath, rows: Rows
) -> Iterator[tuple[str, dict[str, Any]]]:
    source, start, size = None, 0, 1
    while start < size:
        try:
            source = source or builder.as_data_source(split)
            size = len(source)
            records = source.__getitems__(list(range(start, min(start + _CHUNK, size))))
        except Exception as error:  # a file is missing, cut short or changed: of many kinds
            raise _unreadable(folder, error) from error
        for number, record in enumerate(records, start + 1):
            rows.total += 1
            yield f"{folder}/{split}:{number}", record
        start += _CHUNK


def _text(content: bytes, where: str) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} holds a text that is not UTF-8: make the data anew with --mode=prepare_data."
        ) from error


def _unreadable(folder: AnyPath, error: Exception) -> UserError:
    return UserError(
        f"{folder} cannot be read ({brief(error, 160)}): remove it and make it "
        "again with --mode=prepare_data."
    )
