"""Every benchmark runs at its smallest setting. What it measures is never asserted: machines are busy.

One is started as people start it; the others, whose own processes would import for longer than they work, in this one
and in the ranks of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

from benchmarks import balance, bubble, data, emulate, load, mtp, recompute, runtime, start, step
from launch.ranks import Ended
from parallel.pipeline.registry import build
from parallel.pipeline.simulate import simulate
from tests.runs import SMALL, prepare_text, train_main
from tests.spawn import STOP_S, Ranks
from train.compose import compose

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STOP_S)


def test_step() -> None:
    sides = "ours,transformers,torchtitan,torchtitan_fp32_experts"
    result = run("step", "size=tiny", "rounds=2", f"sides={sides}", "malloc=tuned")
    assert result.returncode == 0, result.stderr
    assert "MALLOC_MMAP_MAX_=0" in result.stdout  # it has started itself again
    for name in sides.split(","):
        # One line when it is ready or missing, and one in the table if it has run.
        lines = [line for line in result.stdout.splitlines() if line.startswith((f"{name} ", f"{name}:"))]
        assert len(lines) == (1 if "not installed" in lines[0] or "does not run" in lines[0] else 2), result.stdout
    for name in ("ours", "transformers"):
        assert f"{name}: 769664 parameters" in result.stdout


def test_step_profiles_a_side(capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["size=tiny", "profile=ours"])
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("size=L", "size=L is not one of S, M, tiny"),
        ("clock=sun", "clock=sun is not one of cpu, wall"),
        ("sides=ours,theirs", "sides=theirs is not one of ours"),
        ("speed=9", "unknown settings: speed=9"),
        ("S", "unknown settings: S"),
    ],
)
def test_step_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        step.read([argument])


def test_recompute(capsys: pytest.CaptureFixture[str]) -> None:
    recompute.main(["model=tiny", "seq_len=16", "rounds=2"])
    table = capsys.readouterr().out.splitlines()[-8:]
    assert table[0].startswith("none ") and "100.0%" in table[0]
    assert all("[" in line and "100.0%" not in line for line in table[1:])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("model=huge", "model=huge is not one of .*small, tiny"),
        ("dtype=fp8", "dtype=fp8 is not one of fp32, bf16, fp64"),
        ("size=S", "unknown settings: size=S"),
    ],
)
def test_recompute_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        recompute.read([argument])


def test_balance_goes_on_with_the_runs_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        words = " ".join(f"word{(i * i + number) % 97} = {i % 13};" for i in range(300))
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    settings = ["size=tiny", "steps=5", "seeds=0,1", f"folder={tmp_path / 'runs'}", f"source={tmp_path / 'text'}"]
    balance.main(settings)
    said = capsys.readouterr().out
    rows = table(said)
    # two layers, their mean and the worst of them, the loss, and that of each seed
    assert [len(rows[side]) for side in ("none", "losses", "bias")] == [6, 6, 6]
    assert re.search(r"(Shown|Refuted|Neither shown nor refuted) at this size", said)
    assert (tmp_path / "runs" / "balance.png").stat().st_size > 10_000
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 6
    files[0].unlink()  # as if the benchmark had been ended before this run was
    balance.main(settings)
    again = capsys.readouterr().out
    trained = {line.split(":")[0].strip() for line in again.splitlines() if ": step " in line}
    assert trained == {"bias, seed 0"}
    assert table(again) == rows
    assert sorted((tmp_path / "runs").glob("*.json")) == files


@pytest.mark.parametrize(
    ("bias", "losses", "said"),
    [
        ([(0.1, 3.0), (0.2, 3.1)], [(0.5, 3.0), (0.4, 3.2)], "Shown"),
        ([(0.1, 3.0), (0.2, 3.3)], [(0.5, 3.1), (0.4, 3.1)], "Neither"),
        ([(0.1, 3.2), (0.2, 3.3)], [(0.5, 3.1), (0.4, 3.2)], "Refuted at this size: the loss"),
        ([(0.6, 3.0), (0.5, 3.0)], [(0.5, 3.1), (0.4, 3.1)], "Refuted at this size: balance"),
    ],
)
def test_balance_says_what_the_runs_show(
    bias: list[tuple[float, float]], losses: list[tuple[float, float]], said: str
) -> None:
    sides = {"bias": bias, "losses": losses}
    runs = {
        side: {seed: balance.Run([[violation]], [loss], loss) for seed, (violation, loss) in enumerate(ends)}
        for side, ends in sides.items()
    }
    assert balance.verdict(runs).startswith(said)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("sides=none,noise", "sides=noise is not one of none, losses, bias"),
        ("steps=0", "steps=0 is not made of whole numbers above 0"),
        ("seeds=1,x", "seeds=1,x is not made of whole numbers"),
        ("speed=9", "unknown settings: speed=9"),
    ],
)
def test_balance_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        balance.read([argument])


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        words = " ".join(f"word{(i * i + number) % 97} = {i % 13};" for i in range(1500))
        (tmp_path / f"{number}.txt").write_text(words)
    monkeypatch.setattr(sys, "argv", ["data", "--source", str(tmp_path)])
    monkeypatch.setattr(data, "rows_per_s", partial(data.rows_per_s, at_least_s=0.01))
    data.main()
    out = capsys.readouterr().out
    assert "MB/s" in out
    assert len(out.splitlines()) == 15  # two lines, two heads, five forms and six sizes of rows


def table(output: str) -> dict[str, list[str]]:
    """Lines of a benchmark's tables by their first column, which ends at two spaces."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in output.splitlines())
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def said_to(folder: Path, words: list[str]) -> None:
    """On a rank: what `python -m benchmarks.bubble rank ...` does, its words in a file."""
    with (folder / f"{os.environ['RANK']}.txt").open("w") as file, redirect_stdout(file), warnings.catch_warnings():
        assert bubble.main(words) == 0


def test_bubble(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ranks are those of the tests; `test_bubble_of_deepspeed` starts its own."""
    sides = ["ours 1f1b", "ours dualpipev", "torch dualpipev"]

    def start(command: list[str], num_ranks: int, logs: Path) -> Ended:
        python, *words = command
        assert (python, words[:3]) == (sys.executable, ["-m", "benchmarks.bubble", "rank"])
        ranks.run(said_to, logs, words[2:], world_size=num_ranks, with_group=False)
        print((logs / "0.txt").read_text())
        return Ended(0)

    monkeypatch.setattr(bubble, "start_ranks", start)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the benchmark would, for all tests behind this one
    words = ["ranks=2", "forward_ms=4", "rounds=2", f"sides={','.join(sides)}", f"out={tmp_path / 'bubble.svg'}"]
    assert bubble.main(words) == 0
    said = capsys.readouterr().out
    rows = table(said)
    # formula, as run, measured, best, spread, above formula, and above torch where torch has the schedule
    assert [(rows[side][0], len(rows[side])) for side in sides] == [("3.0", 6), ("1.0", 7), ("1.0", 6)]
    assert "late on average" in said and "neighbours" in said
    assert "dualpipev" in (tmp_path / "bubble.2.svg").read_text()


@pytest.mark.slow
def test_bubble_of_deepspeed() -> None:
    result = run("bubble", "ranks=2", "forward_ms=4", "rounds=1", "sides=deepspeed dualpipev")
    assert result.returncode == 0, result.stdout + result.stderr
    assert table(result.stdout)["deepspeed dualpipev"][0] == "2.0"  # takes weight gradients in its backward: twice ours


def test_bubble_refuses() -> None:
    with pytest.raises(SystemExit, match="sides=ours gpipe is not one of ours 1f1b"):
        bubble.main(["sides=ours gpipe"])
    with pytest.raises(SystemExit, match=r"speed is not a key of benchmarks\.bubble: it takes ranks"):
        bubble.main(["speed=9"])


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_bubbles_formula_is_the_simulators(name: str, num_ranks: int) -> None:
    schedule = build(name, num_ranks, 2 * num_ranks)
    due = bubble.formula(name, num_ranks)
    assert max(simulate(schedule).bubble) == pytest.approx(due)
    assert max(simulate(bubble.as_run(schedule)).bubble) <= due  # results that leave earlier never idle a rank longer


def test_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["rounds=2", "seq_len=16", "micro_batch_size=1", "micro_batches=2", "stages=2", "few_tokens=4"]
    runtime.main(settings)
    said = capsys.readouterr().out
    for size in ("2 micro-batches of 1 x 16 tokens", "2 micro-batches of 1 x 4 tokens"):
        rows = table(said.split(size)[1])
        assert [rows[side][1] for side in ("ours", "ours, pairs", "ours, 2 stages")] == ["4", "3", "8"]


def test_runtime_refuses_a_side_that_computes_something_else() -> None:
    config = compose(["train.seq_len=4", "train.micro_batch_size=1"])
    comparison = runtime.Comparison(config, 2)
    step, models = comparison.plain()
    step()
    want = runtime.gradients(models)
    runtime.check_same(want, models, "plain")
    wrong = want | {"norm.weight": want["norm.weight"] * 1.01}
    with pytest.raises(SystemExit, match=r"plain computes another gradient of norm.weight"):
        runtime.check_same(wrong, models, "plain")


@pytest.mark.slow
def test_overlap() -> None:
    if reason := emulate.able():
        pytest.skip(f"this machine cannot emulate a cluster: {reason}")
    result = run(
        *("overlap", "rounds=2", "ratios=1", "schedules=dualpipev", "micro_batches=4", "layers=1"),
        *("tokens=16", "hidden=32", "dispatch=flat"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert {"pair", "dualpipev"} <= {line.split()[0] for line in result.stdout.splitlines()}


@pytest.mark.slow
def test_overlap_on_the_tiny_model() -> None:
    result = run("overlap", "model", "rounds=1")
    assert result.returncode == 0, result.stdout + result.stderr
    network, loopback = result.stdout.split("tiny model, loopback")
    for part in (loopback,) if "no emulated network" in network else (network, loopback):
        rows = table(part)
        assert {f"{way} pairs={pairs}" for way in ("two_hop", "flat") for pairs in ("true", "false")} <= rows.keys()


@pytest.mark.slow
def test_dispatch() -> None:
    if reason := emulate.able():
        pytest.skip(f"this machine cannot emulate a cluster: {reason}")
    result = run("dispatch", "nodes=2", "per_node=1", "tokens=16", "hidden=32", "rounds=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "two_hop against flat" in result.stdout


def test_mtp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def here(command: list[str], stdout: TextIO, **_: Any) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "train"]
        with redirect_stdout(stdout):
            return SimpleNamespace(returncode=train_main(command[3:]))

    monkeypatch.setattr(mtp.subprocess, "run", here)
    small = [word for word in SMALL if not word.startswith(("train.max_steps", "evaluate.interval", "lr_sch"))]
    small += [*prepare_text(tmp_path / "data"), "model.num_hidden_layers=1", "lr_scheduler.warmup_steps=1"]
    arguments = ["steps=2", "seeds=1", f"out={tmp_path / 'mtp'}", *small]
    mtp.main(arguments)
    row = table(capsys.readouterr().out)["0"]
    assert float(row[2]) == pytest.approx(float(row[0]) - float(row[1]), abs=2e-4)
    assert 1 <= float(row[5]) <= 2
    assert (tmp_path / "mtp" / "mtp.png").stat().st_size > 10_000
    # What is done is read, not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mtp").rglob("metrics.jsonl")}
    mtp.main(arguments)
    assert table(capsys.readouterr().out)["0"] == row
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    with pytest.raises(SystemExit, match="is of other settings"):
        mtp.main([*arguments, "train.seq_len=20"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("steps=0", "steps=0 must be a whole number of at least 1"),
        ("modle=small", "modle is not a key of the config; did you mean model"),
    ],
)
def test_mtp_refuses(argument: str, sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        mtp.read([argument])


def test_start_refuses() -> None:
    for words, sentence in ((["rounds=0"], "rounds=0 must be"), (["round=3"], "did you mean rounds?")):
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            start.main(words)


def test_load(capsys: pytest.CaptureFixture[str]) -> None:
    load.main(["tensors=3", "numel=1001", "ranges=4", "rounds=2"])
    said = capsys.readouterr().out
    assert said.startswith("3 tensors in 4 ranges each, 0 MB\n")
    assert all(f"\n{side}" in said for side in (load.OURS, load.THEIRS, load.CHECKSUMS))
    with pytest.raises(SystemExit, match="ranges=7 must be at most numel=5"):
        load.main(["numel=5", "ranges=7"])
