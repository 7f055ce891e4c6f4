"""A made-up run, with code, long and hostile texts among its examples."""

from __future__ import annotations

import json

import numpy as np

METRICS = ("recall@1", "recall@20", "recall@100", "mrr@10", "ndcg@10")
HOSTILE = "<script>alert('x')</script></pre></article> & <b>bold"
CODE = '''
def read_lines(path, *, encoding="utf-8"):
    """Kept: the blank line above, <angles>, and this indent."""
    with open(path, encoding=encoding) as file:
        if a < b and c > d:
            return [line.rstrip("\\n") for line in file]


class Cache(dict[str, tuple[int, ...]]):
\tdef __missing__(self, key):
\t\treturn self.setdefault(key, a_function_with_a_rather_long_name_that_does_not_break(self, key))
'''


def metrics(*values):
    return dict(zip(METRICS, values, strict=True))


def hits(first_relevant, text):
    ranks = [1, 2, 3] if first_relevant <= 3 else [1, 2, 3, first_relevant]
    return [
        {
            "rank": rank,
            "score": 17.25 - rank / 3,
            "text": CODE if rank == first_relevant else text,
            "relevant": rank == first_relevant,
        }
        for rank in ranks
    ]


def files():
    """The files of the run: {name: content}."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(401):
        drift = 0.6 * (1 - np.exp(-step / 60))
        left = 0.04 * (1 - np.exp(-step / 30))
        row = {"step": step}
        if step % 4 == 0:
            row["train/loss"] = 1.2 + 3.5 * np.exp(-step / 80) + rng.normal(0, 0.25)
            row["train/drift"] = drift * np.exp(rng.normal(0, 0.05)) + 1e-4
            row["train/corrected_error"] = left * np.exp(rng.normal(0, 0.1)) + 1e-4
            row["train/learning_rate"] = 1e-4
        if step % 40 == 0:
            row |= {"probe/drift": drift, "probe/corrected_error": left}
            row |= {"probe/kl_stale": 2.4 * drift, "probe/kl_corrected": 3.6 * left}
            row |= {"probe/gate": 1.0, "probe/overlap_stale": 0.4, "probe/overlap_corrected": 0.8}
        if step % 100 == 0:
            gain = 1 - np.exp(-step / 120)
            values = [0.21, 0.40, 0.55, 0.27, 0.30] + gain * np.array([0.1, 0.18, 0.2, 0.12, 0.13])
            row |= {
                f"eval/code-dev/{name}": value for name, value in zip(METRICS, values, strict=True)
            }
        if len(row) > 1:
            rows.append(row)
    interval = {"difference": 0.1771, "low": 0.1503, "high": 0.2031}
    results = {
        "strategy": "corrected",
        "seed": 0,
        "steps": 400,
        "eval": {
            "before": metrics(0.2102, 0.4011, 0.5532, 0.2743, 0.3012),
            "after": metrics(0.3087, 0.5782, 0.7498, 0.3921, 0.4286),
            "bm25": metrics(0.2612, 0.4415, 0.5621, 0.3122, 0.3391),
            "pretrained": metrics(0.3104, 0.5523, 0.6904, 0.3819, 0.4102),
        },
        "comparison": dict.fromkeys(METRICS, interval),
        "distribution": {
            "kl_stale": 1.4312,
            "kl_corrected": 0.1521,
            "drift": 0.6021,
            "corrected_error": 0.0412,
        },
        "ledger": {
            "initial": 8931,
            "refresh": 0,
            "encoded_with_grad": 115200,
            "encoded_without_grad": 22528,
            "evaluation": 17862,
            "corpus_passes": 1.0,
        },
        "times": {"step": 201.5, "save": 3.25, "wait for the batch": 0.5},
        "wall_seconds": 312.4,
        "examples_per_second": 41.7,
        "dataset": {
            "name": "code",
            "targets": 8931,
            "train_queries": 7102,
            "eval_queries": 911,
            "eval_split": "test",
        },
        "encoder": {"source": "all-MiniLM-L6-v2", "layers": 3, "dim": 384},
    }
    examples = [
        {
            "query": "Read a text file and return its lines without line ends.",
            "positives": [CODE],
            "before": hits(37, "def write_lines(path, lines):\n    pass"),
            "after": hits(1, "def read_bytes(path):\n    return path.read_bytes()"),
        },
        {"query": HOSTILE, "positives": [HOSTILE], "before": hits(2, HOSTILE), "after": []},
        {
            "query": "Say no.",
            "positives": ["a", "b"],
            "before": hits(3, "x " * 3000),
            "after": hits(2, "word"),
        },
    ]
    config = {"data": {"name": HOSTILE, "path": None}, "train": {"steps": 400, "lr": 1e-4}}
    return {
        "results.json": results,
        "config.json": config,
        "examples.json": examples,
        "metrics.jsonl": rows,
    }


def write(folder, run):
    for name, content in run.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in content)
        else:
            text = json.dumps(content)
        (folder / name).write_text(text)
    return folder
