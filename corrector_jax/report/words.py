"""What the files of a run say: reading them, and their numbers as words and sentences."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from corrector_jax import paths
from corrector_jax.paths import AnyPath
from corrector_jax.ranking import METRICS
from corrector_jax.types import UserError, brief

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""{metric: (steps, values)}, both [n]: int64 and rising, float64 and finite."""

# (key in results["eval"], name in the tables), weakest claim first.
_SYSTEMS = (
    ("bm25", "BM25"),
    ("pretrained", "full encoder, untouched"),
    ("before", "encoder before training"),
    ("after", "encoder after training"),
)


_OF_OTHER_VALUES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What looking into values of another kind ends in."""


def json_of(path: AnyPath) -> Any:
    """What a JSON file holds.

    Args:
      path: the file.

    Returns:
      The value, None where there is no such file.

    Raises:
      UserError: the file is not JSON, or cannot be read.
    """
    try:
        return paths.read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): put back the one the run wrote.") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{path} cannot be read ({reason}): put the run's own back.")


@contextlib.contextmanager
def made_by_a_run(workdir: AnyPath | str) -> Iterator[None]:
    """While files of a run are looked into: what is not as a run writes it is said in a sentence.

    Args:
      workdir: the run's folder, or what else is named where something is wrong.

    Raises:
      UserError: a value is of another kind than a run writes.
    """
    try:
        yield
    except UserError:
        raise
    except _OF_OTHER_VALUES as error:
        what = f"{type(error).__name__}: {brief(error, 160)}"
        raise UserError(
            f"{workdir}: not as a run writes it ({what}): put back results.json, and what lies "
            "beside it, as the run wrote them."
        ) from error


def read_metrics(path: AnyPath) -> tuple[Series, int]:
    """The finite numbers of `metrics.jsonl`, as far as its lines can be read.

    A killed run can leave half a line, and a resumed one writes some steps again: the last counts.

    Args:
      path: the file, which may be missing.

    Returns:
      The numbers by metric, and how many lines could not be read.

    Raises:
      UserError: the file cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    unreadable = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise _unreadable(path, error) from error
    for line in lines:
        try:
            row = json.loads(line)
            step = row.pop("step")
            if not isinstance(step, int) or abs(step) >= 2**63:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            unreadable += bool(line.strip())
            continue
        for key, value in row.items():
            if _is_finite(value):
                found.setdefault(key, {})[step] = float(value)
    return {
        key: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for key, values in found.items()
    }, unreadable


def get(tree: Mapping[str, Any], *keys: str) -> Any:
    """The value under nested keys.

    Args:
      tree: nested mappings, as read from JSON.
      keys: from the outermost to the innermost.

    Returns:
      The value, None where one of the keys is missing.
    """
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def finite(tree: Mapping[str, Any], *keys: str) -> float | None:
    """The number under nested keys.

    Args:
      tree: nested mappings, as read from JSON.
      keys: from the outermost to the innermost.

    Returns:
      The number, None where there is none or it is not finite.
    """
    value = get(tree, *keys)
    return value if _is_finite(value) else None


def _is_finite(value: object) -> bool:
    # A whole number may be too large for a float.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


ANSWERS = ("em", "f1", "answer_recall@1", "answer_recall@5", "answer_recall@20")
"""What is measured of answers, and of whether what was found holds one."""

READ = {
    "known_positives": "reads known positives",
    "no_passage": "reads no passage",
    "any_passages": "reads any passages",
}
"""What the trained reader is given besides what is retrieved -> in words."""


def answered(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Who answered: before and after training, and the trained reader on other passages.

    Args:
      results: what `results.json` holds.

    Returns:
      (name, {metric: value}) of each; empty where there is no reader.
    """
    systems = [(label, metrics) for label, metrics in measured(results) if "em" in metrics]
    read = get(results, "reader", "read") or {}
    return systems + [(label, read[key]) for key, label in READ.items() if key in read]


def answer_sentence(results: Mapping[str, Any]) -> str:
    """How exact match changed; empty where there is no reader.

    Args:
      results: what `results.json` holds.
    """
    before, after = (finite(results, "eval", name, "em") for name in ("before", "after"))
    if before is None or after is None:
        return ""
    low, high = (finite(results, "comparison", "em", end) for end in ("low", "high"))
    interval = f", 95 % interval {signed(low)} to {signed(high)}"
    return (
        f"Exact match of the answers was {number(before)} before and {number(after)} after "
        f"training ({signed(after - before)}{'' if low is None else interval})."
    )


def measured(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """The systems that were evaluated, weakest claim first.

    Args:
      results: what `results.json` holds.

    Returns:
      (name, {metric: value}) of each.
    """
    systems = [(label, get(results, "eval", key)) for key, label in _SYSTEMS]
    return [(label, metrics) for label, metrics in systems if metrics]


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals; a tiny one never looks like zero.

    Args:
      value: the number.
      digits: decimals.

    Returns:
      The text, '-' where there is no finite number.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A number with three decimals and its sign, '-' where there is none.

    Args:
      value: the number, or a difference.
    """
    return number(value) if value is None or value < 0 else f"+{number(value)}"


def count(value: float | None) -> str:
    """A whole number with separated thousands, '-' where there is none.

    Args:
      value: the number.
    """
    return "-" if value is None else f"{value:,.0f}"


def _percent(share: float) -> str:
    """A share in whole percent that never rounds to nothing or to everything."""
    if 0 < share < 0.01:
        return "less than 1 %"
    if 0.99 < share < 1:
        return "more than 99 %"
    return f"{100 * share:.0f} %"


def duration(seconds: float | None) -> str:
    """Hours and minutes, or minutes and seconds below an hour; '-' where nothing is known.

    Args:
      seconds: how long it took.
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def recall_sentence(results: Mapping[str, Any]) -> str:
    """How recall@20 changed; a rise or a fall is claimed only where the interval excludes 0.

    Args:
      results: what `results.json` holds.
    """
    before = finite(results, "eval", "before", "recall@20")
    after = finite(results, "eval", "after", "recall@20")
    if before is None or after is None:
        return "Recall@20 was not measured both before and after training."
    low, high = (finite(results, "comparison", "recall@20", end) for end in ("low", "high"))
    ends = f"{number(before)} before and {number(after)} after training"
    if low is None or high is None:
        return f"Recall@20 was {ends}; without an interval that is no evidence of a change."
    gain = f"{signed(after - before)}, 95 % interval {signed(low)} to {signed(high)}"
    if low > 0 or high < 0:
        verb = "rose" if low > 0 else "fell"
        return f"Recall@20 {verb} from {number(before)} to {number(after)} ({gain})."
    return f"Recall@20 was {ends}: these queries cannot tell the difference from none ({gain})."


def cache_sentence(results: Mapping[str, Any]) -> str:
    """What was re-embedded; empty where the ledger does not say.

    Args:
      results: what `results.json` holds.
    """
    if finite(results, "distribution", "kl_stale") is None:
        return "No negatives came from a cache, so none went stale."
    refreshed = finite(results, "ledger", "refresh")
    if refreshed is None:
        return ""
    if get(results, "strategy") == "streaming":
        return "Rows of the cache were made new by the steps that encoded them anyway."
    if not refreshed:
        return "The cache was never refreshed: 0 targets were re-embedded after the first snapshot."
    targets = finite(results, "dataset", "targets")
    passes = f", {refreshed / targets:.1f} times the corpus" if targets else ""
    return f"The cache was refreshed: {count(refreshed)} targets were re-embedded{passes}."


def kl_sentence(results: Mapping[str, Any]) -> str:
    """What staleness cost and what the corrector gave back; empty where nothing was measured.

    Args:
      results: what `results.json` holds.
    """
    stale = finite(results, "distribution", "kl_stale")
    corrected = finite(results, "distribution", "kl_corrected")
    if stale is None:
        return ""
    start = f"The softmax over the stale cache is {number(stale)} nats (KL) from the fresh one"
    if corrected is None:
        return f"{start}; no corrected figure was recorded."
    if math.isclose(stale, corrected, rel_tol=1e-6, abs_tol=1e-9):
        return f"{start}, with the corrector and without it."
    start = f"{start}, {number(corrected)} nats once corrected"
    if corrected > stale:
        return f"{start}: the corrector made it worse."
    return f"{start}: the corrector removed {_percent(1 - corrected / stale)} of the KL."


def baseline_sentence(results: Mapping[str, Any]) -> str:
    """What the same queries get without any training; empty where nothing was measured.

    Args:
      results: what `results.json` holds.
    """
    bm25 = finite(results, "eval", "bm25", "recall@20")
    pretrained = finite(results, "eval", "pretrained", "recall@20")
    parts = [
        f"BM25 reaches {number(bm25)}" if bm25 is not None else "",
        f"the full pretrained encoder, untouched, {number(pretrained)}"
        if pretrained is not None
        else "",
    ]
    return f"On the same queries {' and '.join(filter(None, parts))}." if any(parts) else ""


def summary_table(results: Mapping[str, Any]) -> str:
    """The results as plain text, at most 80 columns wide.

    Args:
      results: what `results.json` holds.
    """
    systems = measured(results)
    lines = [" " * 24 + "".join(f"{metric:>11}" for metric in METRICS)]
    for label, metrics in systems:
        cells = "".join(f"{number(metrics.get(metric)):>11}" for metric in METRICS)
        lines.append(f"{label:<24}{cells}")
    comparison = results.get("comparison") or {}
    if comparison:
        gains = [signed(finite(comparison, metric, "difference")) for metric in METRICS]
        lines.append(f"{'after minus before':<24}" + "".join(f"{gain:>11}" for gain in gains))
    if systems := answered(results):
        lines.append(" " * 24 + "".join(f"{m.replace('answer_', ''):>11}" for m in ANSWERS))
        for label, metrics in systems:
            cells = "".join(f"{number(metrics.get(metric)):>11}" for metric in ANSWERS)
            lines.append(f"{label:<24}{cells}")
    sentences = [
        recall_sentence(results),
        *filter(None, [answer_sentence(results)]),
        kl_sentence(results) or cache_sentence(results),
        "Targets encoded: "
        + ", ".join(
            f"{count(finite(results, 'ledger', key))} {words}"
            for key, words in (
                ("initial", "first snapshot"),
                ("refresh", "refreshes"),
                ("encoded_with_grad", "with gradient"),
                ("encoded_without_grad", "without"),
                ("evaluation", "evaluation"),
            )
        )
        + f"; {number(finite(results, 'ledger', 'corpus_passes'), 2)} corpus passes.",
    ]
    for sentence in sentences:
        lines += textwrap.wrap(sentence, 80, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
