"""`python -m launch report run=DIR [run=DIR ...] [out=FILE]`: runs as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.report.page import write_report
from train.report.runs import find_runs, read_run


def report(settings: Sequence[str]) -> int:
    """Write the page of these runs, whatever they stand at. A sweep's folder means all its jobs.

    One run's page goes to its own folder, a sweep's to the sweep's, that of several to `report.html` here, unless
    `out` says where. ValueError for another setting, or a folder without a run.
    """
    folders: list[Path] = []
    out: Path | None = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "run" and value:
            folders.append(Path(value))
        elif key == "out" and value:
            out = Path(value)
        else:
            raise ValueError(f"{setting} is not known here: python -m launch report run=DIR [run=DIR ...] [out=FILE]")
    if not folders:
        raise ValueError("which run? python -m launch report run=DIR [run=DIR ...] [out=FILE]")
    runs = [read_run(path) for folder in dict.fromkeys(folders) for path in find_runs(folder)]
    out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    write_report(runs, out)
    print(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {out}")
    return 0
