import sys
from pathlib import Path

import pytest

from launch.prepare import prepare_command
from tests.train.data_texts import prepared, write_folder
from train.data.config import DataConfig
from train.data.prepare.progress import Progress


def test_the_report_says_what_was_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "text", 30)
    (source / "empty.txt").touch()
    (source / "junk.txt").write_bytes(b"\xff")
    config = DataConfig(source=str(source), dir=str(tmp_path / "t"), vocab_size=280, valid_fraction=0.3, num_workers=1)
    prepare_command(config)
    first = capsys.readouterr().out
    assert "32 files" in first
    assert "empty, passed over: 1, empty.txt" in first
    assert "not UTF-8 text, passed over: 1, junk.txt" in first
    assert first.endswith(f"The tokens lie in {tmp_path / 't'}.\n")
    rows = {line.split()[0]: line.split() for line in first.splitlines() if line.startswith(("train ", "valid "))}
    assert int(rows["train"][1]) + int(rows["valid"][1]) == 30
    prepare_command(config)
    again = capsys.readouterr().out
    assert "prepared already and whole: nothing to do" in again
    assert again.splitlines()[1:] == first.splitlines()[2:]  # the same report


def test_a_split_without_tokens_has_a_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = prepared(tmp_path, valid_fraction=0.0)
    prepare_command(config)
    assert any(line.split() == ["valid", "0"] for line in capsys.readouterr().out.splitlines())


def test_progress_is_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("train.data.prepare.progress.time.monotonic", lambda: now[0])
    said: list[str] = []
    with Progress("tokenising", 40_000_000, said.append) as progress:
        for _ in range(4):
            now[0] += 6
            progress.add(6_000_000)
    assert said == [
        "tokenising: 12.0 of 40.0 MB, 1.00 MB/s, 28 s to go",
        "tokenising: 24.0 of 40.0 MB, 1.00 MB/s, 16 s to go",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said: list[str] = []
    with Progress("tokenising", 1000, said.append) as progress:
        progress.add(500)
        progress.add(500)
    assert not said
    assert "tokenising" in capsys.readouterr().err


def test_a_resumed_progress_counts_only_what_is_new_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("train.data.prepare.progress.time.monotonic", lambda: now[0])
    said: list[str] = []
    with Progress("tokenising", 40_000_000, said.append, before_bytes=20_000_000) as progress:
        now[0] += 10
        progress.add(10_000_000)
    assert said == ["tokenising: 30.0 of 40.0 MB, 1.00 MB/s, 10 s to go"]


def test_the_lengths_are_drawn_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, meta = prepared(tmp_path)
    prepare_command(config, histogram=True)
    drawn = [line.split() for line in capsys.readouterr().out.splitlines() if "and more #" in line]
    histogram = meta.report["document_tokens"]["histogram"]
    assert [(line[0].replace(",", ""), int(line[-1])) for line in drawn] == list(histogram.items())
