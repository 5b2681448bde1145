"""The only door to Optuna: proposals of a sampler, with its study in an SQLite file that outlives the sweep."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from launch.sweep.config import SweepConfig
from launch.sweep.search import DEFAULT_NUM_TRIALS, Proposal, Result
from train.compose import Swept

NAME = "sweep"
_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


class Study:
    """Proposals of one of Optuna's samplers.

    A proposal is written to the study, whole, before its job starts, so after a kill the same jobs are proposed again.
    Each is drawn by a sampler of its own, seeded by (seed, number), from the trials before it and their results as they
    stand: where jobs run one at a time, a sweep that was killed proposes what an undisturbed one does. Jobs side by
    side end in an order of their own; there tpe's proposals, after its first ten, depend on which had ended.

    Raises ValueError when the study is one of other settings.
    """

    learns = True

    def __init__(
        self, path: Path, sampler: str, config: SweepConfig, fixed: Sequence[str], swept: Sequence[Swept]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        # By a creator, as a path may hold what a URL gives a meaning to.
        self._storage = RDBStorage("sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(path)})
        self._direction = StudyDirection.MINIMIZE if config.direction == "minimize" else StudyDirection.MAXIMIZE
        self._study = optuna.create_study(
            storage=self._storage, study_name=NAME, direction=self._direction, load_if_exists=True
        )
        self._study_id = self._storage.get_study_id_from_name(NAME)
        self._sampler, self._seed, self._swept = sampler, config.seed, list(swept)
        self._distributions = {each.key: _distribution(each) for each in swept}
        self._refuse_another(path, {"sampler": sampler, "seed": config.seed, "metric": config.metric}, fixed)
        self.num_jobs = config.num_trials or DEFAULT_NUM_TRIALS
        self._asked = 0

    def _refuse_another(self, path: Path, chosen: dict[str, Any], fixed: Sequence[str]) -> None:
        """What makes a study itself is written into it once, and compared ever after."""
        swept = {each.key: str(self._distributions[each.key]) for each in self._swept}
        mine = {**chosen, "direction": self._direction.name, "settings": sorted(fixed), "swept": swept}
        known = self._study.user_attrs.get("sweep")
        if known is None:
            self._study.set_user_attr("sweep", mine)
            return
        for name, value in json.loads(json.dumps(mine)).items():
            if known.get(name) != value:
                raise ValueError(
                    f"{path} is the study of another sweep: its {name} was {known.get(name)} and is {value} here; "
                    "choose another run.dir, or remove the folder"
                )

    def ask(self) -> Proposal | None:
        """The next trial: as the study has it, else a new one."""
        number = self._asked
        if number >= self.num_jobs:
            return None
        trials = self._study.get_trials(deepcopy=False)
        if number < len(trials):
            params = trials[number].params
        else:
            params = self._draw(number, trials)
            self._study.add_trial(_open_trial(params, self._distributions))
        self._asked += 1
        values = {each.key: _as_setting(each, params[each.key]) for each in self._swept}
        return Proposal(number, f"trial-{number:04d}", values)

    def _draw(self, number: int, trials: list[FrozenTrial]) -> dict[str, Any]:
        """Parameters of a trial from those before it: a function of these and of (seed, number) alone."""
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        study = optuna.create_study(direction=self._direction, sampler=_sampler(self._sampler, digest))
        study.add_trials(trials)
        return study.ask(self._distributions).params

    def tell(self, number: int, result: Result) -> None:
        """Ends a trial: with its value, as pruned with what was seen of it, or as failed."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        if self._storage.get_trial(trial_id).state.is_finished():
            return
        if result.status == "pruned":
            for step, value in result.history.items():
                if math.isfinite(value):
                    self._storage.set_trial_intermediate_value(trial_id, step, value)
        self._storage.set_trial_user_attr(trial_id, "status", result.status)
        state = _STATES.get(result.status, TrialState.FAIL)
        if state == TrialState.COMPLETE and result.value is None:
            state = TrialState.FAIL
        values = [result.value] if state == TrialState.COMPLETE and result.value is not None else None
        self._storage.set_trial_state_values(trial_id, state=state, values=values)


def _open_trial(params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)


def _sampler(name: str, digest: bytes) -> BaseSampler:
    seed = int.from_bytes(digest[:4], "big")
    return RandomSampler(seed=seed) if name == "random" else TPESampler(seed=seed)


def _distribution(swept: Swept) -> BaseDistribution:
    """What a sampler draws from: a word of a list, a step of a range, a number of an interval."""
    if swept.is_range and len(swept.choices) > 1:
        numbers = sorted(float(choice) for choice in swept.choices)
        if all(number.is_integer() for number in numbers):
            return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(numbers[1] - numbers[0]))
        return IntDistribution(0, len(numbers) - 1)
    if swept.choices:
        return CategoricalDistribution(swept.choices)
    if swept.is_int:
        return IntDistribution(int(swept.low), int(swept.high), log=swept.is_log)
    return FloatDistribution(swept.low, swept.high, log=swept.is_log)


def _as_setting(swept: Swept, drawn: Any) -> str:
    """A drawn value as a command line has it."""
    if swept.is_range and len(swept.choices) > 1:
        ordered = sorted(swept.choices, key=float)
        is_whole = all(float(choice).is_integer() for choice in ordered)
        return min(ordered, key=lambda choice: abs(float(choice) - drawn)) if is_whole else ordered[drawn]
    return repr(drawn) if isinstance(drawn, float) else str(drawn)
