"""Runs as jobs of Slurm: what is refused, what is written and copied, and what the script does at each end.

Here Slurm's programs are stand-ins of a line or two; tests/launch/test_slurm_real.py has the real ones.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.settings import LocalSettings
from launch.slurm import grace, verb
from launch.slurm.config import SlurmConfig, seconds_of
from launch.slurm.grace import checkpoint_bytes, sentence_before
from launch.slurm.on_node import Next, begin, decide, end
from launch.slurm.script import job_name
from launch.slurm.snapshot import PACKAGES, PROGRAM
from tests.runs import SMALL
from tests.spawn import STOP_S
from train.compose import compose, load
from train.config import RunConfig
from train.track.events import EVENTS, Events, read_events

TWO = [*SMALL, "parallel.dp=2", "slurm.nodes=2"]


def shown(tmp_path: Path, *words: str) -> tuple[Path, str]:
    """The job's folder and script of a run that is not queued."""
    assert main(["slurm", *TWO, f"run.dir={tmp_path}/run", "submit=false", *words]) == 0
    folder = sorted((tmp_path / "run" / "jobs").iterdir())[-1]
    return folder, (folder / "job.sh").read_text()


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


# --- what is refused ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("slurm.nodes=0", "slurm.nodes=0 must be at least 1"),
        ("slurm.nodes=a", "slurm.nodes=a must be a whole number"),
        ("slurm.nodse=2", "slurm.nodse is not a key of slurm; did you mean slurm.nodes?"),
        ("slurm.nodes=2 parallel.nodes=1 parallel.dp=2", "slurm.nodes=2 and parallel.nodes=1 must be the same"),
        ("slurm.nodes=3 parallel.dp=4", "parallel.nodes=3 does not divide the number of ranks"),
        ("slurm.time=tomorrow", "slurm.time=tomorrow is no time that sbatch reads"),
        ("slurm.time=1:2:3:4", "slurm.time=1:2:3:4 is no time"),
        ("slurm.time=5", "slurm.time=5 is not longer than slurm.signal_s=300"),
        ("slurm.time=10:00 slurm.signal_s=600", "slurm.time=10:00 is not longer than slurm.signal_s=600"),
        ("slurm.signal_s=0", "slurm.signal_s=0 must be at least 1"),
        ("slurm.signal_s=70000", "slurm.signal_s=70000 must be at most 65535"),
        ("slurm.chain=0", "slurm.chain=0 must be at least 1"),
        ("slurm.restarts=-1", "slurm.restarts=-1 must be at least 0"),
        ("slurm.restart_wait_s=-1", "slurm.restart_wait_s=-1 must be a number of at least 0"),
        ("slurm.gpus_per_node=-1", "slurm.gpus_per_node=-1 must be at least 0"),
        ("slurm.requeue=maybe", "slurm.requeue=maybe must be true or false"),
        ("slurm.option=exclusive", "slurm.option=exclusive is no option of sbatch"),
        ("slurm.option=--nodes=2", "slurm.option=--nodes=2: set slurm.nodes"),
        ("slurm.option=-t5", "slurm.option=-t5: set slurm.time"),
        ("slurm.option=--output=x", "slurm.option=--output=x: the script needs its own"),
        ("slurm.partition=", "slurm.partition is empty"),
        ("run.device=auto", "run.device=auto means the devices of the machine that runs"),
        ("parallel.elastic=true", "only python -m launch local goes on with fewer ranks"),
        ("slurm.plan=nowhere", "nowhere"),
        ("submit=later", "submit=later must be true or false"),
        ("train.max_step=3", "train.max_step is not a key"),
    ],
)
def test_refused_before_anything_is_written(
    words: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unless_said = [] if "submit=" in words else ["submit=false"]
    assert main(["slurm", *SMALL, f"run.dir={tmp_path}/run", *unless_said, *words.split()]) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:15", 1815), ("2:30:15", 9015), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:15", 95415)],
)
def test_times_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    """The six forms of its manual page."""
    assert seconds_of(time) == seconds


def test_words_with_spaces_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", *SMALL, f"run.dir={tmp_path}/run", "submit=false", "slurm.account=a b"]) == 2
    assert "slurm.account=a b must be one word" in capfd.readouterr().err


def test_refused_where_there_is_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", *TWO, f"run.dir={tmp_path}/run"]) == 2
    assert "there is no sbatch here" in capfd.readouterr().err and not (tmp_path / "run").exists()


# --- what is written ---


def test_a_job_has_its_own_code_and_config(tmp_path: Path) -> None:
    folder, text = shown(tmp_path, "train.max_steps=7")
    config = load(folder / "config.yaml")
    assert (config.train.max_steps, config.parallel.nodes, config.parallel.dp) == (7, 2, 2)
    for package in PACKAGES:
        files = [path.relative_to(PROGRAM) for path in (PROGRAM / package).rglob("*") if path.is_file()]
        kept = [str(path) for path in files if "__pycache__" not in path.parts]
        assert kept and filecmp.cmpfiles(PROGRAM, folder / "code", kept, shallow=False)[0] == kept
    # What the ranks import is the copy, whatever lies in the folder in which the job runs.
    place = {"PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"}
    program = [sys.executable, "-c", "import train, launch; print(train.__file__, launch.__file__)"]
    found = subprocess.run(program, cwd=PROGRAM, env={**os.environ, **place}, capture_output=True, text=True)
    assert found.stdout.split() == [f"{folder}/code/{name}/__init__.py" for name in ("train", "launch")]
    assert 'export PYTHONPATH="$folder/code" PYTHONSAFEPATH=1' in text
    # Queued again it gets a folder of its own: what is queued stays as it was.
    assert shown(tmp_path, "train.max_steps=9")[0].name == "0002"
    assert load(folder / "config.yaml").train.max_steps == 7


def test_the_script_asks_for_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["slurm.partition=long", "slurm.account=us", "slurm.qos=high", "slurm.time=1-00:00:00", "slurm.signal_s=90"]
    more += ["slurm.option=--exclusive", "slurm.option=--mem=0", "slurm.setup=module load 'a b'", "slurm.requeue=false"]
    folder, text = shown(tmp_path, *more, "slurm.gpus_per_node=8", "slurm.python=/opt/python", "run.name=a {b}\n$c")
    assert options(text) == [
        *("--job-name=a-b-c", "--nodes=2", "--ntasks-per-node=1", "--partition=long", "--account=us", "--qos=high"),
        *("--time=1-00:00:00", "--gpus-per-node=8", "--signal=B:USR1@90", "--no-requeue", f"--chdir={tmp_path}"),
        *(f"--output={folder}/job.log", "--open-mode=append", "--exclusive", "--mem=0"),
    ]
    assert "\nmodule load 'a b'\n" in text and "\npython=/opt/python\n" in text
    assert "--nnodes=2 --nproc-per-node=1 " in text and "scontrol requeue" not in text
    assert subprocess.run(["bash", "-n", folder / "job.sh"]).returncode == 0


def test_devices_follow_from_the_ranks(tmp_path: Path) -> None:
    config = compose([*SMALL, "parallel.dp=8", "parallel.nodes=2"])
    on_gpus = replace(config, run=replace(config.run, device="cuda"))
    assert SlurmConfig().num_gpus_per_node(config) == 0
    assert SlurmConfig().num_gpus_per_node(on_gpus) == 4
    assert SlurmConfig(gpus_per_node=8).num_gpus_per_node(on_gpus) == 8


@pytest.mark.parametrize("folder", ["plain", "with space", "per%cent", "quo'te"])
def test_folders_may_have_odd_names(tmp_path: Path, folder: str) -> None:
    place, text = shown(tmp_path / folder)
    assert subprocess.run(["bash", "-n", place / "job.sh"]).returncode == 0
    line = next(each for each in text.splitlines() if each.startswith("folder="))
    said = subprocess.run(["bash", "-c", f'{line}; printf %s "$folder"'], capture_output=True, text=True)
    assert said.stdout == str(place)
    (output,) = [each for each in options(text) if each.startswith("--output=")]
    assert output.removeprefix("--output=").strip('"').replace("%%", "%") == f"{place}/job.log"


def test_a_job_name_is_one_word() -> None:
    assert [job_name(each) for each in ("a b", "x/y", "--", "ok_1.2")] == ["a-b", "x-y", "run", "ok_1.2"]


# --- whether a save fits ---


def config_of(folder: Path, *words: str) -> RunConfig:
    return compose([*SMALL, f"run.dir={folder}", *words])


def test_a_checkpoints_size_is_estimated(tmp_path: Path) -> None:
    """Against what a run of this model has written: 1,346,501 to 1,346,521 bytes, indexes of four ranks included."""
    assert 0.6e6 < checkpoint_bytes(config_of(tmp_path)) < 1.4e6
    plain, double = (checkpoint_bytes(config_of(tmp_path, *more)) for more in ([], ["precision=fp64"]))
    assert double == 2 * plain
    assert checkpoint_bytes(config_of(tmp_path, "optimizer.moments_dtype=bf16")) == plain * 8 // 12


def test_a_save_that_cannot_fit_is_said(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert "it fits into the slurm.signal_s=300 s" in sentence_before(config, 300, rate=1e9)
    slow = sentence_before(config, 300, rate=1e3)
    assert "would not fit into the slurm.signal_s=300 s before the limit; raise slurm.signal_s" in slow
    events = Events(tmp_path)
    for duration_s in (500.0, 3.0, 4.0, 3.0, 2.0, 3.0):  # the first one was long ago
        events.add("save", step=1, num_bytes=10, stalled_s=0.0, duration_s=duration_s)
    assert sentence_before(config, 300, rate=1e3).startswith("its saves have taken up to 4.0 s: it fits")
    assert sentence_before(config, 3, rate=1e3).startswith("a save of this run has taken 4.0 s, and would not fit")


def test_the_disk_is_measured_where_checkpoints_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grace, "PROBE_BYTES", 10_000)
    assert grace.write_rate(tmp_path / "not" / "there" / "yet") > 0
    assert list(tmp_path.iterdir()) == []


# --- what follows each end ---


def job_folder(tmp_path: Path) -> Path:
    folder, _ = shown(tmp_path, "slurm.restarts=2", "slurm.restart_wait_s=5")
    return folder


@pytest.fixture
def allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Events]:
    """A job's folder, and its run's events, in which ranks were about to start."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    folder = job_folder(tmp_path)
    begin(folder, 0)
    return folder, Events(folder.parent.parent)


@pytest.mark.parametrize(
    ("outcome", "code", "word", "value"),
    [
        ("done", 0, "end", 0),
        ("stopped", 0, "requeue", 0),
        ("refused", 2, "end", 2),
        ("not_finite", 3, "end", 3),
        ("not_saved", 4, "again", 5),
        ("hung", 5, "again", 5),
        ("lost", 6, "again", 5),
        ("failed", 1, "again", 5),
    ],
)
def test_what_follows_an_end(allocated: tuple[Path, Events], outcome: str, code: int, word: str, value: float) -> None:
    """By what rank 0 says of it: torchrun ends with 1 whatever its ranks have ended with."""
    folder, events = allocated
    events.add("end", outcome=outcome, code=code, reason="because")
    assert end(folder, 1 if code else 0, was_asked=False) == Next(word, value, "because")
    assert (folder / "ended").exists() == (word == "end")


def test_a_job_that_lost_rank_0_starts_again_and_not_for_ever(allocated: tuple[Path, Events]) -> None:
    folder, events = allocated
    words = [end(folder, 137, was_asked=False) for _ in range(3)]
    assert [each.word for each in words] == ["again", "again", "end"]
    assert [each.value for each in words] == [5, 10, 137]
    assert (folder / "ended").read_text().endswith("restarts=2 in a row have come to no new checkpoint\n")
    events.add("save", step=3, num_bytes=1, stalled_s=0.0, duration_s=0.1)
    assert end(folder, 137, was_asked=False).word == "again", "it has come further"
    kinds = [event.kind for event in read_events(folder.parent.parent / EVENTS)]
    lost = ["lost", "restart"]
    assert kinds == ["allocated", *lost, *lost, "lost", "give_up", "save", *lost]


def test_what_was_lost_while_it_was_asked_to_stop_goes_on_elsewhere(allocated: tuple[Path, Events]) -> None:
    folder, _ = allocated
    assert end(folder, 1, was_asked=True).word == "requeue"


def test_only_what_this_job_has_said_counts(allocated: tuple[Path, Events]) -> None:
    folder, events = allocated
    events.add("end", outcome="stopped", code=0, reason="of the job before")
    begin(folder, 0)
    assert decide(read_events(folder.parent.parent / EVENTS), 1, False, LocalSettings(restarts=1)).word == "again"


# --- the script itself, with stand-ins for Slurm ---

STAND_INS = {
    # Ranks: the first call ends when it is asked, or at once, as $SRUN says.
    "srun": 'echo srun >> "$LOG"; case $SRUN in asked) until [ -e "$LOG.asked" ]; do sleep 0.1; done;; esac; exit 0',
    "scancel": 'echo scancel "$@" >> "$LOG"; touch "$LOG.asked"',
    "scontrol": 'echo scontrol "$@" >> "$LOG"',
    # on_node: what it says comes from a file, a line each time.
    "python": 'case "$*" in *"on_node end"*) echo "$@" >> "$LOG"; head -1 "$LOG.words"; sed -i 1d "$LOG.words";; esac',
}


def script_run(tmp_path: Path, words: Sequence[str], srun: str = "") -> tuple[subprocess.Popen[str], Path, Path]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    folder, _ = shown(tmp_path, f"slurm.python={programs}/python")
    log = tmp_path / "log"
    Path(f"{log}.words").write_text("".join(f"{each}\n" for each in words))
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "SRUN": srun, "SLURM_JOB_ID": "17"}
    process = subprocess.Popen(["bash", folder / "job.sh"], env={**os.environ, **variables}, text=True)
    return process, log, folder


def test_the_script_starts_ranks_again_and_ends_with_their_code(tmp_path: Path) -> None:
    process, log, folder = script_run(tmp_path, ["again 0", "again 0", "end 3"])
    assert process.wait(STOP_S) == 3
    assert log.read_text().splitlines() == ["srun", f"-m launch.slurm.on_node end {folder} 0 no"] * 3


def test_the_script_passes_a_request_on_and_puts_the_job_back(tmp_path: Path) -> None:
    """Slurm signals the script alone; the ranks are asked by scancel, until they have ended."""
    process, log, folder = script_run(tmp_path, ["requeue 0"], srun="asked")
    while not log.exists():
        assert process.poll() is None
    process.send_signal(10)  # SIGUSR1
    assert process.wait(STOP_S) == 0
    lines = log.read_text().splitlines()
    assert lines[0] == "srun" and set(lines[1:-2]) == {"scancel --signal=USR1 17"}
    assert lines[-2:] == [f"-m launch.slurm.on_node end {folder} 0 yes", "scontrol requeue 17"]


def test_a_later_job_of_a_chain_finds_the_run_ended(tmp_path: Path) -> None:
    process, _, folder = script_run(tmp_path, ["end 0"])
    assert process.wait(STOP_S) == 0
    (folder / "ended").write_text("done after step 6\n")
    again = subprocess.run(["bash", folder / "job.sh"], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "done after step 6\n")


# --- queueing ---


def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": body, "scancel": 'echo scancel "$@" >> "$CALLS"'}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


COUNT = 'echo "$@" >> "$CALLS"; n=$(grep -c parsable "$CALLS")'


def test_a_chain_is_queued_job_behind_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = fake_sbatch(tmp_path, monkeypatch, f'{COUNT}; echo "$((40 + n));cluster"')
    assert main(["slurm", *TWO, f"run.dir={tmp_path}/run", "slurm.chain=3"]) == 0
    path = tmp_path / "run" / "jobs" / "0001" / "job.sh"
    behind = ["--parsable", "--parsable --dependency=afterany:41", "--parsable --dependency=afterany:42"]
    assert calls.read_text().splitlines() == [f"{words} {path}" for words in behind]
    assert "queued as job 41, 42, 43;" in capfd.readouterr().out


def test_a_refusal_of_sbatch_is_a_sentence_and_leaves_no_half_of_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = '[ "$n" -lt 3 ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }'
    calls = fake_sbatch(tmp_path, monkeypatch, f"{COUNT}; {refuse}; echo $((40 + n))")
    with pytest.raises(ValueError, match=r"sbatch has refused x\.sh: sbatch: error: invalid partition"):
        verb.submit(Path("x.sh"), 3)
    assert calls.read_text().splitlines()[-1] == "scancel 41 42"
