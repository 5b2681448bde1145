"""What the backward pass computes again instead of keeping it (technical report, section 3.2.3).

Two ways, side by side. A module *offers* tensors that it can rebuild from others: wherever autograd would save one of
them, also in a later piece, it saves a handle instead, and the first reader in the backward pass rebuilds it for all.
Where a product keeps its input in another form, that form is offered too, if the input itself will be there: rebuilt,
or kept by others.
Or a whole *node* keeps only its inputs and is run again when its backward begins. Either way the graph is that of the
one forward pass and its backward reads the same bits: gradients do not change, weight gradients leave for their sink as
ever, and what a rerun returns (loads, losses) is dropped, so that nothing is counted twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from train.model.recompute_config import RecomputeConfig
from train.model.tape import Steps, Tape, Trip

Piece = Callable[..., Any]
Rebuild = Callable[..., tuple[Tensor, ...]]
# (rebuild, outputs, inputs): `outputs` were computed as `rebuild(*inputs)`, and can be again.
Offer = Callable[[Rebuild, Sequence[Tensor], Sequence[Tensor]], None]


class _Saved(Protocol):
    """What autograd holds in the place of a tensor."""

    def get(self) -> Tensor: ...


class _Kept(NamedTuple):
    """The tensor itself, detached: with its graph it would keep the node that keeps it."""

    tensor: Tensor

    def get(self) -> Tensor:
        return self.tensor


class _Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> _Layout:
        return _Layout(tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class _Origin:
    """Offered tensors, of which only their inputs are kept; rebuilt once, and free when the last reader is done."""

    def __init__(self, rebuild: Rebuild, inputs: Sequence[_Saved]) -> None:
        self._rebuild, self._inputs = rebuild, inputs
        self._outputs: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def outputs(self) -> tuple[Tensor, ...]:
        if self._outputs is None:
            self._outputs = self._rebuild(*(x.get() for x in self._inputs))
            self._inputs = ()
        return self._outputs


class _Offered(NamedTuple):
    """One tensor of an offer, while its storage lives."""

    storage: StorageWeakRef
    origin: _Origin
    number: int
    layout: _Layout
    dtype: torch.dtype
    version: int

    def covers(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same storage reads what was offered, and no other type or later content."""
        return tensor.dtype == self.dtype and tensor._version == self.version


class _Rebuilt(NamedTuple):
    """A view of an offered tensor."""

    offered: _Offered
    view: _Layout

    def get(self) -> Tensor:
        base = self.offered.origin.outputs()[self.offered.number]
        if _Layout.of(base) != self.offered.layout:
            raise RuntimeError("a tensor was rebuilt with another layout than it was offered with")
        return base.as_strided(*self.view)


class _Offers:
    """All offers of one forward pass, by storage.

    The weak reference keeps a freed storage's address from being used again, so that no other tensor is mistaken for
    an offered one.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, _Offered] = {}
        self._kept: dict[int, StorageWeakRef] = {}

    def add(self, rebuild: Rebuild, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        origin = _Origin(rebuild, [self.pack(x) for x in inputs])
        for number, y in enumerate(outputs):
            storage = StorageWeakRef(y.untyped_storage())
            offered = _Offered(storage, origin, number, _Layout.of(y), y.dtype, y._version)
            self._by_storage[storage.cdata] = offered

    def pack(self, tensor: Tensor) -> _Saved:
        storage = StorageWeakRef(tensor.untyped_storage())
        offered = self._by_storage.get(storage.cdata)
        if offered is None or not offered.covers(tensor):
            self._kept[storage.cdata] = storage
            return _Kept(tensor.detach())
        return _Rebuilt(offered, _Layout.of(tensor))

    def will_be_there(self, tensor: Tensor) -> bool:
        """Whether the backward pass has this tensor anyway: rebuilt, or kept for something that was computed before."""
        address = StorageWeakRef(tensor.untyped_storage()).cdata
        offered = self._by_storage.get(address)
        return address in self._kept if offered is None else offered.covers(tensor)

    def drop_freed(self) -> None:
        """Forget what can no longer be saved, and the inputs that it was offered with."""
        self._by_storage = {key: each for key, each in self._by_storage.items() if not each.storage.expired()}
        self._kept = {key: each for key, each in self._kept.items() if not each.expired()}


class _Slot:
    """One tensor that a node has saved; empty until the node is run again."""

    def __init__(self, run: _Run, like: Tensor) -> None:
        self.run, self.shape, self.dtype = run, like.shape, like.dtype
        self.tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            self.run.again()
        assert self.tensor is not None
        return self.tensor


class _Run:
    """One run of a node, of which only the inputs are kept, and the one rerun that its backward asks for."""

    def __init__(self, piece: Piece, inputs: Sequence[_Saved], differentiable: Sequence[bool]) -> None:
        self._piece, self._inputs, self._differentiable = piece, inputs, differentiable
        # Weak: a tensor goes with the part of the graph that reads it, not with the last one.
        self._slots: list[weakref.ref[_Slot]] = []
        self._looks: list[tuple[torch.Size, torch.dtype]] = []

    def save(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self, tensor)
        self._slots.append(weakref.ref(slot))
        self._looks.append((slot.shape, slot.dtype))
        return slot

    def again(self) -> None:
        """Fill the slots. Whatever the piece returns is dropped."""
        found: list[Tensor] = []
        inputs = [x.get().detach().requires_grad_(d) for x, d in zip(self._inputs, self._differentiable, strict=True)]
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: found.append(tensor.detach()), _get):
            self._piece(*inputs)
        if [(tensor.shape, tensor.dtype) for tensor in found] != self._looks:
            raise RuntimeError("a node that was run again saved other tensors than the first time")
        for reference, tensor in zip(self._slots, found, strict=True):
            slot = reference()
            if slot is not None:
                slot.tensor = tensor
        found.clear()  # The hook may outlive this run.
        self._inputs = ()


def _get(saved: _Saved) -> Tensor:
    return saved.get()


def _decline(rebuild: Rebuild, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    pass


def _as_it_is(piece: Piece) -> Piece:
    return piece


class Recompute:
    """The choices of one slice of the model, taken when it is built: what was not chosen costs nothing."""

    def __init__(self, config: RecomputeConfig | None = None) -> None:
        self._config = config or RecomputeConfig()
        self._offers: _Offers | None = None  # while a piece runs

    def offer(self, kind: str) -> Offer:
        """What a module calls with outputs of its kind: "norm" or "mla_up_proj"."""
        return self._add if getattr(self._config, kind) else _decline

    def offer_hidden(self) -> Offer:
        """What an autograd node of routed experts calls with what it keeps of SwiGLU's input, if it keeps anything."""
        return self._add_kept if self._config.experts_up_proj else _decline

    def offer_form(self, rebuild: Rebuild, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """What an engine calls with what it keeps of an input; declined if the input would be kept for that alone."""
        if self._offers is not None and all(map(self._offers.will_be_there, inputs)):
            self._offers.add(rebuild, outputs, inputs)

    def node(self, name: str) -> Callable[[Piece], Piece]:
        """What a block passes the pieces of a node through (see `recompute_config.NODES`)."""
        return self._kept_by_inputs if name in self._config.nodes else _as_it_is

    def on(self, tape: Tape) -> Tape:
        """The tape on which to write one forward pass."""
        config = self._config
        offers = config.norm or config.mla_up_proj or config.experts_up_proj
        return _OfferingTape(self, tape) if offers else tape

    @contextmanager
    def taking(self, offers: _Offers) -> Iterator[None]:
        """Offers are added to these, and what autograd saves is looked up in them."""
        before, self._offers = self._offers, offers
        try:
            # Not a method of `offers`: every saved tensor holds the hook, and would hold them all.
            with saved_tensors_hooks(self._pack, _get):
                yield
        finally:
            self._offers = before
            offers.drop_freed()

    def _add(self, rebuild: Rebuild, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        if torch.is_grad_enabled():
            self._add_kept(rebuild, outputs, inputs)

    def _add_kept(self, rebuild: Rebuild, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        if self._offers is not None:
            self._offers.add(rebuild, outputs, inputs)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Kept(tensor.detach()) if self._offers is None else self._offers.pack(tensor)

    def _kept_by_inputs(self, piece: Piece) -> Piece:
        def node(*inputs: Tensor) -> Any:
            run = _Run(piece, [self._pack(x) for x in inputs], [x.requires_grad for x in inputs])
            with saved_tensors_hooks(run.save, _get):
                return piece(*inputs)

        return node


class _OfferingTape:
    """A tape whose pieces save what cannot be rebuilt."""

    def __init__(self, recompute: Recompute, tape: Tape) -> None:
        self._recompute, self._tape, self._offers = recompute, tape, _Offers()

    def layer(self, kind: str) -> None:
        self._tape.layer(kind)

    def compute(self, piece: Piece, *inputs: Tensor, node: str = "") -> Any:
        return self._tape.compute(partial(self._run, piece), *inputs, node=node)

    def _run(self, piece: Piece, *inputs: Tensor) -> Any:
        with self._recompute.taking(self._offers):
            return piece(*inputs)

    def communicate(self, trip: Trip, *inputs: Tensor, node: str = "") -> Steps[tuple[Tensor, ...]]:
        return self._tape.communicate(trip, *inputs, node=node)

    def loss(self, value: Tensor, factor: float) -> None:
        self._tape.loss(value, factor)
