"""The tracker and the picture: every step to all sinks, illegal settings refused, and nothing that ends a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.train.test_metrics import report
from train.track.config import TrackConfig
from train.track.console import ConsoleSink
from train.track.metrics_file import JsonlSink, read_metrics
from train.track.sinks import Tracker
from train.view.sinks import PictureSink


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TrackConfig(wandb="cloud"), "track.wandb=cloud is not one of auto, online, offline, disabled"),
        (TrackConfig(log_interval=0), "track.log_interval=0 is below 1"),
    ],
)
def test_illegal_settings_are_refused(config: TrackConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config.check()


def test_a_tracker_feeds_all_its_sinks(tmp_path: Path) -> None:
    stream, metrics, out = io.StringIO(), tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    sinks = [JsonlSink(metrics), ConsoleSink(2, 4, 4000, 0, stream), PictureSink(metrics, out, "first", 5.5)]
    tracker = Tracker(sinks)
    for step in (1, 2, 3, 4):
        tracker.write(report(step))
        if step == 2:
            assert not out.exists()
            tracker.checkpoint()
            assert out.read_bytes().startswith(b"\x89PNG")
            out.unlink()
    tracker.close()
    assert out.exists() and len(read_metrics(metrics)) == 4
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step=1/4", "step=2/4", "step=4/4"]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    sink = PictureSink(tmp_path / "none.jsonl", tmp_path / "loss.png", say=said.append)
    sink.write(report(1))
    sink.checkpoint()
    sink.checkpoint()
    sink.close(failed=False)
    assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'loss.png'} could not be drawn")
