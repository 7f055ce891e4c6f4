"""What storing the cache as int8 changes: top results and the softmax, on real embeddings.

    python -m benchmarks.int8_cache FOLDER

FOLDER is a retrieval set in any layout of docs/data.md. Its targets and dev queries are embedded by
all-MiniLM-L6-v2, stored as bfloat16 and as int8 with a scale a row, and read back. Writes
benchmarks/results/int8_cache.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax.embed import embed_table
from corrector_jax.job import load_data, load_encoder
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.sharding import make_placement

RESULTS = Path(__file__).parent / "results" / "int8_cache.json"
QUERIES, TOP = 512, 100


def main() -> None:
    """Embeds, stores, reads back, compares, prints and writes."""
    config = configs.default()
    config.data.path = sys.argv[1]
    data = load_data(config)
    tokenization, encoder, params, _ = load_encoder(config)
    model, place = DualEncoder(encoder), make_placement(1)
    params = place.put_everywhere(model.from_encoder_params(params))

    def embed(table: np.ndarray) -> np.ndarray:
        pad = tokenization.tokenizer.pad_id
        return embed_table(model, params, table, pad_id=pad, block=128, place=place)

    split = data.splits.get("dev") or data.splits["test"]
    texts = list(split.texts[:QUERIES])
    queries = embed(tokenization.queries(texts))
    targets = embed(tokenization.targets(list(data.target_texts)))
    exact = config.model.beta * queries @ targets.T
    top = np.argsort(-exact, axis=1)[:, :TOP]
    found = {}
    for dtype in (jnp.bfloat16, jnp.int8):
        rows, scale = caches.stored(targets, jnp.dtype(dtype))
        read = np.asarray(caches.read(rows, scale))
        logits = config.model.beta * queries @ read.T
        other = np.argsort(-logits, axis=1)[:, :TOP]
        overlap = [len(set(a) & set(b)) / TOP for a, b in zip(top, other, strict=True)]
        log_p, log_q = (x - np.logaddexp.reduce(x, axis=1)[:, None] for x in (exact, logits))
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        found[np.dtype(dtype).name] = {
            "bytes_per_row": rows.dtype.itemsize * rows.shape[1] + 4 * (scale is not None),
            f"top_{TOP}_overlap": round(float(np.mean(overlap)), 5),
            f"top_{TOP}_overlap_least": round(float(np.min(overlap)), 5),
            "kl_nats_mean": float(f"{np.mean(kl):.3g}"),
            "kl_nats_largest": float(f"{np.max(kl):.3g}"),
            "largest_logit_error": float(f"{np.max(np.abs(exact - logits)):.3g}"),
        }
    record = {
        "data": data.name,
        "targets": len(targets),
        "queries": len(queries),
        "dim": targets.shape[1],
        "beta": config.model.beta,
        "float32_bytes_per_row": 4 * targets.shape[1],
        **found,
    }
    print(json.dumps(record, indent=2))
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
