"""Random checkpoints for the tests: global tensors, and random ways to spread them over ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.everyone import Everyone
from parallel.shards import Piece
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.saver import Checkpoints
from train.checkpoint.state import TrainState, capture_rng

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAMES = (
    "master.layers.{}.mlp.experts.gate_up_proj",
    "exp_avg.lm_head.weight.{}",
    "exp_avg_sq.mtp.{}.eh_proj.weight",
    "{}",
)
CANARY = -7.0


def truth(seed: int) -> dict[str, Tensor]:
    """Global tensors of random names, sizes (1 to 400) and dtypes; every bit pattern of the mantissa may occur."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    names = [draw.choice(NAMES).format(index) for index in range(draw.randint(1, 9))]
    return {
        name: torch.randn(draw.choice((1, 2, draw.randint(1, 400))), generator=generator, dtype=torch.float64).to(
            draw.choice(DTYPES)
        )
        for name in names
    }


def cuts(draw: random.Random, numel: int) -> list[tuple[int, int]]:
    """The range [0, numel) in random consecutive parts: (first, end)."""
    inner = sorted(draw.sample(range(1, numel), draw.randint(0, min(6, numel - 1))))
    return list(zip([0, *inner], [*inner, numel], strict=True))


def spread(tensors: dict[str, Tensor], seed: int, rank: int, world_size: int) -> dict[str, list[Piece]]:
    """Pieces of one rank: each part lies on one random rank or, sometimes, on several. Some ranks may get nothing."""
    draw = random.Random(seed)
    found: dict[str, list[Piece]] = {}
    for name, tensor in tensors.items():
        for first, end in cuts(draw, tensor.numel()):
            holders = draw.sample(range(world_size), draw.choice((1, 1, 1, draw.randint(1, world_size))))
            if rank in holders:
                found.setdefault(name, []).append(Piece(first, tensor[first:end].clone()))
    return found


def empty_pieces(tensors: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], dict[str, list[Piece]]]:
    """Buffers full of canaries, and random ranges (overlapping other ranks', not each other) as views into them."""
    draw = random.Random(seed)
    buffers = {name: torch.full_like(tensor, CANARY) for name, tensor in tensors.items()}
    pieces = {
        name: [Piece(first, buffer[first:end]) for first, end in cuts(draw, buffer.numel()) if draw.random() < 0.7]
        for name, buffer in buffers.items()
        if draw.random() < 0.9
    }
    return buffers, pieces


def check_filled(tensors: dict[str, Tensor], buffers: dict[str, Tensor], pieces: dict[str, list[Piece]]) -> None:
    """Every piece holds the global tensor's bits, everything around it still holds canaries."""
    for name, tensor in tensors.items():
        expected = torch.full_like(tensor, CANARY)
        for piece in pieces.get(name, []):
            part = slice(piece.offset, piece.offset + piece.tensor.numel())
            expected[part] = tensor[part]
        assert torch.equal(buffers[name], expected), name


def sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in tensors.items()}


def state(step: int, model: str = "m", tokens: int = 0) -> TrainState:
    prints = {"model": model, "data": "d", "recipe": "r"}
    return TrainState(step, tokens, step, step, capture_rng(), None, prints, f"train:\n  seed: {step}\n")


def open_checkpoints(root: Path, **keys: Any) -> Checkpoints:
    ranks = Everyone.of(dist.new_group(backend="gloo")) if dist.is_initialized() else None
    return Checkpoints(root, CheckpointConfig(**keys), ranks)


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save_case(checkpoints: Checkpoints, case: int, step: int) -> None:
    tensors = truth(case)
    checkpoints.save(state(step), spread(tensors, case, *rank_and_size()), sizes(tensors))


def load_case(checkpoints: Checkpoints, path: Path, case: int, seed: int = 0) -> None:
    tensors = truth(case)
    buffers, pieces = empty_pieces(tensors, 1000 * case + 10 * seed + rank_and_size()[0])
    checkpoints.load(path, pieces, sizes(tensors))
    check_filled(tensors, buffers, pieces)
