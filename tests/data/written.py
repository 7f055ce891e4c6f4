"""One tiny corpus, written in every layout there is."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

from tests.tiny import WORDS

SIZE = 24
SPLITS = {"train": range(0, 12), "dev": range(12, 18), "test": range(18, 24)}


def title(row: int, titled: bool) -> str:
    return f"{WORDS[50 + row]} {WORDS[row]}" if titled else ""


def text(row: int) -> str:
    """Nothing but row's own text has its first word, which is its answer."""
    return " ".join([WORDS[row], *(WORDS[25 + (5 * row + i * i) % 25] for i in range(2 + row % 4))])


def queries(split: str) -> list[tuple[str, list[int], list[int]]]:
    """(text, positives, negatives) of a split; every third query has two positives."""
    found = []
    for row in SPLITS[split]:
        positives = [row, (row + 1) % SIZE] if row % 3 == 0 else [row]
        negatives = [r for r in ((row + 7) % SIZE, (row + 11) % SIZE) if r not in positives]
        found.append((f"{WORDS[row]} {WORDS[26 + row % 20]}", positives, negatives))
    return found


def _json_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def beir(folder: Path, titled: bool = False) -> Path:
    corpus = [{"_id": f"t{r}", "title": title(r, titled), "text": text(r)} for r in range(SIZE)]
    _json_lines(folder / "corpus.jsonl", corpus)
    asked = []
    (folder / "qrels").mkdir()
    for split in SPLITS:
        lines = ["query-id\tcorpus-id\tscore"]
        for i, (query, positives, negatives) in enumerate(queries(split)):
            asked.append({"_id": f"{split}{i}", "text": query})
            lines += [f"{split}{i}\tt{r}\t1" for r in positives]
            lines += [f"{split}{i}\tt{r}\t0" for r in negatives]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    _json_lines(folder / "queries.jsonl", asked)
    return folder


def _passages(rows: list[int], titled: bool, key: str) -> list[dict]:
    return [{key: f"t{r}", "title": title(r, titled), "text": text(r)} for r in rows]


def dpr(folder: Path, titled: bool = False) -> Path:
    folder.mkdir()
    for split in SPLITS:
        rows = [
            {
                "dataset": "tiny",
                "question": query,
                "answers": [WORDS[r] for r in positives],
                "positive_ctxs": _passages(positives, titled, "passage_id"),
                "negative_ctxs": _passages(negatives[1:], titled, "passage_id"),
                "hard_negative_ctxs": _passages(negatives[:1], titled, "passage_id"),
            }
            for query, positives, negatives in queries(split)
        ]
        (folder / f"tiny-{split}.json").write_text(json.dumps(rows, indent=2))
    return folder


def dpr_with_corpus(folder: Path, titled: bool = False) -> Path:
    dpr(folder, titled)
    lines = [f't{r}\t"{text(r)}"\t{title(r, titled)}' for r in range(SIZE)]
    (folder / "psgs_w100.tsv").write_text("\n".join(["id\ttext\ttitle", *lines]) + "\n")
    return folder


def tevatron(folder: Path, titled: bool = False) -> Path:
    for split in SPLITS:
        rows = [
            {
                "query_id": f"{split}{i}",
                "query": query,
                "positive_passages": _passages(positives, titled, "docid"),
                "negative_passages": _passages(negatives, titled, "docid"),
            }
            for i, (query, positives, negatives) in enumerate(queries(split))
        ]
        _json_lines(folder / f"{split}.jsonl", rows)
    return folder


def flag_embedding(folder: Path) -> Path:
    for split in SPLITS:
        rows = [
            {"query": query, "pos": [text(r) for r in yes], "neg": [text(r) for r in no]}
            for query, yes, no in queries(split)
        ]
        _json_lines(folder / f"{split}.jsonl", rows)
    return folder


def _triplets(split: str) -> list[dict]:
    return [
        {"anchor": query, "positive": text(r)}
        | {f"negative_{i}": text(n) for i, n in enumerate([*no, no[-1]][:2], 1)}
        for query, yes, no in queries(split)
        for r in yes
    ]


def columns(folder: Path) -> Path:
    for split in SPLITS:
        _json_lines(folder / f"{split}.jsonl", _triplets(split))
    return folder


def columns_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for split in SPLITS:
        rows = _triplets(split)
        for part, share in enumerate((rows[:3], rows[3:])):
            table = pyarrow.Table.from_pylist(share)
            pyarrow.parquet.write_table(table, folder / f"{split}-0000{part}-of-00002.parquet")
    return folder


def _labelled(split: str) -> list[dict]:
    return [
        {"sentence1": query, "sentence2": text(r), "label": label}
        for query, yes, no in queries(split)
        for label, some in ((1, yes), (0, no))
        for r in some
    ]


def columns_labels(folder: Path) -> Path:
    for split in SPLITS:
        _json_lines(folder / f"{split}.jsonl", _labelled(split))
    return folder


def columns_csv(folder: Path) -> Path:
    folder.mkdir()
    for split in SPLITS:
        rows = _labelled(split) if split == "dev" else _triplets(split)
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    return folder


def msmarco(folder: Path) -> Path:
    folder.mkdir()
    (folder / "collection.tsv").write_text("".join(f"{r}\t{text(r)}\n" for r in range(SIZE)))
    for split, rows in SPLITS.items():
        asked, judged = "", ""
        for i, (query, positives, negatives) in enumerate(queries(split), rows[0]):
            asked += f"{i}\t{query}\n"
            judged += "".join(f"{i}\t0\t{r}\t1\n" for r in positives)
            judged += "".join(f"{i}\t0\t{r}\t0\n" for r in negatives)
        name = "dev.small" if split == "dev" else split
        (folder / f"queries.{name}.tsv").write_text(asked + "999\tnobody judged this\n")
        (folder / f"qrels.{name}.tsv").write_text(judged)
    return folder


def fid(folder: Path, titled: bool = False) -> Path:
    folder.mkdir()
    for split in SPLITS:
        rows = [
            {
                "question": query,
                "target": WORDS[positives[0]],
                "answers": [WORDS[r].upper() for r in positives],
                "ctxs": [
                    {"title": title(r, titled), "text": text(r), "score": "1.5"}
                    for r in [*negatives, *positives]
                ],
            }
            for query, positives, negatives in queries(split)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def text_files(folder: Path) -> Path:
    for row in range(SIZE):
        file = folder / f"part {row % 3}" / f"t{row}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(row) + "\n")
    rows = [
        {
            "query": query,
            "positives": [f"part {r % 3}/t{r}.txt" for r in positives],
            "negatives": [f"part {r % 3}/t{r}.txt" for r in negatives],
            "split": split,
        }
        for split in SPLITS
        for query, positives, negatives in queries(split)
    ]
    _json_lines(folder / "queries.jsonl", rows)
    return folder


TITLED: dict[str, Callable[..., Path]] = {
    "beir": beir,
    "dpr": dpr,
    "dpr_with_corpus": dpr_with_corpus,
    "tevatron": tevatron,
    "fid": fid,
}

ALL: dict[str, Callable[..., Path]] = {
    **TITLED,
    "flag_embedding": flag_embedding,
    "columns": columns,
    "columns_parquet": columns_parquet,
    "columns_labels": columns_labels,
    "columns_csv": columns_csv,
    "msmarco": msmarco,
    "text_files": text_files,
}


def layout(name: str) -> str:
    """The word of config.data.layout for a key of `ALL`."""
    if name.startswith("columns"):
        return "columns"
    return name.removesuffix("_with_corpus")


def compress(folder: Path, end: str) -> None:
    """Compresses every file of a folder but text files, as .gz or .zst."""
    import pyarrow

    for path in sorted(folder.rglob("*.*")):
        if path.is_file() and path.suffix not in (".txt", ".parquet"):
            content = path.read_bytes()
            new = path.with_name(path.name + end)
            if end == ".gz":
                new.write_bytes(gzip.compress(content))
            else:
                with pyarrow.CompressedOutputStream(str(new), "zstd") as file:
                    file.write(content)
            path.unlink()
