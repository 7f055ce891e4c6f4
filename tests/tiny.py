"""A run small enough to be made in seconds: its data, its tokenizer and its configuration."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from corrector_jax import config as configs

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el")]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> \x1b[31mred"
SECRETS = {
    "HF_TOKEN": "hf_a0secret1token2",
    "AWS_SECRET_ACCESS_KEY": "a3secret4key5",
    "GOOGLE_AUTH_TOKEN": "a6secret7token8",
}
"""Variables of the environment whose values nobody may write down."""
TARGETS, TRAIN, HELD_OUT = 67, 40, 12  # prime: nothing divides it


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices, else as here: the last of a flag counts."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def write_data(folder: Path) -> Path:
    """A BEIR folder: a query is some words of its target; every fourth has two positives."""
    rng = random.Random(0)
    targets = [rng.sample(WORDS, rng.randint(4, 9)) for _ in range(TARGETS)]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for row, words in enumerate(targets):
            record = {"_id": f"t{row}", "title": words[0], "text": " ".join(words[1:])}
            file.write(json.dumps(record) + "\n")
    queries = []
    for split, count in (("train", TRAIN), ("dev", HELD_OUT), ("test", HELD_OUT)):
        lines = ["query-id\tcorpus-id\tscore"]
        for i in range(count):
            row = rng.randrange(TARGETS)
            queries.append({"_id": f"{split}{i}", "text": " ".join(rng.sample(targets[row], 3))})
            lines.append(f"{split}{i}\tt{row}\t1")
            if i % 4 == 0:
                lines.append(f"{split}{i}\tt{(row + 1) % TARGETS}\t1")
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    return folder


def write_questions(folder: Path) -> Path:
    """A folder of text files: a question is some words of its passage, the answer its first one."""
    rng = random.Random(1)
    passages = [rng.sample(WORDS, rng.randint(4, 9)) for _ in range(TARGETS)]
    folder.mkdir(parents=True)
    for row, words in enumerate(passages):
        (folder / f"p{row:02}.txt").write_text(" ".join(words) + "\n")
    lines = []
    for split, count in (("train", TRAIN), ("dev", HELD_OUT), ("test", HELD_OUT)):
        for _ in range(count):
            row = rng.randrange(TARGETS)
            answer, *words = passages[row]
            question = f"{' '.join(rng.sample(words, 3))} {rng.choice(WORDS)}"
            record = {"query": question, "positives": [f"p{row:02}.txt"], "split": split}
            lines.append(json.dumps(record | {"answers": [answer, f"{answer} {answer}"]}))
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A folder with a word-level tokenizer.json of BERT's special tokens."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def overrides(folder: Path) -> dict[str, object]:
    """The keys of a tiny run whose data and tokenizer are written below `folder`."""
    data, tokenizer = folder / "data", folder / "tokenizer"
    if not data.exists():
        write_data(data)
        write_tokenizer(tokenizer)
    return {
        "data.path": str(data),
        "data.cache_dir": str(folder / "cache"),
        "data.query_max_len": 8,
        "data.target_max_len": 16,
        "model.weights": "random",
        "model.tokenizer": str(tokenizer),
        "model.layers": 1,
        "model.hidden": 16,
        "model.heads": 2,
        "model.intermediate": 32,
        "cache.tile_rows": 16,
        "corrector.probe_every": 3,
        "corrector.probe_targets": 32,
        "corrector.probe_queries": 8,
        "corrector.warmup": 4,
        "corrector.updates": 2,
        "negatives.draws": 3,
        "negatives.block_rows": 4,
        "train.steps": 8,
        "train.warmup": 2,
        "train.batch_size": 8,
        "train.learning_rate": 1e-2,
        "eval.batch_size": 16,
        "checkpoint.every": 4,
        "log.every": 1,
        "log.tensorboard": False,
        "log.report": False,  # twenty pictures take longer than training
        "mesh.devices": 2,
    }


def reader_overrides(folder: Path) -> dict[str, object]:
    """What makes it a run that learns from answers; its data are written below `folder` too."""
    data = folder / "questions"
    if not data.exists():
        write_questions(data)
    return {
        "data.path": str(data),
        "reader.weights": "random",
        "reader.layers": 1,
        "reader.hidden": 16,
        "reader.heads": 2,
        "reader.intermediate": 32,
        "reader.passages": 3,
        "reader.given_steps": 2,
        "reader.given_share": 0.3,
        "reader.given": 2,
        "reader.learning_rate": 1e-2,
        "reader.warmup": 2,
        "reader.query_max_len": 6,
        "reader.passage_max_len": 12,
        "reader.answer_max_len": 3,
        "train.steps": 10,
        "eval.bm25": False,
    }


def config(folder: Path, **changes: object) -> ConfigDict:
    """The configuration of a tiny run, with `reader=True` of one that learns from answers.

    Changes are dotted keys with `__` for the dot.
    """
    result = configs.default()
    reader = changes.pop("reader", False)
    keys = overrides(folder) | (reader_overrides(folder) if reader else {})
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    result.update_from_flattened_dict(keys)
    configs.validate(result)
    return result
