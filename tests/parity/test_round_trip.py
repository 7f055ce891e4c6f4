"""Weights in, training here, weights out: what sentence-transformers makes of them is ours."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from corrector_jax import export, weights
from corrector_jax.checkpoint import Position
from corrector_jax.evaluate import trained
from corrector_jax.job import Job, make_job
from corrector_jax.train import train
from tests import tiny
from tests.parity import published

GTR = {"family": "t5", "dense": (24, False, torch.nn.Identity())}
LABSE = {"family": "bert", "pooling": "cls", "dense": (24, True, torch.nn.Tanh())}
PROMPTS = {"query": "ba be ", "document": "bu "}


def config_of(folder: Path, encoder: Path | str, **changes):
    """20 steps from an encoder."""
    changes = {"train__steps": 20, "checkpoint__every": 20, "mesh__devices": 1, **changes}
    changes = {"model__layers": 0, "eval__bm25": False, "strategy": "in_batch", **changes}
    return tiny.config(folder, model__weights=str(encoder), **changes)


def ours(job, params, queries: list[str], targets: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of texts by the job's own encoders."""
    encode = jax.jit(job.model.encode_queries), jax.jit(job.model.encode_targets)
    tokens = job.tokenization.queries(queries), job.tokenization.targets(targets)
    return tuple(np.asarray(f(params, t)) for f, t in zip(encode, tokens, strict=True))


@pytest.mark.parametrize(
    "published_as", [GTR, LABSE, {"family": "modernbert"}], ids=["gtr", "labse", "modernbert"]
)
def test_a_folder_comes_in_whole(tmp_path, published_as):
    folder = published.write_folder(tmp_path, **published_as, prompts=PROMPTS)
    lengths = {"data__query_max_len": 0, "data__target_max_len": 0}
    job = make_job(config_of(tmp_path / "run", folder, **lengths))
    params = job.init_state().params
    queries, targets = list(job.data.splits["dev"].texts), job.data.target_texts[:20]
    assert job.tokenization.query_prefix == PROMPTS["query"]
    model = published.load(folder)
    found = ours(job, params, queries, targets)
    np.testing.assert_allclose(found[0], model.encode_query(queries), atol=1e-4)
    np.testing.assert_allclose(found[1], model.encode_document(targets), atol=1e-4)
    assert np.abs(model.encode_query(queries) - model.encode(queries)).max() > 1e-3  # the prefix


@pytest.mark.parametrize("family", published.FAMILIES)
def test_import_and_export_is_tensor_identical(tmp_path, family):
    dense = (24, True, torch.nn.Tanh()) if family == "bert" else None
    folder = published.write_folder(tmp_path, family, dense=dense, prompts=PROMPTS)
    job = make_job(config_of(tmp_path / "run", folder))
    export.write_final(job, job.init_state().params, tmp_path, Position(), tmp_path / "out")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) == 1 + bool(dense)
    for file in files:
        before, after = load_file(folder / file), load_file(tmp_path / "out" / file)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
            np.testing.assert_array_equal(tensor, after[name])
    texts = ["ba be bi bo", "du"]
    found = published.load(tmp_path / "out").encode_query(texts)
    np.testing.assert_allclose(found, published.load(folder).encode_query(texts), atol=1e-6)
    again = weights.find(str(tmp_path / "out"))
    files = weights.find(str(folder))
    for name in ("pooling", "normalize", "query_prefix", "target_prefix", "tokenizer_json"):
        assert getattr(again, name) == getattr(files, name)


METRICS = ("recall@1", "recall@20", "recall@100", "mrr@10", "ndcg@10")


def measures(run: Path, job: Job, model: SentenceTransformer) -> tuple[dict, dict]:
    """Of the final evaluation: by the library's evaluator, and by ours."""
    split = job.data.splits[job.final_split]
    judged = zip(split.query_ids, split.positives, strict=True)
    evaluator = InformationRetrievalEvaluator(
        dict(zip(split.query_ids, split.texts, strict=True)),
        dict(zip(job.data.target_ids, job.data.target_texts, strict=True)),
        {query: {job.data.target_ids[row] for row in rows} for query, rows in judged},
        accuracy_at_k=[1],
        precision_recall_at_k=[1, 20, 100],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[10],
        main_score_function="dot",
        score_functions={"dot": lambda a, b: a @ b.T},
        write_csv=False,
    )
    found = evaluator(model)
    theirs = {name: found[f"dot_{name}"] for name in METRICS}
    return theirs, json.loads((run / "eval" / "after.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("published_as", "changes"),
    [
        (GTR, {}),
        (
            {"family": "bert", "pooling": "lasttoken"},
            {"model__shared_towers": False, "model__learn_beta": True, "model__projection": 12},
        ),
    ],
    ids=["gtr", "two-towers"],
)
def test_a_trained_encoder_goes_out_whole(tmp_path, published_as, changes):
    folder = published.write_folder(tmp_path, **published_as, prompts=PROMPTS)
    run = tmp_path / "workdir"
    train(config_of(tmp_path / "run", folder, **changes), run, started=time.monotonic())
    job, state, _ = trained(run)
    texts = job.data.target_texts[:30]
    queries = list(job.data.splits["test"].texts)
    model = published.load(run / "final")
    wanted = ours(job, state.params, queries, texts)
    ratio = float(job.model.beta_ratio(state.params))
    assert (ratio != 1) == job.model.learn_beta
    found = model.encode_query(queries), model.encode_document(texts)
    np.testing.assert_allclose(found[0] * ratio, wanted[0], atol=1e-4)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)
    untouched = published.load(folder).encode_document(texts)
    if not changes.get("model__projection"):
        assert np.abs(found[1] - untouched).max() > 0.01
    if not job.model.shared:
        for tower, texts_of, rows in (("query", queries, 0), ("target", texts, 1)):
            alone = published.load(run / "final" / tower)
            encode = alone.encode_query if tower == "query" else alone.encode_document
            np.testing.assert_allclose(encode(texts_of), found[rows], atol=1e-5)
    theirs, own = measures(run, job, model)
    del own["exact_loss"]  # their evaluator has no softmax
    assert theirs == pytest.approx(own, abs=1e-3)


def test_the_real_minilm(tmp_path):
    run = tmp_path / "workdir"
    config = config_of(tmp_path / "run", "all-MiniLM-L6-v2", model__layers=2)
    train(config, run, started=time.monotonic())
    job, state, _ = trained(run)
    model = published.load(run / "final")
    texts = job.data.target_texts[:50]
    _, wanted = ours(job, state.params, ["a query"], texts)
    np.testing.assert_allclose(model.encode_document(texts), wanted, atol=1e-4)
    theirs, own = measures(run, job, model)
    del own["exact_loss"]  # their evaluator has no softmax
    assert theirs == pytest.approx(own, abs=1e-3)
