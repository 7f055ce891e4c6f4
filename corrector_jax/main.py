"""Trains and evaluates dense retrievers with a corrected softmax over a stale cache.

  python -m corrector_jax.main --config=configs/quickstart.py
  python -m corrector_jax.main --config=configs/beir.py --config.data.path=DIR --workdir=runs/mine
  python -m corrector_jax.main --mode=evaluate --workdir=runs/mine

Flags:
  --config=FILE         a file of configs/, or your own: get_config() returns the keys below
  --config.KEY=VALUE    sets one key
  --workdir=DIR         where everything goes; an existing one is resumed (runs/<config's name>)
  --mode=train          train, evaluating before and after; leaves results.json and report.html
  --mode=evaluate       evaluate the newest checkpoint of --workdir; leaves eval/NAME.json
  --name=NAME           of that evaluation (SPLIT-step-STEP)
  --mode=export         write the newest checkpoint of --workdir as a folder that
                        sentence-transformers loads; training leaves the same in final/
  --mode=embed          embed the targets of --workdir, or --config.embed.path=FILE_OR_FOLDER, with
                        its newest checkpoint
"""

from __future__ import annotations

import sys
import time

_STARTED = time.monotonic()  # ahead of the imports below, which a user waits for too

import difflib  # noqa: E402
import inspect  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from corrector_jax import config as configs  # noqa: E402
from corrector_jax.types import UserError  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.")
_MODE = flags.DEFINE_string("mode", "train", "train, evaluate, export or embed.")
_NAME = flags.DEFINE_string("name", "", "Of an evaluation.")


def main(argv: list[str]) -> None:
    """Flags -> configuration -> one call."""
    logging.set_verbosity(logging.WARNING)  # what libraries tell of themselves helps nobody
    _keep_compiled()
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: see --help")
    if _MODE.value == "train":
        _train()
    elif _MODE.value == "evaluate":
        _evaluate()
    elif _MODE.value == "export":
        _export()
    elif _MODE.value == "embed":
        _embed()
    else:
        raise UserError(f"--mode is {_MODE.value!r}: write train, evaluate, export or embed")


def _keep_compiled() -> None:
    """What was compiled once is read back, unless JAX_COMPILATION_CACHE_DIR names another place."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(cache).expanduser() / "corrector_jax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)


def cli() -> None:
    """The command line: one sentence and exit code 2 for what a user can mend."""
    if {"--help", "-h", "-help"} & set(sys.argv):
        print(usage())
        return
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """The text of --help: this module's docstring and every configuration key."""
    lines = [str(__doc__), "Configuration keys and their defaults:"]
    for line in inspect.getsource(configs.default).splitlines():
        if found := re.match(r"\s+c\.([\w.]+) = (.+?)(?:  # (.+))?$", line):
            key, value, comment = found.groups()
            if not value.startswith("ConfigDict"):
                lines.append(f"  {key + ' = ' + value:<44}{comment or ''}".rstrip())
    return "\n".join(lines)


def _train() -> None:
    from corrector_jax.train import train

    if _CONFIG.value is None:
        raise UserError("--config is missing: write --config=configs/quickstart.py, or see --help")
    configs.validate(_CONFIG.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])).stem
    train(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"), started=_STARTED)


def _evaluate() -> None:
    from corrector_jax.evaluate import evaluate_run

    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: write the folder of the run to evaluate")
    evaluate_run(Path(_WORKDIR.value), name=_NAME.value)


def _export() -> None:
    from corrector_jax.export import export_run

    export_run(_saved_workdir(), **_CONFIG.value.export)


def _embed() -> None:
    from corrector_jax.vectors import embed_run

    embed_run(_saved_workdir(), **_CONFIG.value.embed)


def _saved_workdir() -> Path:
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: write the folder of the run")
    return Path(_WORKDIR.value)


def _with_own_config(argv: list[str]) -> list[str]:
    """A mode that takes the run's configuration reads its own section alone of the command line."""
    mode = next((a.partition("=")[2] for a in argv[::-1] if re.match("--?mode=", a)), "")
    if mode not in ("export", "embed"):
        return argv
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.split(".")[1] != mode:
            raise UserError(
                f"{name} cannot be set under --mode={mode}, which takes the configuration of the "
                f"run: only config.{mode}.* can"
            )
    if any(re.match("--?config=", argument) for argument in argv):
        return argv
    return [argv[0], f"--config={configs.__file__}", *argv[1:]]


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing, with what is wrong said in one sentence."""
    argv = _with_own_config(argv)
    keys = dict(configs.flat(configs.default()))
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and not Path(value).is_file():
            raise UserError(f"--config={value} is not a file: write one such as configs/beir.py")
        key = name.removeprefix("config.")
        if key != name and key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help for every key"
            raise UserError(f"config.{key} is not a key of the configuration: {hint}")
    try:
        return list(flags.FLAGS(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(str(error).split())}: see --help") from error


if __name__ == "__main__":
    cli()
