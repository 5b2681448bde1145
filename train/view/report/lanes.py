"""What several workers did over time, a lane each, as SVG that stretches: a window of it, with the bars' texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from train.view.report.chart import SIDE, label, ticks
from train.view.report.document import escaped
from train.view.rows import Bar, Swatch, on

# Of a lane with texts and of one without, and the gap between two, in pixels.
TALL, FLAT, GAP = 24, 12, 3
# The least width of a picture, below which it is scrolled; letters of its texts.
MIN_WIDTH, LETTER, PAD = 980, 6.0, 3.0


def draw_lanes(
    names: Sequence[str],
    bars: Sequence[Bar],
    window: tuple[float, float],
    form: Callable[[float], str],
    has_texts: bool = True,
    said: Sequence[str] = (),
) -> str:
    """The bars that lie in a window of time, of which one row is one lane.

    form: a time of the axis as text. has_texts: whether bars carry their texts where they have room. said: what is
    shown of each bar when it is pointed at; empty: nothing, and the picture is much smaller.
    """
    start, stop = window
    tall = TALL if has_texts else FLAT
    height = len(names) * (tall + GAP)
    scale = SIDE / (stop - start)
    seen = [place for place, bar in enumerate(bars) if bar.stop > start and bar.start < stop]
    parts = [
        f'<div class="scroll"><div class="lanes" style="height:{height}px"><svg viewBox="0 0 {SIDE:.0f} {height}" '
        f'preserveAspectRatio="none" role="img" aria-label="timeline of {len(names)} ranks">'
    ]
    tops = [row * (tall + GAP) for row in range(len(names))]
    parts += [f'<rect class="idle" y="{top}" width="{SIDE:.0f}" height="{tall}"/>' for top in tops]
    cells, texts = list[str](), list[str]()
    together: defaultdict[str, list[str]] = defaultdict(list)
    for place in seen:
        bar = bars[place]
        left, right = (scale * (min(max(at, start), stop) - start) for at in (bar.start, bar.stop))
        high = tall / len(bar.colors)
        for half, (color, text) in enumerate(zip(bar.colors, bar.texts, strict=True)):
            top = tops[bar.row] + half * high
            if not said:
                together[color].append(f"M{left:.1f} {top:g}h{right - left:.1f}v{high:g}H{left:.1f}z")
                continue
            cells.append(
                f'<rect x="{left:.2f}" y="{top:g}" width="{right - left:.2f}" height="{high:g}" fill="{color}">'
                f"<title>{escaped(said[place])}</title></rect>"
            )
            if has_texts and (right - left) / SIDE * MIN_WIDTH >= LETTER * len(text) + PAD:
                at = f"left:{(left + right) / 2 / SIDE:.2%};top:{top + high / 2:g}px;color:{on(color)}"
                texts.append(f'<b style="{at}">{escaped(text)}</b>')
    cells += [f'<path style="fill:{color}" d="{"".join(each)}"/>' for color, each in together.items()]
    parts += [*cells, "</svg>", *texts]
    parts += [
        f'<span class="y" style="top:{top + tall / 2:g}px">{escaped(name)}</span>'
        for top, name in zip(tops, names, strict=True)
    ]
    parts += [label("x", scale * (at - start), form(at)) for at in ticks(start, stop, 10)]
    return "".join(parts) + "</div></div>"


def lanes_key(entries: Sequence[Swatch]) -> str:
    """Names of what bars are, beside their colours."""
    words = []
    for entry in entries:
        lines = ["".join(f'<i style="background:{color}"></i>' for color in line) for line in entry.colors if len(line)]
        colors = "".join(f"<em>{line}</em>" for line in lines)
        words.append(f'<span class="swatches"><span>{colors}</span>{escaped(entry.text)}</span>')
    return f'<div class="key">{"".join(words)}</div>'
