"""What the engine takes for granted of the library: rules that bind, traps that are there, signatures, defaults."""

from __future__ import annotations

import inspect
import pickle
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common.recipe import Float8BlockScaling, Format, QParams
from transformer_engine.pytorch.module._common import WeightGradStore
from transformer_engine.pytorch.permutation import moe_permute
from transformer_engine.pytorch.router import fused_topk_with_score_function
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

from tests.te.contract_engine import values

# The version whose source the engine was written against; another one has to be read again where this test is.
VERSION = "2.20.2"


def parameters(function: Any) -> dict[str, Any]:
    """Parameter -> default; `...` for none."""
    found = inspect.signature(function).parameters.values()
    return {each.name: ... if each.default is each.empty else each.default for each in found if each.name != "self"}


def part(function: Any, *names: str) -> dict[str, Any]:
    every = parameters(function)
    return {name: every[name] for name in names}


def test_version() -> None:
    assert version("transformer-engine") == VERSION


def test_signatures() -> None:
    ours = ("bias", "params_dtype", "device", "fuse_wgrad_accumulation", "delay_wgrad_compute", "save_original_input")
    defaults = {
        "bias": True,
        "params_dtype": None,
        "device": "cuda",
        "fuse_wgrad_accumulation": False,
        "delay_wgrad_compute": False,
        "save_original_input": False,
    }
    assert list(parameters(te.Linear))[:2] == ["in_features", "out_features"]
    assert part(te.Linear, *ours) == defaults
    assert list(parameters(te.GroupedLinear))[:3] == ["num_gemms", "in_features", "out_features"]
    assert part(te.GroupedLinear, *ours, "use_grouped_tensor", "single_grouped_weight") == {
        **defaults,
        "use_grouped_tensor": None,
        "single_grouped_weight": False,
    }
    assert parameters(te.Linear.forward) == {
        "inp": ...,
        "is_first_microbatch": None,
        "fp8_output": False,
        "fp8_grad": False,
    }
    assert parameters(te.GroupedLinear.forward) == {
        "inp": ...,
        "m_splits": ...,
        "is_first_microbatch": None,
        "out": None,
        "dgrad_out": None,
    }
    assert part(te.autocast, "enabled", "recipe") == {"enabled": True, "recipe": None}
    assert parameters(te.Linear.backward_dw) == parameters(te.GroupedLinear.backward_dw) == {}
    assert parameters(WeightGradStore) == {"delay_wgrad_compute": False, "ub_bulk_wgrad": False}
    assert parameters(WeightGradStore.put) == {"tensor_list": ..., "func": ...}
    assert parameters(te.is_fp8_block_scaling_available) == {"return_reason": False}


def test_signatures_of_what_is_left_unused() -> None:
    """docs/fp8.md says why neither serves; should they change, that has to be thought through again."""
    assert list(parameters(moe_permute))[:3] == ["inp", "routing_map", "num_out_tokens"]
    router = parameters(fused_topk_with_score_function)
    assert {"num_groups", "group_topk", "scaling_factor", "score_function", "expert_bias"} <= set(router)


def test_recipe() -> None:
    """Tiles of 1 x 128, blocks of 128 x 128, E4M3, powers of two, no floor, split accumulation."""
    recipe = Float8BlockScaling()
    assert not recipe.use_f32_scales and recipe.fp8_format is Format.E4M3 and recipe.backward_override is None
    dims = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
    assert dims == (1, 2, 1)
    for scaling in (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad):
        assert (scaling.power_2_scale, scaling.amax_epsilon) == (True, 0.0)
    for product in (recipe.fp8_gemm_fprop, recipe.fp8_gemm_dgrad, recipe.fp8_gemm_wgrad):
        assert product.use_split_accumulator
    assert (QParams().power_2_scale, QParams().amax_epsilon) == (False, 0.0)


def linear(fused: bool = True) -> Any:
    torch.manual_seed(0)
    layer = te.Linear(
        64,
        32,
        bias=False,
        device="cpu",
        params_dtype=torch.bfloat16,
        delay_wgrad_compute=True,
        fuse_wgrad_accumulation=fused,
    )
    layer.weight.main_grad = torch.zeros(32, 64)
    return layer


def forward(layer: Any, seed: int, first: bool | None) -> Tensor:
    with te.autocast(enabled=True, recipe=Float8BlockScaling()):
        return layer(values(16, 64, seed=seed).requires_grad_(), is_first_microbatch=first)


def gradient_of_two(layer: Any, flags: tuple[bool | None, bool | None]) -> Tensor:
    """What two micro-batches leave: the second goes back first."""
    outputs = [forward(layer, seed, flag) for seed, flag in enumerate(flags)]
    for y in reversed(outputs):
        y.backward(torch.ones_like(y))
    layer.backward_dw()
    layer.backward_dw()
    return layer.weight.main_grad.clone() if layer.fuse_wgrad_accumulation else layer.weight.grad.float()


def test_a_delayed_gradient_that_is_not_fused_replaces_the_one_before() -> None:
    replaced, added = gradient_of_two(linear(fused=False), (None, None)), gradient_of_two(linear(), (None, None))
    alone = linear()
    forward(alone, 0, None).sum().backward()
    alone.backward_dw()
    torch.testing.assert_close(replaced, alone.weight.main_grad, rtol=2**-8, atol=1e-6)
    assert not torch.allclose(added, replaced, rtol=0.1)


def test_the_flag_of_a_first_micro_batch_overwrites_main_grad() -> None:
    """Whichever comes last: why the engine gives the flag to nobody whose gradient counts."""
    assert not torch.equal(gradient_of_two(linear(), (True, False)), gradient_of_two(linear(), (None, None)))


@pytest.mark.parametrize(("num_rows", "width"), [(12, 64), (16, 40)])
def test_rows_and_widths_that_it_refuses(num_rows: int, width: int) -> None:
    layer = te.Linear(width, 32, bias=False, device="cpu", params_dtype=torch.bfloat16)
    with (
        te.autocast(enabled=True, recipe=Float8BlockScaling()),
        pytest.raises(ValueError, match=r"divisible by 8 and the last dimension to be divisible by 16"),
    ):
        layer(torch.zeros(num_rows, width, dtype=torch.bfloat16))


def test_state_of_a_module_is_its_weight() -> None:
    layer = linear()
    forward(layer, 0, None)
    assert {name: value.numel() for name, value in layer.state_dict().items()} == {"weight": 2048, "_extra_state": 0}


def test_a_quantised_tensor_goes_through_pickle() -> None:
    quantizer = Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)
    tensor = quantizer(values(32, 48, seed=0))
    again = pickle.loads(pickle.dumps(tensor))
    assert torch.equal(tensor.dequantize(), again.dequantize())
    assert torch.equal(tensor._columnwise_data, again._columnwise_data)


def test_both_sides_hold_the_value_in_the_place_that_the_library_reads() -> None:
    """Its own dequantisation, which reads rows and columns by its own account of the layout, gives the value back."""
    x = values(256, 384, seed=3)
    for dim in (1, 2):
        quantizer = Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=dim)
        tensor = quantizer(x)
        rows = tensor.dequantize(dtype=torch.float32)
        tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
        columns = tensor.dequantize(dtype=torch.float32)
        for side in (rows, columns):
            assert (side - x.float()).norm() < 0.05 * x.float().norm()
