"""How small a corrector may be: the quickstart, cut to 5,000 targets, for every width of the mlp.

    python -m benchmarks.corrector_width

Widths are shares of D: 1/6, 1/3 and 1 are 128, 256 and 768 of the 768 dimensions of configs/nq.py.
Everything else is the same, batches and draws' keys among it. Writes
benchmarks/results/corrector_width.json; four short trainings one after the other.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from configs import quickstart
from corrector_jax import config as configs
from corrector_jax.train import train

RESULTS = Path(__file__).parent / "results" / "corrector_width.json"
CORRECTORS = (("linear", 0), ("mlp", 64), ("mlp", 128), ("mlp", 384))


def measure(kind: str, hidden: int) -> dict[str, Any]:
    """Trains with one corrector; what it reached at the end, exact over all targets."""
    config = quickstart.get_config()
    config.corrector.kind, config.corrector.hidden = kind, hidden
    config.data.max_targets = 5000
    config.eval.full_encoder = config.eval.bm25 = config.log.tensorboard = False
    configs.validate(config)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), started=time.monotonic())
        results = json.loads((Path(folder) / "results.json").read_text())
    return {
        "corrector": kind if kind == "linear" else f"mlp {hidden}",
        "share_of_dim": hidden / results["encoder"]["dim"],
        **results["distribution"],
        "recall@20": results["eval"]["after"]["recall@20"],
        "mrr@10": results["eval"]["after"]["mrr@10"],
        "eval_queries": results["dataset"]["eval_queries"],
        "seed": results["seed"],
        "steps": results["steps"],
    }


def main() -> None:
    """Trains, prints and writes."""
    found = []
    for kind, hidden in CORRECTORS:
        found.append(measure(kind, hidden))
        print(json.dumps(found[-1]), flush=True)
        RESULTS.write_text(
            json.dumps({"config": "configs/quickstart.py", "runs": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
