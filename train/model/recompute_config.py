"""`recompute`: what the backward pass computes again, as it is set. Needs no torch: `recompute.py` does it."""

from __future__ import annotations

from dataclasses import dataclass, field

# Parts of a layer that can keep only their inputs.
NODES = ("attention", "experts", "dense")


@dataclass(frozen=True)
class RecomputeConfig:
    """`recompute`: what the backward pass computes again instead of keeping it.

    SwiGLU's activation always is computed again: its backward needs it anyway.

    Attributes:
        norm: rebuild the outputs of all RMSNorms in the backward pass instead of keeping them. With this or one of
            the next two, codes in FP8 of an input that is rebuilt, or kept by others, are made again as well.
        mla_up_proj: rebuild queries, keys and values of all heads from the latents; needs `model.attention=mla`.
            Queries are rebuilt from the hidden state where `model.q_lora_rank` is None.
        experts_up_proj: SwiGLU's input in routed experts, by their first product of the rows that are kept. Needs a
            model with experts, and `recompute.nodes` without `experts`.
        nodes: whole nodes that keep only their inputs and run again in the backward pass: `attention`, `experts`,
            `dense`. The first two are of MoE layers, attention with norms and router, experts routed and shared; the
            third is a dense layer. Each is refused where the model has none. They come before the three choices above.
    """

    norm: bool = False
    mla_up_proj: bool = False
    experts_up_proj: bool = False
    nodes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """ValueError for a node that no layer has, and for a part of one that is run again as a whole."""
        for name in self.nodes:
            if name not in NODES:
                raise ValueError(f"recompute.nodes has {name!r}, which is not one of {', '.join(NODES)}")
        if self.experts_up_proj and "experts" in self.nodes:
            raise ValueError(
                f"recompute.experts_up_proj=true has nothing to rebuild: recompute.nodes={self.nodes} runs experts "
                "again as a whole"
            )
