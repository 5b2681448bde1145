"""Elementwise kernels with their own backward: RMSNorm and SwiGLU. Those of attention are in `attention.kernels`.

Each is a pair of pure functions wrapped in an autograd Function. Sums and products inside are float32 for bfloat16
inputs and keep float32 and float64 as they are. They are written for few passes over memory; where the last pass may
overwrite its own temporary, it does. On GPUs the floor `kernels` has each in one pass; `Kernels` says whose are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model.attention.kernels import JoinHeads, RotateHeads, join_heads_backward, join_heads_forward, rotate_heads
from train.model.cross_entropy import CHUNK_SIZES, ChunkSize, cross_entropy_
from train.precision.grads import wide_dtype


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (x r weight, r [..., 1]) with r = 1 / sqrt(mean(x²) + eps)."""
    wide = x.to(wide_dtype(x.dtype))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, scale).mul_(weight).to(x.dtype), scale


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx [..., d], dweight [d]) from dy, the forward's inputs and its `scale` r. Added to dx is `beside`, the gradient
    of x as it goes on beside its norm."""
    width = x.shape[-1]
    dy, wide, weight = dy.to(scale.dtype), x.to(scale.dtype), weight.to(scale.dtype)
    product = (dy * wide).view(-1, width)
    mean = (product @ weight).view_as(scale).mul_(scale.pow(3)).div_(-width)
    dweight = scale.view(1, -1) @ product
    dx = torch.mul(dy, weight).mul_(scale).addcmul_(wide, mean)
    dx = dx.to(x.dtype)
    return dx if beside is None else dx.add_(beside), dweight.view(width)


def swiglu_forward(h: Tensor, row_weights: Tensor | None) -> Tensor:
    """h = [gate | up] [R, 2f] -> silu(gate) up [R, f], each row times its weight [R] if there are weights."""
    gate, up = h.to(wide_dtype(h.dtype)).chunk(2, -1)
    out = F.silu(gate).mul_(up)
    if row_weights is not None:
        out.mul_(row_weights.unsqueeze(-1))
    return out.to(h.dtype)


def swiglu_backward(da: Tensor, h: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(forward's output a, dh [R, 2f], d_row_weights [R] or None) from da [R, f]; a is recomputed, not stored."""
    gate, up = h.to(wide_dtype(h.dtype)).chunk(2, -1)
    da = da.to(gate.dtype)
    silu = F.silu(gate)
    a = silu * up
    d_row_weights = None
    if row_weights is not None:
        d_row_weights = torch.linalg.vecdot(da, a).to(row_weights.dtype)
        column = row_weights.unsqueeze(-1)
        a.mul_(column)
        da = da * column
    dh = torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, -1)
    torch.mul(silu, da, out=d_up)
    torch.ops.aten.silu_backward(da * up, gate, grad_input=d_gate)
    return a.to(h.dtype), dh, d_row_weights


def widening_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] b [k, n] in float32 or wider, whatever the type of the factors."""
    wide = wide_dtype(a.dtype)
    return torch.mm(a.to(wide), b.to(wide))


def _mm_widened_by_gpu(a: Tensor, b: Tensor) -> Tensor:
    """`widening_mm` where narrow factors have a kernel with a wide result, which rounds nothing either."""
    wide = wide_dtype(a.dtype)
    return torch.mm(a, b, out_dtype=wide) if a.dtype == b.dtype != wide else widening_mm(a, b)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        y, scale = kernels.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dx, dweight = ctx.kernels.rms_norm_backward(dy, x, weight, scale)
        return dx, dweight.to(weight.dtype), None, None


class _RMSNormBeside(torch.autograd.Function):
    """x as it goes on, and its norm: so that the gradients of both are added up where the norm's is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
        y, scale = kernels.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, dy: Tensor | None) -> Any:
        if dy is None:
            return beside, None, None, None
        x, weight, scale = ctx.saved_tensors
        dx, dweight = ctx.kernels.rms_norm_backward(dy, x, weight, scale, beside)
        return dx, dweight.to(weight.dtype), None, None


@dataclass(frozen=True)
class Kernels:
    """The element-wise kernels that a model runs; as written unless others are given, which compute the same."""

    rms_norm_forward: Callable[..., tuple[Tensor, Tensor]] = rms_norm_forward
    rms_norm_backward: Callable[..., tuple[Tensor, Tensor]] = rms_norm_backward
    swiglu_forward: Callable[..., Tensor] = swiglu_forward
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = swiglu_backward
    join_heads_forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = join_heads_forward
    join_heads_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = join_heads_backward
    rotate_heads_by: Callable[..., tuple[Tensor, Tensor]] = rotate_heads
    widening_mm: Callable[[Tensor, Tensor], Tensor] = widening_mm
    cross_entropy_: Callable[[Tensor, Tensor, float], Tensor] = cross_entropy_
    chunk_size: ChunkSize = CHUNK_SIZES["cpu"]
    """Tokens whose logits are made at a time."""
    routing: Any = None
    """`kernels.router`, whose kernels are all of a router but its products; None: a router is made of its parts."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Differentiable x [..., d] -> x / sqrt(mean(x²) + eps) * weight."""
        return _RMSNorm.apply(x, weight, eps, self)

    def rms_norm_beside(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Differentiable x [..., d] -> x itself, to be read further on, and its `rms_norm`."""
        return _RMSNormBeside.apply(x, weight, eps, self)

    def join_heads(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiable `join_heads_forward`."""
        return JoinHeads.apply(q, kv, k_rope, table, v_width, self)

    def rotate_heads(self, q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable q [B, S, H, d], k [B, S, G, d] with the halves of every head rotated by the table."""
        return RotateHeads.apply(q, k, table, self)


def eager_kernels(device: str = "cpu") -> Kernels:
    """Those as written."""
    return Kernels(chunk_size=CHUNK_SIZES[device])


def compiled_kernels(device: str = "cpu") -> Kernels:
    """Those as written, compiled by torch, which needs a C++ compiler on a CPU."""
    # Rows per expert change with every batch: one dynamic kernel instead of one for each count.
    wrap: Callable[[Any], Any] = partial(torch.compile, dynamic=True)
    return Kernels(
        wrap(rms_norm_forward),
        wrap(rms_norm_backward),
        wrap(swiglu_forward),
        wrap(swiglu_backward),
        chunk_size=CHUNK_SIZES[device],
    )


def triton_kernels(device: str = "cuda") -> Kernels:
    """Those of the floor `kernels`, loaded when they are asked for; without Triton they can only be traced."""
    from kernels import cross_entropy, rms_norm, rotary, router, swiglu

    return Kernels(
        rms_norm_forward=rms_norm.rms_norm_forward,
        rms_norm_backward=rms_norm.rms_norm_backward,
        swiglu_forward=swiglu.swiglu_forward,
        swiglu_backward=swiglu.swiglu_backward,
        join_heads_forward=rotary.join_heads,
        join_heads_backward=rotary.join_heads_backward,
        rotate_heads_by=rotary.rotate_heads,
        widening_mm=_mm_widened_by_gpu if device == "cuda" else widening_mm,
        cross_entropy_=cross_entropy.cross_entropy_,
        chunk_size=CHUNK_SIZES[device],
        routing=router,
    )


#: What `run.kernels` may say beside `auto`; each is told for which kind of device.
KERNELS: dict[str, Callable[[str], Kernels]] = {
    "eager": eager_kernels,
    "compiled": compiled_kernels,
    "triton": triton_kernels,
}


def choose_kernels(asked: str, device: torch.device | str) -> str:
    """Whose kernels a run with `run.kernels=asked` takes on this kind of device: a key of `KERNELS`.

    `auto` is Triton's on a GPU where it is installed, and else the kernels as written. ValueError for Triton's where
    they cannot run.
    """
    if asked == "auto" and torch.device(device).type != "cuda":
        return "eager"
    if asked not in ("auto", "triton"):
        return asked
    from kernels.door import missing

    reason = missing(device)
    if reason is not None and asked == "triton":
        raise ValueError(f"run.kernels=triton cannot be: {reason}; use run.kernels=auto")
    return "eager" if reason else "triton"
