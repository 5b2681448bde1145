"""Bytes of tensors that are alive, exactly: every storage that torch's operators make is followed to its end."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.torch_names import TorchDispatchMode, tree_leaves


class _Followed(NamedTuple):
    reference: StorageWeakRef
    num_bytes: int
    owner: Hashable


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class Storages(TorchDispatchMode):
    """While it is on, storages that operators make, forward or backward, belong to `owner` of that moment.

    What existed before (weights, gradient buffers) is not counted, nor are views of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner: Hashable = None
        self._followed: dict[int, _Followed] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {_storage(x).cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for y in tree_leaves(out):
            if isinstance(y, Tensor) and not y.is_meta and (reference := _storage(y)).cdata not in known:
                self._followed[reference.cdata] = _Followed(reference, y.untyped_storage().nbytes(), self.owner)
        return out

    def by_owner(self) -> dict[Hashable, int]:
        """Bytes alive now, of every owner that has any."""
        # The reference keeps the address of a freed storage from being used again.
        self._followed = {address: it for address, it in self._followed.items() if not it.reference.expired()}
        found: dict[Hashable, int] = {}
        for it in self._followed.values():
            found[it.owner] = found.get(it.owner, 0) + it.num_bytes
        return found

    def num_bytes(self, owner: Hashable = None) -> int:
        """Bytes alive now and made for `owner`."""
        return self.by_owner().get(owner, 0)
