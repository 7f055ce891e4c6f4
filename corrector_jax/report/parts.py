"""What pages are made of: a style, tables, pictures. A page is one file that asks for no other."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from corrector_jax import paths
from corrector_jax.paths import AnyPath
from corrector_jax.report.plots import DARK, LIGHT, Theme, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f5f6f8; --ink: #1d2126;
  --faint: #5d6670; --line: #dde1e6; --accent: #0072b2; --mark: #e7f3ea; --mark-ink: #1b6b3a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a1f; --ground: #0f1114;
  --ink: #e6e9ed; --faint: #9aa4af; --line: #2d333b; --accent: #56b4e9; --mark: #16281d;
  --mark-ink: #7fd6a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: 0; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
p { max-width: 46rem; margin: .5rem 0; }
.kind, .note, figcaption, .side, dt { color: var(--faint); font-size: .875rem; }
.kind { margin: 0 0 .25rem; }
.lede { font-size: 1.125rem; margin: 1.25rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem;
  margin: 2rem 0 0; }
.tiles > div, figure, .card { background: var(--paper); border: 1px solid var(--line);
  border-radius: .6rem; }
.tiles > div { padding: .9rem 1.1rem; }
.tiles dd { margin: 0; }
.tiles dd.value { font-size: 1.5rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--faint); font-weight: 500; font-size: .875rem; }
th:first-child { text-align: left; font-weight: 400; }
tbody th.words { white-space: normal; min-width: 15rem; }
tr.total > * { font-weight: 600; }
td b { color: var(--accent); }
td small { display: block; color: var(--faint); font-size: .75rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; padding: 1rem; }
.pictures { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; margin-top: 1rem; }
figure img { display: block; width: 100%; height: auto; margin: .5rem 0; }
.example { padding: 1rem 1.1rem; margin: 1rem 0; }
.example h3 { white-space: pre-wrap; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.25rem; margin-top: .75rem; }
.sides > section { min-width: 0; }
h4 { font-size: .875rem; margin: 0 0 .4rem; font-weight: 600; }
ol { list-style: none; margin: 0; padding: 0; }
li { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .75rem; margin: 0 0 .75rem; }
li.relevant { border-color: var(--mark-ink); }
.badge { background: var(--mark); color: var(--mark-ink); border-radius: 1rem;
  padding: .05rem .55rem; font-size: .8125rem; font-weight: 600; margin-left: .4rem; }
.side { font-variant-numeric: tabular-nums; }
pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  margin: .15rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 11.5rem;
  overflow-y: auto; }
details { padding: .9rem 1.1rem; }
summary { cursor: pointer; font-weight: 600; }
details pre { max-height: none; margin-top: .75rem; }
details.positives { padding: 0; margin-top: .25rem; }
details.positives summary { font-weight: 400; font-size: .875rem; color: var(--faint); }
footer { margin-top: 3rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .lede { font-size: 1.0625rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .tiles > div { padding: .7rem .8rem; }
  .tiles dd.value { font-size: 1.125rem; white-space: nowrap; }
  th, td, thead th { padding: .4rem .5rem; font-size: .8125rem; }
  tbody th.words { min-width: 7rem; }
  th:first-child { position: sticky; left: 0; background: var(--paper); }
  td small { white-space: normal; width: 4.5rem; margin-left: auto; }
}
""".strip()


def whole(title: str, body: str) -> str:
    """A page of its own, that asks for no other file.

    Args:
      title: as HTML.
      body: likewise.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def table(
    label: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], total: str = ""
) -> str:
    """A table of HTML cells.

    Args:
      label: what it holds, for those who cannot see it.
      head: of the columns.
      rows: (name, cells) of each.
      total: the name of the row to set apart.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr class="{"total" if name == total else ""}"><th scope="row" class="words">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll card" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def figure(
    workdir: AnyPath,
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Theme], Figure],
    *,
    wide: bool = False,
) -> str:
    """Draws a picture, light into `plots/NAME.png` and both ways into the page.

    Args:
      workdir: the folder of a run.
      name: of the file, without `.png`.
      title: what it shows.
      caption: how to read it.
      draw: draws it in a theme's colours.
      wide: whether it takes a row of its own.

    Returns:
      HTML.
    """
    light, dark = drawn(title, draw)
    paths.write(workdir / "plots" / f"{name}.png", light)
    first, second = (base64.b64encode(content).decode() for content in (light, dark))
    return picture(title, caption, first, second, wide=wide)


def drawn(title: str, draw: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    """A picture as PNG files, light and dark.

    Args:
      title: named where it fails.
      draw: draws it in a theme's colours.

    Raises:
      RuntimeError: it cannot be drawn. Values were looked into before: this is no fault of a file.
    """
    try:
        light, dark = (png(draw(theme)) for theme in (LIGHT, DARK))
    except Exception as error:
        raise RuntimeError(f"the picture {title!r} cannot be drawn") from error
    return light, dark


def picture(title: str, caption: str, light: str, dark: str, *, wide: bool = False) -> str:
    """A picture as HTML that asks for no file.

    Args:
      title: what it shows.
      caption: how to read it.
      light: a PNG file in base64.
      dark: another, for a dark page.
      wide: whether it takes a row of its own.
    """
    header = base64.b64decode(light[:32])
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    return (
        f'<figure class="{"wide" if wide else ""}">\n<h3>{escape(title)}</h3>\n<picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{escape(title)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{light}">'
        f"</picture>\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"
    )
