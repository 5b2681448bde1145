"""`python -m benchmarks.gpu_check [device=cpu size=small parts=machine,slice out=FOLDER]`: what a GPU finds.

Parts run one after the other, each in a process of its own that is ended when its time is over. What a part has found
by then stays, why it has not come to its end is a line of the table, and the next one begins. The table,
`gpu-check.md`, and the same as an object, `gpu-check.json`, are written after every part. The exit code is 1 where
something is not as it must be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.gpu_check.table import Found, Row, write
from train.settings import read

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Settings of the check.

    Attributes:
        device: `cuda`, `cpu`, or `auto` for CUDA where there is a GPU.
        size: `full`, for a Hopper GPU, `small`, for anything, or `auto` by the device.
        parts: names of parts, with commas between them, or `all`.
        out: folder for the table and the object.
        cluster: whose figures the slice is planned with; `auto` by the name of the GPU.
        patience: times the time that a part may take, for slow machines.
    """

    device: str = "auto"
    size: str = "auto"
    parts: str = "all"
    out: Path = Path("gpu-check")
    cluster: str = "auto"
    patience: float = 1.0

    def check(self) -> None:
        """ValueError for a word that is none of its own."""
        for name, words in {"device": ("auto", "cuda", "cpu"), "size": ("auto", "full", "small")}.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(words)}")
        for name in self.parts.split(","):
            if name not in (*PARTS, "all"):
                raise ValueError(f"parts={name} is not one of {', '.join(PARTS)}")

    @property
    def names(self) -> list[str]:
        """The parts asked for, in the order in which they run."""
        asked = self.parts.split(",")
        return [name for name in PARTS if name in asked or "all" in asked]

    @property
    def steps(self) -> int:
        """Of a small model, that is trained."""
        return 20 if self.size == "full" else 4


Part = Callable[[Settings], Iterator[Row]]


def _machine(given: Settings) -> Iterator[Row]:
    from benchmarks.gpu_check import machine

    return machine.rows(given.device)


def _gpu_tests(given: Settings) -> Iterator[Row]:
    from benchmarks.gpu_check import suites

    return suites.gpu_tests(given.out)


def _kernels(given: Settings) -> Iterator[Row]:
    from benchmarks.gpu_check import suites

    return suites.kernels(given.out, given.device)


def _training(precision: str) -> Part:
    def rows(given: Settings) -> Iterator[Row]:
        from benchmarks.gpu_check import training

        return training.precision(precision, given.device, given.steps)

    return rows


def _attention(given: Settings) -> Iterator[Row]:
    from benchmarks.gpu_check import training

    return training.attention(given.device)


def _slice(precision: str) -> Part:
    def rows(given: Settings) -> Iterator[Row]:
        from benchmarks.gpu_check import layers, machine

        cluster = machine.cluster_of(given.device) if given.cluster == "auto" else given.cluster
        return layers.rows(given.size, precision, given.device, cluster)

    return rows


def _peer(given: Settings) -> Iterator[Row]:
    from benchmarks.gpu_check import peer

    return peer.rows(given.size, given.device)


# What runs, in this order, and the seconds that it may take: 480 in all, at most.
PARTS: dict[str, tuple[Part, int]] = {
    "machine": (_machine, 30),
    "slice-bf16": (_slice("bf16"), 60),
    "peer": (_peer, 60),
    "train-bf16": (_training("bf16"), 50),
    "attention": (_attention, 60),
    "kernels": (_kernels, 70),
    "train-fp8": (_training("fp8"), 50),
    "slice-fp8": (_slice("fp8"), 60),
    "gpu-tests": (_gpu_tests, 40),
}


def run_part(name: str, given: Settings) -> None:
    """In a process of its own: write a line for each finding as soon as it is there."""
    with (given.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in PARTS[name][0](given):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


def started(name: str, words: list[str], given: Settings) -> Found:
    """What a part has found, ended after its time together with all that it has started."""
    file, limit_s = given.out / f"{name}.jsonl", PARTS[name][1] * given.patience
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words, f"parts={name}"]
    environ = {**os.environ, "HALOCLINE_GPU_CHECK_PART": name}
    began_s, ended = time.monotonic(), ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, error = process.communicate(timeout=limit_s)
            if process.returncode:
                lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
                ended = f"not to its end: {lines[-1][:300]}"
                (given.out / f"{name}.log").write_text(error, encoding="utf-8")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            ended = f"not to its end: longer than {limit_s:.0f} s"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return Found([Row(**json.loads(line)) for line in lines], time.monotonic() - began_s, ended)


def main(words: list[str]) -> int:
    """All parts asked for; 1 where something is not as it must be."""
    from train.device import uses_cuda

    given = read(Settings, words, "benchmarks.gpu_check")
    device = "cuda" if uses_cuda("device", given.device) else "cpu"
    size = given.size if given.size != "auto" else "full" if device == "cuda" else "small"
    words = [f"device={device}", f"size={size}", f"out={given.out.resolve()}", f"cluster={given.cluster}"]
    given = replace(given, device=device, size=size, out=given.out.resolve())
    given.out.mkdir(parents=True, exist_ok=True)
    if part := os.environ.get("HALOCLINE_GPU_CHECK_PART"):
        run_part(part, given)
        return 0
    about, parts = {"device": device, "size": size, "command": f"python -m benchmarks.gpu_check {' '.join(words)}"}, {}
    is_right = True
    for name in given.names:
        parts[name] = started(name, words, given)
        is_right = write(given.out, about, parts)
        print(
            f"{name:<12} {len(parts[name].rows):>3} findings in {parts[name].seconds:.0f} s {parts[name].ended}",
            flush=True,
        )
    print(f"written: {given.out / 'gpu-check.md'}, {given.out / 'gpu-check.json'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
