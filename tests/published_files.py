"""The publishers' files in small: their names, their structure, a few rows of made-up words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from tests import tiny

PASSAGES, TRAIN, DEV, TEST = tiny.TARGETS, tiny.TRAIN, tiny.HELD_OUT, tiny.HELD_OUT


class Passage(NamedTuple):
    title: str
    text: str


class Question(NamedTuple):
    text: str
    answers: list[str]
    positives: list[int]


def passages() -> list[Passage]:
    """Some titles and texts hold what csv puts in quotes."""
    rng = random.Random(1)
    made = []
    for number in range(PASSAGES):
        words = rng.sample(tiny.WORDS, rng.randint(6, 10))
        title, text = words[0], " ".join(words[1:])
        if number % 5 == 1:
            text = f'{words[1]} "{words[2]}" {" ".join(words[3:])}'
        if number % 7 == 2:
            title = f'"{words[0]}", called\t{words[1]}'
        if number % 7 == 3:
            text = f'"{text}"'
        made.append(Passage(title, text))
    return made


def questions() -> dict[str, list[Question]]:
    """Every fourth has two positives; every fifth of train has none."""
    rng = random.Random(2)
    texts = passages()
    made: dict[str, list[Question]] = {}
    for split, count in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        made[split] = []
        for number in range(count):
            row = rng.randrange(PASSAGES)
            words = [word for word in texts[row].text.split() if word in tiny.WORDS]
            positives = [row, (row + 1) % PASSAGES] if number % 4 == 0 else [row]
            if split == "train" and number % 5 == 4:
                positives = []
            answers = [words[0], 'the "last" one\'s']
            made[split].append(
                Question(f"{split}{number} {' '.join(words[:3])}", answers, positives)
            )
    return made


def write(name: str, root: Path) -> None:
    """Puts the files of `name` and of its corpus into `root`/published, as fetched."""
    {"nq": _dpr, "triviaqa": _dpr, "msmarco": _msmarco, "hotpotqa": _hotpotqa}[name](name, root)


def psgs() -> str:
    content = io.StringIO()
    writer = csv.writer(content, delimiter="\t", lineterminator="\n")
    writer.writerow(["id", "text", "title"])
    for number, passage in enumerate(passages(), 1):
        writer.writerow([number, passage.text, passage.title])
    return content.getvalue()


def biencoder(found: list[Question], key: str) -> list[dict[str, Any]]:
    rng = random.Random(3)

    def context(row: int, score: float) -> dict[str, Any]:
        passage = passages()[row]
        return {
            "title": passage.title,
            "text": passage.text,
            "score": score,
            "title_score": 1,
            key: str(row + 1),
        }

    return [
        {
            "dataset": "nq_train_psgs_w100",
            "question": one.text,
            "answers": one.answers,
            "positive_ctxs": [context(row, 1000) for row in one.positives],
            "negative_ctxs": [context(rng.randrange(PASSAGES), 0) for _ in range(3)],
            "hard_negative_ctxs": [context(rng.randrange(PASSAGES), 17.5) for _ in range(2)],
        }
        for one in found
    ]


def answers(found: list[Question]) -> str:
    content = io.StringIO()
    writer = csv.writer(content, delimiter="\t", lineterminator="\n")
    for one in found:
        writer.writerow([one.text, one.answers])
    return content.getvalue()


def _dpr(name: str, root: Path) -> None:
    short, key = {"nq": ("nq", "passage_id"), "triviaqa": ("trivia", "psg_id")}[name]
    _put(root / "published" / "wikipedia" / "psgs_w100.tsv.gz", psgs())
    folder = root / "published" / name
    end = "" if name == "nq" else ".gz"
    for split in ("train", "dev"):
        content = json.dumps(biencoder(questions()[split], key), indent=4)
        _put(folder / f"biencoder-{short}-{split}.json.gz", content)
    for split in ("dev", "test"):
        _put(folder / f"{short}-{split}.qa.csv{end}", answers(questions()[split]))


def _msmarco(name: str, root: Path) -> None:
    lines = [f"{row}\t{p.title.replace(chr(9), ' ')} {p.text}" for row, p in enumerate(passages())]
    files = {"collection.tsv": lines, "queries.eval.tsv": ["1\tnever read"]}
    for split, part in (("train", "train"), ("dev", "dev.small")):
        found = questions()[split]
        files[f"queries.{part}.tsv"] = [f"{100 + n}\t{q.text}" for n, q in enumerate(found)]
        files[f"qrels.{part}.tsv"] = [
            f"{100 + n}\t0\t{row}\t1" for n, q in enumerate(found) for row in q.positives
        ]
    path = root / "published" / name / "collectionandqueries.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            data = "".join(f"{line}\n" for line in content).encode()
            member = tarfile.TarInfo(file)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _hotpotqa(name: str, root: Path) -> None:
    files = {
        "corpus.jsonl": [
            {"_id": str(7 * row), "title": p.title, "text": p.text, "metadata": {"url": "u"}}
            for row, p in enumerate(passages())
        ],
        "queries.jsonl": [
            {"_id": f"5ab{split}{n}", "text": q.text, "metadata": {}}
            for split, found in questions().items()
            for n, q in enumerate(found)
        ],
    }
    path = root / "published" / name / "hotpotqa.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hotpotqa/", "")
        for file, records in files.items():
            content = "".join(json.dumps(record) + "\n" for record in records)
            archive.writestr(f"hotpotqa/{file}", content)
        for split, found in questions().items():
            lines = ["query-id\tcorpus-id\tscore"]
            lines += [
                f"5ab{split}{n}\t{7 * row}\t1" for n, q in enumerate(found) for row in q.positives
            ]
            archive.writestr(f"hotpotqa/qrels/{split}.tsv", "\n".join(lines) + "\n")


def _put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
