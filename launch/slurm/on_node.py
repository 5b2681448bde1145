"""`python -m launch.slurm.on_node begin|end ...`: what a batch script asks on its machine, before and after its ranks.

torchrun ends with code 1 whatever its ranks have ended with. What became of them stands in the run's events instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.settings import LocalSettings
from launch.slurm.grace import sentence_of_past, slowest_save_s
from launch.slurm.snapshot import CONFIG, SETTINGS
from launch.supervise import FINAL, wait_before
from train.files import replace_durably
from train.settings import dotted
from train.track.events import EVENTS, Event, Events, read_events

# The file that tells the later jobs of a chain that nothing is left to do, and why.
ENDED = "ended"


@dataclass(frozen=True)
class Next:
    """What follows the end of a job's ranks.

    Attributes:
        word: `again`, `requeue` or `end`.
        value: of `again`, seconds to wait before; of `end`, the exit code of the job.
        reason: for people.
    """

    word: str
    value: float
    reason: str


def decide(events: Sequence[Event], code: int, was_asked: bool, settings: LocalSettings) -> Next:
    """What follows, by the run's events: those behind the last `allocated` are of the ranks that have just ended.

    Args:
        code: with which `srun` has ended.
        was_asked: whether Slurm has told the script that the job's time comes to an end.
    """
    begin = max((number for number, event in enumerate(events) if event.kind == "allocated"), default=-1)
    ends = [event.values for event in events[begin + 1 :] if event.kind == "end"]
    end = ends[-1] if ends else None
    if end is not None and end["outcome"] == "done":
        return Next("end", 0, end["reason"])
    if end is not None and end["outcome"] == "stopped":
        return Next("requeue", 0, end["reason"])
    if end is not None and end["code"] in FINAL:
        return Next("end", end["code"], end["reason"])
    reason = end["reason"] if end is not None else f"the ranks ended with code {code} and without a word of rank 0"
    if was_asked:
        return Next("requeue", 0, f"asked to stop, but not all was saved: {reason}")
    number = 1 + restarts_in_a_row(events)
    if number > settings.restarts:
        return Next("end", code or 1, f"{reason}; restarts={settings.restarts} in a row have come to no new checkpoint")
    return Next("again", wait_before(number, settings.restart_wait_s), reason)


def restarts_in_a_row(events: Sequence[Event]) -> int:
    """How often ranks have started again since the newest checkpoint, in whatever job."""
    newest = max((number for number, event in enumerate(events) if event.kind == "save"), default=-1)
    return sum(event.kind == "restart" for event in events[newest + 1 :])


def begin(job: Path, attempt: int) -> None:
    """Ranks are about to start: where, and whether their saves have fitted into the time that they get."""
    run = _run_folder(job)
    nodes, job_id = os.environ.get("SLURM_JOB_NODELIST", ""), os.environ.get("SLURM_JOB_ID", "")
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    Events(run).add("allocated", job_id=job_id, num_requeues=requeues, attempt=attempt, nodes=nodes)
    past_s = slowest_save_s(run)
    if past_s is not None and (said := sentence_of_past(past_s, float(_settings(job)["signal_s"]))):
        print(said, flush=True)


def end(job: Path, code: int, was_asked: bool) -> Next:
    """Ranks have ended: decide, and write the decision down. What is not to go on is marked for the rest of a chain."""
    run, given = _run_folder(job), _settings(job)
    settings = LocalSettings(restarts=int(given["restarts"]), restart_wait_s=float(given["restart_wait_s"]))
    alert = dotted((job / CONFIG).read_text()).get("track.alert")
    past, events = read_events(run / EVENTS), Events(run, alert=alert)
    found = decide(past, code, was_asked, settings)
    if found.word == "again":
        step = max((event.step for event in past if event.kind == "save"), default=0)
        topology = next((e.values["topology"] for e in reversed(past) if e.kind == "start"), "as before")
        events.add("lost", code=code, reason=found.reason)
        values = {
            "number": 1 + restarts_in_a_row(past),
            "limit": settings.restarts,
            "wait_s": found.value,
            "topology": topology,
        }
        events.add("restart", step=step, **values)
    elif found.word == "requeue":
        events.add("requeue", job_id=os.environ.get("SLURM_JOB_ID", ""), reason=found.reason)
    elif found.value not in FINAL:
        events.add("lost", code=code, reason=found.reason)
        events.add("give_up", code=int(found.value), reason=found.reason)
    if found.word == "end":
        replace_durably(job / ENDED, f"{found.reason}\n".encode())
    return found


def _run_folder(job: Path) -> Path:
    """The folder of the run to which a job belongs, whose own is `<run.dir>/jobs/0001`."""
    return job.parent.parent


def _settings(job: Path) -> dict[str, str]:
    return dotted((job / SETTINGS).read_text())


def main(arguments: Sequence[str]) -> int:
    """The script reads a word and a number from standard output; people read standard error, which is the job's log."""
    verb, job, *rest = arguments
    if verb == "begin":
        begin(Path(job), int(rest[0]))
        return 0
    found = end(Path(job), int(rest[0]), rest[1] == "yes")
    print(found.reason, file=sys.stderr, flush=True)
    print(f"{found.word} {found.value:g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
