"""The whole model, or the parts of it that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.attention.rope import rotation_table
from train.model.block import DenseBlock, MoEBlock
from train.model.config import ModelConfig
from train.model.kernels import Kernels
from train.model.layers import Backend, Embedding, RMSNorm
from train.model.loss import NO_LOSS, LossTerms, cross_entropy_sum
from train.model.moe import Dispatch
from train.model.mtp import MTPModule
from train.model.packing import OneText, Packing, Places
from train.model.parts import Parts
from train.model.recompute import Recompute
from train.model.router import Router, RouterStats
from train.model.tape import Inline, Steps, Tape, drive
from train.precision.engine import Engine
from train.precision.grads import Sink, run_now


class Findings(NamedTuple):
    """What a micro-batch leaves besides its gradient."""

    metrics: dict[str, Tensor]
    """Metric -> detached float64 scalar: cross-entropies in nats summed over tokens (and depths), and what routers
    measure, summed over MoE layers and sequences. What the parts held here do not measure is absent."""
    load: Tensor
    """Tokens that selected each expert, int64 [num_routers, E]; zeros unless training with gradients."""

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Take in scalars; those of layers and depths that measure the same metric are summed."""
        for name, value in measured.items():
            known = self.metrics.get(name)
            # A sum with a float64 widens by itself, in one kernel.
            self.metrics[name] = value.detach().double() if known is None else known + value.detach()


class Output(NamedTuple):
    """Findings, and the loss to differentiate: every term already times its factor (a scalar)."""

    total: Tensor
    metrics: dict[str, Tensor]
    load: Tensor


class Transformer(nn.Module):
    """A model of DeepSeek's. Build it under `torch.device("meta")` and fill it with `init_weights`.

    `dispatch` says which experts live here, `engines` who multiplies for each module (`precision.build`). `parts`
    defaults to everything; multi-token prediction shares embedding and head, so a process that holds it needs both.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatch: Dispatch,
        engines: Mapping[str, Engine],
        kernels: Kernels | None = None,
        sink: Sink = run_now,
        parts: Parts | None = None,
        recompute: Recompute | None = None,
        packing: Packing | None = None,
    ) -> None:
        super().__init__()
        config.check()
        parts = parts or Parts.all(config)
        self.config, self.parts, self.packing = config, parts, packing or OneText()
        self.first_expert = dispatch.first_expert
        core = self.packing.core
        self.backend = backend = Backend(engines, kernels or Kernels(), sink, recompute or Recompute(), core)
        if parts.embedding or parts.mtp:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, backend)
        self.layers = nn.ModuleDict()
        for index in parts.layers:
            is_moe = index >= config.first_k_dense_replace
            self.layers[str(index)] = MoEBlock(config, dispatch, backend) if is_moe else DenseBlock(config, backend)
        if parts.head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        if parts.head or parts.mtp:
            self.lm_head = backend.linear("lm_head", config.hidden_size, config.vocab_size)
        depths = range(config.num_nextn_predict_layers if parts.mtp else 0)
        self.mtp = nn.ModuleList(MTPModule(config, dispatch, backend) for _ in depths)

    def forward(self, tokens: Tensor, terms: LossTerms) -> Output:
        """tokens [B, S + 1]: position i reads token i and predicts token i + 1. One autograd graph."""
        tape = Inline()
        _, findings = drive(self.steps(tokens, None, terms, tape))
        return Output(torch.as_tensor(tape.total), findings.metrics, findings.load)

    def steps(
        self, tokens: Tensor | None, x: Tensor | None, terms: LossTerms, tape: Tape
    ) -> Steps[tuple[Tensor | None, Findings]]:
        """One micro-batch through the parts held here.

        tokens [B, S + 1], needed where `reads_tokens`; x [B, S, hidden], what the part before sends, None where the
        embedding is. Returns what the next part needs, None where the head is, and the findings of this part.
        """
        tape = self.backend.recompute.on(tape)
        if self.parts.embedding:
            assert tokens is not None
            tape.layer("embedding")
            x = tape.compute(partial(self.embed_tokens, tokens[:, :-1]), node="embedding")
        assert x is not None
        tape.layer("stage")
        findings = self.empty_findings(x.device)
        places = self.places(x, tokens)
        x = yield from self.run_layers(x, terms, tape, findings, places)
        if not self.parts.head:
            return x, findings
        assert tokens is not None
        tape.layer("head")
        x = tape.compute(self.norm, x, node="norm")
        predict = partial(self.predict, labels=self.packing.labels(tokens, 0), factor=terms.main)
        main = tape.compute(predict, x, node="loss")
        tape.loss(main, terms.main)
        findings.add({"train/loss": main})
        yield from self.predict_further(x, tokens, terms, tape, findings, places)
        return None, findings

    def read(self, tokens: Tensor | None, x: Tensor | None) -> Steps[Tensor]:
        """Texts through the parts of the main model held here, without a loss: the states of every position.

        tokens [B, S], needed where `reads_tokens`; x [B, S, hidden], what the part before sends, None where the
        embedding is. Returns what the next part needs; where the head is, the normed states that it reads.
        """
        tape = self.backend.recompute.on(Inline())
        if self.parts.embedding:
            assert tokens is not None
            x = self.embed_tokens(tokens)
        assert x is not None
        # Rows are stored with one token more, which only labels read.
        rows = None if tokens is None else F.pad(tokens, (0, 1))
        x = yield from self.run_layers(x, NO_LOSS, tape, self.empty_findings(x.device), self.places(x, rows))
        return self.norm(x) if self.parts.head else x

    def empty_findings(self, device: torch.device) -> Findings:
        """Findings to add to."""
        load = torch.zeros(self.config.num_routers, self.config.n_routed_experts, dtype=torch.int64, device=device)
        return Findings({}, load)

    def run_layers(
        self, x: Tensor, terms: LossTerms, tape: Tape, findings: Findings, places: Places | None = None
    ) -> Steps[Tensor]:
        """The layers held here: x [B, S, hidden] -> the same shape. places: of rows; None where they are one text."""
        places = places or self.places(x, None)
        for index, layer in self._blocks():
            tape.layer(layer.kind)
            x, stats = yield from layer.steps(x, places, tape)
            self._account(index - self.config.first_k_dense_replace, stats, terms, tape, findings)
        return x

    def places(self, x: Tensor, tokens: Tensor | None) -> Places:
        """Where the positions of x [B, S, hidden] stand; tokens [B, S + 1] where `reads_tokens`."""
        table = rotation_table(self.config, x.shape[1], x.device, x.dtype)
        return self.packing.places(table, tokens, x.dtype)

    def _account(
        self, number: int, stats: RouterStats | None, terms: LossTerms, tape: Tape, findings: Findings
    ) -> None:
        if stats is None:  # a dense layer
            return
        tape.loss(stats.expert_balance, terms.balance)
        tape.loss(stats.device_balance, terms.device_balance)
        tape.loss(stats.comm_balance, terms.comm_balance)
        findings.add(stats.metrics())
        findings.load[number] += stats.load

    def predict(self, hidden: Tensor, labels: Tensor, factor: float) -> Tensor:
        """Cross-entropy of the head in nats, summed: hidden [B, N, hidden] (normed), labels [B, N].

        factor: of this sum in the loss (see `cross_entropy_sum`).
        """
        return cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten(), factor, self.backend)

    def predict_further(
        self,
        hidden: Tensor,
        tokens: Tensor,
        terms: LossTerms,
        tape: Tape,
        findings: Findings,
        places: Places | None = None,
    ) -> Steps[None]:
        """Multi-token prediction from the main model's normed state [B, S, hidden] and its tokens [B, S + 1].

        Depth k = 1..D joins the state of position i with token i + k and predicts token i + k + 1, which leaves S - k
        positions. places: those of the rows, where they have been made.
        """
        places = places or self.places(hidden, tokens)
        for k, module in enumerate(self._depths(), start=1):
            tape.layer("mtp")
            joined = tape.compute(partial(self._join, module, tokens[:, k:-1]), hidden, node="join")
            x, stats = yield from module.layer.steps(joined, self.packing.first(places, joined.shape[1]), tape)
            self._account(self.config.num_moe_layers + k - 1, stats, terms, tape, findings)
            hidden = tape.compute(module.norm, x, node="norm")
            predict = partial(self.predict, labels=self.packing.labels(tokens, k), factor=terms.mtp)
            loss = tape.compute(predict, hidden, node="loss")
            tape.loss(loss, terms.mtp)
            findings.add({"train/mtp_loss": loss})

    def _join(self, module: MTPModule, tokens: Tensor, hidden: Tensor) -> Tensor:
        return module.join(hidden[:, : tokens.shape[1]], self.embed_tokens(tokens))

    @property
    def reads_tokens(self) -> bool:
        """Whether the parts held here need a micro-batch's tokens."""
        return self.parts.embedding or self.parts.head or self.packing.reads_tokens

    def _blocks(self) -> list[tuple[int, DenseBlock | MoEBlock]]:
        return [(int(index), cast(DenseBlock | MoEBlock, layer)) for index, layer in self.layers.items()]

    def _depths(self) -> list[MTPModule]:
        return [cast(MTPModule, module) for module in self.mtp]

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

    def matrix_shape(self, name: str) -> tuple[int, int] | None:
        """(rows, columns) of the matrices that this parameter is a stack of, one after the other; None for a vector.

        What is one matrix is a linear map of one input: each expert has its own, and gate and up are two.
        """
        shape = self.get_parameter(name).shape
        if len(shape) < 2:
            return None
        rows, columns = shape[-2:]
        return (rows // 2 if "gate_up_proj" in name else rows), columns

    def global_shape(self, name: str) -> torch.Size:
        """Shape of a parameter over all ranks: expert weights count all experts of the model."""
        shape = self.get_parameter(name).shape
        return torch.Size((self.config.n_routed_experts, *shape[1:])) if self.is_expert(name) else shape
