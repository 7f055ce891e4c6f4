"""Searching from a terminal: one query, or one after the other with a history."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from corrector_jax.paths import AnyPath
from corrector_jax.search import DEPTH, MODELS, Answer, Hit, Searcher, require_count, require_query
from corrector_jax.snippet import Piece, snippet
from corrector_jax.types import UserError
from corrector_jax.writer import say

VIEWS: dict[str, tuple[str, ...]] = {
    "both": ("before", "final"),
    "all": MODELS,
    **{name: (name,) for name in MODELS},
}
"""What is shown side by side, by the word that asks for it."""

_HELP = "a query, :both, :all, :before, :stale, :corrected, :final, :COUNT (as :10), :quit"
_NARROWEST = 44  # characters of a column; with less room, models stand one below the other


def search_run(workdir: AnyPath, *, query: str, step: int | None, show: str, count: int) -> None:
    """Answers one query, or the lines of standard input until it ends.

    Args:
      workdir: the run's folder.
      query: the query; empty = ask for them, or read them where standard input is no terminal.
      step: which checkpoint; None = the newest.
      show: a word of `VIEWS`.
      count: targets shown of each model.

    Raises:
      UserError: there is no run or no checkpoint, or a word or number is impossible.
    """
    if show not in VIEWS:
        raise UserError(f"config.search.show is {show!r}: write {', '.join(VIEWS)}")
    require_count("config.search.count", count)
    wanted = require_query(query) if query else ""
    searcher = Searcher(workdir, step=step)
    if wanted:
        _answer(searcher, wanted, show, count)
        return
    say(f"{workdir} at step {searcher.position.step:,}: {_HELP}")
    for line in _lines():
        command = line.removeprefix(":").strip()
        try:
            if not line.startswith(":"):
                _answer(searcher, require_query(line), show, count)
            elif command in ("quit", "q"):
                return
            elif command in VIEWS:
                show = command
            elif command.isdecimal():
                count = require_count(line, int(command))
            else:
                say(_HELP)
        except UserError as error:
            say(f"error: {error}")


def _answer(searcher: Searcher, query: str, show: str, count: int) -> None:
    models = [name for name in VIEWS[show] if name in searcher.models]
    if not models:
        raise UserError(
            f"{show!r} ranks a cache, which strategy {searcher.job.config.strategy!r} has not: "
            "write before, final or both"
        )
    (answer,) = searcher.answers([query], count=count, models=models)
    width = shutil.get_terminal_size((100, 24)).columns
    say(page(answer, width=width, bold=sys.stdout.isatty()))


def page(answer: Answer, *, width: int, bold: bool) -> str:
    """An answer as text.

    Args:
      answer: what the models found.
      width: columns of the terminal.
      bold: whether matches and titles are set in bold.

    Returns:
      Lines, each model a column of its own where there is room.
    """
    models = list(answer.hits)
    room = (width - 3 * (len(models) - 1)) // len(models)
    side_by_side = room >= _NARROWEST
    room = room if side_by_side else width
    columns = []
    for name in models:
        took = f"{1000 * answer.seconds[name]:.0f} ms"
        lines = [_fit([Piece(f"{name.upper()} ", True), Piece(f"({took})", False)], room, bold)]
        for hit in answer.hits[name]:
            lines += ["", *_hit(answer.query, name, hit, room, bold)]
        columns.append(lines)
    if not side_by_side:
        return "\n\n".join("\n".join(column) for column in columns)
    height = max(map(len, columns))
    empty = " " * room
    padded = [column + [empty] * (height - len(column)) for column in columns]
    rows = zip(*([line or empty for line in column] for column in padded), strict=True)
    return "\n".join(" | ".join(row).rstrip() for row in rows)


def _hit(query: str, model: str, hit: Hit, width: int, bold: bool) -> Iterator[str]:
    others = ", ".join(
        f"{name} {rank or f'> {DEPTH}'}" for name, rank in hit.ranks.items() if name != model
    )
    head = f"{hit.rank:>2}. {hit.score:.3f}  {printable(hit.target)}"
    notes = " · ".join(
        filter(None, [f"rank: {others}" if others else "", "known positive" * hit.relevant])
    )
    yield _fit([Piece(head, True)], width, bold)
    if notes:
        yield _fit([Piece(f"    {notes}", False)], width, bold)
    indent = Piece("    ", False)
    for line in _wrapped(snippet(query, hit.text), width - 4):
        yield _fit([indent, *line], width, bold)


def printable(text: str) -> str:
    """A text without what a terminal would obey: control characters become question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _wrapped(pieces: Sequence[Piece], width: int) -> Iterator[list[Piece]]:
    """Lines of at most `width` characters, broken between words where they fit."""
    line: list[Piece] = []
    used = 0
    parts = (part for word in _whole_words(pieces) for part in _cut(word, width))
    for word in parts:
        length = sum(len(piece.text) for piece in word)
        if used and used + length > width:
            yield line
            line, used = [], 0
        line += word
        used += length
        if used < width:
            line.append(Piece(" ", False))
            used += 1
    yield line


def _whole_words(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """What stands between two blanks, which may be marked in part."""
    word: list[Piece] = []
    for text, marked in pieces:
        first, *others = text.split(" ")
        word.append(Piece(printable(first), marked))
        for other in others:
            yield word
            word = [Piece(printable(other), marked)]
    yield word


def _cut(word: Sequence[Piece], width: int) -> Iterator[list[Piece]]:
    """A word in parts of at most `width` characters; some scripts write no blanks."""
    part: list[Piece] = []
    left = width = max(width, 1)
    for text, marked in word:
        while len(text) > left:
            yield [*part, Piece(text[:left], marked)]
            text, part, left = text[left:], [], width
        part.append(Piece(text, marked))
        left -= len(text)
    yield part


def _fit(pieces: Sequence[Piece], width: int, bold: bool) -> str:
    """Exactly `width` columns: cut, or filled with blanks; marked pieces in bold."""
    line, left = "", width
    for text, marked in pieces:
        text = text[:left]
        left -= len(text)
        line += f"\x1b[1m{text}\x1b[0m" if marked and bold and text else text
    return line + " " * left


def _lines() -> Iterator[str]:
    """What is typed or piped in, a query or command a time; blank lines are left out."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    history = state / "corrector_jax" / "queries"
    with contextlib.suppress(OSError):  # none yet, or not to be read
        readline.read_history_file(history)
    readline.set_history_length(1000)
    try:
        while True:
            if line := input("query> ").strip():
                yield line
    except (EOFError, KeyboardInterrupt):
        say("")
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
