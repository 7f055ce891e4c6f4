"""One job of many processes: how they find each other, agree, and notice that one is lost.

Every process runs the same program on its own devices. What all of them must do alike is decided
from what all of them know: the configuration, the step, or a vote.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from corrector_jax.types import UserError

LOST = 76
"""Exit code: another process of the job was lost or hangs; the same command, run again, goes on."""


class LostError(Exception):
    """The other processes are not there."""


_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
_SIGNS_OF_LOSS = ("gloo", "coordination", "heartbeat", "unavailable", "connection", "nccl")
_MESSAGE_BYTES = 1024
_PATIENCE = 300  # seconds that processes may start one after the other


def start(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Joins the processes of a job; to be called before jax looks for devices.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    without those, TPU hosts, SLURM and Open MPI know it themselves.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which this one is.
      environment: variables of the process.

    Returns:
      Whether this is a job of several processes as far as is known here.

    Raises:
      UserError: some of the three are missing or no numbers.
      LostError: the others cannot be found.
    """
    given: dict[str, str | int | None] = {
        "coordinator": coordinator,
        "processes": processes,
        "process": process,
    }
    for name, variable in _VARIABLES.items():
        if given[name] in ("", None):
            given[name] = environment.get(variable, "")
    if all(value == "" for value in given.values()):
        return _knows_itself(environment) and _find_others()
    for name, value in given.items():
        if value == "":
            raise UserError(
                f"--{name} (or {_VARIABLES[name]}) is missing: give --coordinator=HOST:PORT, "
                "--processes and --process together, or none of them"
            )
    try:
        count, number = int(given["processes"] or 0), int(given["process"] or 0)
    except ValueError as error:
        raise UserError(f"--processes and --process must be whole numbers: {error}") from error
    if not 0 <= number < max(count, 1):
        raise UserError(
            f"--process is {number} of --processes={count}: write numbers from 0 to --processes - 1"
        )
    if not str(given["coordinator"]).rpartition(":")[2].isdigit():
        raise UserError(
            f"--coordinator is {given['coordinator']!r}: write HOST:PORT of process 0, such as "
            "10.0.0.1:8476"
        )
    if count <= 1:
        return False
    _initialize(str(given["coordinator"]), count, number)
    return True


def _knows_itself(environment: Mapping[str, str]) -> bool:
    """Whether jax may find the other processes by itself."""
    # A batch script, too, has SLURM_NTASKS: only a task of srun has the nodes of its step.
    slurm = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in environment else "1"
    if {slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1")} != {"1"}:
        return True
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    return "tpu" in wanted and any(
        path.exists() for path in (Path("/dev/accel0"), Path("/dev/vfio/0"))
    )


def _find_others() -> bool:
    try:
        jax.distributed.initialize(initialization_timeout=_PATIENCE)
    except ValueError:
        return False  # jax knows of no cluster here: this is all there is
    except (RuntimeError, OSError) as error:
        raise _lost(error) from error
    return True


def _initialize(coordinator: str, processes: int, process: int) -> None:
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=_PATIENCE
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _lost(error) from error


def _lost(error: Exception) -> LostError:
    # Hosts of a pod may come minutes apart, or go away again: the same command may find them.
    return LostError(
        f"the other processes of this job cannot be found ({' '.join(str(error).split())[:300]}): "
        "start all of them within five minutes, and check --coordinator or JAX_COORDINATOR_ADDRESS"
    )


def is_alone() -> bool:
    """Whether the job is one process; looks for no devices where it is."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_lead() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return is_alone() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process has come here.

    Args:
      what: the same on all of them.
    """
    if not is_alone():
        multihost_utils.sync_global_devices(what)


def first_of(problem: str) -> str:
    """What went wrong on the first process that has a problem; "" if none has. All call it."""
    if is_alone():
        return problem
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    content = np.frombuffer(problem.encode()[:_MESSAGE_BYTES], np.uint8)
    text[: len(content)] = content
    every = multihost_utils.process_allgather(text)
    found = [bytes(one).rstrip(b"\0").decode(errors="replace") for one in every]
    return next((one for one in found if one), "")


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
    """What the user has to mend on one process ends all of them, instead of leaving them waiting.

    Raises:
      UserError: the block raised it, or an OSError, on some process.
      OSError: the block raised it on this one.
    """
    mine: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        mine = error
    problem = first_of(str(mine) if mine else "")
    if mine is not None:
        raise mine
    if problem:
        raise UserError(f"another process of this job cannot go on: {problem}")


def require_same(what: str, value: str) -> None:
    """Refuses to go on where processes that must agree do not.

    Args:
      what: names it in the message.
      value: of this process; all of them call this.

    Raises:
      UserError: on all of them.
    """
    if is_alone():
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    if (every != every[0]).any():
        raise UserError(
            f"the processes of this job do not have the same {what}: give all of them the same "
            "command, data and --workdir, a folder that every host reaches"
        )


def gather(tree: Any) -> Any:
    """Host arrays of all processes, which call this together: [...] -> [processes, ...]."""
    if is_alone():
        return jax.tree.map(lambda x: x[None], tree)
    return multihost_utils.process_allgather(tree)


class Vote:
    """Whether any process wants something, asked by all again and again.

    With several processes the answer is to the question before: nobody waits for a device, and
    all hear the same.
    """

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._last: jax.Array | None = None

    def __call__(self, wish: bool) -> bool:
        """All processes call this equally often.

        Args:
          wish: of this process.

        Returns:
          Whether any process wished for it: now if there is but one, else the time before.
        """
        if is_alone():
            return wish
        mine = np.full(1, wish, np.int32)
        shape = (self._mesh.size,)
        wishes = jax.make_array_from_callback(shape, self._split, lambda _: mine)
        last, self._last = self._last, self._sum(wishes)
        return last is not None and bool(jax.device_get(last))

    # Once: every step asks.
    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()), ("all",))

    @functools.cached_property
    def _split(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec("all"))

    @functools.cached_property
    def _sum(self) -> Wrapped:
        return jax.jit(jax.numpy.sum, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


class Watch:
    """Ends this process where the others have left it waiting; nothing to do in a job of one."""

    def __init__(self, seconds: float) -> None:
        """Watches nothing yet.

        Args:
          seconds: without a `beat` that mean that another process hangs.
        """
        self._seconds = seconds
        self._last = time.monotonic()
        self._stop = threading.Event()

    def beat(self) -> None:
        """Says that this process goes on."""
        self._last = time.monotonic()

    def add(self, ids: jax.Array, fresh: jax.Array) -> None:
        """A beat for every block of a pass: ids [b] int32 and fresh [b, D] are not looked at."""
        self.beat()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Around work that has no steps: nobody is given up while it lasts."""
        self._last = float("inf")
        try:
            yield
        finally:
            self.beat()

    def __enter__(self) -> Watch:
        if not is_alone():
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                give_up(
                    f"nothing went on for {self._seconds:g} s (config.mesh.timeout): another "
                    "process of this job hangs or is lost"
                )


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another process cannot be reached."""
    if is_alone() or error is None or isinstance(error, UserError):
        return False
    said = str(error).lower()
    if isinstance(error, TimeoutError) and "barrier" in said:
        return True
    computing = isinstance(error, ValueError | RuntimeError)  # jax raises both
    if computing and any(sign in said for sign in _SIGNS_OF_LOSS):
        return True
    return is_loss(error.__cause__)


def give_up(reason: str) -> None:
    """Ends this process at once: a clean end would wait for those that are lost."""
    print(
        f"error: process {jax.process_index()}: {reason}: see what it said, then run the same "
        "command on all of them again; it goes on from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
