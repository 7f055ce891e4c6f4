"""A run that is asked to stop again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from corrector_jax.preemption import PreemptedError, Preemption

FIRST, LATER = 3, 4


def to_its_end(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs until it ends, asked to stop at its third occasion, then at its seventh, and so on.

    Later every time: what a stop leaves half done is begun anew, and asked always too early it
    would never end. A pass over the tiny corpus asks five times.

    Args:
      run: begins, or goes on where it was stopped.
      monkeypatch: pytest's.

    Returns:
      How often it was stopped.
    """
    asked = stops = 0

    def check(self: Preemption) -> None:
        nonlocal asked
        asked += 1
        if asked == FIRST + LATER * stops:
            raise PreemptedError("the test")

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "check", check)
        while True:
            asked = 0
            try:
                run()
            except PreemptedError:
                stops += 1
            else:
                return stops
