"""A kernel as a trace sees it: one operation, with its shapes and its bytes, without values and without Triton."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kernels import fp8_rows, sums, swiglu  # noqa: F401
from kernels.operation import Launch
from launch.plan.events import Enter, Kernel
from launch.plan.layers import layers_of
from launch.plan.operations import kernel_of
from parallel.torch_names import FakeTensorMode
from tests.plan.jobs import WAYS, job

BF16, INT32 = torch.bfloat16, torch.int32


def test_bytes_are_those_of_operands_and_results() -> None:
    with FakeTensorMode():
        h, weights = torch.empty(6, 16, dtype=BF16), torch.empty(6)
        a = torch.ops.halocline.swiglu_forward(h, weights)
        assert (a.shape, a.dtype) == ((6, 8), BF16)
        kernel = kernel_of(torch.ops.halocline.swiglu_forward.default, (h, weights), {}, a)
    assert kernel is not None and (kernel.name, kernel.work, kernel.flops) == ("swiglu_forward", "move", 0)
    assert (kernel.read_bytes, kernel.written_bytes) == (6 * 16 * 2 + 6 * 4, 6 * 8 * 2)


def test_of_rows_that_an_index_names_only_those_are_read() -> None:
    with FakeTensorMode():
        arguments = torch.empty(1000, 9, dtype=torch.uint8), torch.empty(3, dtype=INT32), None, [3], 8
        out = torch.ops.halocline.fp8_take(*arguments)
        kernel = kernel_of(torch.ops.halocline.fp8_take.default, arguments, {}, out)
    assert kernel is not None and out[0].shape == (3, 8)
    assert (kernel.read_bytes, kernel.written_bytes) == (3 * 9 + 3 * 4, 3 * 8 + 3 * 4)


def test_nothing_to_do_is_no_launch() -> None:
    """A grid without programs is an error of CUDA's."""
    launch = Launch(kernel=None, grid=(0, 4), arguments=())
    launch.run()


@pytest.mark.parametrize("num_rows", [0, 5])
def test_what_runs_has_the_shapes_of_what_is_traced(num_rows: int) -> None:
    x = torch.randn(num_rows, 7)
    ran = sums.sum_rows(x, torch.float64)
    with FakeTensorMode() as mode:
        traced = sums.sum_rows(mode.from_tensor(x), torch.float64)
    assert (ran.shape, ran.dtype) == (traced.shape, traced.dtype)
    torch.testing.assert_close(ran, x.double().sum(0), rtol=1e-6, atol=1e-6)


def test_a_layer_with_experts_is_few_launches() -> None:
    """As a plan for GPUs sees it, both ways and with its weight gradients: 139 where torch's operations are 469."""
    passes = layers_of(job(*WAYS["two_hop"], "precision=bf16")).passes["moe"]
    found, at = Counter[tuple[str, str]](), ("", "")
    for event in (*passes.forward, *passes.backward, *(each for part in passes.weights for each in part)):
        if isinstance(event, Enter):
            at = event.node, event.kind
        elif isinstance(event, Kernel):
            found[at] += 1
    assert found.total() <= 150
    assert found["dispatch", "F"] <= 20 and found["attention", "F"] <= 20
