"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from corrector_jax import config as configs
from corrector_jax import main
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "corrector_jax.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def flags_of(folder: Path) -> list[str]:
    return [f"--config.{key}={value}" for key, value in tiny.overrides(folder).items()]


def parse(*arguments: str) -> None:
    main._parse(["main", *arguments])


QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=configs/nope.py"], "configs/nope.py is not a file"),
        ([QUICKSTART, "--config.train.stps=5"], "did you mean train.steps?"),
        ([QUICKSTART, "--config.zzz=5"], "see --help"),
        ([QUICKSTART, "--config.train=5"], "config.train is not a key"),
        ([QUICKSTART, "--bogus=1"], "bogus"),
    ],
)
def test_what_is_misspelt_is_named_in_one_sentence(arguments, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(main.UserError, match=said.replace("?", r"\?")) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)


def test_a_bad_value_ends_with_code_2_one_line_and_no_traceback():
    for arguments, said in (
        ([QUICKSTART, "--config.train.steps=0"], "config.train.steps is 0: write 1 or more"),
        ([QUICKSTART, "--config.train.steps=many"], "--config.train.steps=many"),
        ([], "--config is missing"),
        ([QUICKSTART, "--mode=dance"], "write train, evaluate, prepare_data, check_data, compile"),
        (["--mode=evaluate", "--workdir=/nowhere/at/all"], "config.json"),
        ([QUICKSTART, f"--workdir={ROOT / 'setup.py'}/run"], "--workdir"),
    ):
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_compiled_programs_are_kept(tmp_path):
    code = "from corrector_jax import main; main._keep_compiled(); import jax; print({})"
    for given, where in (
        ({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "corrector_jax" / "jax"),
        ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}, tmp_path / "own"),
    ):
        env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | given
        done = subprocess.run(
            [sys.executable, "-c", code.format("jax.config.jax_compilation_cache_dir")],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == str(where), done.stderr


def test_a_signal_after_the_end_changes_nothing(tmp_path):
    """The first thing done at exit is what was registered last: the signal comes after it."""
    code = (
        "import atexit, os, signal, sys; from corrector_jax import main, train\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "train.train = lambda *_, **__: None\n"
        f"sys.argv = ['main', '{QUICKSTART}', '--workdir={tmp_path}']\n"
        "main.cli()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_modes_on_a_finished_run_take_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mode in ("export", "embed", "search", "serve"):
        own = main._with_own_config(["main", f"--mode={mode}", f"--config.{mode}.path=x"])
        assert own[1] == f"--config={configs.__file__}"
        with pytest.raises(main.UserError, match=rf"seed cannot be set under --mode={mode}"):
            main._with_own_config(["main", f"--mode={mode}", "--config.seed=1"])
    own = main._with_own_config(["main", "--mode=evaluate", "--config.eval.search=scann"])
    assert own[1] == f"--config={configs.__file__}"
    assert main._with_own_config(["main", "--mode=train"]) == ["main", "--mode=train"]


def test_help_lists_every_mode_and_key():
    text = main.usage()
    for key, _ in configs.flat(configs.default()):
        assert f"\n  {key} = " in text, key
    assert "--mode=evaluate" in text
    lines = text.splitlines()
    assert "  loss.estimator = ''                         truncated | single" in text
    assert all(len(one) > 46 for one in lines if re.match(r"  [\w.]+ = ", one))  # explained
    done = command("--help", "--config=configs/own.py")
    assert done.returncode == 0
    assert "--config.KEY=VALUE" in done.stdout
    assert "\n  train.warmup = 20 " in done.stdout  # the file's, not the default


def test_help_on_a_file_that_is_no_configuration_is_a_sentence(tmp_path):
    for content in ("", "def get_config(): return None", "def get_config( oh"):
        (tmp_path / "mine.py").write_text(content)
        with pytest.raises(main.UserError, match=r"mine\.py is no configuration"):
            main.usage(str(tmp_path / "mine.py"))
    assert main._file_of(["main", "--help", "--config", "configs/own.py"]) == "configs/own.py"
    assert main._file_of(["main", "--mode=search", "--config.search.count=3"]) == ""
    for argv in (["--config=nowhere.py"], ["--config", "nowhere.py"], ["--config"]):
        with pytest.raises(main.UserError, match="is not a file"):
            main._file_of(["main", *argv])


def test_train_then_evaluate_from_the_command_line(tmp_path):
    workdir = tmp_path / "run"
    done = command("--config=configs/beir.py", f"--workdir={workdir}", *flags_of(tmp_path))
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"encoders: {workdir / 'final'}"  # a report is not asked for
    assert "recall@20" in done.stdout
    assert "training: 8/8 steps" in done.stderr
    assert "\nstrategy: corrected, negatives by two_level, loss balanced, corrector " in done.stdout
    results = (workdir / "results.json").read_bytes()

    done = command("--mode=evaluate", f"--workdir={workdir}", "--name=again")
    assert done.returncode == 0, done.stderr
    again = json.loads((workdir / "eval" / "again.json").read_text())
    after = json.loads((workdir / "eval" / "after.json").read_text())
    assert again["metrics"] == after["metrics"]
    assert again["distribution"] == pytest.approx(after["distribution"], rel=1e-5)
    assert (workdir / "results.json").read_bytes() == results

    done = command(
        "--config=configs/beir.py", f"--workdir={workdir}", *flags_of(tmp_path), "--config.seed=3"
    )
    assert done.returncode == 2
    assert "seed (0 there, 3 now)" in done.stderr
    assert (workdir / "results.json").read_bytes() == results


def test_check_data_ends_with_code_1_where_training_would_be_wrong(tmp_path):
    arguments = ["--config=configs/own.py", "--mode=check_data", f"--workdir={tmp_path / 'run'}"]
    arguments += flags_of(tmp_path)
    with (tmp_path / "data" / "qrels" / "dev.tsv").open("a") as file:
        file.write("dev0\tnowhere\t1\n")
    done = command(*arguments)
    assert done.returncode == 1, done.stderr
    assert "1 finding(s) would make training wrong" in done.stdout
    assert not json.loads((tmp_path / "run" / "check_data.json").read_text())["right"]
