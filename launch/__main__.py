"""`python -m launch VERB key=value ...`: everything that happens before or beside a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.export import export
from launch.generate import generate_command
from launch.imports import import_model
from launch.local import local
from launch.prepare import prepare_run
from launch.recipe import draw
from launch.report import report
from launch.timeline import timeline
from train.compose import compose


def _prepare(settings: Sequence[str]) -> int:
    prepare_run(compose(settings), histogram=True)
    return 0


def _schedule(settings: Sequence[str]) -> int:
    out = next((setting.split("=", 1)[1] for setting in settings if setting.startswith("out=")), "schedule.png")
    config = compose([setting for setting in settings if not setting.startswith("out=")])
    print(draw(config.recipe(), Path(out)))
    print(f"\npicture: {out}")
    return 0


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "local": (local, "train on this machine's processes; with --multirun sweep over a grid: a=1,2 b=3"),
    "prepare": (
        _prepare,
        "turn text, JSON lines, Parquet or a data set into token shards: data.source=PATH data.dir=PATH",
    ),
    "generate": (generate_command, "go on with a text: checkpoint=FOLDER prompt=TEXT speculative=true"),
    "export": (export, "write a checkpoint in Hugging Face's layout: checkpoint=PATH to=PATH dtype=bf16|fp32|fp8"),
    "import": (import_model, "turn a model in Hugging Face's layout into a checkpoint: from=PATH to=PATH"),
    "report": (report, "runs as one HTML page: run=DIR [run=DIR ...] out=FILE"),
    "schedule": (_schedule, "print and draw the recipe over tokens: experiment=NAME out=FILE"),
    "timeline": (timeline, "simulate and draw a pipeline: pipeline.schedule=NAME parallel.pp=N out=FILE"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs one verb; a user's mistake is one sentence on standard error and exit code 2."""
    if not arguments or arguments[0] not in VERBS:
        known = "\n".join(f"  {verb:10} {text}" for verb, (_, text) in VERBS.items())
        print(f"usage: python -m launch VERB key=value ...\n{known}", file=sys.stderr)
        return 2
    try:
        return VERBS[arguments[0]][0](arguments[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
