"""Compositions against one plain run each. Many on demand, each with its line in a file from which to go on:

python -m tests.fuzz seed=7 count=100 log=runs/compositions.jsonl
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from parallel.mesh import ParallelConfig
from tests.compositions import Composition, Generator
from tests.deviation import of_rows, of_states
from tests.plain_run import PlainRun, plain_run
from tests.rounding import dispatched_alone, order_free_products
from tests.runs import Finished, forget_after, prepare_text, run_in
from tests.spawn import Ranks
from train.compose import compose

# Sums in another order differ by fp64's rounding, which five steps of AdamW do not lift past this.
FP64 = 1e-9
# Single precision, first step, against sums in another order (relative). A loss: sixty roundings of 6e-8 lie between
# the embedding and the logits of the deepest models drawn here, were all in one direction; in 179 draws the most was
# 1.6e-7, and the mean of the logarithms lies six deviations below the bound. The norm of all gradients: twice as many,
# but of thousands of elements; the most was 6e-7.
FP32_LOSS, FP32_NORM = 4e-6, 1e-5
# A router's choice closer than this may fall otherwise under a re-associated fp32 sum: no comparison of a step with it.
FP32_TIE = 1e-5
# One step in FP8 and the same step in one process, under order-free products: losses are sums of the same numbers in
# fp64, all routers choose alike.
FP8_LOSS = 1e-12
# Their gradients are sums of the same terms in another order, up to forty of them: a rounding of 6e-8 for each. In 83
# draws the most was 5e-8.
FP8_NORM = 1e-5
# The weight gradient of an expert that ranks share quantises other tokens together: a fortieth of what its products are
# from the truth, were they all rounded the other way.
FP8_NORM_SHARED_EXPERTS = 1e-2
FP64_NATIVE = ("precision=fp64", "zero.engine=native")


@contextmanager
def loads_recorded(folder: Path, *inside: Callable[[], Any] | None) -> Iterator[None]:
    """Writes the router loads of every step, as the whole job counted them, to `folder`/loads.pt.

    What is logged of them, and the biases, would not show all experts counted twice. inside: makers of contexts, such
    as a fault's, that hold meanwhile.
    """
    from train import loop

    original, loads = loop.reduce, []

    def reduce(job: Any, plan: Any, tally: Any, asked: Any) -> Any:
        result = original(job, plan, tally, asked)
        loads.append(tally.load.clone())
        if job.is_main:
            torch.save(loads, folder / "loads.pt")
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "reduce", reduce))
        for make in inside:
            if make is not None:
                stack.enter_context(make())
        yield


@dataclass(frozen=True)
class Verdict:
    """What a comparison found: relative deviations by what deviates, and the bound of each."""

    deviations: dict[str, float]
    bounds: dict[str, float]

    @property
    def broken(self) -> list[str]:
        """Everything past its bound (or not a number), worst first."""
        found = [(value, name) for name, value in self.deviations.items() if not value <= self.bounds[name]]
        return [f"{name} deviates by {value:.3g}" for value, name in sorted(found, reverse=True)]

    @property
    def worst(self) -> float:
        return max(self.deviations.values())


class Bench:
    """Where compositions are run: ranks, prepared text, a folder for each."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self.text = prepare_text(folder / "tokens")
        self._num_runs = 0
        self._plain: dict[Composition, tuple[Composition, PlainRun]] = {}

    def whole(self, composition: Composition) -> list[str]:
        """The settings with all that a test adds."""
        return [
            *self.text,
            *("checkpoint.interval=0", "track.wandb=disabled", "run.num_threads=1", "run.device=cpu"),
            *composition.settings,
        ]

    def plain(self, composition: Composition) -> tuple[Composition, PlainRun]:
        """The plain run; in fp32 of the first seed under which no router's choice of the step is a tie."""
        if composition not in self._plain:
            self._plain[composition] = self._find_plain(composition)
        return self._plain[composition]

    def _find_plain(self, composition: Composition) -> tuple[Composition, PlainRun]:
        while True:
            config = compose(self.whole(composition))
            run = plain_run(config)
            gap = min((float(gaps.min()) for _, gaps in run.routes), default=1.0)
            if config.precision.name == "fp64" or gap > FP32_TIE:
                return composition, run
            other = f"train.seed={config.train.seed + 1000}"
            kept = [each for each in composition.settings if not each.startswith("train.seed=")]
            composition = Composition(composition.world_size, (*kept, other))

    def run(
        self,
        composition: Composition,
        fault: Callable[[], Any] | None = None,
        under: Callable[[], Any] | None = None,
    ) -> Finished:
        """The run through the entry of `python -m train`. A fault may end it in any way after its steps.

        under: makes another context of the run, which spoils nothing.
        """
        self._num_runs += 1
        folder = self.folder / f"run-{self._num_runs}"
        folder.mkdir()
        observed = partial(loads_recorded, folder, under, fault)
        exit_code = 0 if fault is None else None
        return run_in(self.ranks, folder, self.whole(composition), composition.world_size, observed, exit_code)

    def run_moved(self, composition: Composition, other: Composition, step: int) -> Finished:
        """The run to a checkpoint after `step`, and from there to its end as `other`, whose place is another."""
        every = (f"checkpoint.interval={step}", "checkpoint.keep_latest_k=9")
        run = self.run(Composition(composition.world_size, (*composition.settings, *every)))
        forget_after(run.folder, step)
        loads = torch.load(run.folder / "loads.pt")[:step]
        run = run_in(self.ranks, run.folder, self.whole(other), other.world_size, partial(loads_recorded, run.folder))
        torch.save([*loads, *torch.load(run.folder / "loads.pt")], run.folder / "loads.pt")
        return run

    def judge_moved(self, composition: Composition, other: Composition, step: int) -> Verdict:
        """Hold a run that changed its place against the plain one, which has none (fp64)."""
        _, plain = self.plain(composition)
        return compare_fp64(self.run_moved(composition, other, step), plain)

    def judge_fp8(self, composition: Composition, fault: Callable[[], Any] | None = None) -> Verdict:
        """Hold a run in FP8 against the same run in one process."""
        config = compose(self.whole(composition)).parallel
        run = self.run(composition, fault, under=order_free_products)
        return compare_fp8(run, self.run(composition.alone, under=partial(dispatched_alone, config)), config)

    def judge(self, composition: Composition, fault: Callable[[], Any] | None = None) -> Verdict:
        """Run it and the plain one, and compare all that design promises of the precision."""
        composition, plain = self.plain(composition)
        run = self.run(composition, fault)
        fp32 = "precision=fp32" in composition.settings
        verdict = compare_fp32(run, plain) if fp32 else compare_fp64(run, plain, with_states=fault is None)
        shutil.rmtree(run.folder)
        return verdict


def compare_fp8(run: Finished, alone: Finished, parallel: ParallelConfig) -> Verdict:
    """The first step of two FP8 runs of the same micro-batches, the second in one process."""
    found = {name: value for name, value in of_rows(run, alone).items() if name.startswith("train/")}
    norm = FP8_NORM if parallel.ep == 1 else FP8_NORM_SHARED_EXPERTS
    bounds = {name: norm if "grad_norm" in name else FP8_LOSS for name in found}
    return Verdict({**found, **_of_loads(run, torch.load(alone.folder / "loads.pt"))}, {**bounds, "loads": 0.0})


def compare_fp64(run: Finished, plain: PlainRun, with_states: bool = True) -> Verdict:
    """Everything to FP64, loads exactly. Without states: a fault may have kept the checkpoint from being whole."""
    found = {**of_rows(run, plain), **(of_states(run, plain) if with_states else {})}
    return Verdict({**found, **_of_loads(run, plain.loads)}, dict.fromkeys(found, FP64) | {"loads": 0.0})


def compare_fp32(run: Finished, plain: PlainRun) -> Verdict:
    """The first step's losses, norm and loads. (The validation loss follows an update: no part of it.)"""
    found = {name: value for name, value in of_rows(run, plain).items() if name.endswith("step 1")}
    found = {name: value for name, value in found.items() if not name.startswith("valid")}
    bounds = {name: FP32_NORM if "grad_norm" in name else FP32_LOSS for name in found}
    return Verdict({**found, **_of_loads(run, plain.loads)}, {**bounds, "loads": 0.0})


def _of_loads(run: Finished, loads: list[torch.Tensor]) -> dict[str, float]:
    ours = torch.load(run.folder / "loads.pt")
    return {"loads": float(sum((a - b).abs().sum() for a, b in zip(ours, loads, strict=True)))}


# --- on demand ---


def main(arguments: Sequence[str]) -> int:
    """`seed=S count=N [first=I] [max_ranks=R] [kind=plain|moves|fp8] [log=FILE]`: a line each; 1 when any failed.

    moves: every run goes on in another place half-way, from its checkpoint. fp8: against one process, also in FP8.
    """
    given = dict(argument.split("=", 1) for argument in arguments)
    seed, first, count = int(given.get("seed", 0)), int(given.get("first", 0)), int(given.get("count", 100))
    max_ranks, kind = int(given.get("max_ranks", 8)), given.get("kind", "plain")
    log = Path(given.get("log", "runs/compositions.jsonl"))
    log.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(line["seed"], line["index"], line["kind"]) for line in known}
    generator, ranks, results = Generator(), Ranks(), []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(ranks, Path(folder))
        for index in range(first, first + count):
            if (seed, index, kind) in done:
                continue
            if kind == "fp8":
                case = [generator.draw_fp8(seed, index, max_ranks)]
            else:
                case = [generator.draw(seed, index, max_ranks, fixed=FP64_NATIVE if kind == "moves" else ())]
            if kind == "moves":
                case.append(generator.move(case[0], seed, index, max_ranks))
            results.append(_report(bench, case, {"seed": seed, "index": index, "kind": kind}, log))
    ranks.close()
    failed = [result for result in [*known, *results] if result["broken"]]
    distinct = len({json.dumps(result["settings"]) for result in [*known, *results]})
    print(f"{len(results)} compositions run; {log} has {distinct} distinct ones, of which {len(failed)} failed")
    print(f"drawn and refused: {dict(generator.refusals.most_common())}")
    return 1 if failed else 0


def _report(bench: Bench, case: list[Composition], which: dict[str, Any], log: Path) -> dict[str, Any]:
    start_s = time.monotonic()
    try:
        if which["kind"] == "moves":
            verdict = bench.judge_moved(case[0], case[1], step=2)
        else:
            verdict = bench.judge_fp8(case[0]) if which["kind"] == "fp8" else bench.judge(case[0])
        broken, worst = verdict.broken, verdict.worst
    except Exception as error:  # goes on to the next one, whatever it was
        broken, worst = [str(error)], float("nan")
    result = {**which, "worst": worst, "broken": broken, "settings": [each.settings for each in case]}
    with log.open("a") as file:
        file.write(json.dumps(result) + "\n")
    word = "FAILED" if broken else "ok"
    print(f"{which['index']} {word} {worst:.2g} {time.monotonic() - start_s:.1f} s", flush=True)
    for line in [*(each.command for each in case), *broken]:
        print(f"    {line}", flush=True)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
