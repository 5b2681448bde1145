"""What a run is besides its tensors: how far it has come, its random numbers, and of which model, data and recipe."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from train.settings import dotted

MAX_NAMED_DIFFERENCES = 8
# The settings that a fingerprint is made from, by the names that people gave them.
_SECTIONS = {
    "model": ("model.",),
    "data": ("data.",),
    "recipe": (
        "train.",
        "optimizer.",
        "lr_scheduler.",
        "moe.",
        "mtp.",
        "precision.",
        "checkpoint.init_from",
        "checkpoint.branch_from",
    ),
}
# These are how a run is computed, not what; where it ends is part of the recipe only if a phase's border depends on it.
_FREE = (
    "train.micro_batch_size",
    "data.num_workers",
    "data.valid_sources",
    "precision.engine",
    "precision.bf16_products",
)
_END = ("train.max_steps", "train.max_tokens")


def capture_rng() -> str:
    """The state of torch's CPU random number generator, as text."""
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def restore_rng(text: str) -> None:
    """Set torch's CPU random number generator to what `capture_rng` returned."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))


def fingerprint(settings: Any) -> str:
    """Canonical text of the settings that make one thing what it is: a dataclass or a mapping, nested as it may be.

    Two texts are equal exactly when the settings are, and `differences` can name the keys in which they are not.
    """
    plain = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # type: ignore[arg-type]
    return json.dumps(plain, sort_keys=True, indent=0)


@dataclass(frozen=True)
class TrainState:
    """Everything small that a run needs to go on as if it had never stopped. The data position is `consumed_sequences`:
    batches are a pure function of it.

    Attributes:
        step: finished steps.
        consumed_tokens: predicted tokens so far, over all ranks.
        consumed_sequences: sequences so far, over all ranks.
        num_optimizer_steps: updates that AdamW has made (its bias correction counts them).
        rng: torch's CPU generator, from `capture_rng`; one for all ranks, as nothing in a step draws per rank.
        wandb_id: run id of Weights & Biases, None without one.
        fingerprints: text of the model, the data and the recipe (keys of that name).
        config: resolved config as YAML; kept in a file of its own.
        sources: what a branch has to know of what the run has read, as plain values (train/data/past.py).
        best_valid_loss: what `evaluate.patience` compares with, None before the first evaluation.
        num_evaluations_since_best: and how many evaluations there were since then.
    """

    step: int
    consumed_tokens: int
    consumed_sequences: int
    num_optimizer_steps: int
    rng: str
    wandb_id: str | None
    fingerprints: dict[str, str]
    config: str
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_valid_loss: float | None = None
    num_evaluations_since_best: int = 0

    def to_json(self) -> str:
        """All fields but `config`."""
        fields = dataclasses.asdict(self)
        del fields["config"]
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str, config: str) -> TrainState:
        """What `to_json` wrote. ValueError when fields are missing or unknown."""
        try:
            return cls(config=config, **json.loads(text))
        except TypeError as error:
            raise ValueError(f"the checkpoint's state is of another version of this program: {error}") from None


# Settings of a model that its weights do not depend on: initial values, and how long a sequence it is used for.
_USE = ("initializer_range", "max_position_embeddings", "rope_scaling")


def check_weights_fit(model: Any, saved: TrainState, folder: object) -> None:
    """ValueError, with both values, unless the weights of a checkpoint are those of such a model (a dataclass)."""
    there = dotted(saved.config)
    here = dotted(yaml.safe_dump({"model": dataclasses.asdict(model)}))
    used = tuple(f"model.{key}" for key in _USE)
    ours, theirs = (
        {key: value for key, value in each.items() if key.startswith("model.") and not key.startswith(used)}
        for each in (here, there)
    )
    # A key that an older checkpoint does not have yet has its default here.
    if found := _phrases(ours, {**ours, **theirs}, known=ours, room="model"):
        raise ValueError(f"checkpoint.init_from={folder} holds another model: {'; '.join(found)}")


def differences(now: TrainState, saved: TrainState) -> list[str]:
    """One phrase per setting in which the model, data or recipe of two runs differ: key, saved value, value now.

    The fingerprints decide whether they differ. Settings are named as in the resolved configs; where those agree (the
    text behind `data.source` has changed, say), as in the fingerprints.
    """
    configs = dotted(now.config), dotted(saved.config)
    found: list[str] = []
    for room in sorted({*now.fingerprints, *saved.fingerprints}):
        texts = _without_name(now.fingerprints.get(room, "")), _without_name(saved.fingerprints.get(room, ""))
        if texts[0] == texts[1]:
            continue
        found += (
            _settings(room, *configs)
            or _phrases(dotted(texts[0]), dotted(texts[1]), known=configs[0], room=room)
            or _phrases(*configs, known=configs[0], room=room)
            or [f"{room}: {texts[1]!r} != {texts[0]!r}"]
        )
    return list(dict.fromkeys(found))


def _without_name(text: str) -> str:
    """A fingerprint without the source's name, which older checkpoints have: the same tokens are the same data."""
    return re.sub(r'\n"source": "[^\n]*",(?=\n)', "", text)


def _settings(room: str, now: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Phrases for a room's own settings; those for the run's end only if no other one explains the difference."""

    def phrases(wanted: Callable[[str], bool]) -> list[str]:
        ours = [{key: value for key, value in each.items() if wanted(key)} for each in (now, saved)]
        return _phrases(ours[0], ours[1], known=now, room=room)

    def is_firm(key: str) -> bool:
        return key.startswith(_SECTIONS.get(room, ())) and key not in (*_FREE, *_END)

    return phrases(is_firm) or (phrases(lambda key: key in _END) if room == "recipe" else [])


def _phrases(now: dict[str, Any], saved: dict[str, Any], known: Mapping[str, Any], room: str) -> list[str]:
    phrases = []
    for key in sorted({*now, *saved}):
        if now.get(key) != saved.get(key):
            name = key if key in known or key.startswith(f"{room}.") else f"{room}.{key}"
            phrases.append(f"{name} was {saved.get(key)} there and is {now.get(key)} here")
    return phrases
