"""Three sets of kernels: DeepSeek's trace is reproduced from shapes, and no set undercuts the bound."""

from __future__ import annotations

import dataclasses
import random

import pytest

from launch.plan import cluster as clusters
from launch.plan import published
from launch.plan.cluster import CLUSTERS, Cluster
from launch.plan.events import Enter, Event, Kernel, Memory
from launch.plan.figures import PassRate
from launch.plan.kernels import AS_WRITTEN, BOUND, KERNELS, PUBLISHED, Rates, attention_rate, shape_of_kernel
from tests.plan.v3_layer import BF16, FP8, LAYER, ROWS, TRACED_MS, attention, product, rest

SHIPPED = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
TAKEN = 20


@pytest.fixture(scope="module")
def rates() -> dict[str, Rates]:
    return {name: Rates(clusters.load(name)) for name in SHIPPED}


def layer_ms(rates: Rates, kernels: str, num_taken: int = 0) -> float:
    return 1e3 * sum(rates.node_seconds(events, enter, kernels, num_taken) for enter, events in LAYER.values())


@pytest.mark.parametrize("part", TRACED_MS)
def test_the_parts_of_the_trace_follow_from_their_shapes(rates: dict[str, Rates], part: str) -> None:
    """Within 5 %: rows of experts are nominal here, and vary from layer to layer by 10 % in the trace."""
    enter, events = LAYER[part]
    assert 1e3 * rates["h800"].node_seconds(events, enter, PUBLISHED, TAKEN) == pytest.approx(TRACED_MS[part], rel=0.05)


def test_the_trace_is_made_of_its_classes() -> None:
    for part in published.load().parts:
        products = sum(2 * row.m * row.n * row.k / row.tflops / 1e9 for row in part.products)
        attention_ms = part.span_ms - part.cast_ms - part.permute_ms - part.other_ms - products
        assert attention_ms == pytest.approx({"F": 1.237, "B": 4.254}[part.kind] if part.num_sequences else 0, abs=0.02)


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_undercuts_the_bound(rates: dict[str, Rates], name: str) -> None:
    for part, (enter, events) in LAYER.items():
        bound = rates[name].node_seconds(events, enter, BOUND)
        for kernels in (AS_WRITTEN, PUBLISHED):
            assert bound < rates[name].node_seconds(events, enter, kernels), (part, kernels)


def test_clusters_stand_in_their_order(rates: dict[str, Rates]) -> None:
    for kernels in KERNELS:
        times = {name: layer_ms(rates[name], kernels) for name in SHIPPED}
        assert times["h200"] <= times["h100"] * 1.01, kernels
        assert times["b200"] < 0.65 * times["h200"], kernels
        assert times["gb300"] <= times["gb200"] * 1.05 <= times["b200"] * 1.1, kernels


def test_communication_takes_processors_from_what_multiplies(rates: dict[str, Rates]) -> None:
    free, crowded = layer_ms(rates["h800"], AS_WRITTEN), layer_ms(rates["h800"], AS_WRITTEN, TAKEN)
    assert 1.05 < crowded / free <= 132 / 112
    kernel = product(4096, 4096, 7168)
    assert rates["h800"].seconds(kernel, TAKEN) == pytest.approx(rates["h800"].seconds(kernel) * 132 / 112)
    assert rates["h800"].seconds(rest(10**8), TAKEN) == rates["h800"].seconds(rest(10**8))


def test_bf16_costs_no_casts_and_slower_products(rates: dict[str, Rates]) -> None:
    enter, events = LAYER["mlp(F)"]
    wide: list[Event] = [
        dataclasses.replace(event, dtype=BF16) if isinstance(event, Kernel) and event.dtype == FP8 else event
        for event in events
    ]
    h800 = rates["h800"]
    ratio = h800.node_seconds(wide, enter, BOUND) / h800.node_seconds(events, enter, BOUND)
    assert ratio == pytest.approx(2.0, rel=0.01)
    assert 1.1 < h800.node_seconds(wide, enter, PUBLISHED) / h800.node_seconds(events, enter, PUBLISHED) < 2.0


def test_a_part_scales_with_its_rows(rates: dict[str, Rates]) -> None:
    enter = Enter("moe", "experts", "F")

    def seconds(rows: int, kernels: str) -> float:
        up, down = product(rows, 4096, 7168, 4), product(rows, 7168, 2048, 4)
        return rates["h800"].node_seconds([up, down], enter, kernels)

    for kernels in KERNELS:
        assert seconds(2 * ROWS, kernels) / seconds(ROWS, kernels) == pytest.approx(2.0, rel=0.03)


def test_a_pass_takes_the_bandwidth_or_the_least_time(rates: dict[str, Rates]) -> None:
    h800 = rates["h800"]
    assert h800.seconds(rest(64)) == h800.least_s
    assert h800.seconds(rest(3 * 10**9)) == pytest.approx(3e9 / (3350e9 * 0.895))


def test_a_pass_is_what_was_measured_of_its_operation() -> None:
    measured = [PassRate("mul", 1000, 1.0), PassRate("mul", 10**6, 8.0), PassRate("any", 10**6, 2.0)]
    cluster = clusters.load("h800")
    passes = dataclasses.replace(cluster.passes, least_us=0.1, measured=measured)
    mine = Rates(dataclasses.replace(cluster, passes=passes))
    assert mine.pass_seconds("mul", BF16, 10**6) == pytest.approx(10**6 / 8e9)
    assert mine.pass_seconds("topk", BF16, 10**6) == pytest.approx(10**6 / 2e9)
    assert mine.pass_seconds("mul", BF16, 10**8) == pytest.approx(10**8 / 8e9)
    between = mine.pass_seconds("mul", BF16, 10**4)
    assert mine.pass_seconds("mul", BF16, 1000) < between < mine.pass_seconds("mul", BF16, 10**5)


def test_nodes_without_a_product(rates: dict[str, Rates]) -> None:
    """Inside a layer their work is in the trace's parts; else they move what their largest kernel does."""
    h800, copy = rates["h800"], rest(3 * 10**9)
    assert h800.node_seconds([copy, rest(10)], Enter("moe", "dispatch", "F"), PUBLISHED) == 0
    assert h800.node_seconds([copy, rest(10)], Enter("embedding", "embedding", "F"), PUBLISHED) > 0.9e-3
    assert h800.node_seconds([copy, rest(10)], Enter("moe", "dispatch", "F"), BOUND) == pytest.approx(3e9 / 3350e9)
    for kernels in KERNELS:
        assert h800.node_seconds([], Enter("moe", "dispatch", "F"), kernels) == 0


def test_what_the_trace_does_not_have_moves_its_operands_and_results(rates: dict[str, Rates]) -> None:
    h800, logits = rates["h800"], product(4096, 129280, 7168, dtype=BF16)
    alone = h800.core_seconds(logits, PUBLISHED)
    moved = 2 * 4096 * (129280 + 7168) / h800.cluster.bytes_per_s
    for enter in (Enter("head", "loss", "F"), Enter("mtp", "loss", "B"), Enter("optimizer", "update", "U")):
        assert h800.node_seconds([logits], enter, PUBLISHED) == pytest.approx(alone + moved)


def test_the_bound_moves_what_outlives_a_node(rates: dict[str, Rates]) -> None:
    enter = Enter("moe", "dense", "F")
    thin = [product(64, 4096, 4096)]
    kept = [*thin, Memory(10**9, "activations", ""), Memory(10**9, "work", ""), Memory(-(10**9), "work", "")]
    h800 = rates["h800"]
    more = h800.node_seconds(kept, enter, BOUND) - h800.node_seconds(thin, enter, BOUND)
    assert more == pytest.approx(1e9 / 3350e9, rel=0.01)


def test_shapes_of_grouped_products_are_told_by_their_bytes() -> None:
    draw = random.Random(0)
    for _ in range(100):
        groups = draw.choice((2, 4, 32))
        m, n, k = (draw.choice((128, 512, 2048)) for _ in range(3))
        forward = shape_of_kernel(product(groups * m, n, k, groups))
        assert (forward.by_depth, forward.is_added, forward.result_bytes) == (False, False, 2)
        gradient = shape_of_kernel(product(m, n, groups * k, groups, gradient=True))
        assert (gradient.by_depth, gradient.is_added, gradient.result_bytes) == (True, True, 4)


def test_a_batch_of_products_has_the_rows_of_all() -> None:
    one = Kernel(
        "bmm", "product", BF16, (16, 64, 128, 32), 2 * 16 * 64 * 128 * 32, 2 * 16 * 32 * (64 + 128), 2 * 16 * 64 * 128
    )
    shape = shape_of_kernel(one)
    assert (shape.groups, shape.m, shape.flops, shape.by_depth) == (16, 16 * 64, one.flops, False)


def test_published_attention_pads_no_values() -> None:
    """Our own pads them to the width of the keys, for kernels that want that."""
    h800 = clusters.load("h800")
    enter = Enter("moe", "attention", "F")
    for backward in (False, True):
        kernel = attention(backward)
        *others, qk_width, v_width = kernel.sizes
        share = (5 * qk_width) / (3 * qk_width + 2 * v_width) if backward else 2 * qk_width / (qk_width + v_width)
        padded = dataclasses.replace(kernel, sizes=(*others, qk_width, qk_width), flops=round(kernel.flops * share))
        rates, blind = Rates(h800, value_width=v_width), Rates(h800)
        assert rates.node_seconds([padded], enter, PUBLISHED) == pytest.approx(
            blind.node_seconds([kernel], enter, PUBLISHED)
        )
        assert rates.seconds(padded) > 1.1 * rates.seconds(kernel)


def test_a_product_with_a_vector_is_a_pass_over_its_matrix(rates: dict[str, Rates]) -> None:
    """As a norm's gradient has it; in the published set it is of the class of norms."""
    moved = 4 * (4096 * 7168 + 7168 + 4096)
    kernel = Kernel("mv", "product", "float32", (1, 4096, 1, 7168), 2 * 4096 * 7168, moved - 4096 * 4, 4096 * 4)
    h800 = rates["h800"]
    assert h800.seconds(kernel) == pytest.approx(moved / h800.cluster.bytes_per_s)
    assert h800.core_seconds(kernel, PUBLISHED) == 0
    enter, events = LAYER["attn(B)"]
    assert h800.node_seconds([*events, kernel], enter, PUBLISHED) == h800.node_seconds(events, enter, PUBLISHED)


def test_a_float32_router_is_the_traces(rates: dict[str, Rates]) -> None:
    narrow = product(4096, 256, 7168, dtype=BF16)
    wide = dataclasses.replace(narrow, dtype="float32", written_bytes=2 * narrow.written_bytes)
    h800 = rates["h800"]
    assert h800.core_seconds(wide, PUBLISHED) == pytest.approx(h800.core_seconds(narrow, PUBLISHED), rel=0.05)
    assert h800.seconds(wide) > 4 * h800.seconds(narrow)


def test_attention_is_that_of_the_nearest_widths(rates: dict[str, Rates]) -> None:
    cluster = rates["b200"].cluster
    kernel = attention(False)
    assert attention_rate(cluster.attention.measured, kernel, cluster) == pytest.approx(1366e12)
    narrow = dataclasses.replace(kernel, sizes=(*kernel.sizes[:4], 128, 128))
    assert attention_rate(cluster.attention.measured, narrow, cluster) == pytest.approx(1297e12)
    longer = dataclasses.replace(kernel, sizes=(1, 128, 32768, 32768, 192, 128))
    assert attention_rate(cluster.attention.measured, longer, cluster) == pytest.approx(1494e12)


def test_words_that_are_none_are_refused(rates: dict[str, Rates]) -> None:
    with pytest.raises(ValueError, match="kernels=fast is not one of as_written, published, bound"):
        rates["h800"].node_seconds([], Enter("moe", "dispatch", "F"), "fast")
    with pytest.raises(ValueError, match="a product in int8 has no rate"):
        rates["h800"].seconds(dataclasses.replace(product(8, 8, 8), dtype="int8"))


def test_a_type_without_a_row_goes_by_the_peaks(rates: dict[str, Rates]) -> None:
    cluster: Cluster = rates["h800"].cluster
    kernel = dataclasses.replace(product(8192, 8192, 8192), dtype="float64")
    assert rates["h800"].seconds(kernel) >= kernel.flops / cluster.compute.peak("float64")
