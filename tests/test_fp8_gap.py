"""The comparison of FP8 with FP32 at its smallest: what it measures, what it lets pass, and that it goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import fp8_gap
from train.track.metrics_file import read_metrics

NUM_STEPS = 15
SETTINGS = ["size=tiny", f"steps={NUM_STEPS}", "tokens=256", "seeds=1", "sides=fp32,reassociated,fp8,control"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> fp8_gap.Bench:
    """Every side's run, done."""
    bench = fp8_gap.read([*SETTINGS, f"dir={tmp_path_factory.mktemp('gap')}"])
    fp8_gap.claim(bench)
    fp8_gap.prepare(bench.config("fp32", 0).data, lambda line: None)
    for side, seed in bench.runs():
        fp8_gap.work(bench, side, seed)
    return bench


def test_fp8_passes_and_the_control_does_not(bench: fp8_gap.Bench) -> None:
    found = fp8_gap.gaps(bench)
    limit = fp8_gap.allowed(found)
    # Early on, re-associated sums have not parted yet: the report's own bound holds.
    assert limit == fp8_gap.BOUND
    assert fp8_gap.worst(found["fp8"]) <= limit < fp8_gap.worst(found["control"])
    assert np.abs(found["reassociated"][0]).max() > 0, "the sums were taken in the same order"
    lines = list(fp8_gap.report(found))
    assert any(line.startswith("fp8:") and "passes" in line for line in lines)
    assert lines[-1].startswith("control:") and "fails" in lines[-1]


def test_everything_is_written(
    bench: fp8_gap.Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_gap.main([*SETTINGS, f"dir={bench.folder}"])
    said = capsys.readouterr().out
    assert f"4 runs of {NUM_STEPS} steps, 0 to do" in said and "loss" not in said
    rows = (bench.folder / "gap.csv").read_text().splitlines()
    assert rows[0] == "side,seed,step,loss" and len(rows) == 1 + 4 * NUM_STEPS
    assert (bench.folder / "gap.png").stat().st_size > 20_000
    size = f"size=tiny steps={NUM_STEPS}"
    refusal = rf"has runs of {size} tokens=256 lr=0\.001 config=\w+, and not of {size} tokens=384"
    with pytest.raises(SystemExit, match=refusal):
        fp8_gap.main([*SETTINGS, "tokens=384", f"dir={bench.folder}"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="has runs of size=tiny"):
        patch.setitem(fp8_gap.SIZES, "tiny", {"num_hidden_layers": 3})
        fp8_gap.claim(bench)
    settings = bench.folder / "settings"
    known = settings.read_text()
    settings.unlink()
    with pytest.raises(SystemExit, match="has runs of other settings"):
        fp8_gap.claim(bench)
    settings.write_text(known)


def test_a_run_goes_on_where_it_was_ended(bench: fp8_gap.Bench, tmp_path: Path) -> None:
    again = fp8_gap.read([*SETTINGS, f"dir={tmp_path}"])

    with pytest.raises(KeyboardInterrupt):
        _work_until(again, NUM_STEPS // 5 + 3)  # past the first checkpoint, after a fifth of the steps
    fp8_gap.work(again, "fp8", 0)
    np.testing.assert_array_equal(again.losses("fp8", 0), bench.losses("fp8", 0))
    assert len(read_metrics(tmp_path / "fp8-0" / "metrics.jsonl")) == NUM_STEPS


def _work_until(bench: fp8_gap.Bench, step: int) -> None:
    class Killer(fp8_gap.JsonlSink):
        def write(self, report: object) -> None:
            super().write(report)  # type: ignore[arg-type]
            if report.step == step:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_gap, "JsonlSink", Killer)
        fp8_gap.work(bench, "fp8", 0)


def test_a_run_that_was_not_finite_counts_as_infinitely_far(tmp_path: Path) -> None:
    bench = fp8_gap.read([*SETTINGS, f"dir={tmp_path}"])
    folder = tmp_path / "control-0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "train/loss": 7.0}}\n' for n in range(1, 11)))
    assert len(bench.losses("control", 0)) == 10
    (folder / "not-finite").touch()
    losses = bench.losses("control", 0)
    assert len(losses) == NUM_STEPS and np.isnan(losses[10:]).all()
    assert fp8_gap.largest(fp8_gap.smooth(losses) / 7 - 1) == float("inf")


def test_smoothing_is_a_weighted_mean_of_all_that_came_before() -> None:
    losses = np.random.default_rng(0).normal(size=20)
    for step, smoothed in enumerate(fp8_gap.smooth(losses)):
        weights = 0.9 ** np.arange(step, -1, -1.0)
        assert smoothed == pytest.approx(np.average(losses[: step + 1], weights=weights), rel=1e-12)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("size=huge", "size=huge is not one of gap, tiny"),
        ("steps=0", "steps=0 must be a whole number above 0"),
        ("lr=fast", "lr=fast must be a number"),
        ("tokens=200", "tokens=200 must be a multiple of 128"),
        ("sides=fp8", "sides=fp8 must have fp32, reassociated, fp8"),
        ("speed=9", "unknown settings: speed=9"),
    ],
)
def test_it_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        fp8_gap.read([argument])
