"""When the whole cache is re-embedded (docs/method.md, 6): values, asked before each step."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Protocol

from corrector_jax.types import UserError

EXAMPLE = "0-1000:500,1000-end:2000"


class RefreshPolicy(Protocol):
    """Decides from what is known between two steps, so that a resumed run decides alike."""

    def is_due(self, step: int, error: float | None) -> bool:
        """Whether the cache is refreshed before training step `step`.

        Args:
          step: steps done so far.
          error: relative squared error of the embeddings that selection uses, at the newest probe
            since the last refresh; None where there was none.
        """
        ...

    def shortest(self, steps: int) -> int:
        """The fewest steps between two snapshots in a run of `steps`; all where there is one."""
        ...


@dataclasses.dataclass(frozen=True)
class Never:
    """The first snapshot is the only one."""

    def is_due(self, step: int, error: float | None) -> bool:
        """False."""
        return False

    def shortest(self, steps: int) -> int:
        """All of them."""
        return steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Another interval in every stretch of the run, as Atlas does.

    Attributes:
      parts: (a, b, R) in rising order: from step a to before step b, wherever (t - a) mod R = 0;
        b None = to the end.

    Example:
      >>> [t for t in range(10) if parse("0-4:2,4-end:3").is_due(t, None)]
      [2, 4, 7]
    """

    parts: tuple[tuple[int, int | None, int], ...]

    def is_due(self, step: int, error: float | None) -> bool:
        """Due where a part holds the step, at its multiples; never before step 0."""
        for first, stop, every in self.parts:
            if first <= step and (stop is None or step < stop):
                return step > 0 and (step - first) % every == 0
        return False

    def shortest(self, steps: int) -> int:
        """The smallest distance between two of them; the last one's life does not count."""
        stretches = (
            range(first, steps if stop is None else min(stop, steps), every)
            for first, stop, every in self.parts
        )
        due = [0, *(step for step in itertools.chain(*stretches) if step)]
        return min((b - a for a, b in itertools.pairwise(due)), default=steps)


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """When what selection uses has moved too far from fresh: the probe says so.

    Attributes:
      threshold: relative squared error, |h(C) - g|^2 / |g|^2, above which it is due.
      probe_every: steps between probes; a probe at step t is heeded before step t + 1.
    """

    threshold: float
    probe_every: int

    def is_due(self, step: int, error: float | None) -> bool:
        """Whether the newest probe was above the threshold."""
        return error is not None and error > self.threshold

    def shortest(self, steps: int) -> int:
        """One step beyond the first probe."""
        return min(steps, self.probe_every + 1)


def every(steps: int) -> Schedule:
    """One interval: due where t > 0 and t mod R = 0."""
    return Schedule(((0, None, steps),))


def parse(text: str) -> Schedule:
    """`a-b:R` parts, as in "0-1000:500,1000-end:2000".

    Args:
      text: half-open stretches in rising order, "end" for the last one's end.

    Returns:
      The schedule; steps in no part have no refresh.

    Raises:
      UserError: it cannot be read; the message shows one that can.
    """
    parts: list[tuple[int, int | None, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)-(\d+|end):(\d+)\s*", part)
        first, stop, interval = found.groups() if found else ("0", "0", "0")
        end = None if stop == "end" else int(stop)
        before = parts[-1][1] if parts else 0
        wrong = (
            not found
            or not int(interval)
            or before is None
            or int(first) < before
            or (end is not None and end <= int(first))
        )
        if wrong:
            raise UserError(
                f"config.refresh.schedule has {part.strip()!r}: write stretches in rising order "
                f"with the steps between refreshes in each, such as {EXAMPLE}"
            )
        parts.append((int(first), end, int(interval)))
    return Schedule(tuple(parts))
