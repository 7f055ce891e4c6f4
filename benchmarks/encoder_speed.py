"""Embedding and training speed beside sentence-transformers: same model, texts, tokens and loss.

    make parity && .venv-parity/bin/python benchmarks/encoder_speed.py [--dtype=bfloat16]

writes `benchmarks/results/encoder_speed_PLATFORM_DTYPE.json`. Both sides run in one process, by
turns, so that whatever else the machine does hits both alike; a ratio is that of two neighbouring
turns, and the median of those is the result.

* embedding: texts to vectors, tokenizing included. Here as `--mode=embed` does it; there
  `SentenceTransformer.encode`. Both sort by length.
* training: one step on the same token ids, queries and targets in full batches, in-batch softmax,
  AdamW behind a clip of the norm. Here the package's own step (strategy in_batch); there a plain
  loop over the same modules, cross entropy of the scaled products.

bfloat16: here `config.model.dtype`; there autocast. On a GPU the share of the peak is the floating
point operations of the dense layers and attention over time, over --peak_tflops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from corrector_jax import config as configs
from corrector_jax import export, rng
from corrector_jax.checkpoint import Position
from corrector_jax.embed import embed_table
from corrector_jax.job import make_job
from corrector_jax.train import make_batch

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--weights", default="all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=1024, help="embedded in one turn")
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest text")
    parser.add_argument("--batch", type=int, default=32, help="queries of a training step")
    parser.add_argument("--steps", type=int, default=3, help="training steps in one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak_tflops", type=float, default=0.0)
    parser.add_argument("--note", default="", help="what else the machine did")
    args = parser.parse_args()

    config = configs.default()
    config.update_from_flattened_dict(
        {
            "strategy": "in_batch",
            "data.query_max_len": args.length,
            "data.target_max_len": args.length,
            "data.max_targets": args.texts,
            "model.weights": args.weights,
            "model.dtype": args.dtype,
            "train.batch_size": args.batch,
            "mesh.devices": 1,
        }
    )
    configs.validate(config)
    job = make_job(config)
    state = job.init_state()
    with tempfile.TemporaryDirectory() as folder:
        export.write_final(job, state.params, Path(folder), Position(), Path(folder))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = SentenceTransformer(folder, device=device, local_files_only=True)

    results = {
        "embedding": turns(*embedding(job, state, model, args), args.turns),
        "training": turns(*training(job, state, model, args), args.turns),
    }
    for name, result in results.items():
        if args.peak_tflops:
            share = result.pop("flops") / result["seconds_here"] / args.peak_tflops / 1e12
            result["share_of_peak"] = round(share, 3)
        print(f"{name}: {result['ratio']:.2f} times as fast ({result['ratios']})")
    record = {
        "command": "benchmarks/encoder_speed.py",
        **{key: value for key, value in vars(args).items() if value},
        "platform": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        **results,
    }
    kind = jax.default_backend()
    path = ROOT / "benchmarks" / "results" / f"encoder_speed_{kind}_{args.dtype}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


Turn = Callable[[], object]


def embedding(job, state, model, args) -> tuple[Turn, Turn, float]:
    """One turn here, one turn there, and the operations of one."""
    texts = list(job.data.target_texts)

    def here() -> np.ndarray:
        return embed_table(
            job.model,
            state.params,
            job.tokenization.targets(texts),
            pad_id=job.tokenization.tokenizer.pad_id,
            block=job.config.eval.batch_size,
            place=job.place,
        )

    def there() -> np.ndarray:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return model.encode(texts, batch_size=job.config.eval.batch_size)

    worst = np.abs(here() - there()).max()
    assert worst < (1e-4 if args.dtype == "float32" else 5e-2), f"they differ by {worst}"
    used = int((job.tokenization.targets(texts) != job.tokenization.tokenizer.pad_id).sum())
    return here, there, 2.0 * _weights(job) * used


def training(job, state, model, args) -> tuple[Turn, Turn, float]:
    """One turn here, one turn there, and the operations of one."""
    step_fn = job.train_step()
    batches = [make_batch(job, step) for step in range(args.steps)]
    table = np.asarray(job.tokens.ids)
    held = [state]

    def here() -> None:
        for step, batch in enumerate(batches):
            key = rng.key(0, "step", step)
            held[0], _, measured = step_fn(held[0], None, job.tokens, batch, key)
        jax.block_until_ready(measured)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)

    def embed(tokens: np.ndarray) -> torch.Tensor:
        ids = torch.tensor(tokens.astype(np.int64), device=model.device)
        mask = (ids != job.tokenization.tokenizer.pad_id).long()
        return model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]

    def there() -> None:
        for batch in batches:
            low = args.dtype == "bfloat16"
            with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
                queries = embed(np.asarray(batch.query_tokens))
                targets = embed(table[np.asarray(batch.positive)])
                scores = job.method.beta * queries.float() @ targets.float().T
                wanted = torch.arange(len(scores), device=scores.device)
                loss = torch.nn.functional.cross_entropy(scores, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        float(loss.detach())

    model.eval()  # no dropout, as here
    width = batches[0].query_tokens.shape[1] + table.shape[1]
    return here, there, 6.0 * _weights(job) * args.steps * args.batch * width


def _weights(job) -> float:
    """Parameters of the dense layers: those that every token is multiplied by."""
    layers = {k: v for k, v in job.encoder_params.items() if k.startswith("layer_")}
    return float(sum(leaf.size for leaf in jax.tree.leaves(layers) if leaf.ndim == 2))


def turns(here: Turn, there: Turn, flops: float, count: int) -> dict:
    """By turns, after one of each that compiles and warms up."""
    times: dict[str, list[float]] = {"here": [], "there": []}
    here(), there()
    for turn in range(count):
        order = (("here", here), ("there", there))
        for name, run in order if turn % 2 else order[::-1]:
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    ratios = [there / here for here, there in zip(times["here"], times["there"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds_here": round(statistics.median(times["here"]), 4),
        "seconds_there": round(statistics.median(times["there"]), 4),
        "flops": flops,
    }


if __name__ == "__main__":
    main()
