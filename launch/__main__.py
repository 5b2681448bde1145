"""`python -m launch VERB key=value ...`, installed as `halocline VERB key=value ...`: a run and all that it needs.

A verb's module is imported when the verb is called, so that help and mistakes cost no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.settings import (
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    ImportSettings,
    LocalSettings,
    ReportSettings,
    ScheduleSettings,
    SearchSettings,
    TimelineSettings,
    VerifySettings,
)
from launch.slurm.config import SlurmConfig, SubmitSettings
from launch.sweep.config import SweepConfig
from train.cli import console, refusals, usage
from train.config import RunConfig
from train.data.config import DataConfig
from train.files import is_full
from train.settings import hint
from train.stopping import ended

# A run's settings among those of a verb.
RUN = (RunConfig, "")


@dataclass(frozen=True)
class Verb:
    """What follows `python -m launch`.

    Attributes:
        place: "module:function" that is called with the words behind the verb, and returns the exit code.
        summary: what it does, in a line.
        settings: dataclasses of the keys that it takes, with what stands before each key.
    """

    place: str
    summary: str
    settings: tuple[tuple[type, str], ...]

    @property
    def takes_a_run(self) -> bool:
        """Whether it takes a run's settings, and Hydra's own words."""
        return RUN in self.settings

    def __call__(self, words: Sequence[str]) -> int:
        module, name = self.place.split(":")
        function: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), name)
        return function(words)


VERBS = {
    "local": Verb(
        "launch.local:local",
        "train on this machine's processes; with --multirun sweep over a grid: a=1,2 b=3",
        ((LocalSettings, ""), (SweepConfig, "sweep."), RUN),
    ),
    "slurm": Verb(
        "launch.slurm.verb:slurm",
        "queue a run as a job of Slurm that goes on until it is done: slurm.nodes=N slurm.time=24:00:00 submit=false",
        ((SubmitSettings, ""), (SlurmConfig, "slurm."), RUN),
    ),
    "train": Verb("train.__main__:main", "train, as one rank of the run: what torchrun starts on every device", (RUN,)),
    "config": Verb("train.compose:show", "print the whole tree of settings as YAML, checked and resolved", (RUN,)),
    "prepare": Verb(
        "launch.prepare:prepare",
        "turn text, JSON lines, Parquet or a data set into token shards: data.source=PATH data.dir=PATH",
        (RUN,),
    ),
    "generate": Verb(
        "launch.generate:generate_command",
        "go on with a text: checkpoint=FOLDER prompt=TEXT speculative=true",
        ((GenerateSettings, ""),),
    ),
    "evaluate": Verb(
        "launch.evaluate:evaluate_command",
        "loss and perplexity by source, without a run: checkpoint=FOLDER [data.source=PATH] out=FILE",
        ((EvaluateSettings, ""), (DataConfig, "data.")),
    ),
    "export": Verb(
        "launch.export:export",
        "write a checkpoint in Hugging Face's layout: checkpoint=PATH to=PATH dtype=bf16|fp32|fp8",
        ((ExportSettings, ""),),
    ),
    "import": Verb(
        "launch.imports:import_model",
        "turn a model in Hugging Face's layout into a checkpoint: from=PATH to=PATH",
        ((ImportSettings, ""),),
    ),
    "verify": Verb(
        "launch.verify:verify_command",
        "read checkpoints whole: every file against its checksum, every range, every number: checkpoint=PATH",
        ((VerifySettings, ""),),
    ),
    "report": Verb(
        "launch.report:report", "runs as one HTML page: run=DIR [run=DIR ...] out=FILE", ((ReportSettings, ""),)
    ),
    "schedule": Verb(
        "launch.recipe:schedule",
        "print and draw the recipe over tokens: experiment=NAME out=FILE",
        ((ScheduleSettings, ""), RUN),
    ),
    "plan": Verb(
        "launch.plan.verb:plan",
        "memory and step time of a run on a cluster: cluster=h800 experiment=NAME; plan search, compare, pair",
        ((SearchSettings, ""), RUN),
    ),
    "timeline": Verb(
        "launch.timeline:timeline",
        "simulate and draw a pipeline: pipeline.schedule=NAME parallel.pp=N out=FILE",
        ((TimelineSettings, ""),),
    ),
}


def main(arguments: Sequence[str], program: str = "python -m launch") -> int:
    """Runs one verb; a user's mistake is one sentence on standard error and exit code 2."""
    console.take()
    if not arguments or arguments[0] in usage.HELP:
        print(verbs_help(program), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *words = arguments
    if name not in VERBS:
        print(f"{name} is no verb{hint(name, VERBS)}", file=sys.stderr)
        return 2
    if any(word in usage.HELP for word in words):
        print(verb_help(program, name))
        return 0
    try:
        return VERBS[name](words)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and not is_full(error):
            raise  # of no file that a person could have named
        print(refusals.of_file(error, words), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def verbs_help(program: str) -> str:
    """The verbs, a line each."""
    verbs = [f"  {name:<10}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([f"usage: {program} VERB key=value ...", "", *verbs, "", f"{program} VERB --help: what it takes"])


def verb_help(program: str, name: str) -> str:
    """One verb: what it does, and every key that it takes."""
    verb = VERBS[name]
    lines = [f"{name}: {verb.summary}", ""]
    lines.append(usage.run_help(f"{program} {name}") if verb.takes_a_run else f"usage: {program} {name} key=value ...")
    for kind, prefix in verb.settings:
        if kind is not RunConfig:
            lines += usage.keys_help(kind, prefix)
    return "\n".join(lines)


def command(program: str = "halocline") -> int:
    """The installed `halocline`, or `python -m launch`."""
    if sys.argv[1:2] == ["train"]:  # a rank, which has its own way of ending
        ended(lambda: main(sys.argv[1:], program))
    return main(sys.argv[1:], program)


if __name__ == "__main__":
    sys.exit(command("python -m launch"))
