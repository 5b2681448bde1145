"""The small state of a run: text and back, random numbers, and the differences between runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from train.checkpoint.state import TrainState, capture_rng, differences, fingerprint, restore_rng


def state(config: str = "", **fingerprints: str) -> TrainState:
    return TrainState(3, 300, 30, 3, capture_rng(), "abc", fingerprints, config)


def test_random_numbers_go_on_where_they_were() -> None:
    torch.manual_seed(7)
    torch.randn(5)
    text = capture_rng()
    expected = torch.randn(100)
    torch.randn(1000)
    restore_rng(text)
    assert torch.equal(torch.randn(100), expected)


def test_text_and_back() -> None:
    before = state("model:\n  hidden_size: 64\n", model="a", data="ä\n", recipe="c")
    assert TrainState.from_json(before.to_json(), before.config) == before
    assert "hidden_size" not in before.to_json()


def test_a_state_of_another_version_is_refused() -> None:
    text = state().to_json().replace('"step"', '"steps"')
    with pytest.raises(ValueError, match="another version"):
        TrainState.from_json(text, "")


@dataclass(frozen=True)
class _Settings:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


def test_fingerprints_are_equal_exactly_when_settings_are() -> None:
    assert fingerprint(_Settings()) == fingerprint({"betas": [0.9, 0.95], "lr": 1e-3})
    assert fingerprint(_Settings()) != fingerprint(_Settings(lr=1.0000000001e-3))
    assert fingerprint(_Settings()) != fingerprint(_Settings(betas=(0.9, 0.999)))


def test_differences_name_each_key_and_both_values() -> None:
    settings = {"hidden_size": 64, "rope_scaling": {"factor": 40}, "n_group": 4}
    saved = state(model=fingerprint(settings), data="same")
    now = state(model=fingerprint(settings | {"hidden_size": 96, "rope_scaling": None}), data="same")
    phrases = differences(now, saved)
    assert "model.hidden_size was 64 there and is 96 here" in phrases
    assert any("rope_scaling" in phrase for phrase in phrases)
    assert not any("n_group" in phrase for phrase in phrases)
    assert differences(saved, saved) == []


def test_full_keys_of_the_config_are_not_prefixed() -> None:
    saved = state("optimizer:\n  lr: 1\n", recipe=fingerprint({"optimizer": {"lr": 1}}))
    now = state("optimizer:\n  lr: 2\n", recipe=fingerprint({"optimizer": {"lr": 2}}))
    assert differences(now, saved) == ["optimizer.lr was 1 there and is 2 here"]


def test_fingerprints_that_are_no_mapping_fall_back_to_the_configs() -> None:
    saved = state("train:\n  seed: 1\n", data="sha-1")
    now = dataclasses.replace(saved, fingerprints={"data": "sha-2"})
    assert differences(now, saved) == ["data: 'sha-1' != 'sha-2'"]
    now = dataclasses.replace(now, config="train:\n  seed: 2\n")
    assert differences(now, saved) == ["train.seed was 1 there and is 2 here"]


def test_what_the_fingerprints_leave_out_may_differ() -> None:
    saved = state("parallel:\n  ep: 1\n", model="m")
    assert differences(dataclasses.replace(saved, config="parallel:\n  ep: 2\n"), saved) == []
