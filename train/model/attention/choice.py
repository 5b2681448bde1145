"""The kernels of attention's core by name: what each can do, and which of them a run takes. Needs no torch.

A core takes queries, keys and values to what heads mix (`cores`). Which one computes it changes the last bits of
numbers, and memory and time a lot: a kernel that wants values as wide as keys is given them padded with zeros, and its
output, as wide, is kept for the backward pass beside the part of it that goes on. All of them take queries, keys and
values by their strides, of which the last one is 1: values that are a part of wider rows are handed over as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.model.attention.kinds import AttentionSizes

AUTO, TORCH = "auto", "torch"


@dataclass(frozen=True)
class Facts:
    """What one kernel can do.

    Attributes:
        needs_gpu: and weights of two bytes: such kernels have no other form.
        equal_widths: whether a head's values must be as wide as its keys.
        by_document: whether it takes rows of several documents by their lengths.
        repeats: whether its backward pass has a form whose bits do not depend on timing.
        widths_of: what a head's widths must be a multiple of.
        widest: the widest head; widest_repeating: in the form that repeats, where that is less.
    """

    needs_gpu: bool = True
    equal_widths: bool = False
    by_document: bool = True
    repeats: bool = True
    widths_of: int = 8
    widest: int = 256
    widest_repeating: int | None = None

    def value_width(self, qk_width: int, v_width: int) -> int:
        """How wide a head's values must be, of keys and values so wide."""
        return max(qk_width, v_width) if self.equal_widths else v_width


CORES: dict[str, Facts] = {
    # Of torch's fused kernels this one takes any two widths, and has no backward that repeats. With lengths torch calls
    # it in experimental forms alone.
    "cudnn": Facts(by_document=False, repeats=False),
    "flash_attention_3": Facts(widest_repeating=192),
    "flash_attention_2": Facts(equal_widths=True),
    "torch_flash": Facts(equal_widths=True),
    # What torch takes by itself, on any device and in any type. Of a CPU's kernels the fast one wants equal widths.
    TORCH: Facts(needs_gpu=False, equal_widths=True, widths_of=1, widest=1 << 30),
}
"""Kernels by name, in the order in which `auto` prefers them."""


@dataclass(frozen=True)
class Demand:
    """What a run wants of its attention.

    Attributes:
        qk_width, v_width: of a head.
        two_bytes: whether weights are of a type of two bytes.
        by_document: whether the documents of a row see nothing of each other.
        deterministic: whether bits must repeat.
    """

    qk_width: int
    v_width: int
    two_bytes: bool
    by_document: bool = False
    deterministic: bool = False

    @classmethod
    def of(cls, sizes: AttentionSizes, precision: str, by_document: bool, deterministic: bool) -> Demand:
        """The demand of a run with attention of these sizes. precision: as `precision.name` has it."""
        two_bytes = precision in ("bf16", "fp8")
        return cls(sizes.qk_head_dim, sizes.value_head_dim, two_bytes, by_document, deterministic)


def objection(name: str, demand: Demand) -> str | None:
    """Why a kernel cannot do what a run wants, wherever it runs, as the end of a sentence; None where it can."""
    core = CORES[name]
    if core.needs_gpu and not demand.two_bytes:
        return "it computes in bfloat16, as runs of precision bf16 and fp8 do"
    if demand.by_document and not core.by_document:
        return "it takes no documents of different lengths, as data.document_mask=true needs"
    if demand.deterministic and not core.repeats:
        return "its backward pass does not repeat its bits, as run.deterministic=true needs"
    widest = core.widest_repeating if demand.deterministic and core.widest_repeating else core.widest
    widths = demand.qk_width, demand.v_width
    if max(widths) > widest or any(width % core.widths_of for width in widths):
        return (
            f"its heads have widths up to {widest} that {core.widths_of} divides, and the model's are {widths[0]} and "
            f"{widths[1]} wide"
        )
    return None


def check(name: str, demand: Demand, device: str) -> None:
    """ValueError for a kernel that is unknown, or that cannot do what a run wants.

    device: as `run.device` has it, where that is known to be a CPU.
    """
    if name == AUTO:
        return
    if name not in CORES:
        raise ValueError(f"run.attention_kernel={name} is not one of {', '.join([AUTO, *CORES])}")
    reason = objection(name, demand)
    if reason is None and device == "cpu" and CORES[name].needs_gpu:
        reason = "it needs a GPU, and run.device=cpu"
    if reason is not None:
        raise ValueError(f"run.attention_kernel={name}: {reason}; use {AUTO}")


def choose(name: str, demand: Demand, missing: Callable[[str], str | None]) -> str:
    """The kernel that a run takes: the one asked for, or of `auto` the first one that can do it and is there.

    missing: why a kernel is not there, as the end of a sentence; None where it is.
    ValueError as `check` raises it, and for a kernel that is asked for and not there.
    """
    check(name, demand, AUTO)
    if name == AUTO:
        return next(each for each in CORES if objection(each, demand) is None and missing(each) is None)
    if (reason := missing(name)) is not None:
        raise ValueError(f"run.attention_kernel={name}: {reason}; use {AUTO}")
    return name
