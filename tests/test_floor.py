"""The floor reads everything, writes everything, is timed in everybody's rounds, and is a dash where it was not measured."""

import json
from pathlib import Path

import pytest
import torch

from fastloss.bench import floor, limits, tables
from fastloss.bench.cases import Case
from fastloss.bench.losses import LOSSES
from fastloss.bench.measure import measure
from fastloss.bench.presets import CPU_TARGETS, FRONT
from fastloss.bench.providers import EAGER, FASTLOSS
from fastloss.bench.runner import Times
from fastloss.bench.timing import Series
from fastloss.kernels.cpu import floor as kernels

MEASURED = Path(__file__).parent.parent / "docs" / "measured" / "cpu.json"
SIZES = [0, 1, 2, 63, 64, 1000, kernels.TASK, kernels.TASK + 65, 3 * kernels.TASK - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_it_reads_and_writes_everything_and_nothing_else(size: int, dtype: torch.dtype) -> None:
    source = torch.randint(-8, 8, (size,)).to(dtype)
    words = source[: size * dtype.itemsize // 4 * 4 // dtype.itemsize].view(torch.float32)
    sums = kernels.sums_for(source)
    kernels.read(source, sums)
    expected = words.double().split(kernels.TASK) if len(words) else ()
    torch.testing.assert_close(
        sums.double(), torch.tensor([float(part.sum()) for part in expected], dtype=torch.float64), rtol=1e-4, atol=1e-3
    )
    around = torch.full((size + 64,), 7.0, dtype=dtype)
    sink = around[32 : 32 + size]
    kernels.read_and_write(source, sink)
    bytes_ = words.numel() * 4 // dtype.itemsize
    assert torch.equal(sink[:bytes_], source[:bytes_])
    assert bool((around[:32] == 7).all())
    assert bool((around[32 + bytes_ :] == 7).all())


def test_large_results_go_past_the_caches_and_are_whole() -> None:
    source = torch.arange(kernels.STREAM_BYTES // 4 + 5, dtype=torch.float32)
    for start in (0, 1):  # aligned, and not
        sink = torch.zeros(len(source) + 1)[start : start + len(source)]
        kernels.read_and_write(source, sink)
        assert torch.equal(sink, source)


def test_every_loss_has_a_floor_or_a_reason_not_to() -> None:
    assert set(LOSSES) - set(floor.TRAFFIC) == {"linear_cross_entropy", "nll_loss"}
    assert all(0 < writes <= reads for reads, writes in floor.TRAFFIC.values())
    assert {target.case.key for target in CPU_TARGETS} <= set(limits.WHY)
    assert len(set(FRONT)) == len(FRONT) <= 10
    assert set(FRONT) <= {target.case for target in CPU_TARGETS}


def test_a_floor_is_made_of_reads_and_of_reads_with_writes() -> None:
    series = {
        floor.READ: Series([Times(2.0, 0.0), Times(4.0, 0.0)]),
        floor.READ_AND_WRITE: Series([Times(3.0, 0.0), Times(7.0, 0.0)]),
    }
    for loss, expected in (("cross_entropy", [3.0, 7.0]), ("binary_cross_entropy", [5.0, 11.0]), ("softmax", [8.0, 18.0])):
        found = floor.of(loss, series)
        assert found is not None
        assert [times.step for times in found.times] == expected
    assert floor.of("cross_entropy", {}) is None


def test_a_measurement_has_the_share_of_the_floor_and_tables_show_it() -> None:
    found = measure(Case("cross_entropy", (300, 100)), [FASTLOSS, EAGER], seconds=0, memory=False, least=2)
    assert set(found["floor"]) == {"read", "read and write", "step"}
    assert set(found["providers"]) == {FASTLOSS, EAGER}
    assert set(found["providers"][FASTLOSS]["slower"]) == {EAGER}
    share = found["providers"][FASTLOSS]["share_of_floor"]
    assert 0 < share["low"] <= share["middle"] <= share["high"]
    assert tables.share(found["providers"][FASTLOSS]) == f"{share['middle']:.0%}"
    linear = measure(Case("linear_cross_entropy", (20, 8, 30)), [FASTLOSS], seconds=0, memory=False, least=1)
    assert linear["floor"] is linear["providers"][FASTLOSS]["share_of_floor"] is None


def test_what_was_not_measured_is_a_dash() -> None:
    result = json.loads(MEASURED.read_text())
    for case in result["cases"]:
        case.pop("floor", None)
        for found in case["providers"].values():
            found.pop("share_of_floor", None)
            found.pop("memory", None)
    header, lines = tables.front(result)
    assert 0 < len(lines) <= 10
    assert {line[header.index("of the floor")] for line in lines} == {tables.NOTHING}
    assert {line[header.index("extra memory")] for line in lines} == {tables.NOTHING}
    assert {line[4] for line in limits.limits(result)[1]} == {tables.NOTHING}


@pytest.mark.parametrize("measured", [True, False])
def test_the_picture_has_the_floor_where_it_was_measured(measured: bool) -> None:
    from fastloss.bench import charts

    def case(classes: int) -> dict[str, object]:
        found = {"status": "timed", "step": {"middle": classes * 2e-6}}
        least = {"step": {"middle": classes * 1e-6}} if measured else None
        return {"loss": "cross_entropy", "dtype": "float32", "shape": [4096, classes], "providers": {FASTLOSS: found}, "floor": least}

    figure = charts._front([case(classes) for classes in (10, 100, 1000, 10000)])
    assert figure is not None
    (axes,) = figure.axes
    words = " ".join(text.get_text() for text in axes.texts)
    assert FASTLOSS in words
    assert ("floor" in words) == measured
    assert len(axes.lines) == (2 if measured else 1)
    charts.plt.close(figure)
    assert charts._front([case(10), case(100)]) is None
