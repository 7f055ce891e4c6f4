"""Being asked to stop: by a signal, or by a notice of Google Cloud that the machine goes away.

The first SIGTERM, SIGINT (Ctrl-C) or notice lets the step that runs end, saves and exits with
`EXIT_CODE`; a second signal exits at once, which leaves the newest checkpoint that was whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, run again, goes on where this one stopped."""

POLL_SECONDS = 5.0

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a run to stop."""

_METADATA = "metadata.google.internal"
_NOTICES = (("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE"))


class PreemptedError(Exception):
    """The run was asked to stop, and has saved what it can."""


class Preemption:
    """Listens from `with` to its end.

    Attributes:
      reason: what asked the run to stop; "" = nothing did.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] = print,
        notices: bool = False,
        vote: Callable[[bool], bool] = bool,
    ) -> None:
        """Listens to nothing yet.

        Args:
          say: told once when the run is asked to stop.
          notices: whether to ask Google Cloud's metadata server too; the variable
            GCE_METADATA_HOST names another host than the usual one.
          vote: whether any process of the job was asked, from whether this one was.
        """
        self.reason = ""
        self._say, self._vote = say, vote
        self._host = os.environ.get("GCE_METADATA_HOST") or (_METADATA if notices else "")
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._listen()
        if self._host:
            self._start(self._watch_notices)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._restore()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Called where nothing is lost by stopping, and by all processes equally often.

        Raises:
          PreemptedError: the run was asked to stop, on this process or another.
        """
        if self._vote(bool(self.reason)):
            raise PreemptedError(self.reason or "what another process of this job was asked")

    def _listen(self) -> None:
        # A handler of Python's runs between two lines of the main thread, which may be minutes
        # away in a compilation. The wakeup descriptor is written to at once, and read by a thread.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            os.close(write_end)  # ends the thread that reads

        self._restore = restore
        self._start(lambda: self._read_signals(read_end))

    def _read_signals(self, read_end: int) -> None:
        signals = 0
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                signals += 1  # a notice is none: the signal that follows it is the first
                if signals > 1:
                    os._exit(128 + number[0])
                self._ask(signal.Signals(number[0]).name)

    def _watch_notices(self) -> None:
        while True:
            for name, awaited in _NOTICES:
                if self._notice(name) == awaited:
                    self._ask(f"a notice of Google Cloud ({name} {awaited})")
            if self._stop.wait(POLL_SECONDS):
                return

    def _notice(self, name: str) -> str:
        request = urllib.request.Request(
            f"http://{self._host}/computeMetadata/v1/instance/{name}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=POLL_SECONDS) as answer:  # noqa: S310
                return str(answer.read(200).decode(errors="replace")).strip()
        except (OSError, ValueError):
            return ""  # not on Google Cloud, or the server is busy: ask again

    def _ask(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        with contextlib.suppress(OSError, ValueError):  # Ctrl-C ends `| tee log` too
            self._say(
                f"asked to stop by {reason}: saving as soon as this step ends (a second signal "
                "exits at once, without saving)"
            )

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="preemption", daemon=True)
        thread.start()
        self._threads.append(thread)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Keeps the signal from ending the process; the thread that reads the pipe acts on it."""
