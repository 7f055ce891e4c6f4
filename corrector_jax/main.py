"""Trains and evaluates dense retrievers with a corrected softmax over a stale cache.

  python -m corrector_jax.main --config=configs/quickstart.py
  python -m corrector_jax.main --config=configs/own.py --config.data.path=DIR --workdir=runs/mine
  python -m corrector_jax.main --mode=evaluate --workdir=runs/mine

Flags:
  --config=FILE         a file of configs/, or your own: get_config() returns the keys below
  --config.KEY=VALUE    sets one key
  --workdir=DIR         where everything goes; an existing one is resumed (runs/<config's name>)
  --mode=train          train, evaluating before and after; leaves results.json and report.html
  --mode=prepare_data   fetch, write and tokenize the data of configs/nq.py and its like
  --mode=check_data     what is in the data; exits 1 where training would be wrong
  --mode=mine           mine negatives of the train split, by BM25, an encoder, a run's encoder or a
                        TREC file; leaves negatives.trec, for --config.negatives.path
  --mode=compile        compile every step for --topology=v5e:4x4 (v4, v5p, v6e, cpu:8; empty = the
                        devices at hand) from shapes alone; exits 1 where it does not fit
  --mode=evaluate       evaluate a checkpoint of --workdir; leaves eval/NAME.json; by an index where
                        --config.eval.search=scann
  --coordinator=HOST:PORT --processes=N --process=I
                        this process of a job of several (train, evaluate); TPU hosts and SLURM
                        need none of them, and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
                        JAX_PROCESS_ID say the same (docs/scale.md)
  --name=NAME           of that evaluation (SPLIT-step-STEP)
  --step=STEP           which checkpoint (the newest)
  --mode=inspect        show what --workdir holds and check it against its digests
  --mode=export         write the newest checkpoint of --workdir as a folder that
                        sentence-transformers loads; training leaves the same in final/
  --mode=embed          embed the targets of --workdir, or --config.embed.path=FILE_OR_FOLDER, with
                        its newest checkpoint
  --mode=search         search the targets of --workdir, before and after training side by side:
                        --query="...", or a prompt; --config.search.show=all for all four models
  --mode=serve          the same as a web page on this machine alone, until Ctrl-C
  --mode=compare DIR DIR ...
                        hold finished runs on the same queries against the first: compare.html, in
                        --workdir or here
  --query=TEXT          of --mode=search; left out = asked for, or read from standard input
  --help                this, and every key; beside --config=FILE, with the values of that file

Exit codes: 0 done; 1 inspect found damage, check_data what makes training wrong, or compile that
memory does not suffice; 2 something to mend, said in one sentence; 75 asked to stop (SIGTERM,
Ctrl-C, maintenance) and saved: the same command goes on; 76 another process of the job was lost or
hangs: likewise; 143 or 130 a second signal.
"""

from __future__ import annotations

import sys
import time

_STARTED = time.monotonic()  # ahead of the imports below, which a user waits for too

import atexit  # noqa: E402
import difflib  # noqa: E402
import errno  # noqa: E402
import inspect  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import runpy  # noqa: E402
import signal  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from corrector_jax import chips, distributed, paths  # noqa: E402
from corrector_jax import config as configs  # noqa: E402
from corrector_jax.paths import AnyPath  # noqa: E402
from corrector_jax.preemption import EXIT_CODE, SIGNALS, PreemptedError  # noqa: E402
from corrector_jax.types import UserError  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.")
_MODE = flags.DEFINE_string("mode", "train", "What to do.")
_NAME = flags.DEFINE_string("name", "", "Of an evaluation.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "What to compile for.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the job has.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is.")
_QUERY = flags.DEFINE_string("query", None, "What to search for.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest if left out.")

_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT}


def main(argv: list[str]) -> None:
    """Flags -> configuration -> one call."""
    logging.set_verbosity(logging.WARNING)  # what libraries tell of themselves helps nobody
    if len(argv) > 1 and _MODE.value != "compare":
        raise UserError(f"{argv[1]!r} is not a flag: see --help")
    modes = {
        "train": _train,
        "evaluate": _evaluate,
        "prepare_data": _prepare_data,
        "check_data": _check_data,
        "compile": _compile,
        "inspect": _inspect,
        "export": _export,
        "embed": _embed,
        "mine": _mine,
        "search": _search,
        "serve": _serve,
        "compare": lambda: _compare(argv[1:]),
    }
    if _MODE.value not in modes:
        raise UserError(f"--mode is {_MODE.value!r}: write {', '.join(modes)}")
    if _MODE.value in ("train", "evaluate"):
        distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    elif _COORDINATOR.value or _PROCESSES.value:
        raise UserError(
            f"--mode={_MODE.value} runs in one process: start it on one host, without "
            "--coordinator and --processes"
        )
    _keep_compiled()
    chips.find_devices()
    modes[_MODE.value]()


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
    try:
        if {"--help", "-h", "-help"} & set(sys.argv):
            print(usage(_file_of(sys.argv)))
            return
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _fail(2)
    except distributed.LostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(distributed.LOST)
    except PreemptedError as reason:
        print(f"stopped by {reason}: run the same command to go on", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except OSError as error:
        if error.errno not in _MENDABLE:
            _crash(error)
        print(
            f"error: {error.filename or 'writing'} failed ({error.strerror}): make room or make it "
            "writable, then run the same command again",
            file=sys.stderr,
        )
        _fail(2)
    except Exception as error:
        _crash(error)


def _crash(error: Exception) -> None:
    """What nobody foresaw, or the loss of another process."""
    if distributed.is_alone():
        raise error
    if distributed.is_loss(error):
        distributed.give_up("another process of this job cannot be reached any more")
    traceback.print_exception(error)
    _fail(1)


def _fail(code: int) -> None:
    """Ends the process; in a job of several at once, or it would wait for the others' end."""
    if distributed.is_alone():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.is_lead():
        time.sleep(2)  # the others, who may have the same to say, end with it
    os._exit(code)


def usage(file: str = "") -> str:
    """The text of --help: this module's docstring and every configuration key.

    Args:
      file: of configs/, whose values are shown; '' = the defaults.
    """
    values = _values_in(file) if file else dict(configs.flat(configs.default()))
    of = f"values in {file}" if file else "defaults"
    lines = [str(__doc__), f"Configuration keys and their {of}:"]
    above = ""
    for line in inspect.getsource(configs.default).splitlines():
        if found := re.match(r"\s+c\.([\w.]+) = .+?(?:  # (.+))?$", line):
            key, comment = found.groups()
            if key in values:
                shown = f"{key} = {values[key]!r}"
                lines.append(f"  {shown:<44}{comment or above}".rstrip())
        found = re.match(r"\s+# (.+)", line)
        above = f"{above} {found[1]}".strip() if found else ""
    return "\n".join(lines)


def _values_in(file: str) -> dict[str, object]:
    try:
        return dict(configs.flat(runpy.run_path(file)["get_config"]()))
    except Exception as error:
        raise UserError(
            f"--config={file} is no configuration ({' '.join(repr(error).split())}): write a file "
            "whose get_config() returns one, such as configs/own.py"
        ) from error


def _file_of(argv: list[str]) -> str:
    """What --config names, '' where nothing does."""
    named = ""
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        found = re.fullmatch("--?config(=.*)?", argument)
        if found:
            named = found[1][1:] if found[1] else following
            if not Path(named).is_file():
                raise UserError(
                    f"--config={named} is not a file: write one such as configs/beir.py"
                )
    return named


def _train() -> None:
    from corrector_jax.train import train

    train(*_config_and_workdir(), started=_STARTED)
    # Everything is written. A signal while the interpreter ends, which takes a moment with JAX in
    # it, would make a run that is done look killed, and a scheduler start it again.
    atexit.register(_be_deaf)


def _be_deaf() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _prepare_data() -> None:
    from corrector_jax.prepare import prepare_data

    prepare_data(_config_and_workdir()[0])


def _check_data() -> None:
    from corrector_jax.check_data import check_data

    if not check_data(*_config_and_workdir()):
        sys.exit(1)


def _mine() -> None:
    from corrector_jax.mining import mine

    mine(*_config_and_workdir(), step=_STEP.value)


def _compile() -> None:
    from corrector_jax.compile_ahead import compile_run

    config, workdir = _config_and_workdir()
    name = re.sub(r"\W", "-", _TOPOLOGY.value or "here")
    if not compile_run(config, _TOPOLOGY.value, workdir / "compile" / f"{name}.json"):
        sys.exit(1)


def _config_and_workdir() -> tuple[ConfigDict, AnyPath]:
    if _CONFIG.value is None:
        raise UserError("--config is missing: write --config=configs/quickstart.py, or see --help")
    configs.validate(_CONFIG.value)
    name = Path(config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])).stem
    return _CONFIG.value, paths.make(_WORKDIR.value or f"runs/{name}")


def _evaluate() -> None:
    from corrector_jax.evaluate import evaluate_run

    search = _CONFIG.value.eval.search
    evaluate_run(_workdir(), name=_NAME.value, step=_STEP.value, search=search)


def _inspect() -> None:
    from corrector_jax.inspection import inspect_run

    if not inspect_run(_workdir()):
        sys.exit(1)


def _workdir() -> AnyPath:
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: write the folder of a run")
    return paths.make(_WORKDIR.value)


def _export() -> None:
    from corrector_jax.export import export_run

    export_run(_workdir(), **_CONFIG.value.export)


def _embed() -> None:
    from corrector_jax.vectors import embed_run

    embed_run(_workdir(), **_CONFIG.value.embed)


def _search() -> None:
    from corrector_jax.prompt import search_run

    if _QUERY.value is not None and not _QUERY.value.strip():
        raise UserError("--query is empty: write a few words, or leave it out to be asked")
    search_run(_workdir(), query=_QUERY.value or "", step=_STEP.value, **_CONFIG.value.search)


def _serve() -> None:
    from corrector_jax.serve import serve_run

    serve_run(_workdir(), step=_STEP.value, **_CONFIG.value.serve)


def _compare(folders: list[str]) -> None:
    from corrector_jax.compare import compare

    compare(
        [paths.make(folder) for folder in folders],
        paths.make(_WORKDIR.value or ".") / "compare.html",
    )


def _with_own_config(argv: list[str]) -> list[str]:
    """A mode that takes the run's configuration reads its own keys alone of the command line."""
    mode = next((a.partition("=")[2] for a in argv[::-1] if re.match("--?mode=", a)), "")
    if mode not in ("export", "embed", "evaluate", "search", "serve"):
        return argv
    # A job of several processes evaluates with the flags it trained with; they are its own.
    for argument in argv[1:] if mode != "evaluate" else ():
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.split(".")[1] != mode:
            raise UserError(
                f"{name} cannot be set under --mode={mode}, which takes the configuration of the "
                f"run: only config.{mode}.* can"
            )
    if _file_of(argv):
        return argv
    return [argv[0], f"--config={configs.__file__}", *argv[1:]]


def _parse(argv: list[str]) -> list[str]:
    """absl's parsing, with what is wrong said in one sentence."""
    argv = _with_own_config(argv)
    _file_of(argv)
    keys = dict(configs.flat(configs.default()))
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
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
