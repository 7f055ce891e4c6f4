"""Writes the reference embeddings of all-MiniLM-L6-v2, made by sentence-transformers and torch.

Run once, in an environment of its own (the package needs neither):

    pip install sentence-transformers torch
    cd tests/reference
    python make_minilm_vectors.py --model FOLDER --out minilm_vectors.npz

FOLDER holds the published config.json, model.safetensors and tokenizer.json. The file written holds
`texts` (uint8: UTF-8 json), `max_len`, and per number of layers kept `layers_6`, `layers_3`:
[texts, 384] float32, mean pooling, normalised. It holds no pickle.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import sentence_transformers
import torch  # noqa: TID251  (runs outside the package's environment)
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

MAX_LEN = 160
TEXTS = [
    "A cat sat on the mat.",
    "A dog lay on the rug.",
    "how do vaccines produce immunity",
    "Vaccines train the immune system to recognise a pathogen before it meets the real one.",
    "who wrote the origin of species",
    "What is the capital of France?",
    "Paris is the capital and most populous city of France.",
    "",
    " ",
    "\n\t",
    "a",
    ".",
    "?!...,;:()[]{}<>@#$%^&*",
    "1234567890 3.14159 1,000,000 2^10 = 1024",
    "UPPER CASE TEXT IS LOWERED",
    "naïve café résumé Ångström façade",
    "Größe, Straße und Übermut",
    "Быстрая коричневая лиса прыгает через ленивую собаку",
    "東京は日本の首都です",
    "机器学习是人工智能的一个分支",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "emoji 😀🚀 and family 👩‍👩‍👧",
    "zero\u200bwidth, nbsp\u00a0here, soft\u00adhyphen, combining e\u0301",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "for (int i = 0; i < n; ++i) { sum += x[i] * y[i]; }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    " ".join(f"Sentence {i} of a long text about the number {i * i}." for i in range(40)),
    "word " * 300,
]


def embed(folder: str, layers: int) -> np.ndarray:
    """Embeds `TEXTS` with the first `layers` layers of the model: [texts, D] float32."""
    bert = Transformer(folder, max_seq_length=MAX_LEN)
    bert.model.encoder.layer = bert.model.encoder.layer[:layers]
    width = bert.get_embedding_dimension()
    model = SentenceTransformer(
        modules=[bert, Pooling(width, pooling_mode="mean"), Normalize()], device="cpu"
    )
    with torch.no_grad():
        return model.encode(TEXTS, batch_size=8, convert_to_numpy=True).astype(np.float32)


def main() -> None:
    """Reads the arguments, writes the file and says which versions made it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the published model")
    parser.add_argument("--out", required=True, help="the .npz file to write")
    args = parser.parse_args()
    versions = " ".join(
        f"{m.__name__} {m.__version__}" for m in (sentence_transformers, transformers, torch)
    )
    np.savez_compressed(
        args.out,
        texts=np.frombuffer(json.dumps(TEXTS).encode(), np.uint8),
        made_with=np.frombuffer(versions.encode(), np.uint8),
        max_len=np.int32(MAX_LEN),
        layers_6=embed(args.model, 6),
        layers_3=embed(args.model, 3),
    )
    print(f"{len(TEXTS)} texts by {versions} -> {args.out}")


if __name__ == "__main__":
    main()
