"""`precision`: which module multiplies in what, and how each does it in FP8. Needs no torch.

Technical report, section 3.3.1: embedding, head, router, norms and the attention core keep their precision. The first
and the last three ask no engine for anything; attention's core is torch's. The projection of multi-token prediction and
the head do ask, and stay high unless told otherwise: the published weights have both in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PRECISIONS = ("fp64", "fp32", "bf16", "fp8")
FP8_ENGINES = ("auto", "reference", "transformer_engine")
BF16_PRODUCTS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Fp8:
    """How one kind of matrix is multiplied in FP8. The default is the report's for most.

    Attributes:
        round_input: the input's scales are powers of two.
        round_gradient: the gradient's are too, and its columns are made from its quantised rows, as they are where the
            rows have come from other ranks.
        keep: the format in which the input is kept for the backward pass: "e4m3" or "e5m6".
    """

    round_input: bool = False
    round_gradient: bool = False
    keep: str = "e4m3"


# By the keys of `precision.modules`, the modules that each chooses for, and how these multiply in FP8. Modules of one
# key share an input, an autograd node or rows that travel. Every module that multiplies through an engine is here.
_TABLE: dict[str, dict[str, Fp8]] = {
    "attention": dict.fromkeys(
        ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj"), Fp8()
    ),
    # Attention's backward needs its output too, more exactly than E4M3 has it (section 3.3.3).
    "o_proj": {"o_proj": Fp8(round_input=True, keep="e5m6")},
    "mlp": {"gate_up_proj": Fp8(), "down_proj": Fp8()},
    # What dispatch brings, and what the backward of combine brings, travels in FP8 (section 3.3.3).
    "experts": {"experts.gate_up_proj": Fp8(round_input=True), "experts.down_proj": Fp8(round_gradient=True)},
    "eh_proj": {"eh_proj": Fp8()},
    "lm_head": {"lm_head": Fp8()},
}
KEYS = tuple(_TABLE)
MODULE_KEYS = {module: key for key, modules in _TABLE.items() for module in modules}
"""The key that chooses for a module."""
FP8_MODULES = {module: fp8 for modules in _TABLE.values() for module, fp8 in modules.items()}
"""How a module multiplies where it does so in FP8."""


@dataclass(frozen=True)
class PrecisionConfig:
    """`precision`: which arithmetic multiplies.

    Attributes:
        name: `fp32`, `bf16`, `fp8` (products in FP8, all else as in bf16) or `fp64` (for proofs); set it as
            `precision=bf16`. fp8: docs/fp8.md.
        modules: fp8: what `attention`, `o_proj`, `mlp`, `experts`, `eh_proj` and `lm_head` multiply in, `fp8` or
            `bf16`; empty in other precisions.
        power_of_two_scales: fp8: all scales are powers of two, not only those of the report.
        engine: fp8: who multiplies. `reference`: any device; `transformer_engine`: a GPU of compute capability 9.0 or
            more with the extra `[cuda]`, matrices whose widths are multiples of 16; `auto`: the second where it can,
            else the first.
        bf16_products: how a CPU multiplies bfloat16 matrices: `bf16` by its own instructions, `fp32` widened and
            rounded once. Their sums differ in the last bits. `auto` takes the faster one, which is measured when a run
            begins and stands in its config.yaml from then on.
    """

    name: str = "fp32"
    modules: dict[str, str] = field(default_factory=dict)
    power_of_two_scales: bool = False
    engine: str = "auto"
    bf16_products: str = "auto"

    def check(self) -> None:
        """ValueError for an unknown precision, module or engine, for a table that is not whole, or for any of fp8's
        settings where there is no fp8."""
        if self.name not in PRECISIONS:
            raise ValueError(f"precision={self.name} is not one of {', '.join(PRECISIONS)}")
        if self.engine not in FP8_ENGINES:
            raise ValueError(f"precision.engine={self.engine} is not one of {', '.join(FP8_ENGINES)}")
        if self.bf16_products not in BF16_PRODUCTS:
            raise ValueError(f"precision.bf16_products={self.bf16_products} is not one of {', '.join(BF16_PRODUCTS)}")
        if self.name == "fp8":
            self._check_modules()
        elif self.power_of_two_scales:
            raise ValueError(f"precision.power_of_two_scales=true needs precision=fp8, not {self.name}")
        elif self.engine != "auto":
            raise ValueError(f"precision.engine={self.engine} needs precision=fp8, not {self.name}")
        elif self.modules:
            raise ValueError(f"precision.modules.{next(iter(self.modules))} needs precision=fp8, not {self.name}")

    def _check_modules(self) -> None:
        for key, arithmetic in self.modules.items():
            if key not in KEYS:
                raise ValueError(f"precision.modules.{key} is not one of {', '.join(KEYS)}")
            if arithmetic not in ("fp8", "bf16"):
                raise ValueError(f"precision.modules.{key}={arithmetic} is not one of fp8, bf16")
        for key in KEYS:
            if key not in self.modules:
                raise ValueError(f"precision.modules.{key} is missing: it must be fp8 or bf16")

    def is_fp8(self, module: str) -> bool:
        """Whether a module multiplies in FP8, by the name that MODULE_KEYS has; what is not there does not."""
        return self.modules.get(MODULE_KEYS.get(module, "")) == "fp8"

    def arithmetic(self) -> dict[str, object]:
        """What of it makes the numbers of a run; the engine is like the device: a run may go on with another."""
        fp8 = {"modules": self.modules, "power_of_two_scales": self.power_of_two_scales} if self.name == "fp8" else {}
        return {"precision": self.name, **fp8}
