"""The door to Transformer Engine: FP8 products by the library's modules on GPUs that have them. Not yet run on a GPU.

Its `Linear` and `GroupedLinear` quantise, multiply and keep; parameters, `main_grad` and order stay ours. A module is
made without memory, outside the model's tree, and given our parameter (of stacked weights, one view for each expert),
so names, shapes, checkpoints and the sharded optimizer know nothing of it. What the library's weight gradients wait
for is handed to the sink as it arises, and runs when the schedule has it run, in any order.

Two of the library's rules shape this file. A module whose forward is flagged as a step's first quantises its weight
anew, but its weight gradient then overwrites `main_grad`: so the flag goes to a forward of zeros that nobody uses, and
every real one adds. And a delayed weight gradient adds to `main_grad` only where accumulation is fused; else it would
replace what earlier micro-batches have left.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from train.precision.config import Fp8
from train.precision.engine import Activation, Engine, Mlp
from train.precision.grads import Sink
from train.precision.padding import ROWS, Padding, missing_rows, pad_rows
from train.precision.tiles import keep_rows, restore_rows, round_rows

# Widths of matrices have to be multiples by themselves (`build.check_widths`).
WIDTH = 16
CAPABILITY = (9, 0)


@lru_cache(maxsize=1)
def _library() -> Any:
    """transformer_engine.pytorch, imported when first needed: it takes seconds, and a GPU."""
    import transformer_engine.pytorch as te

    return te


def missing(device: torch.device | str) -> str | None:
    """Why Transformer Engine cannot multiply on this device, as the end of a sentence; None where it can."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return "it needs a GPU, and the run is on a CPU"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"it needs a GPU of compute capability 9.0 (Hopper), not {torch.cuda.get_device_capability()}"
    try:
        available, reason = _library().is_fp8_block_scaling_available(return_reason=True)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"it is not installed (pip install --no-build-isolation -e '.[cuda]'): {error}"
    return None if available else f"it says: {reason}"


def _recipe(fp8: Fp8, power_of_two: bool) -> Any:
    """Tiles of 1 x 128, blocks of 128 x 128, E4M3 and no floor are the library's own defaults."""
    from transformer_engine.common.recipe import Float8BlockScaling, Format, QParams

    recipe = Float8BlockScaling(fp8_format=Format.E4M3, backward_override=None)
    recipe.fp8_quant_fwd_inp = QParams(power_2_scale=fp8.round_input or power_of_two, amax_epsilon=0.0)
    recipe.fp8_quant_fwd_weight = QParams(power_2_scale=power_of_two, amax_epsilon=0.0)
    recipe.fp8_quant_bwd_grad = QParams(power_2_scale=fp8.round_gradient or power_of_two, amax_epsilon=0.0)
    return recipe


class Library(Protocol):
    """What is used of Transformer Engine: the library itself, or what stands for it where nothing is computed."""

    @property
    def pytorch(self) -> Any:
        """`Linear`, `GroupedLinear` and `autocast`."""
        ...

    def recipe(self, fp8: Fp8, power_of_two: bool) -> Any:
        """What `autocast` takes."""
        ...


class Installed:
    """The library itself."""

    @property
    def pytorch(self) -> Any:
        return _library()

    def recipe(self, fp8: Fp8, power_of_two: bool) -> Any:
        return _recipe(fp8, power_of_two)


class _Store:
    """Stands for a module's store of delayed weight gradients during one forward: what comes leaves for the sink.

    The work puts the library's own store, filled, back into the module and calls `backward_dw`.
    """

    def __init__(self, module: Any, sink: Sink) -> None:
        self._module, self._sink, self._store = module, sink, type(module.wgrad_store)

    def delay_wgrad_compute(self) -> bool:
        return True

    def put(self, tensors: list[Any], func: Callable[..., Any]) -> None:
        store = self._store(True)
        store.put(tensors, func)
        self._sink(partial(self._run, store))

    def _run(self, store: Any) -> None:
        module = self._module
        module.wgrad_store, before = store, module.wgrad_store
        try:
            module.backward_dw()
        finally:
            module.wgrad_store = before


class _Module:
    """One of the library's modules over one of our parameters: [n, k], or stacked [E, n, k]."""

    def __init__(self, weight: Tensor, recipe: Any, saves_input: bool, library: Library) -> None:
        *groups, num_outputs, num_inputs = weight.shape
        self._te = te = library.pytorch
        make = te.GroupedLinear if groups else te.Linear
        self._grouped = bool(groups)
        self._module = make(
            *groups,
            num_inputs,
            num_outputs,
            bias=False,
            params_dtype=weight.dtype,
            device="meta",
            fuse_wgrad_accumulation=True,
            delay_wgrad_compute=True,
            save_original_input=saves_input,
        )
        self._weight, self._recipe = weight, recipe
        self._bound: tuple[int, int | None] | None = None
        self._quantised: tuple[int, int] | None = None

    def __call__(self, x: Tensor, sink: Sink, generation: int, *splits: Tensor) -> Tensor:
        """x [R, k], R a multiple of 16 (of each group too) -> [R, n]. generation: counts changes of the weights."""
        self._bind()
        if self._quantised != (generation, self._weight._version):
            self._quantise(x)
            self._quantised = (generation, self._weight._version)
        module = self._module
        module.wgrad_store, before = _Store(module, sink), module.wgrad_store
        try:
            with self._te.autocast(enabled=True, recipe=self._recipe):
                return module(x, *splits, is_first_microbatch=False)
        finally:
            module.wgrad_store = before

    def _bind(self) -> None:
        """Give the module our parameter where it now lies: an optimizer moves weights into a buffer of its own."""
        weight, grad = self._weight, getattr(self._weight, "main_grad", None)
        place = weight.data_ptr(), None if grad is None else grad.data_ptr()
        if place == self._bound:
            return
        if not self._grouped:
            self._module.weight = weight
        else:
            for e, part in enumerate(weight.detach()):
                view = nn.Parameter(part, requires_grad=weight.requires_grad)
                if grad is not None:
                    view.main_grad = grad[e]  # type: ignore[attr-defined]
                setattr(self._module, f"weight{e}", view)
        self._bound, self._quantised = place, None

    def _quantise(self, like: Tensor) -> None:
        """Rows and columns of the weight, from its present values: the library's cache, filled by unused zeros."""
        splits = [torch.tensor([ROWS] + [0] * (self._weight.shape[0] - 1))] if self._grouped else []
        zeros = like.new_zeros(ROWS, like.shape[1]).requires_grad_()
        # With gradients, or there would be no columns; by hooks of its own, or it would count as saved by the model.
        quantising = self._te.autocast(enabled=True, recipe=self._recipe)
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself), quantising:
            self._module(zeros, *splits, is_first_microbatch=True)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class LibraryModules:
    """What all engines of a run share: a library's module for every weight, and how often weights have changed."""

    def __init__(self, power_of_two: bool = False, library: Library | None = None) -> None:
        """power_of_two: for all scales, whatever an engine's own `Fp8` says. library: None is the installed one."""
        self.power_of_two, self.generation = power_of_two, 0
        self.library = library or Installed()
        self._modules: dict[int, _Module] = {}

    def changed(self) -> None:
        """An optimizer has stepped, or a checkpoint was read: weights are quantised anew when next used."""
        self.generation += 1

    def module(self, weight: Tensor, recipe: Any, saves_input: bool = False) -> _Module:
        """The module over this weight."""
        found = self._modules.get(id(weight))
        if found is None:
            found = self._modules[id(weight)] = _Module(weight, recipe, saves_input, self.library)
        return found


class TransformerEngine:
    """An engine that multiplies in one way (`Engine`): keeps inputs and gradients as the library's columns in E4M3."""

    def __init__(self, fp8: Fp8, modules: LibraryModules) -> None:
        self.fp8, self.modules = fp8, modules
        self.recipe = modules.library.recipe(fp8, modules.power_of_two)

    def project(self, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        num_rows = rows.shape[0]
        rows = nn.functional.pad(rows, (0, 0, 0, missing_rows(num_rows)))
        outputs = [self.multiply(rows, sink, weight) for weight in weights]
        return tuple(y[:num_rows].view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        down = mlp.down_engine
        assert isinstance(down, TransformerEngine)
        num_rows = x.shape[0]
        extra = missing_rows(num_rows)
        x = nn.functional.pad(x, (0, 0, 0, extra))
        row_weights = None if row_weights is None else nn.functional.pad(row_weights, (0, extra))
        return _padded_mlp(self, down, mlp, x, row_weights)[:num_rows]

    def grouped(self, splits: list[int]) -> Engine:
        return _Groups(self, splits)

    def multiply(self, rows: Tensor, sink: Sink, weight: Tensor, *splits: Tensor, saves_input: bool = False) -> Tensor:
        """rows [R, k], padded, by one weight; of stacked weights `splits` has the padded rows of each group.

        saves_input: autograd keeps the rows themselves, not the library's columns of them.
        """
        module = self.modules.module(weight, self.recipe, saves_input)
        return module(rows, sink, self.modules.generation, *splits)


class _Groups:
    """An engine for stacked weights. Every group is padded with rows of zeros, which add nothing anywhere."""

    def __init__(self, engine: TransformerEngine, splits: list[int]) -> None:
        self.engine, self.splits = engine, splits

    def project(self, x: Tensor, sink: Sink, *weights: Tensor) -> tuple[Tensor, ...]:
        padding = Padding.of(self.splits, x.device)
        rows = pad_rows(_rounded(self.engine, x), padding)
        outputs = [self.engine.multiply(rows, sink, weight, padding.splits) for weight in weights]
        return tuple(y[padding.rows] for y in outputs)

    def mlp(self, mlp: Mlp, x: Tensor, row_weights: Tensor | None) -> Tensor:
        down = mlp.down_engine
        assert isinstance(down, _Groups)
        padding = Padding.of(self.splits, x.device)
        x = pad_rows(_rounded(self.engine, x), padding)
        row_weights = None if row_weights is None else pad_rows(row_weights, padding)
        y = _padded_mlp(self.engine, down.engine, mlp, x, row_weights, padding.splits)
        return _rounded_gradient(down.engine, y[padding.rows])

    def grouped(self, splits: list[int]) -> Engine:
        return self.engine.grouped(splits)


def _padded_mlp(
    up: TransformerEngine,
    down: TransformerEngine,
    mlp: Mlp,
    x: Tensor,
    row_weights: Tensor | None,
    *splits: Tensor,
) -> Tensor:
    """The two maps and the activation, of which only the input is kept (technical report, section 3.3.3).

    The second map would keep its own input; what autograd is given in its place makes it again from the activation's.
    """
    h = up.multiply(x, mlp.sink, mlp.gate_up, *splits)
    a = _Activate.apply(h, row_weights, mlp.activation, down.fp8.round_input or down.modules.power_of_two)

    def multiply(a: Tensor) -> Tensor:
        return down.multiply(a, mlp.sink, mlp.down, *splits, saves_input=True)

    if not a.requires_grad:
        return multiply(a)
    kind, shape, place, node = type(a), a.shape, _place(a), a.grad_fn

    def pack(saved: Tensor) -> Any:
        # A quantised tensor of the library is a wrapper and lies nowhere.
        return node if type(saved) is kind and saved.shape == shape and _place(saved) == place else saved

    with saved_tensors_hooks(pack, _unpack):
        return multiply(a)


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory is told from all other that is in use."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else _Activate.again(packed)


class _Activate(torch.autograd.Function):
    """activation(h, row_weights), which keeps h in E4M3."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, row_weights: Tensor | None, activation: Activation, round_input: bool) -> Tensor:
        ctx.save_for_backward(row_weights, *keep_rows(h, round_input))
        ctx.activation, ctx.dtype = activation, h.dtype
        return activation.swiglu_forward(h, row_weights)

    @staticmethod
    @torch.no_grad()
    def again(node: Any) -> Tensor:
        """The result, from what a node has kept."""
        row_weights, *kept = node.saved_tensors
        return node.activation.swiglu_forward(restore_rows(tuple(kept)).to(node.dtype), row_weights)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Any:
        row_weights, *kept = ctx.saved_tensors
        h = restore_rows(tuple(kept)).to(ctx.dtype)
        _, dh, d_row_weights = ctx.activation.swiglu_backward(da, h, row_weights)
        return dh, d_row_weights, None, None


class _Round(torch.autograd.Function):
    """Rounds rows to E4M3 and back, on the way forward or on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.forward_rounds = forward
        return round_rows(x, True).to(x.dtype) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy if ctx.forward_rounds else round_rows(dy, True).to(dy.dtype), None


def _rounded(engine: TransformerEngine, x: Tensor) -> Tensor:
    """x as dispatch brings it. The library makes rows and columns from the same x, so x itself has to be rounded.

    What has travelled as bytes is rounded already, and rounding it again changes nothing: so the numbers do not depend
    on the way that rows have come.
    """
    return _Round.apply(x, True) if engine.fp8.round_input else x


def _rounded_gradient(engine: TransformerEngine, y: Tensor) -> Tensor:
    """y, whose gradient is rounded as the backward of combine brings it."""
    return _Round.apply(y, False) if engine.fp8.round_gradient else y
