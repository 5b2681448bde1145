"""A page as one document: its frame, its tables and its text, for whatever is drawn on it.

It needs no network, is whole without its script, and is well-formed XML as well as HTML.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from train.view.report.style import CSS, JS

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def document(title: str, body: str, style: str = "") -> str:
    """The whole page. title: as text; body: as HTML; style: rules beside those of all pages."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"/>'
        f"<title>{escaped(title)}</title><style>{CSS}{style}</style></head>\n<body>{body}"
        f"<script>//<![CDATA[\n{JS}\n//]]></script></body></html>\n"
    )


def escaped(text: str) -> str:
    """Text for the page. What XML has no place for, a model may have written: U+FFFD stands for it."""
    return html.escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A line of figures, (name, value), that a reader wants first."""
    return '<div class="facts">' + "".join(_fact(*pair) for pair in pairs) + "</div>"


def _fact(name: str, value: str) -> str:
    return f"<div><small>{escaped(name)}</small><b>{escaped(value)}</b></div>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of texts. kind: its class, for its style."""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{lines}</table></div>'


def folded(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that is shown when it is asked for."""
    return f"<details><summary>{escaped(title)}</summary>{table(header, rows, kind)}</details>"
