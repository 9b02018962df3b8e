"""The planning functions: shapes in, launch geometry out, no device and no Triton."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

# by path: the package itself imports Triton, and plans must be testable without
_path = Path(__file__).parents[2] / "kernels" / "cuda" / "plan.py"
_spec = importlib.util.spec_from_file_location("cuda_plan_alone", _path)
assert _spec is not None
assert _spec.loader is not None
plan: Any = importlib.util.module_from_spec(_spec)
sys.modules["cuda_plan_alone"] = plan
_spec.loader.exec_module(plan)

H100, A100, MI300 = plan.Device(132, 32), plan.Device(108, 32), plan.Device(304, 64)


def contiguous(*shape: int) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def test_rows_of_a_matrix_are_positions() -> None:
    v = plan.view((6, 10), contiguous(6, 10))
    assert (v.batch, v.classes, v.positions, v.rows) == (1, 10, 6, 6)
    assert v.strides[0] == (0, 1, 10)


def test_batch_and_position_merge_where_all_tensors_allow_it() -> None:
    channels_last = (3 * 100, 1, 100)  # [4, 100, 3] stored as [4, 3, 100]
    v = plan.view((4, 100, 3), channels_last)
    assert (v.batch, v.positions, v.strides[0].position) == (1, 12, 100)
    v = plan.view((4, 100, 3), channels_last, contiguous(4, 100, 3))
    assert (v.batch, v.positions) == (4, 3)
    shifted = (4 * 100, 1, 100)  # positions 0..2 of 4
    assert plan.view((4, 100, 3), shifted).batch == 4


def test_one_position_and_one_class() -> None:
    v = plan.view((8, 5, 1), contiguous(8, 5, 1))
    assert (v.batch, v.positions, v.strides[0]) == (1, 8, (0, 1, 5))
    assert plan.view((8, 1), (3, 77)).strides[0].class_ == 1


def test_positions_are_never_merged_beyond_int32() -> None:
    shape = (1 << 20, 2, 1 << 12)
    v = plan.view(shape, (2 << 12, 1 << 12, 1))
    assert (v.batch, v.positions) == (1 << 20, 1 << 12)
    huge = plan.view((1 << 20, 2, 1 << 12), ((1 << 12), 1 << 33, 1))  # mergeable but for the count
    assert huge.batch == 1 << 20


@pytest.mark.parametrize("rows", [1, 7, 100, 5000, 1 << 18])
@pytest.mark.parametrize("classes", [512, 1000, 1024, 4096, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_rows_plans_cover_every_class_once(rows: int, classes: int, itemsize: int) -> None:
    v = plan.view((rows, classes), contiguous(rows, classes), contiguous(rows, classes))
    for device in (H100, A100, MI300):
        for r in (plan.forward_rows(v, itemsize, device), plan.backward_rows(v, itemsize, device)):
            assert (r.splits - 1) * r.chunk < classes <= r.splits * r.chunk
            assert r.chunk % r.BLOCK_C == 0
            assert r.BLOCK_C % (2 * r.VEC) == 0
            assert r.programs == rows * r.splits < 2**31
            assert r.VEC * itemsize == 16
            assert 1 <= r.num_warps * device.warp <= 256


def test_few_huge_rows_are_split_and_many_are_not() -> None:
    few, many = plan.view((4, 128256), (128256, 1)), plan.view((8192, 128256), (128256, 1))
    assert plan.forward_rows(few, 2, H100).programs >= 60
    assert plan.forward_rows(many, 2, H100).splits == 1
    short = plan.view((4, 4096), (4096, 1))
    assert plan.forward_rows(short, 2, H100).splits == 1


def test_vectors_need_rows_that_start_alike() -> None:
    odd = contiguous(4, 50257)
    assert plan.vector(plan.view((4, 50257), odd, odd), 2) == 8
    assert plan.vector(plan.view((4, 50257), (50304, 1), odd), 2) == 1
    assert plan.vector(plan.view((4, 50257), (50257 + 16, 1), odd), 2) == 8
    assert plan.vector(plan.view((4, 50257), (50257 + 2, 1), odd), 8) == 2


@pytest.mark.parametrize(
    ("shape", "itemsize", "want"),
    [((8, 512), 2, (8, 512, 1, 1)), ((8, 1000), 2, (8, 1024, 1, 1)), ((8, 1000), 4, (4, 1024, 1, 1)), ((8, 1024), 2, (8, 1024, 1, 1)),
     ((8, 10007), 2, (8, 16384, 16, 1)), ((8, 16384), 2, (8, 16384, 16, 1)), ((8, 32000), 2, (8, 32768, 16, 2)),
     ((8, 128256), 2, (8, 131072, 16, 8)), ((8, 128256), 4, (4, 131072, 16, 8)), ((8, 262144), 2, (8, 262144, 16, 16)),
     ((8, 262160), 2, None), ((8, 50257), 2, None), ((8, 100), 2, None), ((8, 4096), 8, None)],
)  # fmt: skip
def test_one_visit(shape: tuple[int, ...], itemsize: int, want: tuple[int, ...] | None) -> None:
    v = plan.view(shape, contiguous(*shape), contiguous(*shape))
    got = plan.one_visit(v, itemsize, plan.Device(132, 32, clusters=True), clusters=True)
    assert got == (None if want is None else plan.OneVisitPlan(shape[0], *want))
    for device, clusters in ((A100, True), (plan.Device(132, 32, clusters=True), False)):
        got = plan.one_visit(v, itemsize, device, clusters)
        assert got is None or got.num_ctas == 1
    assert plan.one_visit(v, itemsize, MI300, False) is None or plan.one_visit(v, itemsize, MI300, False).num_ctas == 1


def test_one_visit_needs_rows_that_start_alike() -> None:
    assert plan.one_visit(plan.view((8, 1024), (1027, 1), contiguous(8, 1024)), 2, H100, False) is None
    assert plan.one_visit(plan.view((8, 1024), (1027, 1), (1027, 1)), 2, H100, False) is not None
    cluster = plan.Device(132, 32, clusters=True)
    assert plan.one_visit(plan.view((8, 32000), (32001, 1), (32001, 1)), 2, cluster, True) is None


def test_which_kernel() -> None:
    assert plan.has_long_rows(plan.view((4, 50257), contiguous(4, 50257)))
    assert not plan.has_long_rows(plan.view((4, 10), contiguous(4, 10)))
    assert not plan.has_long_rows(plan.view((2, 5000, 9), contiguous(2, 5000, 9)))
    assert not plan.has_long_rows(plan.view((4, 5000), contiguous(4, 5000), (1, 4)))
    assert plan.has_long_rows(plan.view((4, 1000), contiguous(4, 1000)))  # not a multiple of 16: tiles would not see vectors


def test_which_kernel_reads_weights() -> None:
    aligned, odd = (plan.view((4, classes), contiguous(4, classes)) for classes in (32000, 50257))
    assert plan.takes_rows(aligned, None)
    assert not plan.takes_rows(aligned, 1)
    assert plan.takes_rows(odd, None)
    assert plan.takes_rows(odd, 1)
    assert plan.takes_rows(plan.view((4, 32000), (32003, 1)), 1)


@pytest.mark.parametrize("make", [plan.tiles, plan.looping_tiles, plan.reading_tiles])
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 10), (1000, 1000), (100000, 2), (3, 7, 50), (64, 1000, 49), (2, 128256, 100), (200, 65, 1)], ids=str
)
def test_tiles_cover_everything_once(make: Any, shape: tuple[int, ...]) -> None:
    v = plan.view(shape, contiguous(*shape))
    for lanes in (2048, 1024):
        t = make(v, H100, lanes)
        assert t.programs == v.batch * plan.ceil_div(v.positions, t.BLOCK_N)
        assert (t.class_tiles - 1) * t.BLOCK_C < v.classes <= t.class_tiles * t.BLOCK_C
        assert lanes >= t.BLOCK_N * t.BLOCK_C
        assert t.num_warps in (1, 2, 4)
        assert t.BLOCK_N & (t.BLOCK_N - 1) == 0
        assert t.BLOCK_C & (t.BLOCK_C - 1) == 0


def test_tiles_follow_memory() -> None:
    images = plan.looping_tiles(plan.view((16, 21, 512 * 512), contiguous(16, 21, 512 * 512)), H100)
    assert images.BLOCK_N >= 256
    rows = plan.tiles(plan.view((1000, 700), contiguous(1000, 700)), H100)
    assert rows.BLOCK_C == 1024


def addresses(v: Any, t: Any, number: int) -> list[int]:
    """`rows._tile_of` and `rows._lanes_at` in Python integers: the first and last element a tile touches."""
    tiles = plan.ceil_div(v.positions, t.BLOCK_N)
    b, p = number // tiles, number % tiles * t.BLOCK_N
    s = v.strides[0]
    last = min(p + t.BLOCK_N, v.positions) - 1
    return [b * s.batch + p * s.position, b * s.batch + last * s.position + (v.classes - 1) * s.class_]


def test_more_than_2_to_the_31_elements() -> None:
    """What is counted in int32 stays below 2**31; offsets, which do not, are int64 in the kernels (`.to(tl.int64)`)."""
    rows, classes = 40000, 128256
    v = plan.view((rows, classes), contiguous(rows, classes))
    assert rows * classes > 2**31
    for r in (plan.forward_rows(v, 2, H100), plan.backward_rows(v, 2, H100)):
        assert r.programs < 2**31
        assert r.chunk + r.BLOCK_C < 2**31
        assert classes + r.BLOCK_C < 2**31
    images = plan.view((64, 1000, 65536), contiguous(64, 1000, 65536))
    t = plan.tiles(images, H100)
    assert t.elementwise_programs < 2**31
    assert addresses(images, t, t.programs - 1)[1] == 64 * 1000 * 65536 - 1 > 2**31


@pytest.mark.parametrize("shape", [(1, plan.MOST_CLASSES), (2, plan.MOST_CLASSES - 1), (1, plan.MOST_CLASSES, 3)], ids=str)
def test_most_classes(shape: tuple[int, ...]) -> None:
    """Whatever a kernel adds to a class number fits int32: the step of a loop, the end of a block, the vector after the last."""
    v = plan.view(shape, contiguous(*shape), contiguous(*shape))
    for make in (plan.tiles, plan.looping_tiles, plan.reading_tiles):
        assert v.classes + make(v, H100, 2048).BLOCK_C < 2**31
    for itemsize in (2, 4, 8):
        for r in (plan.forward_rows(v, itemsize, H100), plan.backward_rows(v, itemsize, H100)):
            assert (r.splits - 1) * r.chunk < v.classes <= r.splits * r.chunk
            assert v.classes + r.BLOCK_C + 2 * r.VEC < 2**31


@pytest.mark.parametrize("shape", [(1, plan.MOST_CLASSES + 1), (1, 2**31 - 1), (1, 2**31), (2, 2**32 + 1, 3)], ids=str)
def test_more_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="classes"):
        plan.view(shape, contiguous(*shape))


@pytest.mark.parametrize("positions", [2**31 - 1, 2**31, 2**33 + 5])
def test_positions_around_int32(positions: int) -> None:
    v = plan.view((positions, 3), contiguous(positions, 3))
    for make in (plan.tiles, plan.looping_tiles, plan.reading_tiles):
        t = make(v, H100, 2048)
        assert t.programs == plan.ceil_div(positions, t.BLOCK_N) < 2**31
    e = plan.elements((1, 1, positions), contiguous(1, 1, positions))
    assert e.programs == plan.ceil_div(positions, e.BLOCK_P) < 2**31


def test_elements_merge_into_one_line() -> None:
    e = plan.elements((4, 5, 6), contiguous(4, 5, 6), contiguous(4, 5, 6), (0, 0, 0))
    assert e.shape == (1, 1, 120)
    assert e.strides == ((0, 0, 1), (0, 0, 1), None)
    e = plan.elements((4, 5, 6), contiguous(4, 5, 6), (0, 0, 1))
    assert e.shape == (1, 20, 6)
    assert e.strides == ((0, 6, 1), (0, 0, 1))
    e = plan.elements((4, 5, 6), contiguous(4, 5, 6), (0, 1, 0))
    assert e.shape == (4, 5, 6)
    assert e.programs * e.BLOCK_B * e.BLOCK_P >= 120


def test_elements_beyond_int32_stay_apart() -> None:
    shape = (1, 1 << 20, 1 << 12)
    e = plan.elements(shape, contiguous(*shape))
    assert max(e.shape) < 2**31
    assert e.shape[0] * e.shape[1] * e.shape[2] == 1 << 32
    assert e.programs < 2**31
