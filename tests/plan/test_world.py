"""A rank without its cluster, made in a process that goes on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from launch.plan.events import Kernel
from launch.plan.layers import layers_of
from launch.plan.record import Recorder
from launch.plan.world import world
from tests.plan.jobs import WAYS, job
from train.job import Job
from train.model.loss import LossTerms


def test_nothing_is_left_behind() -> None:
    """Several in one process, one after the other, and what was there before is there still."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for rank in (0, 3, 0):
        with world(job(*WAYS["two_hop"]), rank) as made:
            assert made.groups.mesh.rank == rank and dist.get_world_size() == 4
            assert isinstance(torch.ones(1), FakeTensor)
        assert not dist.is_initialized() and not isinstance(torch.ones(1), FakeTensor)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_leaves_after_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), world(job()):
        raise RuntimeError("on purpose")
    with world(job()):
        pass


def test_a_rank_of_a_job_is_no_place_for_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="default process group"), world(job()):
            pass
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def operations(made: Job, recorder: Recorder) -> list[str]:
    (stage,) = made.stages.values()
    stage.begin(lambda _: made.train_rows.rows(0, 2), LossTerms(1.0, 1.0, 1.0))
    with recorder.on():
        recorder.drive(stage.forward(0, None))
    return [getattr(entry.event, "name", type(entry.event).__name__) for entry in recorder.entries()]


@pytest.mark.parametrize("kernels", ["cuda", "cpu"])
def test_kernels_are_those_of_the_device_that_is_asked_for(kernels: str) -> None:
    recorder = Recorder()
    with world(job(*WAYS["flat"], "precision=bf16"), 0, kernels, recorder=recorder) as made:
        found = operations(made, recorder)
        assert made.host.runs_ahead == (kernels == "cuda")
    assert ("_grouped_mm" in found) == (kernels == "cuda")


@pytest.mark.parametrize("kernels", ["cuda", "cpu"])
def test_documents_and_what_a_cpu_measures_are_no_obstacle(kernels: str) -> None:
    """A row is one document for a kernel that asks for lengths, and it wants values as wide as keys."""
    settings = [
        *WAYS["flat"],
        "precision=bf16",
        "data.document_mask=true",
        "run.kernels=compiled",
        "zero.engine=deepspeed",
    ]
    passes = layers_of(job(*settings), kernels).passes["dense"]
    plain = layers_of(job(*WAYS["flat"], "precision=bf16"), kernels).passes["dense"]
    cores = [
        sum(event.flops for event in each.forward if isinstance(event, Kernel) and event.work == "attention")
        for each in (passes, plain)
    ]
    sizes = job().model.attention_sizes
    widths = sizes.qk_head_dim, sizes.value_head_dim
    padded = Fraction(2 * max(widths), sum(widths)) if kernels == "cuda" else 1
    assert cores[0] == padded * cores[1] > 0


def test_what_is_not_there_says_so() -> None:
    with world(job()) as made, pytest.raises(NotImplementedError, match="no files, and is asked for latest"):
        made.checkpoints.latest()
