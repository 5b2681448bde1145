"""Transformer Engine as a plan sees it: the kernels that it launches for what a run asks of it, without values.

It stands where `train.precision.transformer_engine` has the library, and answers the same calls. From the library's own
Python (2.20, `module/linear.py` and `grouped_linear.py` under block scaling) is taken what is quantised, when, and what
is kept. A tensor is quantised by rows (tiles of 1 x 128) and by columns (stored transposed) in one pass over it, an
input for its own product and the weight gradient, a gradient likewise, weights in blocks of 128 x 128 once for all
micro-batches. Experts are multiplied by one kernel, as far as their weights are not: of them each has its own quantiser
and its own weight gradient, for which rows are taken to be shared out evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from train.precision.config import Fp8, PrecisionConfig
from train.precision.transformer_engine import LibraryWeights

# The namespace of the operations below among torch's.
LIBRARY = "halocline_fp8"
TILE = 128
_SCHEMAS = (
    "quantize(Tensor x, bool rows, bool columns, bool blocks) -> Tensor[]",
    "multiply(Tensor a, Tensor[] b, ScalarType dtype) -> Tensor",
    "multiply_add(Tensor a, Tensor b, Tensor(a!) into) -> ()",
)


def library_shapes(config: PrecisionConfig) -> LibraryWeights | None:
    """What multiplies in FP8 on a GPU with the library; None where a run there would multiply by the reference."""
    if config.name != "fp8" or config.engine == "reference" or config.is_fp8("lm_head"):
        return None
    return LibraryWeights(config.power_of_two_scales, _Shapes())


def library_sizes(name: str, operands: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(groups, m, n, k) of a product of the library."""
    a, b = operands["a"], operands["b"]
    if name == "multiply":
        return len(b), a.shape[0], b[0].shape[0], a.shape[1]
    n, k = operands["into"].shape
    return 1, n, k, a.shape[1]


class _Shapes:
    """The part of the library that is used."""

    def __init__(self) -> None:
        _operations()

    @property
    def pytorch(self) -> Any:
        return self

    def recipe(self, fp8: Fp8, power_of_two: bool) -> Any:
        """Scales make no difference to a plan."""

    def autocast(self, enabled: bool, recipe: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def Linear(self, num_inputs: int, num_outputs: int, **options: Any) -> _Module:  # noqa: N802
        return _Module(["weight"], options["save_original_input"])

    def GroupedLinear(self, num_groups: int, num_inputs: int, num_outputs: int, **options: Any) -> _Module:  # noqa: N802
        return _Module([f"weight{e}" for e in range(num_groups)], options["save_original_input"])


class _Delayed:
    """A store of delayed weight gradients."""

    def __init__(self, delays: bool) -> None:
        self._waiting: list[Callable[[], None]] = []

    def put(self, tensors: list[Any], func: Callable[..., Any]) -> None:
        self._waiting.append(partial(func, *tensors))

    def run(self) -> None:
        self._waiting.pop(0)()


class _Module:
    """A module over one weight [n, k], or over one for each group."""

    def __init__(self, names: list[str], saves_input: bool) -> None:
        self._names, self.saves_input = names, saves_input
        self.wgrad_store: Any = _Delayed(True)
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []

    @property
    def weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def __call__(self, x: Tensor, *splits: Tensor, is_first_microbatch: bool) -> Tensor:
        if is_first_microbatch:
            self.quantise()
        return _Multiply.apply(x, self, self.wgrad_store, *self.weights)

    @torch.no_grad()
    def quantise(self) -> None:
        """Rows and columns of the weights, which are kept with their scales until they change."""
        kept = [torch.ops.halocline_fp8.quantize(weight, True, True, True) for weight in self.weights]
        self._kept = kept
        self.rows, self.columns = [each[0] for each in kept], [each[2] for each in kept]

    def backward_dw(self) -> None:
        """The weight gradient that the store has waiting."""
        self.wgrad_store.run()


class _Multiply(torch.autograd.Function):
    """x [m, k] times the weights of a module, transposed: [m, n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: _Module, store: Any, *weights: Tensor) -> Tensor:
        rows, _, *columns = torch.ops.halocline_fp8.quantize(x, True, not module.saves_input, False)
        ctx.save_for_backward(*([x] if module.saves_input else columns))
        ctx.module, ctx.store, ctx.dtype = module, store, x.dtype
        return torch.ops.halocline_fp8.multiply(rows, module.rows, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        module = ctx.module
        rows, _, *columns = torch.ops.halocline_fp8.quantize(dy, True, True, False)
        dx = torch.ops.halocline_fp8.multiply(rows, module.columns, ctx.dtype)
        kept = ctx.saved_tensors
        if module.saves_input:
            kept = torch.ops.halocline_fp8.quantize(kept[0], False, True, False)
        # Detached: what waits for its turn must not hold the graph.
        ctx.store.put([columns, [each.detach() for each in kept]], partial(_add, module.weights))
        return dx, None, None, *(None for _ in module.weights)


def _add(weights: list[Tensor], of_dy: list[Tensor], of_x: list[Tensor]) -> None:
    """Each weight's gradient from its share of the columns of dy [n, m] and of x [k, m]."""
    share = of_dy[0].shape[1] // len(weights)
    for number, weight in enumerate(weights):
        own = slice(number * share, (number + 1) * share)
        grad: Any = weight.main_grad  # type: ignore[attr-defined]
        torch.ops.halocline_fp8.multiply_add(of_dy[0][:, own], of_x[0][:, own], grad)


@lru_cache(maxsize=1)
def _operations() -> torch.library.Library:
    """Make the operations known to torch, for tensors without values alone."""
    library = torch.library.Library(LIBRARY, "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("quantize", _quantize, "Meta")
    library.impl("multiply", lambda a, b, dtype: a.new_empty((a.shape[0], b[0].shape[0]), dtype=dtype), "Meta")
    library.impl("multiply_add", lambda a, b, into: None, "Meta")
    return library


def _quantize(x: Tensor, rows: bool, columns: bool, blocks: bool) -> list[Tensor]:
    """Values in E4M3 and scales in float32 of x [m, k] by rows, and of its columns [k, m]; either if asked for."""
    found = []
    for asked, (height, width) in ((rows, x.shape), (columns, reversed(x.shape))):
        if asked:
            tiles = -(-width // TILE), (-(-height // TILE) if blocks else height)
            found += [x.new_empty((height, width), dtype=torch.float8_e4m3fn), x.new_empty(tiles, dtype=torch.float32)]
    return found
