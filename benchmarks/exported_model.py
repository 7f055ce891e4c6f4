"""A run's exported encoder, measured by sentence-transformers' own evaluator, beside our metrics.

    .venv-parity/bin/python benchmarks/exported_model.py runs/quickstart

needs the environment of `make parity`. Writes `benchmarks/results/exported_model.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from corrector_jax import paths
from corrector_jax.evaluate import saved_config
from corrector_jax.job import load_data


def main(workdir: Path) -> None:
    """Evaluates `final/` on the run's last split, and holds it against `eval/after.json`."""
    ours = json.loads((workdir / "eval" / "after.json").read_text())
    data = load_data(saved_config(workdir))
    split = data.splits[ours["split"]]
    ids = list(data.target_ids)
    evaluator = InformationRetrievalEvaluator(
        dict(zip(split.query_ids, split.texts, strict=True)),
        dict(zip(ids, data.target_texts, strict=True)),
        {
            name: {ids[row] for row in positives}
            for name, positives in zip(split.query_ids, split.positives, strict=True)
        },
        precision_recall_at_k=[1, 20, 100],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        score_functions={"dot": util.dot_score},
    )
    found = evaluator(SentenceTransformer(str(workdir / "final"), device="cpu"))
    theirs = {
        name: float(found[f"dot_{name}"]) for name in ours["metrics"] if f"dot_{name}" in found
    }
    result = {
        "command": f".venv-parity/bin/python benchmarks/exported_model.py {workdir}",
        "ours": {name: ours["metrics"][name] for name in theirs},
        "sentence_transformers": theirs,
        "largest_difference": max(
            abs(value - ours["metrics"][name]) for name, value in theirs.items()
        ),
    }
    path = Path(__file__).parent / "results" / "exported_model.json"
    paths.write(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
