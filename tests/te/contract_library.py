"""What the engine takes for granted of the library: signatures, and how operands lie in memory."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.pytorch.cpp_extensions import gemm
from transformer_engine.pytorch.permutation import moe_permute
from transformer_engine.pytorch.router import fused_topk_with_score_function
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

from tests.te.contract_engine import values
from train.precision import tiles
from train.precision.eager_passes import EagerPasses
from train.precision.quantised import Groups
from train.precision.transformer_engine import Installed

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
    """Products by operands that are quantised already, and the tensor that holds them."""
    assert list(parameters(gemm.general_gemm))[:2] == ["A", "B"]
    assert part(gemm.general_gemm, "out_dtype", "accumulate", "layout", "out", "use_split_accumulator") == {
        "out_dtype": None,
        "accumulate": False,
        "layout": "TN",
        "out": None,
        "use_split_accumulator": False,
    }
    grouped = ["A", "B", "out", "quantization_params", "out_dtype"]
    assert list(parameters(gemm.general_grouped_gemm))[:5] == grouped
    names = "layout", "m_splits", "accumulate", "use_split_accumulator", "single_output", "use_bias", "grad"
    assert part(gemm.general_grouped_gemm, *names) == {
        "layout": "TN",
        "m_splits": None,
        **dict.fromkeys(("accumulate", "use_split_accumulator", "single_output", "use_bias", "grad"), False),
    }
    assert part(Float8BlockQuantizer.__init__, "rowwise", "columnwise", "amax_epsilon", "force_pow_2_scales") == {
        "rowwise": ...,
        "columnwise": ...,
        "amax_epsilon": 0.0,
        "force_pow_2_scales": True,
    }
    held = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv", "fp8_dtype", "quantizer")
    found = list(parameters(Float8BlockwiseQTensorStorage.__new__))
    assert found[1:8] == [*held, "is_2D_scaled"] and found[-2] == "fake_dtype"
    assert parameters(te.is_fp8_block_scaling_available) == {"return_reason": False}


@pytest.mark.parametrize("num_rows", [16, 144, 256])
def test_operands_lie_as_the_library_lays_them(num_rows: int) -> None:
    """Rows and columns made by our passes against those of its own quantiser, shapes too, and its own reading of them.
    Powers of two, where both define every bit."""
    x = values(num_rows, 384, seed=3)
    theirs = Float8BlockQuantizer(te.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)(x)
    rows, columns = EagerPasses().quantise(x, True)
    groups, library = Groups((num_rows,)), Installed()
    ours = library._storage(*groups.rows(rows), None), library._storage(None, *groups.columns(columns))
    for side, mine in zip(("rowwise", "columnwise"), ours, strict=True):
        for name in (f"_{side}_data", f"_{side}_scale_inv"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert torch.equal(ours[0].dequantize(dtype=torch.float32), tiles.round_rows(x, True))
    assert torch.equal(ours[1].dequantize(dtype=torch.float32), tiles.round_columns(x, True))


@pytest.mark.parametrize("shape", [(256, 384), (144, 272)], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_columns_of_a_weight_are_made_of_its_rows(shape: tuple[int, int], power_of_two: bool) -> None:
    """Those that its own quantiser would have made beside the rows, which stay as they are and are not copied."""
    weight, library = values(*shape, seed=4), Installed()
    how: dict[str, Any] = {"rowwise": True, "columnwise": True, "block_scaling_dim": 2, "amax_epsilon": 0.0}
    theirs = Float8BlockQuantizer(te.DType.kFloat8E4M3, force_pow_2_scales=power_of_two, **how)(weight)
    rows = library.quantise(weight, power_of_two)
    both = library.with_columns(rows)
    assert rows._columnwise_data is None and both._rowwise_data is rows._rowwise_data
    num_scales = -(-shape[0] // 128)  # what pads them is never read
    for side, width in (("rowwise", None), ("columnwise", num_scales)):
        assert torch.equal(getattr(both, f"_{side}_data"), getattr(theirs, f"_{side}_data"))
        scales = (getattr(each, f"_{side}_scale_inv") for each in (both, theirs))
        mine, its = (each[:, :width] for each in scales)
        assert torch.equal(mine, its)


def test_signatures_of_what_is_left_unused() -> None:
    """docs/fp8.md says why neither serves; should they change, that has to be thought through again."""
    assert list(parameters(moe_permute))[:3] == ["inp", "routing_map", "num_out_tokens"]
    router = parameters(fused_topk_with_score_function)
    assert {"num_groups", "group_topk", "scaling_factor", "score_function", "expert_bias"} <= set(router)


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
