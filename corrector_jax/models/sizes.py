"""Sizes of well-known encoders and readers: a run can be planned before anything is downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """What shapes an encoder.

    Attributes:
      config: the keys of its published `config.json` that matter.
      pooling: "mean" or "cls".
      normalize: whether its embeddings are unit vectors.
      projection: D of the dense layer after pooling, which has no bias; 0 = none.
    """

    config: dict[str, Any]
    pooling: str = "mean"
    normalize: bool = True
    projection: int = 0


def _bert(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
    }


def _t5(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "num_layers": layers,
        "num_heads": heads,
        "d_kv": 64,
        "d_ff": inner,
    }


READERS = {
    "google-t5/t5-small": _t5(512, 6, 8, 2048),
    "google-t5/t5-base": _t5(768, 12, 12, 3072),
    "google-t5/t5-large": _t5(1024, 24, 16, 4096),
}
"""Hub id -> what shapes a reader, as its `config.json` states; the head is the table of words."""

SIZES = {
    "sentence-transformers/gtr-t5-base": Sizes(_t5(768, 12, 12, 3072), projection=768),
    "sentence-transformers/gtr-t5-large": Sizes(_t5(1024, 24, 16, 4096), projection=768),
    "google-bert/bert-base-uncased": Sizes(_bert(768, 12, 12), normalize=False),
    "intfloat/e5-base-v2": Sizes(_bert(768, 12, 12)),
    "BAAI/bge-base-en-v1.5": Sizes(_bert(768, 12, 12), pooling="cls"),
}
"""Hub id -> sizes, as `config.json`, `modules.json` and the folders beside them state there."""
