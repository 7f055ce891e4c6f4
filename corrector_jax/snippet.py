"""The part of a text that says why it was found: the words it shares with the query, and around."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

WIDTH = 240
"""Characters of a snippet."""

_LOOKED_AT = 20_000  # characters of a text; matches behind them are not looked for

_WORD = re.compile(r"[^\W_]+")  # `read_file` is two words: a query says "read a file"
_COMMON = frozenset(
    _WORD.findall(
        "a an and are as at be by can do does for from has have how in into is it its not of on "
        "or that the their they this to was what when where which who why will with"
    )
)


class Piece(NamedTuple):
    """A run of characters, and whether it is a word of the query."""

    text: str
    marked: bool


def snippet(query: str, text: str, width: int = WIDTH) -> list[Piece]:
    """The stretch of a text that holds most words of the query, in pieces.

    Words match by their stems (English), without regard to case; words as common as "the" do not.

    Args:
      query: the query.
      text: the text; runs of blanks become one.
      width: characters kept, up to a word more; "..." stands for what is left out.

    Returns:
      Pieces that add up to the snippet; no two neighbours are marked alike.
    """
    text = " ".join(text[:_LOOKED_AT].split())
    wanted = {_stem(word) for word in _words(query)}
    words = [match.span() for match in _WORD.finditer(text)]
    marked = [(start, end) for start, end in words if _stem(text[start:end]) in wanted]
    first, last = _best(text, words, marked, width)
    pieces = [Piece("… ", False)] if first else []
    at = first
    for start, end in marked:
        if first <= start and end <= last:
            pieces += [Piece(text[at:start], False), Piece(text[start:end], True)]
            at = end
    pieces.append(Piece(text[at:last] + (" …" if last < len(text) else ""), False))
    return _joined(pieces)


def _best(
    text: str, words: list[tuple[int, int]], marked: list[tuple[int, int]], width: int
) -> tuple[int, int]:
    """Where the snippet begins and ends: most different matches first, then most, then earliest."""
    if len(text) <= width:
        return 0, len(text)
    first, most = 0, (0, 0)
    for start, _ in marked:
        inside = [text[a:b].lower() for a, b in marked if start <= a and b <= start + width]
        if (len(set(inside)), len(inside)) > most:
            first, most = start, (len(set(inside)), len(inside))
    if first <= width // 4:
        first = 0  # near enough to begin where the text does
    else:  # a few words ahead of the first match
        first = next(start for start, _ in words if start >= first - width // 8)
    ends = [end for start, end in words if first <= start and end <= first + width]
    last = ends[-1] if ends else first + width
    # Closing punctuation goes with its word.
    while last < min(len(text), first + width + 8) and not re.match(r"[\s\w]", text[last]):
        last += 1
    return first, last


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if joined and joined[-1].marked == piece.marked:
            piece = Piece(joined.pop().text + piece.text, piece.marked)
        joined.append(piece)
    return joined


def _words(text: str) -> list[str]:
    found = [word for word in _WORD.findall(text) if word.lower() not in _COMMON]
    return found or _WORD.findall(text)


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    import Stemmer

    return str(Stemmer.Stemmer("english").stemWord(word.lower()))
