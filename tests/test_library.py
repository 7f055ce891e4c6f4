"""docs/library.md is a program that works, and needs nothing but layers 1 and 2."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "library.md"


def program() -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.fixture(scope="module")
def ran():
    """What the program leaves behind."""
    made: dict = {}
    exec(compile(program(), str(PAGE), "exec"), made)
    return made


def test_the_corrector_is_used_and_brings_the_softmax_closer(ran):
    assert float(ran["gate"]) == 1.0
    assert ran["kl_corrected"] < 0.6 * ran["kl_stale"]


def test_the_reader_s_own_encoder_learns(ran):
    fresh, queries = (np.asarray(ran[name]) for name in ("fresh", "queries"))
    best = (queries @ fresh.T).argmax(axis=1)
    assert (best == ran["rows"]).mean() > 0.5  # by chance: 1 / 600


def test_no_draw_is_a_known_positive_and_the_cache_is_as_it_was_written(ran):
    drawn, batch = ran["drawn"], ran["batch"]
    assert np.asarray(drawn.valid).all()
    assert not (np.asarray(drawn.ids) == batch.positive[:, None]).any()
    assert set(np.asarray(ran["cache"].written_at)[: ran["TARGETS"]]) == {0}


def test_it_imports_layers_1_and_2_alone():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    stack = next(c for c in layers["contracts"] if c["name"].startswith("Imports point"))["layers"]
    names = [set(re.split(r"\s[|:]\s", layer)) for layer in stack]
    lowest = next(i for i, layer in enumerate(names) if "negatives" in layer)
    allowed = set().union(*names[lowest:])
    assert {"cache", "losses", "models"} <= allowed
    imports = re.findall(r"^(?:import|from) .+$", program(), re.M)
    code = "\n".join([*imports, "import sys", "print(*sys.modules)"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = [name for name in done.stdout.split() if name.startswith("corrector_jax.")]
    assert {name.split(".")[1] for name in loaded} <= allowed
    assert "ml_collections" not in done.stdout.split()
