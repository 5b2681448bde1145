"""Tokens to their experts over an emulated cluster: two hops against flat, and our exchange against the library's.

    python -m benchmarks.dispatch [nodes=4 per_node=2 rate=200mbit tokens=512 hidden=1024 rounds=9]

Needs what `python -m benchmarks.emulate check` asks for (Linux, root, iproute2). Prints one table per emulated cluster:

dispatch  8 of 32 experts per token, limited to 2 nodes by routing groups, bf16 rows, fp32 weights. `two_hop` and `flat`
          are ours; `flat, library` is the same flat dispatch over `all_to_all_single`, which is what an all-to-all
          after a sort by expert sends elsewhere. A side's time is that of the slowest rank for dispatch and combine.
          "wire" is what the kernel counted on the nodes' links, "counted" what the dispatch says it sent.
duplex    4 MB from each node to each other one, one rank per node, on 2 nodes and on `nodes`: `exchange`, which posts
          receives first, against `all_to_all_single`. "link" is the share of the link's rate that the payload reached.

Times are ratios inside one run: keep the machine quiet, and the rate low enough that the wire is the limit.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._ranks import as_words, read_settings, slowest, total
from benchmarks._sides import Neighbours, median_ms, speedup, take_turns
from benchmarks.emulate import LINK, Lab, able, bits_per_s
from parallel import process
from parallel.collectives import Handle, drive, exchange
from parallel.expert.dispatch import Dispatch, Hop
from parallel.expert.flat import FlatDispatch
from parallel.expert.two_hop import TwoHopDispatch
from parallel.mesh import ParallelConfig
from parallel.process import Groups

NUM_EXPERTS, NUM_CHOSEN, NODES_KEPT = 32, 8, 2
DUPLEX_FLOATS = 1_000_000  # 4 MB to each other node


class LibraryFlatDispatch(FlatDispatch):
    """Flat dispatch whose rows travel by the library's collective."""

    def _transfer(self, hop: Hop, payload: Tensor, send_counts: list[int], recv_counts: list[int]) -> Handle:
        received = payload.new_empty((sum(recv_counts), *payload.shape[1:]))
        work = dist.all_to_all_single(
            received, payload.contiguous(), recv_counts, send_counts, group=hop.group, async_op=True
        )
        return Handle([work], (payload, received), lambda: received)


def route(num_tokens: int, num_nodes: int, rank: int) -> Tensor:
    """Group-limited choice by random scores: the 2 nodes whose two best experts sum highest, then the best 8."""
    scores = torch.rand(num_tokens, num_nodes, NUM_EXPERTS // num_nodes, generator=torch.Generator().manual_seed(rank))
    kept = scores.topk(2, -1)[0].sum(-1).topk(min(NODES_KEPT, num_nodes), -1)[1]
    outside = torch.ones(num_tokens, num_nodes, dtype=torch.bool).scatter_(1, kept, False)
    return scores.masked_fill(outside.unsqueeze(-1), -1).flatten(1).topk(NUM_CHOSEN, -1)[1]


def sent_on_link() -> int:
    """Bytes this rank's node has sent to other nodes, by the kernel's counter; only one rank of a node reads it."""
    if os.environ["LOCAL_RANK"] != "0":
        return 0
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def there_and_back(dispatch: Dispatch, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    rows, _, plan = drive(dispatch.dispatch(x, weights, indices))
    return drive(dispatch.combine(rows, plan))


def wire_bytes(side: Callable[[], object]) -> float:
    """What one run of a side puts on all nodes' links."""
    dist.barrier()
    before = sent_on_link()
    dist.barrier()
    side()
    dist.barrier()
    return total(sent_on_link() - before)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        nodes: machines of the emulated cluster.
        per_node: ranks of a machine.
        rate: of each machine's link, as `tc` writes it.
        tokens: of each rank.
        hidden: width of a token.
        rounds: how often each side runs, in turns.
    """

    nodes: int = 4
    per_node: int = 2
    rate: str = "200mbit"
    tokens: int = 512
    hidden: int = 1024
    rounds: int = 9


def compare_dispatch(groups: Groups, settings: Settings) -> None:
    config, num_tokens = groups.mesh.config, settings.tokens
    indices = route(num_tokens, config.nodes, groups.mesh.rank)
    x = torch.randn(num_tokens, settings.hidden).to(torch.bfloat16)
    weights = torch.rand(num_tokens, NUM_CHOSEN)
    ways: dict[str, Dispatch] = {
        "two_hop": TwoHopDispatch(NUM_EXPERTS, groups),
        "flat": FlatDispatch(NUM_EXPERTS, groups),
        "flat, library": LibraryFlatDispatch(NUM_EXPERTS, groups),
    }
    sides = {
        name: (lambda dispatch: lambda: there_and_back(dispatch, x, weights, indices))(way)
        for name, way in ways.items()
    }
    seconds = take_turns(sides, settings.rounds, clock=slowest)
    counted = {}
    for name, way in ways.items():
        way.take_internode_bytes()
        sides[name]()
        counted[name] = total(way.take_internode_bytes())
    counted["flat, library"] = counted["flat"]  # the same rows and weights
    wire = {name: statistics.median(wire_bytes(sides[name]) for _ in range(3)) for name in ways}
    if groups.mesh.rank:
        return
    print(
        f"{'dispatch + combine':20s} {'ms':>7s} {'against flat':>22s} {'MB wire':>9s} {'MB counted':>11s} {'link':>6s}"
    )
    for name, taken in seconds.items():
        share = wire[name] * 8 / config.nodes / statistics.median(taken) / bits_per_s(os.environ["EMULATED_RATE"])
        print(
            f"{name:20s} {median_ms(taken):7.0f} {speedup(seconds, name, 'flat')!s:>22s} {wire[name] / 1e6:9.2f} "
            f"{counted[name] / 1e6:11.2f} {share:6.0%}   wire / counted {wire[name] / counted[name]:.4f}"
        )
    print(f"two_hop against flat over the library's transport: {speedup(seconds, 'two_hop', 'flat, library')}")


def compare_duplex(groups: Groups, settings: Settings) -> None:
    size = groups.mesh.world_size
    send, received = torch.rand(size, DUPLEX_FLOATS), torch.empty(size, DUPLEX_FLOATS)
    ones = [1] * size
    sides: dict[str, Callable[[], object]] = {
        "exchange": lambda: exchange(send, ones, ones, groups.ep).wait(),
        "all_to_all_single": lambda: dist.all_to_all_single(received, send, group=groups.ep),
    }
    seconds = take_turns(sides, settings.rounds, clock=slowest)
    if groups.mesh.rank:
        return
    least = DUPLEX_FLOATS * 4 * (size - 1) * 8 / bits_per_s(os.environ["EMULATED_RATE"])
    print(f"{'duplex, ' + str(size) + ' nodes':20s} {'ms':>7s} {'against library':>22s} {'link':>6s}")
    for name, taken in seconds.items():
        against = speedup(seconds, name, "all_to_all_single")
        print(f"{name:20s} {median_ms(taken):7.0f} {against!s:>22s} {least / statistics.median(taken):6.0%}")


def on_a_rank(part: str, settings: Settings) -> None:
    torch.set_num_threads(1)
    nodes, per_node = settings.nodes, settings.per_node if part == "dispatch" else 1
    size = nodes * per_node
    groups = process.start(ParallelConfig(dp=size, ep=size, nodes=nodes, dispatch="two_hop"))
    {"dispatch": compare_dispatch, "duplex": compare_duplex}[part](groups, settings)
    process.stop(groups)


def main(arguments: list[str]) -> int:
    part, settings = read_settings(Settings, arguments, "benchmarks.dispatch")
    if part:
        on_a_rank(part, settings)
        return 0
    if reason := able():
        raise SystemExit(f"this machine cannot emulate a cluster: {reason}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # names of hosts do not resolve in a namespace; never mind
    print("settings: " + " ".join(as_words(settings)), flush=True)
    for part, nodes in (("dispatch", settings.nodes), ("duplex", 2), ("duplex", settings.nodes)):
        given = as_words(replace(settings, nodes=nodes))
        per_node = settings.per_node if part == "dispatch" else 1
        with Lab(nodes, settings.rate) as lab, Neighbours() as neighbours:
            result = lab.run([sys.executable, "-m", "benchmarks.dispatch", part, *given], per_node)
        print(result.outputs[0].strip() if result.ok else "\n".join(result.outputs))
        print(f"({neighbours}; {settings.rounds} rounds in turns)", flush=True)
        if not result.ok:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
