"""A page of numbers and pictures in one file, which needs no network."""

import base64
from html import escape
import math

_STYLE = """
:root { color-scheme: light; --faint: #667085; --line: #e3e7ee; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px;
  color: #1f2430; background: #fff; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 8px 0 16px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
.banner { border-left: 4px solid #2f6fbb; background: #f2f6fc;
  padding: 10px 14px; margin: 0 0 16px; }
.faint, figcaption { color: var(--faint); font-size: 13px; }
figure { display: inline-block; vertical-align: top; margin: 0 16px 24px 0;
  max-width: calc(100% - 16px); }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 6px; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th, td { text-align: left; padding: 4px 16px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); }
td:not(:last-child) { white-space: nowrap; }
@media (max-width: 640px) {
  .stacks thead { display: none; }
  .stacks :is(tbody, tr, td) { display: block; }
  .stacks tr { border-bottom: 1px solid var(--line); padding: 6px 0; }
  .stacks td { border: 0; padding: 0; overflow-wrap: anywhere; }
  .stacks td:not(:last-child) { white-space: normal; }
  .stacks td:first-child { font-weight: 600; }
  .stacks td:not(:first-child) { display: inline-block; margin-right: 12px; }
  .stacks td:empty:not(:first-child) { display: none; }
  .stacks td:not(:first-child)::before { content: attr(data-name) " ";
    color: var(--faint); }
}
details { color: var(--faint); font-size: 13px; margin-top: 8px; }
dt { font-weight: 600; margin-top: 6px; }
dd { margin: 0; }
"""


class Page:
  """Collects the parts of a page, from top to bottom."""

  def __init__(self, title: str):
    self._title = title
    self._parts = []

  def heading(self, text: str) -> None:
    """Adds the heading of a section."""
    self._parts.append(f'<h2>{escape(text)}</h2>')

  def text(self, text: str, style: str = 'faint') -> None:
    """Adds a remark, or as a `banner` a highlighted sentence."""
    self._parts.append(f'<p class="{style}">{escape(text)}</p>')

  def table(
    self,
    header: tuple[str, ...],
    rows: list[tuple[str, ...]],
    *,
    stacks: bool = False,
  ) -> None:
    """Adds a table of texts; if it is too wide, it scrolls by itself.

    With `stacks`, cells are stacked on a phone instead.
    """
    names = [escape(name) for name in header]
    head = ''.join(f'<th>{name}</th>' for name in names)
    head = f'<thead><tr>{head}</tr></thead>\n' if any(header) else ''
    body = ''
    for row in rows:
      cells = zip(names, map(escape, row), strict=True)
      cells = ''.join(f'<td data-name="{n}">{cell}</td>' for n, cell in cells)
      body += f'<tr>{cells}</tr>\n'
    kind = ' class="stacks"' if stacks else ''
    table = f'<table{kind}>{head}<tbody>{body}</tbody></table>'
    self._parts.append(f'<div class="scroll">{table}</div>')

  def notes(self, rows: list[tuple[str, str]]) -> None:
    """Adds a folded list of names and their meanings."""
    items = ''.join(
      f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows
    )
    self._parts.append(
      f'<details><summary>What they mean</summary><dl>{items}</dl></details>'
    )

  def figure(
    self, png: bytes, caption: str, width: int = 496, min_width: int = 0
  ) -> None:
    """Embeds a PNG, so many pixels wide; below `min_width` it scrolls."""
    data = base64.b64encode(png).decode()
    caption = escape(caption)
    self._parts.append(
      f'<figure style="width: {width}px"><div class="scroll">'
      f'<img style="min-width: {min_width}px" alt="{caption}" '
      f'src="data:image/png;base64,{data}"></div>'
      f'<figcaption>{caption}</figcaption></figure>'
    )

  def html(self) -> str:
    """The page."""
    title, body = escape(self._title), '\n'.join(self._parts)
    return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{title}</title>\n<style>{_STYLE}</style></head>\n'
      f'<body><h1>{title}</h1>\n{body}\n</body></html>\n'
    )


def number(value: float, error: float | None = None) -> str:
  """A number for a reader: `12`, `0.01234`, `-11,364.7`, `45.31 ± 0.12`."""
  if not math.isfinite(value):
    return '–'
  if error is not None and error > 0:
    # Two digits of the error, but no more than six of the value.
    of_error = 1 - math.floor(math.log10(error))
    of_value = 5 - math.floor(math.log10(max(abs(value), 1e-9)))
    digits = max(0, min(of_error, of_value))
    shown, rounded = f'{value:,.{digits}f}', f'{error:.{digits}f}'
    return f'{shown} ± {rounded}' if float(rounded) else shown
  if value == int(value) and abs(value) < 1e6:
    return f'{int(value):,}'
  return f'{value:,.4g}' if abs(value) < 1000 else f'{value:,.1f}'
