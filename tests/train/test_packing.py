"""A row whose documents are apart is its documents, each run alone: losses, gradients, and under recompute."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.train.model_cases import TINY, added, build, random_config, same_bits
from train.model.attention.cores import Core, HostCore, TorchCore
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.packing import ByDocument
from train.model.recompute import Recompute
from train.model.recompute_config import NODES, RecomputeConfig
from train.model.transformer import Output, Transformer

END = 5
CORES: list[Core] = [HostCore(), TorchCore()]
# The balance loss is of whole rows, and so of no document alone.
TERMS = LossTerms(main=0.1, mtp=0.03, balance=0.0)


def documents(config: ModelConfig, lengths: list[int], seed: int) -> list[Tensor]:
    """Random documents of these lengths, each ended by END."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        body = torch.randint(config.vocab_size - 1, (length - 1,), generator=draw)
        found.append(torch.cat([body + (body >= END), torch.tensor([END])]))
    return found


LOSSES = ("train/loss", "train/mtp_loss")


def alone(config: ModelConfig, parts: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each document as a row of its own: sums of the cross-entropies, and of the gradients, both by name."""
    sums: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for part in parts:
        depth = min(config.num_nextn_predict_layers, len(part) - 2)
        if depth < 0:
            continue  # one token predicts nothing
        model = build(replace(config, num_nextn_predict_layers=depth))
        whole = build(config).state_dict()
        model.load_state_dict({name: whole[name] for name in model.state_dict()})
        output = model(part.unsqueeze(0), TERMS)
        output.total.backward()
        sums = added(sums, {name: output.metrics[name] for name in LOSSES if name in output.metrics})
        for name, param in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + param.main_grad
    return sums, gradients


def packed(model: Transformer, rows: Tensor) -> tuple[Output, dict[str, Tensor]]:
    output = model(rows, TERMS)
    output.total.backward()
    return output, {name: param.main_grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("core", CORES, ids=["one by one", "masked"])
@pytest.mark.parametrize("seed", range(4))
def test_a_packed_row_is_its_documents_each_run_alone(seed: int, core: Core) -> None:
    config = random_config(seed, num_nextn_predict_layers=seed % 4)
    draw = torch.Generator().manual_seed(seed)
    rows, parts = [], []
    for row in range(2):
        lengths = torch.randint(1, 9, (40,), generator=draw).tolist()
        cut = torch.cat(documents(config, lengths, 10 * seed + row))[:19]  # the last document is cut short
        rows.append(cut)
        borders = (cut == END).nonzero().flatten() + 1
        parts += [part for part in cut.tensor_split(borders) if len(part)]
    expected_sums, expected = alone(config, parts)
    output, found = packed(build(config, packing=ByDocument(END, core)), torch.stack(rows))
    # Sums over other lengths of rows: fp64 rounding.
    for name in LOSSES:
        nothing = torch.zeros((), dtype=torch.float64)
        expected_sum, sum_ = expected_sums.get(name, nothing), output.metrics.get(name, nothing)
        torch.testing.assert_close(sum_, expected_sum, rtol=1e-10, atol=1e-10)
    for name, gradient in found.items():
        # A parameter of a depth that no document reaches alone has no gradient in the row either.
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_logits_of_a_packed_row_are_those_of_its_documents() -> None:
    config = replace(TINY, num_nextn_predict_layers=0)
    parts = documents(config, [4, 1, 7, 6], 3)
    row = torch.cat([*parts, torch.tensor([0])]).unsqueeze(0)
    model = build(config, packing=ByDocument(END, HostCore()))
    single = build(config)

    def states(model: Transformer, tokens: Tensor) -> Tensor:
        from train.model.tape import Inline, drive

        x = model.embed_tokens(tokens[:, :-1])
        places = model.places(x, tokens)
        x = model.norm(drive(model.run_layers(x, TERMS, Inline(), model.empty_findings(x.device), places)))
        return x @ model.lm_head.weight.T

    each = [states(single, torch.cat([part, part[:1]]).unsqueeze(0)) for part in parts]
    torch.testing.assert_close(states(model, row), torch.cat(each, 1), rtol=1e-10, atol=1e-10)
    assert (states(single, row) - torch.cat(each, 1)).abs().max() > 1e-3  # as one text they see each other


def test_labels_leave_out_what_crosses_a_border() -> None:
    rows = torch.tensor([[7, 8, END, 9, END, 6], [END, END, 1, 2, 3, 4]])
    packing = ByDocument(END, HostCore())
    assert packing.labels(rows, 0).tolist() == [[8, END, -1, END, -1], [-1, -1, 2, 3, 4]]
    assert packing.labels(rows, 1).tolist() == [[END, -1, -1, -1], [-1, -1, 3, 4]]
    table = torch.arange(5).unsqueeze(1) * 1j
    places = packing.places(table, rows, torch.float64)
    assert places.table.imag.squeeze(-1).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    assert places.documents is not None
    assert places.documents.numbers.tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("core", CORES, ids=["one by one", "masked"])
def test_grouped_heads_attend_as_repeated_ones(core: Core) -> None:
    """Attention with fewer heads of keys and values than of queries takes the same object."""
    rows = torch.tensor([[7, 8, END, 9, END, 6, 1], [1, 2, 3, END, 3, 4, 5]])
    table = torch.zeros(6, 1, dtype=torch.complex128)
    attend = ByDocument(END, core).places(table, rows, torch.float64).attend
    q, k, v = (torch.randn(2, 6, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    repeated = (each.repeat_interleave(2, dim=2) for each in (k, v))
    torch.testing.assert_close(attend(q, k, v, 0.5), attend(q, *repeated, 0.5))
    torch.testing.assert_close(attend(q, k, v, 0.5)[0, :3], core.causally(q[:1, :3], k[:1, :3], v[:1, :3], 0.5)[0])


@pytest.mark.parametrize("core", CORES, ids=["one by one", "masked"])
def test_recompute_changes_no_bit(core: Core) -> None:
    rows = torch.cat(documents(TINY, [6, 3, 1, 8, 5, 9, 4, 20], 7)).view(4, 14)
    choices = [
        RecomputeConfig(True, True),
        RecomputeConfig(False, True, True, ["dense"]),
        RecomputeConfig(nodes=list(NODES)),
    ]
    results = []
    for choice in (RecomputeConfig(), *choices):
        model = build(TINY, recompute=Recompute(choice), packing=ByDocument(END, core))
        results.append(packed(model, rows))
    (first, expected), *others = results
    for (output, found), name in itertools.product(others, expected):
        assert same_bits(output.metrics, first.metrics)
        assert torch.equal(found[name], expected[name]), name
