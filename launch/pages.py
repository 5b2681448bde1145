"""`python -m launch.pages`: writes the tables of settings in docs/ from the dataclasses that own them (`make docs`).

A page says between two marks whose keys it shows: `<!-- settings of train -->` ... `<!-- end of settings -->` are those
of a section of a run's config, `sweep` those of a sweep, and the name of a verb the verb's own; `launch NAME` where a
section has that name, too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launch.__main__ import RUN, VERBS
from train.cli import usage

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKED = re.compile(r"(<!-- settings of ([\w, ]+) -->\n).*?(<!-- end of settings -->)", re.S)


def tables() -> dict[str, str]:
    """The table of each name that a page may show."""
    sections = dict(usage.run_tables())
    found = dict(sections)
    for name, verb in VERBS.items():
        for kind, prefix in verb.settings:
            if (kind, prefix) != RUN and prefix.rstrip(".") not in sections:
                own = f"launch {name}" if name in sections else name
                key, made = prefix.rstrip(".") or own, usage.table(kind, prefix)
                # A verb's plain keys and its section of the same name are one table.
                found[key] = "\n".join([found[key], *made.splitlines()[2:]]) if key in found else made
    return found


def filled(text: str) -> str:
    """A page with its tables as they must be. KeyError for a mark that names nothing."""
    known = tables()

    def replace(match: re.Match[str]) -> str:
        head, *others = [known[name.strip()] for name in match[2].split(",")]
        rows = [row for table in others for row in table.splitlines()[2:]]
        return match[1] + "\n".join([head, *rows]) + "\n" + match[3]

    return MARKED.sub(replace, text)


def main() -> int:
    """Write every page that differs from what its marks mean."""
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"written: {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
