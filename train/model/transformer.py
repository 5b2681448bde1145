"""The whole model, or the parts of it that one pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.model.block import DenseBlock, MoEBlock
from train.model.config import ModelConfig
from train.model.kernels import Kernels
from train.model.layers import Backend, Embedding, RMSNorm
from train.model.loss import LossTerms, cross_entropy_sum
from train.model.moe import Dispatch
from train.model.mtp import MTPModule
from train.model.rope import rotation_table
from train.model.router import Router, RouterStats
from train.precision.grads import Sink, run_now
from train.precision.linear import Engine


class Output(NamedTuple):
    """What a micro-batch leaves."""

    total: Tensor
    """The loss to differentiate, every term already times its factor; scalar."""
    sums: Tensor
    """Detached [main, mtp, balance]: cross-entropies in nats summed over tokens (and depths), balance losses summed
    over MoE layers and sequences."""
    load: Tensor
    """Tokens that selected each expert, int64 [num_routers, E]; zeros unless training with gradients."""


@dataclass(frozen=True)
class Parts:
    """Which parts of the model a process holds. Names do not change with the split."""

    embedding: bool
    layers: tuple[int, ...]
    head: bool
    mtp: bool

    @staticmethod
    def all(config: ModelConfig) -> Parts:
        return Parts(True, tuple(range(config.num_hidden_layers)), True, config.num_nextn_predict_layers > 0)


class Transformer(nn.Module):
    """DeepSeek-V3. Build it under `torch.device("meta")` and fill it with `init_weights`.

    `dispatch` says which experts live here. `parts` defaults to everything; multi-token prediction shares embedding
    and head, so a process that holds it needs both.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatch: Dispatch,
        engine: Engine,
        kernels: Kernels | None = None,
        sink: Sink = run_now,
        parts: Parts | None = None,
    ) -> None:
        super().__init__()
        config.check()
        parts = parts or Parts.all(config)
        self.config, self.parts = config, parts
        self.first_expert = dispatch.first_expert
        self.backend = backend = Backend(engine, kernels or Kernels(), sink)
        if parts.embedding or parts.mtp:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, backend)
        self.layers = nn.ModuleDict()
        for index in parts.layers:
            is_moe = index >= config.first_k_dense_replace
            self.layers[str(index)] = MoEBlock(config, dispatch, backend) if is_moe else DenseBlock(config, backend)
        if parts.head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        if parts.head or parts.mtp:
            self.lm_head = backend.linear(config.hidden_size, config.vocab_size)
        depths = range(config.num_nextn_predict_layers if parts.mtp else 0)
        self.mtp = nn.ModuleList(MTPModule(config, dispatch, backend) for _ in depths)

    def forward(self, tokens: Tensor, terms: LossTerms) -> Output:
        """tokens [B, S + 1]: position i reads token i and predicts token i + 1."""
        hidden, stats = self.run_layers(self.embed_tokens(tokens[:, :-1]))
        hidden = self.norm(hidden)
        main = self.predict(hidden, tokens[:, 1:])
        mtp, mtp_stats = self.predict_further(hidden, tokens)
        return self.output(main, mtp, {**stats, **mtp_stats}, terms)

    def run_layers(self, x: Tensor) -> tuple[Tensor, dict[int, RouterStats]]:
        """The layers held here: x [B, S, hidden] -> (the same shape, each router's report by its number)."""
        table = rotation_table(self.config, x.shape[1], x.device, x.dtype)
        reports = {}
        for index, layer in self.layers.items():
            x, stats = layer(x, table)
            if stats is not None:
                reports[int(index) - self.config.first_k_dense_replace] = stats
        return x, reports

    def predict(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the head in nats, summed: hidden [B, N, hidden] (normed), labels [B, N]."""
        return cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten(), self.backend)

    def predict_further(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, dict[int, RouterStats]]:
        """Multi-token prediction from the main model's normed state [B, S, hidden] and its tokens [B, S + 1].

        Depth k = 1..D joins the state of position i with token i + k and predicts token i + k + 1, which leaves S - k
        positions. Returns the cross-entropies summed over depths and positions, and the routers' reports.
        """
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        table = rotation_table(self.config, hidden.shape[1], hidden.device, hidden.dtype)
        reports = {}
        for k, module in enumerate(self.mtp, start=1):
            positions = hidden.shape[1] - 1
            embedding = self.embed_tokens(tokens[:, k:-1])
            hidden, reports[self.config.num_moe_layers + k - 1] = module(
                hidden[:, :positions], embedding, table[:positions]
            )
            total = total + self.predict(hidden, tokens[:, k + 1 :])
        return total, reports

    def output(self, main: Tensor, mtp: Tensor, reports: dict[int, RouterStats], terms: LossTerms) -> Output:
        """Join the loss terms and the routers' reports of a micro-batch."""
        balance = (
            torch.stack([stats.balance for stats in reports.values()]).sum() if reports else torch.zeros_like(main)
        )
        load = torch.zeros(self.config.num_routers, self.config.n_routed_experts, dtype=torch.int64, device=main.device)
        for number, stats in reports.items():
            load[number] = stats.load
        total = main * terms.main + mtp * terms.mtp + balance * terms.balance
        return Output(total, torch.stack((main, mtp, balance)).detach(), load)

    def routers(self) -> dict[int, Router]:
        """The routers held here by their number: main layers in order, then prediction depths."""
        blocks: dict[int, nn.Module] = {
            int(index) - self.config.first_k_dense_replace: layer for index, layer in self.layers.items()
        }
        for k, module in enumerate(self.mtp):
            blocks[self.config.num_moe_layers + k] = module.get_submodule("layer")
        return {number: block.mlp.gate for number, block in blocks.items() if isinstance(block, MoEBlock)}

    def is_expert(self, name: str) -> bool:
        """Whether the parameter of this name is stacked over routed experts."""
        return ".mlp.experts." in name

    def global_shape(self, name: str) -> torch.Size:
        """Shape of a parameter over all ranks: expert weights count all experts of the model."""
        shape = self.get_parameter(name).shape
        return torch.Size((self.config.n_routed_experts, *shape[1:])) if self.is_expert(name) else shape
