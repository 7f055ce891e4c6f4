"""One job per workdir.

On a disk the kernel keeps the lock and drops it when its process ends, however it ends. An object
store has no such thing: there the holder rewrites a small file again and again, and who wants the
lock watches whether the file changes. Clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

import filelock

from corrector_jax import paths
from corrector_jax.paths import AnyPath, is_local
from corrector_jax.types import UserError

BEAT_SECONDS = 15.0
"""Time between two signs of life on an object store; three without one free the lock."""

_NAME = "lock"


class Lock:
    """Held from `with` to its end."""

    def __init__(
        self,
        workdir: AnyPath,
        *,
        say: Callable[[str], None] = print,
        beat: float = BEAT_SECONDS,
        lead: bool = True,
    ) -> None:
        """Takes nothing yet.

        Args:
          workdir: the run's folder; made if it is not there.
          say: told when there is something to wait for.
          beat: seconds between signs of life, on an object store.
          lead: whether this process takes it for the whole job; else it is told nothing.
        """
        self._lead = lead
        self._workdir, self._say, self._beat = workdir, say, beat
        self._path = workdir / _NAME
        self._token = secrets.token_hex(8)
        self._disk: filelock.BaseFileLock | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        """Takes the lock.

        Raises:
          UserError: another job has it, or the workdir cannot be written.
        """
        if not self._lead:
            return self
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            if is_local(self._workdir):
                self._take_on_disk()
            else:
                self._take_on_store()
        except OSError as error:
            raise UserError(
                f"--workdir={self._workdir} cannot be written ({error.strerror or error}): name a "
                "folder that can"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._lead:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._read().get("token") == self._token:
            self._path.unlink(missing_ok=True)
        if self._disk is not None:
            self._disk.release()

    def holder(self) -> str:
        """Names the job that holds the lock, as this process sees the workdir; "" = none."""
        return str(self._read().get("token", ""))

    def verify(self) -> None:
        """Makes sure that the lock is still held; called before anything is saved.

        Raises:
          UserError: another job took the workdir over, or it is gone.
        """
        if self._lead and self._read_patiently().get("token") != self._token:
            raise UserError(
                f"{self._path} is no longer this job's: another job took --workdir="
                f"{self._workdir} over, or it was removed; stop one of the two"
            )

    def _take_on_disk(self) -> None:
        self._disk = filelock.FileLock(f"{self._path}.held", timeout=0)
        try:
            self._disk.acquire()
        except filelock.Timeout:
            self._refuse(self._read())
        self._write(0)

    def _take_on_store(self) -> None:
        before = self._read_patiently()
        if before:
            self._say(f"{self._path} is there: waiting to see whether its job is alive")
        waited = 0.0
        while before and waited < 3 * self._beat:
            time.sleep(self._beat / 4)
            waited += self._beat / 4
            now = self._read_patiently()
            if now and now != before:
                self._refuse(now)
            before = now
        self._write(0)
        time.sleep(self._beat / 4)  # of two that found it free at once, the last to write has it
        found = self._read_patiently()
        if found.get("token") != self._token:
            self._refuse(found)
        self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        beats = 0
        while not self._stop.wait(self._beat):
            beats += 1
            try:
                if self._read().get("token") != self._token:
                    return  # `verify` says so before the next save
                self._write(beats)
            except Exception:  # noqa: S112 - gcsfs has its own: out of reach for a moment
                continue

    def _write(self, beats: int) -> None:
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": self._token,
            "beats": beats,
        }
        self._path.write_text(json.dumps(record) + "\n")

    def _read(self) -> dict[str, object]:
        """What the lock's file holds; nothing where there is none."""
        try:
            record = paths.read_json(self._path)
        except FileNotFoundError:
            return {}
        except IsADirectoryError as error:
            raise UserError(f"{self._path} is a folder and no lock: remove it") from error
        except ValueError:
            return {"host": "another machine"}  # half written: somebody is there
        return record if isinstance(record, dict) else {}

    def _read_patiently(self) -> dict[str, object]:
        """The same from a store that may fail for a moment: that is no news of the lock."""
        for _ in range(3):
            try:
                return self._read()
            except Exception:  # of any kind, see `_keep`
                time.sleep(self._beat / 4)
        return self._read()

    def _refuse(self, holder: dict[str, object]) -> None:
        pid, host = (
            "".join(c for c in str(holder.get(key, unknown)) if c.isprintable())[:80]
            for key, unknown in (("pid", "?"), ("host", "another machine"))
        )
        who = f"process {pid} on {host}"
        raise UserError(
            f"--workdir={self._workdir} is in use by {who}: wait for it, stop it, or name another "
            "folder"
        )
