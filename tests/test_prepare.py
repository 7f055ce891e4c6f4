"""--mode=prepare_data and a run on what it made, for every published data set."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest

from corrector_jax import config as configs
from corrector_jax import paths
from corrector_jax.check_data import check_data
from corrector_jax.prepare import prepare_data
from corrector_jax.train import train
from corrector_jax.types import UserError
from tests import published_files, tiny

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("nq", "triviaqa", "msmarco", "hotpotqa")


def overrides(folder: Path) -> dict[str, object]:
    """Sizes of a tiny run, for data below `folder`."""
    return tiny.overrides(folder) | {
        "data.path": str(folder / "everything"),
        "data.cache_dir": str(folder / "cache"),
        "cache.dtype": "float32",  # as other tests have it: their programs are compiled
        "data.verify": False,
        "train.steps": 20,
    }


def config_of(name: str, folder: Path, **changes: object):
    spec = util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    configs.validate(config)  # as it stands
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(overrides(folder) | keys)
    configs.validate(config)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("published")


# Here they are trained on; what all four make of what was published: data/test_builders.py.
@pytest.mark.parametrize(
    "name",
    [n if n == "nq" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_prepare_then_train_twenty_steps(folder, name, capsys):
    config = config_of(name, folder, data__cache_dir=str(folder / "cache" / name))
    with pytest.raises(UserError, match=f"{name} is not in .* yet: .* --mode=prepare_data first"):
        train(config, folder / name, started=time.monotonic())
    published_files.write(name, folder / "everything")
    prepare_data(config)
    said = capsys.readouterr()
    assert f"data: {name}, 67 targets, queries: 32 train, 12 dev" in said.out
    assert "tokenizing: 67/67 targets" in said.err

    prepare_data(config)  # finds everything done
    again = capsys.readouterr()
    assert "wrote" not in again.out
    assert "tokenizing" not in again.err

    train(config, folder / name, started=time.monotonic())
    assert "tokenizing: 67/67 targets" not in capsys.readouterr().err
    results = json.loads((folder / name / "results.json").read_text())
    assert results["steps"] == 20
    assert 0 <= results["eval"]["after"]["mrr@10"] <= 1
    losses = [
        json.loads(line)["train/loss"]
        for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])

    check_data(config, folder / name)  # finds the same data
    assert f"{name}: 67 targets" in capsys.readouterr().out


def test_the_command_line_says_what_to_do_without_a_network(tmp_path):
    flags = overrides(tmp_path) | {"data.verify": True}
    # A proxy that refuses every connection stands for a host that is out of reach.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "corrector_jax.main"),
            *("--config=configs/nq.py", "--mode=prepare_data"),
            *(f"--config.{key}={value}" for key, value in flags.items()),
        ],
        cwd=ROOT,
        env={"PATH": "", "HTTPS_PROXY": "http://127.0.0.1:9", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: psgs_w100.tsv.gz cannot be downloaded (")
    assert f"into {tmp_path}/everything/published/wikipedia, packed or unpacked" in line


def test_without_tensorflow_datasets_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"tensorflow_datasets, .* pip install tensorflow-datasets"):
        prepare_data(config_of("nq", tmp_path))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "free_bytes", lambda path: 30 * 10**9)
    with pytest.raises(UserError) as error:
        prepare_data(config_of("nq", tmp_path, data__verify=True))
    message = str(error.value)
    assert f"nq needs 36.8 GB below {tmp_path}" in message
    assert "(downloads 7.3, records 13.8, tables 15.7)" in message
    assert "the disk has 30.0 GB left" in message
    assert not (tmp_path / "everything").exists()


def test_records_are_refused_where_they_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.path is 'memory://x' .* a folder of this"):
        prepare_data(config_of("nq", tmp_path, data__path="memory://x"))
    with pytest.raises(UserError, match=r"config\.data\.path is empty"):
        config_of("nq", tmp_path, data__path="")


def test_other_data_is_tokenized_too(tmp_path, capsys):
    prepare_data(tiny.config(tmp_path, data__cache_dir=str(tmp_path / "cache")))
    assert "67 targets" in capsys.readouterr().out
    assert list((tmp_path / "cache" / "tokens").glob("*/ids.npy"))
