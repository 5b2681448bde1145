"""What lies on a rank between its steps: the closed form held against ranks as they are assembled."""

from __future__ import annotations

import pytest

from launch.plan.events import Enter, Kernel, Launch
from launch.plan.record import Recorder, events_of
from launch.plan.state import state_bytes, update_events
from launch.plan.world import world
from parallel.pipeline.segments import Name
from tests.plan.jobs import WAYS, job
from train.compose import compose
from train.config import RunConfig
from train.job import held

SETTINGS = {
    "one rank": ["precision=fp32"],
    "experts over ranks": [*WAYS["two_hop"], "precision=bf16", "optimizer.moments_dtype=bf16"],
    "shared ends": ["parallel.pp=3", "parallel.dp=2", "precision=bf16", "optimizer.ema_decay=0.9"],
    "mirrored": ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "pipeline.schedule=dualpipe", "precision=fp64"],
}


def check(config: RunConfig, pp_rank: int) -> None:
    recorder = Recorder()
    with world(config, pp_rank * config.parallel.dp, recorder=recorder) as made:
        weights = {id(param): param for _, param in held(made.models)}
        buffers = [buffer for model in made.models for buffer in model.buffers()]
        storages = {}
        for param in weights.values():
            for tensor in (param, param.main_grad):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        formula = state_bytes(config, pp_rank)
        assert formula.weights + formula.main_grad == sum(storages.values())
        # Weights that are their own masters count as masters there: of their three states two are moments.
        beside = formula.masters if formula.masters else formula.moments // 2
        assert beside + formula.moments == made.optimizer.state_bytes()
        assert formula.buffers == sum(buffer.numel() * buffer.element_size() for buffer in buffers)
        if made.ema is not None:
            ema = sum(part.tensor.nbytes for parts in made.ema.state().values() for part in parts)
            assert formula.ema_on_host == ema
        recorder.begins(Name("optimizer", 0, "zero_grad"), "U")
        with recorder.on():
            made.optimizer.zero_grad()
            recorder.begins(Name("optimizer", 0, "update"), "U")
            made.optimizer.step(1.0)
            made.optimizer.settle()
        traced = events_of(recorder.entries())
    assert update_events(config, pp_rank) == traced
    assert [each.node for each in traced if isinstance(each, Enter)] == ["zero_grad", "update"]
    assert any(isinstance(each, Kernel) for each in traced)
    if config.parallel.world_size > 1:
        assert {each.name for each in traced if isinstance(each, Launch)} == {"reduce_scatter", "all_gather"}


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_and_update_of_a_rank(name: str) -> None:
    config = job(*SETTINGS[name])
    for pp_rank in {0, config.parallel.pp - 1}:
        check(config, pp_rank)


@pytest.mark.slow
@pytest.mark.parametrize("pp_rank", [0, 7, 15])
def test_the_published_job(pp_rank: int) -> None:
    check(compose(["experiment=v3_h800_2048"]), pp_rank)
