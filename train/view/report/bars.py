"""Rows of bars beside their names and figures, as HTML: how much of a whole each of several parts is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.view.report.document import escaped


@dataclass(frozen=True)
class Part:
    """A piece of a bar. color: its number in the style sheet. text: its figure, shown when it is pointed at."""

    name: str
    value: float
    color: int
    text: str


@dataclass(frozen=True)
class Row:
    """A row: one bar, or several thin ones below each other, each made of parts; at the right a figure per column."""

    name: str
    bars: Sequence[Sequence[Part]]
    texts: Sequence[str]


def draw_bars(
    rows: Sequence[Row], headings: Sequence[str], level: tuple[float, str] | None = None, has_key: bool = True
) -> str:
    """Rows over one scale, which ends at the longest bar or at the level, whichever is more.

    headings: of the columns of figures. level: a value that is marked through all rows, with its name. has_key:
    whether the parts are named above the rows.
    """
    end = max([sum(part.value for part in bar) for row in rows for bar in row.bars] + ([level[0]] if level else []))
    end = end or 1.0
    cells = [f'<div class="bars" style="--columns:{len(headings)}"><span></span><span></span>']
    cells += [f"<b>{escaped(heading)}</b>" for heading in headings]
    for row in rows:
        cells.append(f'<span class="name">{escaped(row.name)}</span><div class="track">')
        cells += [_bar(bar, end) for bar in row.bars]
        if level is not None:
            cells.append(f'<u style="left:{level[0] / end:.2%}" title="{escaped(level[1])}"></u>')
        cells.append("</div>")
        cells += [f"<span>{escaped(text)}</span>" for text in row.texts]
    cells.append("</div>")
    return (_key(rows, level) if has_key else "") + f'<div class="scroll">{"".join(cells)}</div>'


def _bar(parts: Sequence[Part], end: float) -> str:
    cells = [
        f'<i class="c{part.color}" style="width:{part.value / end:.3%}" title="{escaped(f"{part.name}: {part.text}")}">'
        "</i>"
        for part in parts
        if part.value > 0
    ]
    return f"<div>{''.join(cells)}</div>"


def _key(rows: Sequence[Row], level: tuple[float, str] | None) -> str:
    """Every part that some row has, once."""
    parts = [part for row in rows for bar in row.bars for part in bar]
    seen = {part.name for part in parts if part.value > 0}
    colors = {part.name: part.color for part in parts if part.name in seen}
    return key(list(colors.items()), level and level[1])


def key(colors: Sequence[tuple[str, int]], level: str | None = None) -> str:
    """Names beside their colours. level: what the line that is drawn through all stands for."""
    words = [f'<span><i class="square c{color}"></i>{escaped(name)}</span>' for name, color in colors]
    if level:
        words.append(f'<span><i class="square limit"></i>{escaped(level)}</span>')
    return f'<div class="key">{"".join(words)}</div>'
