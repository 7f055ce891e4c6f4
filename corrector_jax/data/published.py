"""The published data sets: which files they are, where they come from, and how they are fetched.

Every address, size and checksum below was read where the comment next to it says. The publishers
give no checksums; those below are what others found when they downloaded the files. TFDS records
the sha256 of whatever it fetched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import lzma
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from corrector_jax import paths
from corrector_jax.data.rows import find
from corrector_jax.types import UserError, brief
from corrector_jax.writer import say


@dataclasses.dataclass(frozen=True)
class File:
    """A file as its publisher offers it.

    Attributes:
      name: its name there.
      urls: where it is; the second is tried if the first fails.
      size: bytes; 0 = not known, and small.
      md5: hex; '' = not known.
      members: of an archive: what is read of it, by the paths inside.
    """

    name: str
    urls: tuple[str, ...]
    size: int = 0
    md5: str = ""
    members: tuple[str, ...] = ()

    @property
    def contents(self) -> tuple[str, ...]:
        """The files that stand in the folder once this one is fetched, without .gz."""
        if not self.members:
            return (self.name.removesuffix(".gz"),)
        top = _top(self.members)
        return tuple(member.removeprefix(top) for member in self.members)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Passages that somebody published.

    Attributes:
      files: what they are made of.
      passages: N, as published.
      text_bytes: bytes of all titles and texts, about.
    """

    files: tuple[File, ...]
    passages: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class Queries:
    """Questions that somebody published for a corpus.

    Attributes:
      corpus: its name in `CORPORA`.
      files: questions and judgements.
      answers: split -> a file of questions with short answers and no judgements.
    """

    corpus: str
    files: tuple[File, ...]
    answers: dict[str, File] = dataclasses.field(default_factory=dict)


# Addresses: RESOURCES_MAP of the publisher's script,
# https://github.com/facebookresearch/DPR/blob/main/dpr/data/download_data.py
# Sizes and md5: "dpr-w100" in
# https://github.com/allenai/ir_datasets/blob/master/ir_datasets/etc/downloads.json
_DPR = "https://dl.fbaipublicfiles.com/dpr"


def _dpr(name: str, size: int = 0, md5: str = "") -> File:
    folder = "wikipedia_split" if name.startswith("psgs") else "data/retriever"
    return File(name, (f"{_DPR}/{folder}/{name}",), size, md5)


# The first address: the publisher's page, https://microsoft.github.io/msmarco/Datasets, read at
# https://github.com/microsoft/msmarco/blob/master/Datasets.md
# The second, the same file on another host of the publisher, and the md5:
# https://github.com/castorini/anserini/blob/master/docs/experiments-msmarco-passage.md
# The size: the definition of msmarco-passage in https://github.com/allenai/ir_datasets
# The members: https://github.com/capreolus-ir/capreolus/blob/master/capreolus/collection/msmarco.py
_MSMARCO = File(
    "collectionandqueries.tar.gz",
    (
        "https://msmarco.blob.core.windows.net/msmarcoranking/collectionandqueries.tar.gz",
        "https://msmarco.z22.web.core.windows.net/msmarcoranking/collectionandqueries.tar.gz",
    ),
    1_057_717_952,
    "31644046b18952c1386cd4564ba2ae69",
    (
        "collection.tsv",
        "queries.train.tsv",
        "queries.dev.small.tsv",
        "qrels.train.tsv",
        "qrels.dev.small.tsv",
    ),
)

# The address: host and folder as in https://github.com/beir-cellar/beir (README), spelt out with
# size and md5 under "beir" in
# https://github.com/allenai/ir_datasets/blob/master/ir_datasets/etc/downloads.json
# The members: https://github.com/beir-cellar/beir/blob/main/beir/datasets/data_loader.py, with the
# splits that https://github.com/tensorflow/datasets lists in datasets/beir.
_HOTPOTQA = File(
    "hotpotqa.zip",
    ("https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/hotpotqa.zip",),
    654_025_350,
    "f412724f78b0d91183a0e86805e16114",
    (
        "hotpotqa/corpus.jsonl",
        "hotpotqa/queries.jsonl",
        "hotpotqa/qrels/train.tsv",
        "hotpotqa/qrels/dev.tsv",
        "hotpotqa/qrels/test.tsv",
    ),
)

CORPORA = {
    # N: count_hint in
    # https://github.com/allenai/ir_datasets/blob/master/ir_datasets/datasets/dpr_w100.py
    # Text: the size of https://huggingface.co/datasets/facebook/wiki_dpr (psgs_w100.nq.exact)
    # less its 21,015,300 embeddings of 768 float32.
    "wikipedia": Corpus(
        (_dpr("psgs_w100.tsv.gz", 4_694_541_059, "612fe66e0b6b41ee28f806140226c563"),),
        21_015_324,
        13_860_000_000,
    ),
    # Both on the publisher's page, as above.
    "msmarco": Corpus((_MSMARCO,), 8_841_823, 2_900_000_000),
    # N: https://huggingface.co/datasets/irds/beir_hotpotqa
    # Text: https://huggingface.co/datasets/Dipto084/hotpotqa (hotpotqa_passages).
    "hotpotqa": Corpus((_HOTPOTQA,), 5_233_329, 1_611_000_000),
}
"""Name -> corpus; `wikipedia` is DPR's, which nq and triviaqa share."""

QUERIES = {
    "nq": Queries(
        "wikipedia",
        (
            _dpr("biencoder-nq-train.json.gz", 2_314_892_908, "a1c927b5adae71388eb064329387709f"),
            _dpr("biencoder-nq-dev.json.gz", 256_239_282, "2640483dbe0df7ae29c6da419c551a80"),
        ),
        {"dev_answers": _dpr("nq-dev.qa.csv"), "test_answers": _dpr("nq-test.qa.csv")},
    ),
    "msmarco": Queries("msmarco", (_MSMARCO,)),
    "triviaqa": Queries(
        "wikipedia",
        (
            _dpr(
                "biencoder-trivia-train.json.gz", 1_848_559_940, "5aa4d3577c91425cd20e239ed89a252b"
            ),
            _dpr("biencoder-trivia-dev.json.gz", 207_271_749, "d559dffe09acfe5a6370adea55b8abf2"),
        ),
        {
            "dev_answers": _dpr("trivia-dev.qa.csv.gz"),
            "test_answers": _dpr("trivia-test.qa.csv.gz"),
        },
    ),
    "hotpotqa": Queries("hotpotqa", (_HOTPOTQA,)),
}
"""Word of config.data.published -> its questions."""


_MOST_UNPACKED = 100
"""A file takes at most so many times its archive's bytes; text takes three or four."""

# Beside what archives raise: of an encrypted one, of a packing nobody knows, of damaged packings.
_DAMAGED: tuple[type[Exception], ...] = (
    *(EOFError, OSError, ValueError, RuntimeError, struct.error, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, zipfile.BadZipFile),
)


def fetch(
    files: tuple[File, ...], folder: Path, download: Callable[[str], Path], *, verify: bool
) -> None:
    """Brings files into a folder, under their publisher's names, unless they are there.

    What somebody put there by hand is taken, packed or unpacked. Archives are unpacked.

    Args:
      files: which.
      folder: where to.
      download: url -> the file it was downloaded to; raises an OSError if that fails.
      verify: whether packed files must have their md5.

    Raises:
      UserError: a file cannot be had, or is not the published one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        packed = folder / file.name
        there = file not in missing_files(files, folder)
        if not there and not packed.exists():
            _download(file, missing_files(files, folder), folder, download)
        if file.members and there:
            continue  # it was checked before it was unpacked
        if verify and file.md5 and packed.exists():
            _check_md5(packed, file)
        if file.members:
            _unpack(packed, file, folder)


def folder_of(name: str, root: str) -> str:
    """The prepared data set `name` below `root`, which `layouts.tfds` reads."""
    return f"{root}/retrieval_queries/{name}"


def missing_files(files: tuple[File, ...], folder: Path) -> list[File]:
    """Those of `files` that a folder does not hold in readable form; archives are not."""
    return [file for file in files if not all(find(folder, name) for name in file.contents)]


def instructions(files: list[File], folder: Path) -> str:
    """What to put where by hand, in words."""
    listed = ", ".join(f"{file.name} (from {file.urls[-1]})" for file in files)
    return f"put {listed} into {folder}, packed or unpacked, and start again"


def _download(
    file: File, missing: list[File], folder: Path, download: Callable[[str], Path]
) -> None:
    reason: Exception | None = None
    for url in file.urls:
        try:
            # Asked first: a host that is out of reach is found out at once, and not in the four
            # minutes that the retries of a download take.
            urllib.request.urlopen(url, timeout=30).close()  # noqa: S310 - one of those above
            say(f"downloading {url}")
            fetched = download(url)
        except OSError as error:
            reason = error
        else:
            # TFDS keeps its record of address, size and sha256 where it downloads to.
            paths.move(fetched, folder / file.name)
            return
    raise UserError(
        f"{file.name} cannot be downloaded ({brief(reason)}): {instructions(missing, folder)}."
    ) from reason


def _check_md5(path: Path, file: File) -> None:
    say(f"checking {path}")
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(2**22):
            found.update(chunk)
    if found.hexdigest() != file.md5:
        raise UserError(
            f"{path} is not the published file: its md5 is {found.hexdigest()}, not {file.md5}; "
            "remove it to have it fetched again, or write --config.data.verify=False to take it "
            "as it is."
        )


def _unpack(path: Path, file: File, folder: Path) -> None:
    """Takes an archive's members out; one that is there was taken out whole."""
    wanted = dict(zip(file.members, file.contents, strict=True))
    wanted = {member: name for member, name in wanted.items() if not find(folder, name)}
    say(f"unpacking {path}")
    most = _MOST_UNPACKED * path.stat().st_size + 2**20
    try:
        for member, content in _archived(path):
            name = wanted.pop(member.removeprefix("./"), None)
            if name is not None:
                beside = folder / f"{name}.part"
                beside.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with beside.open("wb") as out:
                        _copy(content, out, most)
                    paths.move(beside, folder / name)
                finally:
                    paths.remove(beside)
    except _DAMAGED as error:
        raise UserError(
            f"{path} cannot be unpacked ({brief(error)}): free some of the disk if it is full, or "
            "fetch the file again."
        ) from error
    if wanted:
        raise UserError(f"{path} holds no {', '.join(wanted)}: fetch the file again.")


def _copy(content: IO[bytes], out: IO[bytes], most: int) -> None:
    """Copies a file of an archive, unless it is longer than it can be."""
    left = most
    while chunk := content.read(2**20):
        left -= len(chunk)
        if left < 0:
            raise ValueError(f"a file in it has more than {most:,} bytes")
        out.write(chunk)


def _archived(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(path inside, content) of every file of an archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as content:
                    yield name, content
    else:
        with tarfile.open(path, "r|gz") as stream:
            for member in stream:
                content_or_none = stream.extractfile(member) if member.isreg() else None
                if content_or_none is not None:
                    yield member.name, content_or_none


def _top(members: tuple[str, ...]) -> str:
    """The folder that all members are in, with its slash; '' where there is none."""
    top = members[0].split("/")[0] + "/"
    return top if all(member.startswith(top) for member in members) else ""
