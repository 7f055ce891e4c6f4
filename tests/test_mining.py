"""--mode=mine, and training on what it finds."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from corrector_jax import config as configs
from corrector_jax import paths
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.job import load_data, make_job
from corrector_jax.mining import choose, mine
from corrector_jax.preemption import PreemptedError, Preemption
from corrector_jax.ranking import Ranking, bm25
from corrector_jax.train import make_batch, train
from corrector_jax.types import UserError
from tests import oracle, tiny

DEPTH, SKIP, KEEP = 40, 2, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mining")


def config_of(folder, **changes):
    mining = {"mine__depth": DEPTH, "mine__skip": SKIP, "mine__keep": KEEP}
    return tiny.config(folder, **{**mining, "eval__bm25": False, **changes})


def lines(path: Path) -> list[tuple[str, str, int, float]]:
    """(query, target, rank, score) of every line."""
    fields = [line.split() for line in path.read_text().splitlines()]
    return [(query, target, int(rank), float(s)) for query, _, target, rank, s, _ in fields]


def judged(data) -> dict[str, set[str]]:
    """Training query -> its known positives, by name."""
    split = data.splits["train"]
    return {
        query: {data.target_ids[row] for row in rows}
        for query, rows in zip(split.query_ids, split.positives, strict=True)
    }


def window(ranked: list[tuple], known: set, limit: float = np.inf) -> list[tuple]:
    """What a query keeps of (target, score), best first: one rule a line."""
    left = [one for one in ranked if one[0] not in known]
    left = left[SKIP:]
    left = [one for one in left if one[1] <= limit]
    return left[:KEEP]


def test_what_is_kept_follows_the_rules_query_by_query():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(60)[:30] for _ in range(200)]).astype(np.int32)
    scores = -np.sort(-rng.normal(size=rows.shape).astype(np.float32), axis=1)
    rows[::7, 12:], rows[5] = -1, -1
    scores[rows < 0] = 0
    positives = [np.sort(rng.choice(60, 1 + i % 4, replace=False)) for i in range(200)]
    positives[8] = np.sort(rows[8, 15:17])  # the best positive is not among the first ten
    found = Ranking(rows, scores)
    unfiltered = choose(found, positives, skip=SKIP, keep=KEEP)
    for share, margin in ((0.0, 0.0), (0.9, 0.0), (0.0, 0.4), (0.9, 0.4), (1.0, 0.0)):
        kept = choose(
            found, positives, skip=SKIP, keep=KEEP, max_relative_score=share, margin=margin
        )
        assert kept.rows.shape == kept.scores.shape == (200, KEEP)
        for i in range(200):
            known = set(positives[i].tolist())
            ranked = [(y, s) for y, s in zip(rows[i].tolist(), scores[i], strict=True) if y >= 0]
            limit, best = np.inf, [s for y, s in ranked if y in known][:1]
            if share or margin:
                limit = best[0] - margin if best else -np.inf
            if share and best:
                limit = min(limit, best[0] - (1 - share) * abs(best[0]))
            wanted = window(ranked, known, limit)
            there = kept.rows[i] >= 0
            pairs = zip(kept.rows[i, there].tolist(), kept.scores[i, there], strict=True)
            assert list(pairs) == wanted
            assert not there[len(wanted) :].any()
        if share or margin:
            assert 0 < (kept.rows >= 0).sum() < (unfiltered.rows >= 0).sum()


def test_bm25_finds_negatives_that_training_reads(folder, capsys):
    config = config_of(folder)
    output = mine(config, folder / "words")
    assert output == folder / "words" / "negatives.trec"
    data = load_data(config)
    split, known = data.splits["train"], judged(data)
    ranked = bm25(data.target_texts, split.texts, DEPTH)
    wanted = []
    for query, rows, scores in zip(split.query_ids, ranked.rows, ranked.scores, strict=True):
        of_query = [(data.target_ids[y], s) for y, s in zip(rows, scores, strict=True) if y >= 0]
        kept = enumerate(window(of_query, known[query]), start=1)
        wanted += [(query, target, rank, pytest.approx(s)) for rank, (target, s) in kept]
    assert lines(output) == wanted
    assert len(wanted) > 100
    assert "ranking by BM25: 40/40 queries" in capsys.readouterr().err
    with pytest.raises(UserError, match="is there already"):
        mine(config, folder / "words")

    job = make_job(config_of(folder, strategy="mined", negatives__path=str(output)))
    for query, rows in zip(split.query_ids, job.mined, strict=True):
        of_query = [target for other, target, _, _ in lines(output) if other == query]
        assert [data.target_ids[y] for y in rows] == of_query
    assert "training queries have some" in capsys.readouterr().out


def test_a_run_s_encoder_finds_what_brute_force_finds(folder, monkeypatch):
    """With filters, and more queries and targets than meet at once."""
    monkeypatch.setattr("corrector_jax.mining.GROUP", 16)
    monkeypatch.setattr("corrector_jax.mining.TOGETHER", 2)
    plain = config_of(folder, strategy="in_batch", mesh__devices=1)
    job = make_job(plain)
    rng = np.random.default_rng(0)
    state = job.init_state()
    params = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), state.params
    )
    with Checkpoints.writable(folder / "run") as checkpoints:
        paths.write(folder / "run" / "config.json", configs.to_json(plain))
        moved = dataclasses.replace(state, params=params)
        checkpoints.save(moved, Position(step=4, data=job.fingerprint))
    share, margin = 0.97, 0.01
    config = config_of(
        folder, mesh__devices=1, mine__source=str(folder / "run"),
        mine__output=str(folder / "by-run.trec"), mine__depth=tiny.TARGETS,
        mine__max_relative_score=share, mine__margin=margin,
    )  # fmt: skip
    output = mine(config, folder / "elsewhere")
    assert output == folder / "by-run.trec"
    assert output.read_text().split()[5] == "run-step-4"

    tokens = job.query_tokens["train"]
    queries = np.asarray(oracle.jit(job.model.encode_queries)(params, tokens))
    texts = job.tokenization.targets(job.data.target_texts)
    targets = np.asarray(oracle.jit(job.model.encode_targets)(params, texts))
    scores, known, ids = queries @ targets.T, judged(job.data), job.data.target_ids
    found: dict[str, list] = {query: [] for query in known}
    for query, target, _, score in lines(output):
        found[query].append((target, pytest.approx(score, abs=1e-5)))
    fewer = 0
    for query, row in zip(known, scores, strict=True):
        ranked = [(ids[y], row[y]) for y in np.argsort(-row)]
        best = max(score for target, score in ranked if target in known[query])
        limit = min(best - margin, best - (1 - share) * abs(best))
        wanted = window(ranked, known[query], limit)
        assert wanted == found[query]
        fewer += wanted != window(ranked, known[query])
    assert fewer > 5

    another = tiny.write_data(folder / "another")
    with (another / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "more", "title": "", "text": "ba be"}) + "\n")
    other = config_of(folder, data__path=str(another), mine__source=str(folder / "run"))
    with pytest.raises(UserError, match="was trained on other targets or queries"):
        mine(other, folder / "nowhere")


def test_an_untrained_encoder_ranks_whatever_the_strategy_needs(folder):
    """Mining comes before the file that strategy 'mined' reads."""
    config = config_of(
        folder, strategy="mined", negatives__path=str(folder / "later.trec"),
        mine__source="encoder", mine__output=str(folder / "later.trec"), mesh__devices=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="which is not a file"):
        make_job(config)
    mine(config, folder / "encoder")
    assert config.strategy == "mined"
    known = judged(load_data(config))
    found = lines(folder / "later.trec")
    assert len(found) == tiny.TRAIN * KEEP
    assert not any(target in known[query] for query, target, _, _ in found)
    assert sum(map(len, make_job(config).mined)) == len(found)


def test_an_earlier_run_s_file_is_filtered(folder):
    data = load_data(config_of(folder))
    (query, known), *_ = judged(data).items()
    free = [target for target in data.target_ids if target not in known][:8]
    ranked = [*free[:4], min(known), *free[4:]]
    earlier = folder / "earlier.trec"
    rows = enumerate(ranked, start=1)
    earlier.write_text("".join(f"{query} Q0 {t} {rank} {10 - rank} x\n" for rank, t in rows))
    config = config_of(
        folder, mine__source=str(earlier), mine__output=str(folder / "filtered.trec"),
        mine__margin=2.0,
    )  # fmt: skip
    # The positive has 5, so that 4 is too close, and four score above it.
    assert lines(mine(config, folder)) == [
        (query, free[5], 1, 3.0), (query, free[6], 2, 2.0), (query, free[7], 3, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mine__source": "bm52"}, "config.mine.source is 'bm52': write bm25, encoder, the folder"),
        ({"mine__output": "found.trec.gz"}, r"write a name that ends with \.trec"),
        ({"mine__margin": 1e9}, "leaves no negative for any training query"),
    ],
)
def test_what_cannot_be_mined_is_refused(folder, changes, said):
    with pytest.raises(UserError, match=said) as error:
        mine(config_of(folder, **changes), folder / "refused")
    assert "\n" not in str(error.value)
    assert not (folder / "refused").exists()


def test_a_file_or_data_without_negatives_is_refused(folder):
    with pytest.raises(UserError, match=r"names none for any training query.*--mode=mine"):
        make_job(config_of(folder, strategy="mined"))
    for name, content, said in (
        ("empty.trec", "", r"empty\.trec names none"),
        ("wrong.trec", "train0 Q0 nowhere 1 1 x\n", r"wrong\.trec:1 names target 'nowhere'"),
    ):
        (folder / name).write_text(content)
        path = str(folder / name)
        with pytest.raises(UserError, match=said):
            make_job(config_of(folder, strategy="mined", negatives__path=path))


# Whole runs.


@pytest.fixture(scope="module")
def negatives(folder) -> Path:
    """A file of them; some training queries have one alone, and one has none."""
    config = config_of(folder, mine__output=str(folder / "some.trec"), mine__skip=0)
    output = mine(config, folder)
    few = {"train3", "train7", "train20"}
    kept = [
        line
        for line in output.read_text().splitlines(keepends=True)
        if not line.startswith("train11 ")
        and (line.split()[0] not in few or line.split()[3] == "1")
    ]
    output.write_text("".join(kept))
    return output


RUNS = {
    "mined": {"strategy": "mined", "negatives__max_relative_score": 0.99},
    "mix": {"negatives__mined": 2, "negatives__in_batch": True, "negatives__draws": 2},
}


def saved(config, workdir: Path) -> dict[str, bytes]:
    """Every leaf of the last checkpoint and its cache, as bytes."""
    job = make_job(config)
    cache = job.empty_cache() if job.uses_cache else None
    with Checkpoints.readable(workdir) as checkpoints:
        state, cache, _ = checkpoints.resume(
            job.init_state(), cache, data=job.fingerprint, made_by=job.made_by
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path((state, cache))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mined", "mix"])
def test_runs_with_mined_negatives_resume_to_the_same_bytes(folder, negatives, name, monkeypatch):
    config = config_of(folder, negatives__path=str(negatives), **RUNS[name])
    drawn, mined = (3, 3) if name == "mined" else (4, 2)
    with monkeypatch.context() as patched:
        if name == "mix":  # one summary is enough
            patched.setattr("corrector_jax.train.finish", lambda *arguments: None)
        train(config, folder / name, started=time.monotonic())
    assert (folder / name / "results.json").exists() == (name == "mined")
    with Checkpoints.readable(folder / name) as checkpoints:
        ledger = checkpoints.read(8)[0].ledger
    assert ledger["initial"] == (0 if name == "mined" else tiny.TARGETS)
    assert ledger["encoded_with_grad"] == 8 * 8 * (1 + drawn)
    rows = [json.loads(row) for row in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 8
    assert min(row["train/loss"] for row in steps) > 0
    if name == "mined":
        assert 0 < max(row["train/dropped_share"] for row in steps) <= 1
    job = make_job(config)
    for step in range(8):  # each query gets its own, and as many as there are
        batch = make_batch(job, step)
        assert batch.mined.shape == (8, mined)
        for tokens, chosen in zip(batch.query_tokens, batch.mined, strict=True):
            table = job.query_tokens["train"][:, : len(tokens)]
            (query,) = np.flatnonzero((table == tokens).all(axis=1))
            taken, own = {y for y in chosen.tolist() if y >= 0}, set(job.mined[query].tolist())
            assert taken <= own
            assert len(taken) == min(len(own), mined)

    asked = 0

    def check(self: Preemption) -> None:
        nonlocal asked
        asked += 1
        if asked == 12:
            raise PreemptedError("the test")

    workdir = folder / f"{name}-stopped"
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "check", check)
        with pytest.raises(PreemptedError):
            train(config, workdir, started=time.monotonic())
    with Checkpoints.readable(workdir) as checkpoints:
        assert 0 < checkpoints.steps()[-1] < 8
    with monkeypatch.context() as patched:
        patched.setattr("corrector_jax.train.finish", lambda *arguments: None)
        train(config, workdir, started=time.monotonic())
    assert saved(config, workdir) == saved(config, folder / name)


def test_other_negatives_are_other_data_though_the_path_is_the_same(folder, negatives):
    config = config_of(folder, negatives__path=str(negatives), **RUNS["mined"])
    before = make_job(config).fingerprint
    assert make_job(config).fingerprint == before
    negatives.write_text("".join(negatives.read_text().splitlines(keepends=True)[:-1]))
    assert make_job(config).fingerprint != before
