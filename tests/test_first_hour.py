"""The newcomer's hour: every command of docs/first-hour.md runs, in one shell, and prints what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "first-hour.md"
END = "=== end of command"


@dataclass
class Command:
    """One `$ command` of the page and the lines that it must print, in this order, among others."""

    text: str
    expected: list[str] = field(default_factory=list)
    asks_exit_code: bool = False  # the page's next command is `echo $?`


def commands(page: str) -> list[Command]:
    """What the page's fenced blocks do: `console` runs, `python` saves the file that its first line names."""
    found: list[Command] = []
    for language, body in re.findall(r"^```(console|python)\n(.*?)^```$", page, re.M | re.S):
        if language == "python":
            name = re.match(r"# (\S+\.py)\n", body)
            assert name, f"a python block must open with its file's name: {body[:60]!r}"
            found.append(Command(f"cat > {name[1]} <<'END_OF_FILE'\n{body}END_OF_FILE"))
            continue
        for line in body.splitlines():
            if not line.startswith("$ "):
                found[-1].expected.append(line)
                continue
            if line == "$ echo $?":
                found[-1].asks_exit_code = True
            found.append(Command(line[2:]))
    return found


def script(page: list[Command]) -> str:
    """One shell for the whole page; after each command a line with its exit code, which `$?` still holds then."""
    return "".join(f"{each.text}\ncode=$?; echo; echo '{END}' $code; (exit $code)\n" for each in page)


def mismatch(expected: list[str], output: str) -> str | None:
    """The first expected line that the output lacks behind the ones before it; `...` stands for any text."""
    lines = iter(line.rstrip() for line in output.splitlines())
    for want in expected:
        pattern = ".*".join(re.escape(part) for part in want.split("..."))
        if not any(re.fullmatch(pattern, line) for line in lines):
            return want
    return None


def environment(folder: Path) -> dict[str, str]:
    """A stranger's shell: an empty home, and a `python` that is this one."""
    program = folder / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "WANDB_", "NETRC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    home = folder / "home"
    home.mkdir()
    return {**kept, "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(home), "OMP_NUM_THREADS": "1"}


def run_page(page: Path, tmp_path: Path, timeout_s: int) -> Path:
    """Runs a page's commands in a folder of their own, which it returns; each must succeed and print what is shown."""
    steps = commands(page.read_text())
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-c", script(steps)],
        cwd=folder,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    outputs = re.split(rf"^{END} (\d+)\n", done.stdout, flags=re.M)
    assert len(outputs) == 2 * len(steps) + 1, done.stdout[-2000:]
    for command, output, code in zip(steps, outputs[::2], outputs[1::2], strict=False):
        shown = f"$ {command.text}\n{output}"
        assert code == "0" or command.asks_exit_code, f"exit code {code}\n{shown}"
        assert (missing := mismatch(command.expected, output)) is None, f"not printed: {missing}\n{shown}"
    return folder


def test_the_pages_commands_do_what_it_shows(tmp_path: Path) -> None:
    run_page(PAGE, tmp_path, timeout_s=1800)


@pytest.mark.parametrize(
    ("expected", "output", "missing"),
    [
        (["a ...", "b"], "a 1\nnoise\nb\n", None),
        (["a ...", "b"], "b\na 1\n", "b"),
        (["loss=6..."], "loss=5.2\n", "loss=6..."),
        (["2"], "12\n", "2"),
    ],
)
def test_lines_are_compared_in_order_and_whole(expected: list[str], output: str, missing: str | None) -> None:
    assert mismatch(expected, output) == missing


def test_the_page_keeps_the_hours_promises() -> None:
    """What a newcomer is promised: each of these is a command of the page."""
    text = "\n".join(command.text for command in commands(PAGE.read_text()))
    for promised in ("data.source=", "model.hidden_size=", "parallel.ep=2", "--multirun", "train.max_step=", "wandb"):
        assert promised in text
