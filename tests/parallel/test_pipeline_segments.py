"""A forward written once gives the same gradients in one autograd graph and in pieces that stop at communications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.collectives import drive
from parallel.pipeline.overlap import HOST_AHEAD, HOST_COMPUTES, interleave
from parallel.pipeline.segments import Segments
from tests.train.model_cases import build, random_config, random_tokens
from train.model.loss import LossTerms

TERMS = LossTerms(main=0.1, mtp=0.03, balance=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_give_the_gradients_of_the_whole_also_in_turns(seed: int) -> None:
    config = random_config(seed, num_nextn_predict_layers=seed % 3)
    whole, split = build(config), build(config)
    first, second = random_tokens(config, 2, 9, seed), random_tokens(config, 2, 9, seed + 1)
    expected = [whole(tokens, TERMS) for tokens in (first, second)]
    for output in expected:
        output.total.backward()
    one, two = Segments(), Segments()
    _, findings = drive(split.steps(first, None, TERMS, one))
    # The backward of one micro-batch and the forward of another.
    overlap = (HOST_AHEAD, HOST_COMPUTES)[seed % 2]
    _, (_, later) = interleave(overlap, one.backward(None), split.steps(second, None, TERMS, two))
    drive(two.backward(None))
    torch.testing.assert_close(findings.metrics, expected[0].metrics)
    torch.testing.assert_close(later.metrics, expected[1].metrics)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(split.get_parameter(name).main_grad, parameter.main_grad, msg=name)


def test_only_what_autograd_saved_is_held() -> None:
    """Not the inputs and outputs of pieces; and nothing once the backward is done, whoever still holds the graph."""
    held: dict[str, StorageWeakRef] = {}
    graph: list[Tensor] = []

    def followed(name: str, tensor: Tensor) -> Tensor:
        held[name] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def alive() -> set[str]:
        return {name for name, reference in held.items() if not reference.expired()}

    def last(doubled: Tensor, exponent: Tensor) -> Tensor:
        graph.append(doubled)
        return followed("sum", doubled + exponent)

    record = Segments()
    x = record.enter(followed("x", torch.randn(3)))
    expected = 2 + x.exp()
    doubled = record.compute(lambda x: followed("doubled", x * 2), x)
    exponent = record.compute(lambda x: followed("exponent", x.exp()), x)
    record.leave(record.compute(last, doubled, exponent))
    graph[0] = graph[0].view(1, 3)[:, :0]
    del x, doubled, exponent
    assert alive() == {"exponent", "doubled"}
    graph[0] = graph[0].sum()
    assert alive() == {"exponent"}
    dy = followed("dy", torch.ones(3))
    dx = drive(record.backward(dy))
    assert dx is not None
    torch.testing.assert_close(dx, expected)
    del dx, dy
    assert alive() == set()
