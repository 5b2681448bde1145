"""Layers by themselves: what they cost by formula, and that together they are the whole rank."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from launch.plan.events import Event, Kernel, Launch, LayerPasses, Memory, Turn
from launch.plan.layers import Kept, Layers, layers_of
from launch.plan.record import Entry, Recorder, events_of
from launch.plan.world import world
from tests.plan.jobs import RECOMPUTE, WAYS, job
from train.compose import compose
from train.config import RunConfig
from train.flops import forward_costs
from train.model.loss import LossTerms


@pytest.fixture(scope="module")
def kept() -> Kept:
    """Layers that several tests ask for are traced once."""
    return {}


def flops(events: tuple[Event, ...], work: str) -> int:
    """Of products of two matrices (one with a vector is part of a norm), or of attention."""
    return sum(
        each.flops
        for each in events
        if isinstance(each, Kernel) and each.work == work and (work != "product" or min(each.sizes[1:]) > 1)
    )


def whole(passes: LayerPasses) -> tuple[Event, ...]:
    return (*passes.forward, *passes.backward, *(event for part in passes.weights for event in part))


def vectors(config: RunConfig, kind: str) -> int:
    """Norms that the closed form counts, which multiply nothing: of dense layers those of latents alone."""
    model = config.model
    latents = (model.q_lora_rank or 0) + (model.kv_lora_rank or 0)
    return latents + (2 * model.hidden_size if kind == "moe" else 0)


KINDS = [("model=tiny", "two_hop", "bf16"), ("model=tiny", "local", "fp32"), ("model=tiny_dense", "local", "bf16")]


@pytest.mark.parametrize(("model", "way", "precision"), KINDS)
def test_flops_are_those_of_the_closed_forms(kept: Kept, model: str, way: str, precision: str) -> None:
    """A forward is two operations for each of its weights and half the attention core. The gradient of its input costs
    as much in products, and attention's two and a half times as much, since it makes the scores again; so do the
    weights' gradients in products."""
    config = job(model, *WAYS[way], f"precision={precision}")
    found = layers_of(config, kept=kept).passes
    sizes, tokens = config.model.attention_sizes, config.train.micro_batch_size * config.train.seq_len
    core = tokens * sizes.core_flops(config.train.seq_len) / 2
    costs, _ = forward_costs(config.model, config.train.seq_len)
    for kind, cost in (("dense", costs[0]), ("moe", costs[-1])):
        if kind not in found:
            continue
        products = 2 * tokens * (cost - vectors(config, kind)) - core
        passes = found[kind]
        assert flops(passes.forward, "product") == products == flops(passes.backward, "product")
        assert sum(flops(part, "product") for part in passes.weights) == products
        # Its gradient multiplies three times over the width of keys and twice over that of values. What computes in
        # float32 wants them equally wide.
        v_width = sizes.value_head_dim if precision == "bf16" else sizes.qk_head_dim
        unit = core / (sizes.qk_head_dim + sizes.value_head_dim)
        assert flops(passes.forward, "attention") == unit * (sizes.qk_head_dim + v_width)
        assert flops(passes.backward, "attention") == unit * (3 * sizes.qk_head_dim + 2 * v_width)


def test_what_is_computed_again_is_seen(kept: Kept) -> None:
    """Whole nodes run twice: their forward's products are in the backward too."""
    settings = [[*WAYS["two_hop"], "precision=bf16", *RECOMPUTE[name]] for name in ("nothing", "nodes")]
    plain, again = (layers_of(job(*each), kept=kept).passes for each in settings)
    for kind in ("dense", "moe"):
        extra = flops(again[kind].backward, "product") - flops(plain[kind].backward, "product")
        assert extra == flops(plain[kind].forward, "product")
        assert held(again[kind].forward) < held(plain[kind].forward)


def traced(config: RunConfig, rank: int, place: int) -> list[Entry]:
    """The second micro-batch through a slice of the model, counted from the first, on a rank of the whole job."""
    recorder = Recorder()
    with world(config, rank, recorder=recorder) as made:
        (stage,) = (stage for number, stage in made.stages.items() if config.placement.position(number) == place)
        stage.begin(lambda _: made.train_rows.rows(0, config.train.micro_batch_size), LossTerms(1.0, 1.0, 1.0))
        shape = config.train.micro_batch_size, config.train.seq_len, config.model.hidden_size
        for number in range(2):
            x, dy = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            start = recorder.num_entries
            with recorder.on():
                recorder.drive(stage.forward(number, None if stage.model.parts.embedding else x))
                recorder.drive(stage.backward(number, None if stage.model.parts.head else dy))
                stage.weight_gradients(number)
                stage.findings.clear()
    return recorder.entries(start)


def composed(layers: Layers, kinds: list[str]) -> list[Event]:
    return [event for kind in ["stage", *kinds] for event in whole(layers.passes[kind])]


def measures(events: list[Event] | tuple[Event, ...]) -> tuple[Counter[str], int, int, int, int]:
    """Operations by name, FLOPs, bytes moved, payload, turns."""
    kernels = [each for each in events if isinstance(each, Kernel)]
    launches = [each for each in events if isinstance(each, Launch)]
    return (
        Counter(each.name for each in kernels),
        sum(each.flops for each in kernels),
        sum(each.read_bytes + each.written_bytes for each in kernels),
        sum(each.sent_bytes for each in launches),
        sum(isinstance(each, Turn) for each in events),
    )


def held(events: list[Event] | tuple[Event, ...]) -> int:
    return sum(each.num_bytes for each in events if isinstance(each, Memory))


@pytest.mark.parametrize("stages", [1, 2])
def test_layers_together_are_the_rank(kept: Kept, stages: int) -> None:
    """By name, work, bytes and turns; a rank whose stage has every kind of layer, and each half of it.

    What differs between the first and the other layers of a kind is a few additions of scalars.
    """
    split = "[3]" if stages == 1 else "[2,1]"
    settings = [*WAYS["two_hop"], "precision=bf16", *RECOMPUTE["norms and heads"], f"pipeline.layers={split}"]
    settings += [f"parallel.pp={stages}", f"parallel.nodes={2 * stages}"]
    config, kinds = job(*settings), ["embedding", "dense", "moe", "moe", "head", "mtp"]
    layers = layers_of(config, kept=kept)
    parts = [kinds] if stages == 1 else [kinds[:3], kinds[3:]]
    for number, part in enumerate(parts):
        entries = traced(config, number * 4, number)
        expected, found = (measures(each) for each in (composed(layers, part), events_of(entries)))
        names = (expected[0] - found[0]) + (found[0] - expected[0])
        assert set(names) <= {"add", "copy_", "_to_copy"} and sum(names.values()) <= 8, names
        for mine, its in list(zip(expected, found, strict=True))[1:]:
            assert mine == pytest.approx(its, rel=1e-3)


def test_every_layer_gives_back_what_it_takes(kept: Kept) -> None:
    """But for scalars, of which one more lives at the first layer of a kind than at the others."""
    for recompute in RECOMPUTE.values():
        layers = layers_of(job(*WAYS["two_hop"], "precision=bf16", *recompute), kept=kept)
        left = {kind: held(whole(passes)) for kind, passes in layers.passes.items()}
        assert left["dense"] == left["moe"] == left["stage"] == 0
        assert abs(sum(left.values())) <= 8 * 512


def test_layers_are_traced_once(kept: Kept) -> None:
    """For what decides them: the rest of a job is not asked. And traced again they are equal."""
    first = layers_of(job("precision=fp32"), kept=kept)
    assert layers_of(job("precision=fp32", "parallel.pp=2", "model.num_hidden_layers=8"), kept=kept) is first
    assert layers_of(job("precision=fp32")) == first and layers_of(job("precision=fp32")) is not first


def test_fp8_on_a_gpu_is_the_librarys(kept: Kept) -> None:
    """Its products have E4M3 operands and the FLOPs of the same layer in bfloat16, rows of experts padded to multiples
    of 16; weights are quantised once for a step, to one byte with a scale of four bytes for each tile, and each
    backward pass transposes them."""
    plain, fp8 = (layers_of(job(*WAYS["two_hop"], f"precision={name}"), kept=kept) for name in ("bf16", "fp8"))
    assert set(plain.quantising.values()) == {()} and set(plain.quantised_bytes.values()) == {0}
    for kind in ("dense", "moe"):
        mine, its = whole(fp8.passes[kind]), whole(plain.passes[kind])
        products = [each for each in mine if isinstance(each, Kernel) and each.work == "product" and "fp8" in each.name]
        assert {each.dtype for each in products} == {"float8_e4m3fn"}
        assert flops(mine, "product") == pytest.approx(flops(its, "product"), rel=0.1)
        assert flops(mine, "product") >= flops(its, "product") and sum(e.flops for e in products) > 0
        assert {each.name for each in fp8.quantising[kind]} >= {"quantize"} and held(mine) == 0
        transposed = [each for each in mine if isinstance(each, Kernel) and each.name == "transpose"]
        assert len(transposed) == sum(each.name == "quantize" for each in fp8.quantising[kind])
    config = job().model
    weights = config.attention_sizes.num_parameters + 3 * config.hidden_size * config.intermediate_size
    assert fp8.quantised_bytes["dense"] == pytest.approx(weights, rel=0.15)
    assert not fp8.quantising["embedding"]


@pytest.mark.slow
def test_fp8_on_a_cpu_is_the_references() -> None:
    """Its products are of values that were rounded, in float32; of weights there is one rounded copy, of four bytes."""
    found = layers_of(job("precision=fp8"), "cpu")
    assert found.quantising["moe"] and not found.quantising["embedding"]
    config = job().model
    weights = config.attention_sizes.num_parameters + 3 * config.hidden_size * config.intermediate_size
    assert found.quantised_bytes["dense"] == pytest.approx(4 * weights, rel=0.15)


def test_weights_follow_the_turns_of_their_backward(kept: Kept) -> None:
    """What the backward of combine lets others compute, comes before what its own end does."""
    moe = layers_of(job(*WAYS["two_hop"], "precision=bf16"), kept=kept).passes["moe"]
    legs = ["departure", "first hop", "last hop"]
    slots = [event.slot for event in moe.backward if isinstance(event, Turn)]
    assert slots == [f"{trip} {leg}" for trip in ("combine", "dispatch") for leg in legs]
    assert [bool(each) for each in moe.weights] == [False, False, False, True, False, False, True]


# Both stages of the first pipeline rank, which mirrors the last one, and one in the middle.
V3_STAGES = {"first": (0, 0), "last": (0, 15), "middle": (7 * 128 + 5, 7)}


@pytest.mark.slow
@pytest.mark.parametrize("place", V3_STAGES)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stages_of_the_published_job_are_their_layers(place: str, precision: str) -> None:
    rank, stage = V3_STAGES[place]
    config = compose(["experiment=v3_h800_2048", f"precision={precision}"])
    parts = config.slices[stage]
    kinds = ["embedding"] * parts.embedding
    kinds += ["moe" if layer >= config.model.first_k_dense_replace else "dense" for layer in parts.layers]
    kinds += ["head"] * parts.head + ["mtp"] * parts.mtp
    expected = measures(composed(layers_of(config), kinds))
    found = measures(events_of(traced(config, rank, stage)))
    assert sum(((expected[0] - found[0]) + (found[0] - expected[0])).values()) <= 16
    for mine, its in list(zip(expected, found, strict=True))[1:]:
        assert mine == pytest.approx(its, rel=1e-3)
