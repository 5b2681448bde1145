"""Which way of multiplying bfloat16 matrices is the faster one on this CPU.

What a CPU says of its instructions does not tell: some that have bfloat16 products multiply float32 faster.
"""

from __future__ import annotations

import time

import torch

from train.precision.engine import Products
from train.precision.torch_engine import TorchEngine, WideningEngine

# By the words of `precision.bf16_products`.
WAYS: dict[str, Products] = {"bf16": TorchEngine(generates_kernels=True), "fp32": WideningEngine()}
# Rows, inputs and outputs of the product that is timed: some 100 MFLOP, a millisecond or a few.
_SHAPE = 256, 512, 512
_ROUNDS = 7


def faster_bf16_products() -> str:
    """Which is quicker, "bf16" or "fp32": one of of torch's own product and one that is widened and rounded.

    Each takes turns with the other, and its quickest turn counts, so that what else the machine does matters little.
    """
    rows, inputs, outputs = _SHAPE
    x, weight = torch.ones(rows, inputs, dtype=torch.bfloat16), torch.ones(outputs, inputs, dtype=torch.bfloat16)
    quickest_s = dict.fromkeys(WAYS, float("inf"))
    for _ in range(_ROUNDS):
        for name, products in WAYS.items():
            began_s = time.perf_counter()
            products.fprop(x, weight)
            quickest_s[name] = min(quickest_s[name], time.perf_counter() - began_s)
    return min(quickest_s, key=lambda name: quickest_s[name])
