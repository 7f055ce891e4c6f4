"""Planning from shapes: against calculations by hand, and what must never cross the network."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from corrector_jax import chips, compile_ahead
from corrector_jax import config as configs
from corrector_jax.program import make_program, placement
from corrector_jax.types import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
N, BATCH, DRAWS, KNOWN = 10_007, 16, 3, 2
WIDTH, INNER, DIM, LAYERS, LENGTH = 64, 128, 64, 2, 16


def config(folder: Path, **changes: object):
    return tiny.config(
        folder,
        **{
            "mesh__devices": 0,
            "model__layers": LAYERS,
            "model__hidden": WIDTH,
            "model__intermediate": INNER,
            "compile__targets": N,
            "compile__known": KNOWN,
            "compile__queries": 64,
            "train__batch_size": BATCH,
            "negatives__draws": DRAWS,
            "negatives__block_rows": 8,
            "cache__dtype": "bfloat16",
            "eval__batch_size": 64,
            **changes,
        },
    )


@functools.cache
def compiled(folder: Path, topology: str, size: int = N) -> dict[str, compile_ahead.Compiled]:
    found = config(folder, compile__targets=size)
    devices, chip = chips.topology(topology)
    encoder, lengths = compile_ahead.find_encoder(found)
    program = make_program(found, encoder, size, placement(found, devices))
    resident, steps = compile_ahead.lower_steps(program, lengths)
    with chips.compiling(devices):
        return {
            name: compile_ahead.measure(name, lower, resident, own, chip)
            for name, lower, own in steps
            if name in ("train", "embed")
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def test_what_a_device_holds_is_what_shapes_say(folder):
    """Parameters and optimizer on every device; a share of rows, tokens and examples."""
    steps, rows = compiled(folder, "cpu:8"), math.ceil(N / 64) * 64 // 8
    vocabulary = len(tiny.WORDS) + 4
    encoder = (
        (vocabulary + 16 + 2) * WIDTH + 2 * WIDTH  # tokens, places, kinds, norm
        + LAYERS * (4 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * INNER + (INNER + 1) * WIDTH + 4 * WIDTH)
    )  # fmt: skip
    corrector = 2 * (DIM + 1) * DIM
    numbers = 3 * encoder + 3 * corrector  # and two moments each
    pairs = BATCH * (1 + DRAWS) * (2 * DIM + 1)  # the ring of one step
    cache, tokens = rows * (2 * DIM + 4), rows * 2 * LENGTH
    expected = 4 * (numbers + pairs) + cache + tokens
    batch = BATCH // 8 * (4 * 8 + 4 + 4 * KNOWN + 1)  # query tokens, positive, known, valid
    assert steps["train"].own == batch
    assert steps["embed"].own == 64 * 4
    for step in steps.values():
        assert step.resident == pytest.approx(expected, rel=0.001)
        assert step.peak == step.resident + step.own + step.temporaries


@pytest.mark.parametrize(
    ("changes", "mined"),
    [({"strategy": "mined"}, DRAWS), ({"strategy": "uniform", "negatives__mined": 2}, 2)],
)
def test_mined_negatives_come_with_the_batch(folder, changes, mined):
    asked = config(folder, **changes)
    encoder, lengths = compile_ahead.find_encoder(asked)
    program = make_program(asked, encoder, N, placement(asked))
    _, steps = compile_ahead.lower_steps(program, lengths)
    (own,) = [own for name, lower, own in steps if name == "train" and lower()]
    assert own == BATCH // 8 * (4 * 8 + 4 + 4 * KNOWN + 1 + 4 * mined)


def test_a_reader_s_steps_and_what_it_reads_are_planned(folder):
    plain, asked = (config(folder, reader=reader) for reader in (False, True))
    encoder, lengths = compile_ahead.find_encoder(asked)
    reader = compile_ahead.find_reader(asked)
    program = make_program(asked, encoder, N, placement(asked), reader)
    resident, steps = compile_ahead.lower_steps(program, lengths)
    assert [name for name, _, _ in steps] == [
        "embed", "search", "loss", "given", "train", "read", "probe", "gap",
    ]  # fmt: skip
    own = {name: own for name, _, own in steps}
    batch = BATCH // 8 * (4 * 8 + 4 + 4 + 1 + 4 * (6 + 3))  # with question and answer
    assert own["train"] == own["given"] == batch
    for name, lower, _ in steps:
        if name in ("given", "read"):
            assert lower().as_text()
    # Beside what a retriever holds: the reader, its moments, and its own table of the corpus; K = 3
    # pairs a query are kept for the corrector, not a positive and m draws.
    state = compile_ahead.abstract_state(program)
    reads = compile_ahead.held_bytes(state.params["reader"])
    made = make_program(plain, encoder, N, placement(plain))
    before = compile_ahead.lower_steps(made, lengths)[0]
    fewer = 4 * BATCH * (1 + DRAWS - 3) * (2 * DIM + 1)
    assert resident - before > 3 * reads + N * 12 * 2 // 8 - fewer
    assert compile_ahead.find_reader(
        config(folder, reader=True, reader__weights="google-t5/t5-base")
    ).config.encoder.hidden_size == 768  # fmt: skip


def test_the_work_is_what_the_method_says(folder):
    steps = compiled(folder, "cpu:8")

    def encode(texts: int, length: int) -> float:
        dense = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
        return 2.0 * texts * length * LAYERS * (dense + 2 * length * WIDTH)

    assert steps["embed"].cost.flops == pytest.approx(encode(64 // 8, LENGTH), rel=0.01)
    # The mlp on every row and a product with every query; then the blocks that won.
    rows = math.ceil(N / 64) * 64 // 8
    won = math.ceil(BATCH * DRAWS / 8) * 8
    sweep = rows * (4 * DIM * DIM + 2 * BATCH * DIM) + won * (4 * DIM * DIM + 2 * DIM)
    assert steps["train"].cost.flops_of["sweep"] == pytest.approx(sweep, rel=0.03)
    targets, queries = encode(BATCH * (1 + DRAWS) // 8, LENGTH), encode(BATCH // 8, 8)
    rest = steps["train"].cost.flops - steps["train"].cost.flops_of["sweep"]
    assert rest > 3 * (targets + queries)  # forward, and twice as much backward
    assert rest < 3 * (targets + queries) + 3e8 / 8  # the loss, and the corrector's two updates


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_neither_the_cache_nor_a_score_of_every_target_crosses_the_network(folder):
    size = 1_000_003
    for step in compiled(folder, "v5e:2x2", size).values():
        largest = step.cost.largest
        assert largest is not None  # the gradient of all parameters
        assert largest.bytes < 0.02 * size * DIM * 2 / 4, largest  # a device's share of the cache
        assert largest.bytes < 0.02 * BATCH * size * 4 / 4, largest  # its share of all scores


def test_the_command_prints_writes_and_says_whether_it_fits(folder, tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(configs.to_json(config(folder)))
    file = tmp_path / "plan.py"
    file.write_text(
        "from pathlib import Path\nfrom corrector_jax import config\n"
        f"get_config = lambda: config.from_json(Path({str(saved)!r}).read_text())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "corrector_jax.main", f"--config={file}", "--mode=compile",
         "--topology=cpu:8", f"--workdir={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("8 devices", "10,007 targets", "compiling the train step", "not known", "network"):
        assert word in done.stdout
    record = json.loads((tmp_path / "compile" / "cpu-8.json").read_text())
    assert record["fits"] is None
    assert set(record["steps"]) == {"embed", "search", "loss", "train", "probe", "gap"}
    assert record["steps"]["train"]["flops"] > record["steps"]["train"]["flops_of_sweep"] > 0


def test_what_does_not_fit_says_what_to_change(folder, monkeypatch, tmp_path, capsys):
    small = chips.Chip("small", memory_bytes=1e6)
    monkeypatch.setattr(chips, "topology", lambda name: (jax.devices()[:2], small))
    resident, steps = 2e6, [("train", lambda: jax.jit(jax.numpy.negative).lower(1.0), 0)]
    monkeypatch.setattr(compile_ahead, "lower_steps", lambda *_: (resident, steps))
    assert not compile_ahead.compile_run(config(folder), "small:2", tmp_path / "plan.json")
    said = capsys.readouterr().out
    assert "it does not fit (train): try, in this order, --config.model.dtype=bfloat16" in said
    assert "--config.cache.dtype=int8" in said
    assert not json.loads((tmp_path / "plan.json").read_text())["fits"]


def test_what_is_not_known_is_asked_for(folder):
    with pytest.raises(UserError, match=r"config\.compile\.targets"):
        compile_ahead.count_targets(config(folder, compile__targets=0))
    nq = configs.default()
    nq.data.published = "nq"
    assert compile_ahead.count_targets(nq) == 21_015_324
    nq.data.max_targets = 1000
    assert compile_ahead.count_targets(nq) == 1000
    nq.model.weights = "sentence-transformers/gtr-t5-base"
    encoder, lengths = compile_ahead.find_encoder(nq)
    assert lengths == (32, 64)
    assert (encoder.dim, encoder.config.num_layers, encoder.normalize) == (768, 12, True)
