"""The console: plain lines in a log, one moving line on a terminal."""

from __future__ import annotations

import io

import pytest

from tests.train.test_metrics import report
from train.track.console import ConsoleSink
from train.track.metrics import StepReport


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def console(stream: io.StringIO, total_steps: int, log_interval: int = 10) -> None:
    clock = Clock()
    sink = ConsoleSink(log_interval, total_steps, 1000 * total_steps, 0, stream, clock)
    for step in range(1, total_steps + 1):
        clock.now_s += 2
        valid = {"valid/loss": 4.5} if step == 15 else {}
        sink.write(report(step, **valid, **{"moe/max_vio": 0.25}))
    sink.close(failed=False)


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    console(stream, 25)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    rows = [dict(part.split("=", 1) for part in line.split(" ")) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [f"{step}/25" for step in (1, 10, 15, 20, 25)]
    assert [row["valid_loss"] for row in rows if "valid_loss" in row] == ["4.5000"]
    assert rows[1] == {
        "step": "10/25",
        "tokens": "10k",
        "loss": "0.5000",
        "max_vio": "0.25",
        "grad_norm": "1.500",
        "lr": "1.00e-03",
        "tokens_per_s": "2000",
        "eta": "0:00:30",  # 15 steps of 2 s on the console's clock, not the 0.5 s that the report claims
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_moving_line() -> None:
    stream = Terminal()
    console(stream, 25)
    last = stream.getvalue().split("\r")[-1]
    assert stream.getvalue().count("\n") <= 4  # the validation's line, and the bar's own end
    assert "step 25/25" in last and "loss 0.2000" in last and "2k tokens/s" in last and "ETA 0:00:00" in last
    assert "step 15: loss 0.3333 valid 4.500" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_an_evaluation_before_the_first_step_has_a_line(stream: io.StringIO) -> None:
    sink = ConsoleSink(10, 5, 5000, 0, stream, Clock())
    sink.write(StepReport({"step": 0, "train/consumed_tokens": 0, "valid/loss": 7.25}))
    sink.close(failed=False)
    assert "step=0/5 valid_loss=7.2500" in stream.getvalue()
