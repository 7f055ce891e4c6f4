"""What a workdir holds, and whether it is still what was saved: `--mode=inspect`."""

from __future__ import annotations

import re

from corrector_jax import index, snapshot
from corrector_jax.checkpoint import Checkpoints
from corrector_jax.evaluate import saved_config
from corrector_jax.paths import AnyPath
from corrector_jax.snapshot import DamagedError
from corrector_jax.types import UserError
from corrector_jax.writer import say


def inspect_run(workdir: AnyPath) -> bool:
    """Prints checkpoints, cache snapshots and ledger of a run, with every digest checked.

    Args:
      workdir: the run's folder; nothing in it is touched.

    Returns:
      Whether everything is what was saved.

    Raises:
      UserError: it is no run.
    """
    config = saved_config(workdir)
    say(f"{workdir}: strategy {config.strategy}, {config.train.steps:,} steps asked for")
    good, newest = True, None
    with Checkpoints.readable(workdir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            say("no checkpoint")
        for step in steps:
            try:
                position, _ = checkpoints.read(step)
                parts = list(checkpoints.check(step))
            except (DamagedError, UserError) as error:
                good = False
                say(f"checkpoint {step:>8,}  DAMAGED: {error}")
                continue
            newest = position
            refers = "no cache" if position.cache is None else f"cache {position.cache['step']:,}"
            state = sum(size for what, size, _ in parts if what == "state")
            problems = [problem for _, _, problem in parts if problem]
            good = good and not problems
            verdict = "good" if not problems else f"DAMAGED: {'; '.join(problems)}"
            say(f"checkpoint {step:>8,}  {_bytes(state):>9}  {refers}  {verdict}")
    for folder in _numbered(workdir / "cache"):
        try:
            manifest = snapshot.read_manifest(folder)
        except (DamagedError, UserError) as error:
            say(f"cache {folder.name:>13}  not whole: {error}")
            continue
        age = "" if newest is None else f", {newest.step - manifest['step']:,} steps old"
        size = sum(entry["bytes"] for entry in manifest["files"])
        say(
            f"cache {manifest['step']:>13,}  {_bytes(size):>9}  {manifest['size']:,} targets x "
            f"{manifest['dim']} {manifest['dtype']}{age}"
        )
        made_by = manifest["made_by"].items()
        say("    made by " + ", ".join(f"{field} {_short(value)}" for field, value in made_by))
        indices = [path for path in folder.iterdir() if path.name.startswith("index-")]
        for place in sorted(indices, key=str):
            try:
                say(f"    {place.name}  {_bytes(index.check(place))}  good")
            except DamagedError as error:
                good = False
                say(f"    {place.name}  DAMAGED, a resumed run makes it anew: {error}")
    if newest is not None:
        hours = newest.seconds / 3600
        say(f"step {newest.step:,} after {hours:.2f} hours; targets encoded:")
        for purpose, count in newest.ledger.items():
            say(f"    {purpose:<22} {count:>15,}")
        if newest.skipped:
            say(f"{len(newest.skipped)} steps skipped, not finite: {newest.skipped}")
    for folder in _numbered(workdir / "damaged"):
        say(f"set aside because it was damaged: {folder}")
    return good


def _numbered(folder: AnyPath) -> list[AnyPath]:
    """The folders in it whose names begin with a step, by step."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.split("-")[0].isdigit()]
    return sorted(found, key=lambda path: (int(path.name.split("-")[0]), path.name))


def _short(value: object) -> str:
    """A digest by its beginning, other values as they are."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else repr(value)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
