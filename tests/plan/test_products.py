"""Products that were not measured are predicted from those that were, on made-up devices that are known all over."""

from __future__ import annotations

import random
import statistics

import pytest

from launch.plan import cluster as clusters
from launch.plan.figures import WIDTHS, ProductRate
from launch.plan.products import ProductTable, Shape, shape_of

PEAK, BYTES_PER_S, LEAST_S, TILE, NUM_UNITS = 100e12, 1e12, 2e-6, (128, 128), 32


def table(rows: list[ProductRate]) -> ProductTable:
    return ProductTable(rows, PEAK, BYTES_PER_S, TILE, NUM_UNITS, LEAST_S)


def truth(shape: Shape, rate: float, ramp: float) -> float:
    """Seconds on a device that obeys the law, written apart from it."""
    rows, columns, depth = shape.of_group
    tiles = shape.groups * -(-rows // 128) * -(-columns // 128)
    waves = tiles / 32 if tiles < 32 else -(-tiles // 32)
    return LEAST_S + max(waves * 32 * 128 * 128 * 2 * (depth + ramp) / rate, shape.num_bytes("bfloat16") / BYTES_PER_S)


def row(shape: Shape, seconds: float) -> ProductRate:
    return ProductRate("bfloat16", shape.m, shape.n, shape.k, shape.flops / seconds / 1e12, shape.groups)


def drawn(draw: random.Random) -> Shape:
    groups = draw.choice((1, 1, 4, 16))
    m, n, k = (128 * round(2 ** draw.uniform(1, 6)) for _ in range(3))
    return Shape(groups, groups * m, n, k)


@pytest.mark.parametrize(("rate", "ramp"), [(80e12, 700.0), (60e12, 150.0), (95e12, 2000.0)])
def test_a_lawful_device_is_predicted_wherever_it_was_not_measured(rate: float, ramp: float) -> None:
    draw = random.Random(f"{rate}{ramp}")
    measured = [drawn(draw) for _ in range(16)]
    predicted = table([row(shape, truth(shape, rate, ramp)) for shape in measured])
    assert predicted.law.rate == pytest.approx(rate, rel=0.02)
    for _ in range(200):
        shape = drawn(draw)
        assert predicted.seconds(shape) == pytest.approx(truth(shape, rate, ramp), rel=0.03)


def test_what_a_library_is_bad_at_is_carried_to_shapes_nearby() -> None:
    """A device that takes half as long again for narrow results than its law says."""
    draw = random.Random(1)

    def slow(shape: Shape) -> float:
        return truth(shape, 80e12, 500.0) * (1.5 if shape.n <= 512 else 1.0)

    predicted = table([row(shape, slow(shape)) for shape in (drawn(draw) for _ in range(60))])
    errors = [abs(predicted.seconds(shape) / slow(shape) - 1) for shape in (drawn(draw) for _ in range(200))]
    by_law = [abs(predicted.by_law(shape) / slow(shape) - 1) for shape in (drawn(draw) for _ in range(200))]
    assert statistics.mean(errors) < 0.7 * statistics.mean(by_law)
    assert statistics.median(errors) < 0.08


def test_a_measured_product_takes_what_was_measured() -> None:
    rows = clusters.load("h800").products.measured
    narrow = [each for each in rows if each.dtype == "float8_e4m3fn" and each.result == "bfloat16"]
    seconds = ProductTable(narrow, 1978.9e12, 3e12, (128, 128), 132, 2e-6).seconds
    for each in narrow:
        twins = [twin for twin in narrow if shape_of(twin) == shape_of(each)]
        if len(twins) == 1:
            assert seconds(shape_of(each)) == pytest.approx(shape_of(each).flops / each.tflops / 1e12, rel=0.01)


def test_the_rate_falls_off_with_every_size() -> None:
    predicted = table(
        [row(shape, truth(shape, 80e12, 700.0)) for shape in (drawn(random.Random(i)) for i in range(20))]
    )
    large = Shape(1, 4096, 4096, 4096)
    rate = large.flops / predicted.seconds(large)
    for small in (Shape(1, 64, 4096, 4096), Shape(1, 4096, 64, 4096), Shape(1, 4096, 4096, 64)):
        assert small.flops / predicted.seconds(small) < 0.7 * rate


def test_one_row_is_enough_and_nothing_is_faster_than_the_peak() -> None:
    predicted = table([ProductRate("bfloat16", 4096, 4096, 4096, 80.0)])
    for shape in (drawn(random.Random(i)) for i in range(50)):
        assert predicted.seconds(shape) >= max(shape.flops / PEAK, LEAST_S)
    assert predicted.seconds(Shape(1, 0, 4096, 4096)) == LEAST_S


def test_published_tables_predict_their_own_large_rows() -> None:
    """Each row of h800's from the others. The FP8 tables are of one machine and one program each; the BF16 rows are of
    five sources, which contradict each other by 10 % where they are of nearly the same shape."""
    cluster = clusters.load("h800")
    tile = cluster.products.tile_rows, cluster.products.tile_columns
    kinds = {("float8_e4m3fn", "bfloat16"): 0.03, ("float8_e4m3fn", "float32"): 0.05, ("bfloat16", "bfloat16"): 0.1}
    for (dtype, result), within in kinds.items():
        rows = [each for each in cluster.products.measured if (each.dtype, each.result) == (dtype, result)]
        errors = []
        for index, each in enumerate(rows):
            if each.m >= 1000:
                others = rows[:index] + rows[index + 1 :]
                left = ProductTable(others, cluster.compute.peak(dtype), cluster.bytes_per_s, tile, 132, 2e-6)
                errors.append(abs(left.seconds(shape_of(each)) * each.tflops * 1e12 / shape_of(each).flops - 1))
        assert statistics.median(errors) < within, (dtype, result)


def test_bytes_of_a_product() -> None:
    assert Shape(4, 1000, 30, 20).num_bytes("bfloat16") == 2 * (1000 * 20 + 4 * 30 * 20 + 1000 * 30)
    by_depth = Shape(4, 50, 30, 1000, by_depth=True, result_bytes=4, is_added=True)
    assert by_depth.num_bytes("float8_e4m3fn") == 1000 * (50 + 30) + 2 * 4 * 4 * 50 * 30
    assert by_depth.of_group == (50, 30, 250)
    assert WIDTHS["float8_e4m3fn"] == 1
