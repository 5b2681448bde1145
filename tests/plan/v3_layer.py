"""One MoE layer of DeepSeek-V3 in FP8 as its trace has it, written out by hand: 4096 tokens, 32768 rows of experts."""

from __future__ import annotations

from launch.plan.events import Enter, Event, Kernel

TOKENS, ROWS = 4096, 32768
HIDDEN, EXPERT, EXPERTS, GROUPS = 7168, 2048, 256, 4
HEADS, QK, V = 128, 192, 128
FP8, BF16 = "float8_e4m3fn", "bfloat16"
WIDTH = {FP8: 1, BF16: 2}


def product(m: int, n: int, k: int, groups: int = 1, dtype: str = FP8, gradient: bool = False) -> Kernel:
    """A product as the trace of our own code writes it down; `gradient`: of a weight, added up in float32."""
    weights = 1 if gradient else groups
    read = WIDTH[dtype] * (m * k + weights * n * k)
    results = m * n * (groups if gradient else 1)
    if gradient:
        read += 4 * results
    return Kernel("mm", "product", dtype, (groups, m, n, k), 2 * m * n * k, read, (4 if gradient else 2) * results)


def attention(backward: bool) -> Kernel:
    widths = 3 * QK + 2 * V if backward else QK + V
    flops = TOKENS * TOKENS * HEADS * widths  # two a product, half of the square
    moved = 2 * TOKENS * HEADS * (2 * QK + 2 * V) * (2 if backward else 1)
    sizes = (1, HEADS, TOKENS, TOKENS, QK, V)
    return Kernel("attention", "attention", BF16, sizes, flops, moved // 2, moved // 2, backward)


def rest(num_bytes: int) -> Kernel:
    """Any of the passes over memory that our own code needs in between."""
    return Kernel("mul", "move", BF16, (), 0, num_bytes // 2, num_bytes // 2)


UP_PROJECTIONS = [product(TOKENS, HEADS * QK, 1536), product(TOKENS, HEADS * 2 * V, 512)]
LAYER: dict[str, tuple[Enter, list[Event]]] = {
    "attn(F)": (
        Enter("moe", "attention", "F"),
        [
            rest(2 * 2 * TOKENS * HIDDEN),
            product(TOKENS, 1536, HIDDEN),
            product(TOKENS, 576, HIDDEN),
            *UP_PROJECTIONS,
            attention(False),
            product(TOKENS, HIDDEN, HEADS * V),
            product(TOKENS, EXPERTS, HIDDEN, dtype=BF16),
        ],
    ),
    "mlp(F)": (
        Enter("moe", "experts", "F"),
        [
            product(TOKENS, 2 * EXPERT, HIDDEN),
            product(TOKENS, HIDDEN, EXPERT),
            rest(3 * 2 * ROWS * EXPERT),
            product(ROWS, 2 * EXPERT, HIDDEN, GROUPS),
            product(ROWS, HIDDEN, EXPERT, GROUPS),
        ],
    ),
    "mlp(B)": (
        Enter("moe", "experts", "B"),
        [
            product(TOKENS, EXPERT, HIDDEN),
            product(TOKENS, HIDDEN, 2 * EXPERT),
            product(ROWS, EXPERT, HIDDEN, GROUPS),
            product(ROWS, HIDDEN, 2 * EXPERT, GROUPS),
        ],
    ),
    "mlp(W)": (
        Enter("moe", "experts", "W"),
        [
            product(HIDDEN, EXPERT, TOKENS, gradient=True),
            product(2 * EXPERT, HIDDEN, TOKENS, gradient=True),
            product(HIDDEN, EXPERT, ROWS, GROUPS, gradient=True),
            product(2 * EXPERT, HIDDEN, ROWS, GROUPS, gradient=True),
        ],
    ),
    "attn(B)": (
        Enter("moe", "attention", "B"),
        [
            product(TOKENS, HIDDEN, EXPERTS, dtype=BF16),
            product(EXPERTS, HIDDEN, TOKENS, dtype=BF16, gradient=True),
            product(TOKENS, HEADS * V, HIDDEN),
            *UP_PROJECTIONS,
            attention(True),
            product(TOKENS, 1536, HEADS * QK),
            product(TOKENS, 512, HEADS * 2 * V),
            product(TOKENS, HIDDEN, 576),
            product(TOKENS, HIDDEN, 1536),
        ],
    ),
    "attn(W)": (
        Enter("moe", "attention", "W"),
        [
            product(HIDDEN, HEADS * V, TOKENS, gradient=True),
            product(HEADS * QK, 1536, TOKENS, gradient=True),
            product(HEADS * 2 * V, 512, TOKENS, gradient=True),
            product(576, HIDDEN, TOKENS, gradient=True),
            product(1536, HIDDEN, TOKENS, gradient=True),
        ],
    ),
}
# docs/planner.md, "DeepSeek's trace": milliseconds of each part, in the mean over four layers.
TRACED_MS = {"attn(F)": 4.60, "mlp(F)": 4.64, "mlp(B)": 5.36, "mlp(W)": 5.07, "attn(B)": 9.54, "attn(W)": 2.40}
