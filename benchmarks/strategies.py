"""The comparison: strategies x seeds on one data set, each run as a user would start it.

    python -m benchmarks.strategies --grid=small --data=DIR_OR_FILE
    python -m benchmarks.strategies --grid=answers
    python -m benchmarks.strategies --grid=small --list
    python -m benchmarks.strategies --table

The first two run every cell of a grid (`benchmarks/grids.py`) that is not done, one process after
the other, in runs/strategies/NAME. It can be killed at any time: the same command goes on, from the
checkpoints of the run that was under way. What is left of a run is
benchmarks/results/strategies/NAME/CELL-SEED.json; of all together
benchmarks/results/strategies_NAME_summary.json and two plots beside it. The third says what is
done and what is missing, the last writes the tables of docs/results.md and docs/reader.md anew from
the summaries.

  --cells=A,B  --seeds=0,1    others than the grid's
  --targets=N                 the data is cut to so many, another number than the grid's; 0 = all
  --name=NAME                 of the results; the grid's
  --config.KEY=VALUE          changes the setting, for all cells
  --runs=DIR --results=DIR    where the runs are, and where results go
  --keep                      checkpoints, caches and encoders of finished runs stay

Exit codes: 0 all done; 1 a run failed, its log says why; 2 something to mend; 75 asked to stop.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from benchmarks import comparison, grid_data
from benchmarks.grids import CELLS, GRIDS, ORACLE, Grid, config_of, settings_of
from corrector_jax import config as configs
from corrector_jax import paths
from corrector_jax.preemption import EXIT_CODE
from corrector_jax.report.words import json_of, read_metrics
from corrector_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("results.md", "reader.md")
"""Of docs/: they hold tables of comparisons."""

SERIES = ("probe/kl_stale", "probe/kl_corrected", "probe/drift", "probe/gate", "train/kl_estimate")
MINED = 20
"""Negatives of a query, where they are mined."""

HEAVY = ("checkpoints", "cache", "final")
"""What a finished run does not need any more."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
      name: of `grids.CELLS`.
      seed: of the run.
      config: its configuration but for the data.
      workdir: where it runs.
      path: of its result.
    """

    name: str
    seed: int
    config: ConfigDict
    workdir: Path
    path: Path

    @property
    def is_done(self) -> bool:
        """Whether its result is there.

        Raises:
          UserError: the result is of another setting.
        """
        found = json_of(self.path)
        if found is None:
            return False
        wanted = settings_of(self.config)
        before = found["settings"]
        if differ := [k for k in wanted | before if wanted.get(k) != before.get(k)]:
            raise UserError(
                f"{self.path} has another {', '.join(differ)} than this grid: remove it, or write "
                "another --name"
            )
        return True

    def state(self) -> str:
        """One word or two on how far it is."""
        if self.is_done:
            return "done"
        steps = [int(p.name) for p in (self.workdir / "checkpoints").glob("*") if p.name.isdigit()]
        return f"step {max(steps)} of {self.config.train.steps}" if steps else "missing"


def plan(
    grid: Grid, name: str, *, runs: Path, results: Path, changes: Mapping[str, Any] | None = None
) -> list[Cell]:
    """All runs of a grid, those of a seed together: what is there early can be compared.

    Args:
      grid: the grid.
      name: of the results.
      runs: holds the workdirs.
      results: holds the results.
      changes: dotted keys that change the setting.

    Raises:
      UserError: a cell has no such name, or its configuration cannot be.
    """
    if unknown := [cell for cell in grid.cells if cell not in CELLS]:
        raise UserError(f"there is no cell {unknown[0]!r}: write some of {', '.join(CELLS)}")
    return [
        Cell(
            cell,
            seed,
            config_of({**grid.setting, **(changes or {})}, cell, seed),
            runs / name / f"{cell}-{seed}",
            results / "strategies" / name / f"{cell}-{seed}.json",
        )
        for seed in grid.seeds
        for cell in grid.cells
    ]


def command(keys: Mapping[str, Any], workdir: Path, *flags: str) -> list[str]:
    """What a user would write: keys of the configuration that are not its defaults."""
    config = ROOT / "corrector_jax" / "config.py"
    written = [f"--config.{key}={value}" for key, value in keys.items()]
    main = [sys.executable, "-m", "corrector_jax.main", f"--config={config}"]
    return [*main, f"--workdir={workdir}", *written, *flags]


def mined(data: Mapping[str, str]) -> dict[str, str]:
    """The key that names negatives of the training queries, where the data bring none: BM25's.

    Args:
      data: keys that say where the data are; `data.path` is a folder of `grid_data`.

    Returns:
      {"negatives.path": a TREC file beside the data, which is made once}, or nothing.

    Raises:
      UserError: mining failed.
    """
    folder = Path(data["data.path"])
    if grid_data.has_negatives(folder):
        return {}
    path = folder.with_name("negatives.trec")
    if not path.exists():
        flags = ("--mode=mine", f"--config.mine.output={path}", f"--config.mine.keep={MINED}")
        if code := subprocess.run(command(data, path.parent, *flags), cwd=ROOT).returncode:
            raise UserError(f"--mode=mine ended with exit {code}: it said why")
    return {"negatives.path": str(path)}


def run(cell: Cell, data: Mapping[str, str]) -> int:
    """Trains one cell in a process of its own, which is told what this one is told.

    Args:
      cell: the run.
      data: keys that say where the data are.

    Returns:
      The exit code.
    """
    keys = settings_of(cell.config) | data
    cell.workdir.mkdir(parents=True, exist_ok=True)
    # A run may outlive a benchmark that was killed: wait for it, then go on from what it left.
    with filelock.FileLock(cell.workdir / "lock.held"):
        pass
    with (cell.workdir / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command(keys, cell.workdir),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes once, from here
        )
        told = {
            number: signal.signal(number, lambda number, _: process.send_signal(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return process.wait()
        finally:
            for number, handler in told.items():
                signal.signal(number, handler)


def record(cell: Cell, metrics: Sequence[str]) -> dict[str, Any]:
    """What is kept of a finished run.

    Args:
      cell: the run.
      metrics: what is kept of every query, to four digits.

    Returns:
      A JSON-able dict; of every series its steps and values; where a reader answers, what it
      answers from other passages.
    """
    found = json.loads((cell.workdir / "results.json").read_text())
    after = json.loads((cell.workdir / "eval" / "after.json").read_text())
    series, _ = read_metrics(cell.workdir / "metrics.jsonl")
    return {
        "cell": cell.name,
        "seed": cell.seed,
        "settings": settings_of(cell.config),
        "queries": _asked(cell.workdir),
        **device(),
        **{key: found[key] for key in ("steps", "dataset", "encoder", "eval", "distribution")},
        **{key: found[key] for key in ("ledger", "wall_seconds", "examples_per_second")},
        "series": {
            name: [series[name][0].tolist(), [float(f"{v:.4g}") for v in series[name][1]]]
            for name in SERIES
            if name in series
        },
        "per_query": {
            name: [_short(value) for value in after["per_query"][name]] for name in metrics
        },
        **({"read": after["read"]} if "read" in after else {}),
    }


@functools.cache
def device() -> dict[str, Any]:
    """What runs have computed on; asked in a process of its own, which leaves it to them."""
    code = "import jax; print(jax.__version__, jax.device_count(), jax.devices()[0].device_kind)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, count, kind = said.stdout.strip().split(" ", 2)
    return {"jax": version, "devices": f"{count} x {kind}", "cores": os.cpu_count()}


def run_all(
    cells: Sequence[Cell],
    source: str,
    folder: Path,
    *,
    grid: Grid,
    cache_dir: str,
    keep: bool,
) -> int:
    """Runs what is not done.

    Args:
      cells: the plan.
      source: the data set, in any layout, where the grid does not bring its own.
      folder: where the data goes as it is compared.
      grid: of the cells.
      cache_dir: of tokens; empty = the configuration's.
      keep: whether checkpoints, caches and encoders of finished runs stay.

    Returns:
      The exit code.
    """
    failed = 0
    for number, cell in enumerate(cells, start=1):
        named = f"[{number}/{len(cells)}] {cell.name}, seed {cell.seed}"
        if cell.is_done:
            print(f"{named}: done before", flush=True)
            continue
        data = {}
        if not grid.own_data:
            whole = grid_data.write(source, folder / "data", targets=grid.targets)
            data["data.path"] = str(whole)
        if cache_dir:
            data["data.cache_dir"] = cache_dir
        if configs.STRATEGIES[cell.config.strategy].proposals == ("mined",):
            data |= mined(data)
        print(f"{named}: {cell.state()}, running", flush=True)
        code = run(cell, data)
        if code == EXIT_CODE:
            print("stopped: run the same command to go on", file=sys.stderr)
            return code
        if code:
            failed += 1
            print(f"{named}: exit {code}, see {cell.workdir / 'log.txt'}", file=sys.stderr)
            continue
        found = record(cell, grid.metrics)
        paths.write(cell.path, json.dumps(found, separators=(",", ":")) + "\n")
        if not keep:
            for name in HEAVY:
                paths.remove(cell.workdir / name)
        metrics = found["eval"]["after"]
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in grid.metrics)
        print(f"{named}: {shown}, {found['wall_seconds']:.0f} s", flush=True)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", choices=list(GRIDS), help="of benchmarks/grids.py")
    parser.add_argument("--data", default="", help="a data set in any layout of docs/data.md")
    parser.add_argument("--cells", default="")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--targets", type=int, default=None)
    parser.add_argument("--name", default="")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "strategies")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
    parser.add_argument("--table", action="store_true", help="fill in the tables of docs/")
    arguments, changes = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an accelerator is for the runs alone
    try:
        if arguments.table:
            for page in PAGES:
                comparison.fill_in(ROOT / "docs" / page, arguments.results)
            return 0
        return compare(arguments, parse_changes(changes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> int:
    """Lists or runs a grid, and sums up what is there.

    Args:
      arguments: of the command line.
      changes: dotted keys that change the setting.

    Returns:
      The exit code.

    Raises:
      UserError: something is missing or cannot be.
    """
    if not arguments.grid:
        raise UserError(f"--grid is missing: write {' or '.join(GRIDS)}, or --table")
    grid = GRIDS[arguments.grid]
    if arguments.cells:
        grid = dataclasses.replace(grid, cells=tuple(arguments.cells.split(",")))
    if arguments.seeds:
        grid = dataclasses.replace(grid, seeds=tuple(map(int, arguments.seeds.split(","))))
    if arguments.targets is not None:
        grid = dataclasses.replace(grid, targets=arguments.targets)
    if "oracle" in grid.cells and not 0 < grid.targets <= ORACLE:
        raise UserError(
            f"oracle embeds every target at every step: write --targets={ORACLE} or less, or a "
            "refreshed cell in its place"
        )
    name = arguments.name or arguments.grid
    if arguments.name:
        grid = dataclasses.replace(grid, shares="")
    changes = dict(changes)
    cache_dir = str(changes.pop("data.cache_dir", ""))
    runs = arguments.runs.resolve()
    shared = grid.folder(name)
    cells = plan(grid, shared, runs=runs, results=arguments.results, changes=changes)
    if arguments.list:
        for cell in cells:
            print(f"{cell.name}-{cell.seed}: {cell.state()}")
        return 0
    if bool(arguments.data) == grid.own_data:
        raise UserError(
            f"--data is given but grid {arguments.grid} brings its own: drop it"
            if grid.own_data
            else "--data is missing: write a data set in any layout of docs/data.md"
        )
    code = run_all(
        cells,
        arguments.data,
        runs / shared,
        grid=grid,
        cache_dir=cache_dir,
        keep=arguments.keep,
    )
    comparison.write(grid, name, arguments.results)
    return code


def parse_changes(arguments: Sequence[str]) -> dict[str, Any]:
    """--config.KEY=VALUE, as {dotted key: value}.

    Raises:
      UserError: an argument is something else, or there is no such key.
    """
    known, changes = dict(configs.flat(configs.default())), {}
    for argument in arguments:
        key, _, text = argument.lstrip("-").partition("=")
        key = key.removeprefix("config.")
        if not argument.startswith("--config.") or key not in known:
            raise UserError(f"{argument} is not known: see --help")
        if isinstance(known[key], str):
            changes[key] = text
            continue
        try:
            changes[key] = type(known[key])(ast.literal_eval(text))
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{argument}: write a value like {known[key]!r}") from error
    return changes


def _asked(workdir: Path) -> str:
    """16 hex digits of the queries that the last evaluation ranked for, in their order."""
    with (workdir / "runs" / "after.trec").open(encoding="utf-8") as lines:
        ids = dict.fromkeys(line.split(maxsplit=1)[0] for line in lines)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _short(value: float) -> float | int:
    """Four digits, and 0 and 1 as they are written shortest."""
    value = round(value, 4)
    return int(value) if value.is_integer() else value


if __name__ == "__main__":
    sys.exit(main())
