"""Where the time of an encoder goes on a CPU, here and in torch, part by part of one layer.

    make parity                                     # makes .venv-parity
    .venv-parity/bin/python benchmarks/encoder_parts.py

Times are CPU seconds of all threads (the least of three turns), which other work on the machine
moves little. It explains what `encoder_speed.py` measures: where products of matrices take most of
the time, and both libraries do them at the machine's rate, neither can be much faster. Writes
benchmarks/results/encoder_parts.json.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

RESULTS = Path(__file__).parent / "results" / "encoder_parts.json"
TEXTS, TOKENS, DIM, HEADS, INNER = 128, 64, 384, 12, 1536  # of MiniLM
REPEATS = 8


def least(run: Callable[[], Any]) -> float:
    """CPU milliseconds of one call."""
    run()
    found = math.inf
    for _ in range(3):
        started = time.process_time()
        for _ in range(REPEATS):
            run()
        found = min(found, (time.process_time() - started) / REPEATS)
    return round(1e3 * found, 2)


def main() -> None:
    """Measures, prints and writes."""
    numbers = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return numbers.normal(0, 0.1, shape).astype(np.float32)

    x, inner = normal(TEXTS * TOKENS, DIM), normal(TEXTS * TOKENS, INNER)
    square, up, down = normal(DIM, DIM), normal(DIM, INNER), normal(INNER, DIM)
    heads = normal(TEXTS, TOKENS, HEADS, DIM // HEADS)
    # name -> times in a layer, arguments, here, there
    parts: dict[str, tuple[int, tuple[np.ndarray, ...], Any, Any]] = {
        "dense, D to D": (4, (x, square), jnp.matmul, torch.matmul),
        "dense, D to 4D": (1, (x, up), jnp.matmul, torch.matmul),
        "dense, 4D to D": (1, (inner, down), jnp.matmul, torch.matmul),
        "attention": (1, (heads,), lambda q: jax.nn.dot_product_attention(q, q, q), _attention),
        "gelu": (
            1,
            (inner,),
            lambda h: jax.nn.gelu(h, approximate=False),
            torch.nn.functional.gelu,
        ),
        "layer norm": (2, (x,), _norm, lambda x: torch.nn.functional.layer_norm(x, (DIM,))),
    }
    found: dict[str, Any] = {}
    for name, (count, arguments, here, there) in parts.items():
        placed, tensors = [jnp.asarray(a) for a in arguments], [torch.tensor(a) for a in arguments]
        jitted = jax.jit(here)
        with torch.no_grad():
            found[name] = {
                "in_a_layer": count,
                "here_ms": least(lambda f=jitted, a=placed: f(*a).block_until_ready()),
                "there_ms": least(lambda f=there, a=tensors: f(*a)),
            }
        print(name, found[name], flush=True)
    total = {
        side: sum(part["in_a_layer"] * part[f"{side}_ms"] for part in found.values())
        for side in ("here", "there")
    }
    dense = sum(p["in_a_layer"] * p["here_ms"] for name, p in found.items() if "dense" in name)
    result = {
        "command": "benchmarks/encoder_parts.py",
        "shape": {"texts": TEXTS, "tokens": TOKENS, "dim": DIM, "heads": HEADS, "inner": INNER},
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "parts": found,
        "layer_there_over_here": round(total["there"] / total["here"], 3),
        "share_of_dense_here": round(dense / total["here"], 3),
        "there_over_here_if_all_but_dense_were_free": round(total["there"] / dense, 3),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if "over" in key}))


def _norm(x: jax.Array) -> jax.Array:
    center = x - x.mean(axis=-1, keepdims=True)
    return center * jax.lax.rsqrt(jnp.square(center).mean(axis=-1, keepdims=True) + 1e-12)


def _attention(q: torch.Tensor) -> torch.Tensor:
    q = q.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)


if __name__ == "__main__":
    main()
