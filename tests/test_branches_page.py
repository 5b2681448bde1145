"""Every command of docs/branches.md runs: a cooldown, two phases of longer sequences, more text, frozen parts."""

from __future__ import annotations

from pathlib import Path

from tests.test_first_hour import run_page
from train.track.metrics_file import read_metrics

PAGE = Path(__file__).resolve().parent.parent / "docs" / "branches.md"


def test_the_page_does_what_it_shows(tmp_path: Path) -> None:
    folder = run_page(PAGE, tmp_path, timeout_s=1800)
    rows = read_metrics(folder / "runs" / "longer" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 17))
    tokens = [row["train/consumed_tokens"] for row in rows]
    assert tokens == [1024 * step for step in range(1, 17)]
    # Warm-up, stable, decay to the last step's place, then the rate of the long phases.
    rates = [row["train/lr"] for row in rows]
    assert rates[2:9] == [3e-3] * 7
    assert sorted(rates[8:12], reverse=True) == rates[8:12] and rates[11] == 3e-3 / 4
    assert rates[12:] == [7.3e-6] * 4
    report = (folder / "runs" / "longer" / "report.html").read_text()
    assert "Ancestry of longer" in report and report.count(" branches off ") == 3
