"""Every launcher compiled for GPUs that are not here, and what the machine code must look like in the hot loops."""

import math
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its compiler cannot compile the CUDA kernels")

from triton_compiler import Launch, compiling

import fastloss.kernels.cuda as k
from fastloss.kernels.cuda.plan import Device
from fastloss.kernels.groups import Focus, Foreseen, Rows, Smoothing


def untouched(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nothing writes to, not even torch's filling of fresh memory: its size costs nothing."""
    numel = math.prod(shape)
    return torch.empty(0, dtype=dtype).set_(
        torch.UntypedStorage(numel * dtype.itemsize), 0, shape, torch.empty(shape, device="meta").stride()
    )


def launch_index_targets(classes: int, dtype: torch.dtype, rows: int = 1000) -> None:
    """Enough rows that none is split."""
    logits = untouched(rows, classes, dtype=dtype)
    target, loss = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    numbers = Rows(torch.empty(rows), None, torch.empty(rows), torch.empty(rows))
    k.cross_entropy_forward(logits, target, torch.ones(1).expand(classes), -100, loss, numbers)
    k.cross_entropy_backward(logits, target, -100, numbers, loss, untouched(rows, classes, dtype=dtype))


def launch_everything(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = untouched(*shape, dtype=dtype), untouched(*shape, dtype=dtype)
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    target, n, w = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=real), torch.ones(1, dtype=real).expand(shape[1])
    numbers, smoothing = Rows(n, n, n, n), Smoothing(0.9, 0.1)
    k.cross_entropy_forward(x, target, w, -100, n, numbers)
    k.cross_entropy_backward(x, target, -100, numbers, n, x)
    k.smoothed_cross_entropy_forward(x, target, w, -100, smoothing, n, numbers)
    k.smoothed_cross_entropy_backward(x, target, w, -100, smoothing, numbers, n, y)
    k.soft_cross_entropy_forward(x, y, w, smoothing, n, numbers)
    k.soft_cross_entropy_backward(x, y, w, smoothing, numbers, n, x)
    k.soft_cross_entropy_target_backward(x, w, smoothing.keep, numbers, n, y)
    entries, prob = torch.empty(rows, 4, dtype=torch.int64), torch.empty(rows, 4, dtype=real)
    for plain_or_smoothed in (Smoothing(1.0, 0.0), smoothing):
        k.sparse_soft_cross_entropy_forward(x, entries, prob, w, plain_or_smoothed, n, numbers)
        k.sparse_soft_cross_entropy_backward(x, entries, prob, w, plain_or_smoothed, numbers, n, x)
    k.sparse_soft_cross_entropy_prob_backward(x, entries, w, smoothing.keep, numbers, n, prob)
    dense = torch.empty(shape[1], dtype=real)
    k.smoothed_cross_entropy_forward(x, target, dense, -100, smoothing, n, numbers)
    k.soft_cross_entropy_forward(x, y, dense, smoothing, n, numbers)
    k.softmax_forward(x, y)
    k.softmax_backward(x, y, x)
    k.log_softmax_forward(x, y)
    k.log_softmax_backward(x, y, x)
    k.nll_loss_forward(x, target, w, -100, n, n)
    k.nll_loss_backward(target, -100, n, n, x)
    values = torch.empty(100000, dtype=real)
    k.sum_rows(values, n[:1])
    k.mean_of_rows(values, values, n[:1], n[:1])


def launch_elements(dtype: torch.dtype) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = torch.empty(1, 64, 4096, dtype=dtype), torch.ones(1, 1, 1, dtype=real).expand(1, 64, 4096)
    loss, total = torch.empty(1, 64, 4096, dtype=real), torch.empty(1, dtype=real)
    k.bce_with_logits_forward(x, x, w, w, loss)
    k.bce_with_logits_sum(x, x, w, w, 1, total)
    k.bce_with_logits_backward(x, x, w, w, loss, x)
    k.binary_cross_entropy_forward(x, x, w, loss)
    k.binary_cross_entropy_sum(x, x, w, 1, total)
    k.binary_cross_entropy_backward(x, x, w, loss, x)
    focus = Focus(0.25, 0.75, 2.0)
    k.sigmoid_focal_loss_forward(x, x, focus, loss)
    k.sigmoid_focal_loss_sum(x, x, focus, 1, total)
    k.sigmoid_focal_loss_backward(x, x, focus, loss, x)


def of_name(launches: list[Launch], name: str) -> Launch:
    (found,) = {launch.name: launch for launch in launches if launch.name == name}.values()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("target", "classes"),
    [("sm_90", 50257), *(pytest.param(*case, marks=pytest.mark.long) for case in (("sm_80", 50257), ("sm_90", 128256), ("sm_100", 50257)))],
)
def test_hot_loops_on_nvidia(target: str, dtype: torch.dtype, classes: int) -> None:
    """128-bit loads and stores only, for odd vocabularies too; no barrier, no spill."""
    with compiling(target) as launches:
        launch_index_targets(classes, dtype)
    for name in ("_cross_entropy_forward_rows", "_cross_entropy_backward_rows"):
        launch = of_name(launches, name)
        assert launch.registers_spilled == 0
        (loop,) = [loop for loop in launch.loops() if "ld.global" in loop]
        assert set(re.findall(r"ld\.global[\w.:]*", loop)) == {"ld.global.v4.b32"}
        assert not re.search(r"\bbar\.|barrier|shfl|\.shared", loop)
        if "backward" in name:
            assert set(re.findall(r"st\.global[\w.:]*", loop)) == {"st.global.v4.b32"}


LONG_RUN = pytest.mark.long


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, (16384, 50257)),
     *(pytest.param(dtype, shape, marks=LONG_RUN) for dtype, shape in [
         (torch.bfloat16, (65536, 1000)), (torch.float32, (65536, 1000)), (torch.float16, (65536, 1000)), (torch.float16, (16384, 50257)),
         (torch.float32, (16384, 50257))
     ])],
    ids=str,
)  # fmt: skip
def test_dense_losses_in_vectors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """128-bit loads and stores in all loops, however rows start; beside them single numbers of rows and at the edges of rows."""
    x, y, n, target = untouched(*shape, dtype=dtype), untouched(*shape, dtype=dtype), torch.empty(shape[0]), torch.empty(shape[0]).long()
    numbers, smoothing, w = Rows(n, n, n, n), Smoothing(0.9, 0.1), torch.ones(1).expand(shape[1])
    with compiling("sm_90") as launches:
        k.cross_entropy_forward(x, target, w, -100, n, numbers)
        k.cross_entropy_backward(x, target, -100, numbers, n, y)
        k.smoothed_cross_entropy_forward(x, target, w, -100, smoothing, n, numbers)
        k.smoothed_cross_entropy_backward(x, target, w, -100, smoothing, numbers, n, y)
        k.soft_cross_entropy_forward(x, y, w, smoothing, n, numbers)
        k.soft_cross_entropy_backward(x, y, w, smoothing, numbers, n, x)
        k.soft_cross_entropy_target_backward(x, w, smoothing.keep, numbers, n, y)
        k.softmax_forward(x, y)
        k.softmax_backward(x, y, x)
        k.log_softmax_forward(x, y)
        k.log_softmax_backward(x, y, x)
    assert len(launches) == 11
    for launch in launches:
        assert launch.name.endswith("_rows")
        assert launch.registers_spilled == 0, launch.name
        ptx, loops = launch.kernel.asm["ptx"], [loop for loop in launch.loops() if re.search(r"(ld|st)\.global", loop)]
        assert loops or shape[1] == 1000, launch.name  # there one step is enough, and no loop is left
        for loop in loops:
            loads = re.findall(r"ld\.global[\w.:]*", loop)
            assert set(loads) <= {"ld.global.v4.b32", "ld.global.b32"}, launch.name
            assert loads.count("ld.global.b32") <= 1, launch.name  # the one class weight, of which the compiler knows no better
            assert set(re.findall(r"st\.global[\w.:]*", loop)) <= {"st.global.v4.b32"}, launch.name
        assert "ld.global.v4.b32" in ptx, launch.name
        assert ("st.global.v4.b32" in ptx) == (launch.name not in FORWARD_ONLY), launch.name
        assert len(re.findall(r"ld\.global\.b(?:16|32)", ptx)) <= 8, launch.name
        assert len(re.findall(r"st\.global\.b(?:16|32)", ptx)) <= 5, launch.name


FORWARD_ONLY = ("_cross_entropy_forward_rows", "_smoothed_cross_entropy_forward_rows", "_soft_cross_entropy_forward_rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hot_loops_on_amd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloss.kernels.cuda.launch.ASSUMED", Device(processors=304, warp=64))
    with compiling("gfx942") as launches:
        launch_index_targets(50257, dtype)
    for name in ("_cross_entropy_forward_rows", "_cross_entropy_backward_rows"):
        launch = of_name(launches, name)
        assert launch.registers_spilled == 0
        assert re.search(r"(global|buffer)_load_dwordx4", launch.kernel.asm["amdgcn"])
        if "backward" in name:
            assert re.search(r"(global|buffer)_store_dwordx4", launch.kernel.asm["amdgcn"])


FEW, LONG, IMAGES = (1000, 10), (300, 4099), (8, 1000, 256)


@pytest.mark.parametrize(
    ("target", "dtype", "shape"),
    [
        ("sm_80", torch.bfloat16, FEW),
        pytest.param("sm_80", torch.bfloat16, IMAGES, marks=pytest.mark.long),
        pytest.param("sm_80", torch.float64, LONG, marks=pytest.mark.long),
        pytest.param("sm_100", torch.float32, LONG, marks=pytest.mark.long),
        pytest.param("gfx942", torch.bfloat16, LONG, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_everything_compiles_without_spills(target: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with compiling(target) as launches:
        launch_everything(dtype, shape)
    for launch in launches:
        assert launch.registers_spilled == 0, launch.name


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float32, torch.float16, torch.float64))],
    ids=str,
)
def test_elementwise_kernels(dtype: torch.dtype) -> None:
    with compiling("sm_90") as launches:
        launch_elements(dtype)
    for launch in launches:
        assert launch.registers_spilled == 0, launch.name
        if dtype != torch.float64 and launch.name != "_sum":
            assert "ld.global.v4.b32" in launch.kernel.asm["ptx"], launch.name


def test_two_launches_for_few_huge_rows() -> None:
    with compiling("sm_90") as launches:
        launch_index_targets(128256, torch.bfloat16, rows=2)
    assert [launch.name for launch in launches[:2]] == ["_statistics_of_parts", "_cross_entropy_forward_parts"]
    assert launches[0].registers_spilled == 0
    (loop,) = [loop for loop in launches[0].loops() if "ld.global" in loop]
    assert set(re.findall(r"ld\.global[\w.:]*", loop)) == {"ld.global.v4.b32"}


CLUSTERS = pytest.mark.skipif(
    not k.cross_entropy_one_visit._TRITON_HAS_CLUSTERS, reason="clusters need Triton 3.8: before, long rows take two visits"
)


@pytest.mark.parametrize(
    ("target", "ctas"), [("sm_80", 0), pytest.param("sm_90", 8, marks=CLUSTERS), pytest.param("sm_100", 8, marks=CLUSTERS)]
)
def test_one_visit_by_a_cluster(target: str, ctas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_CLUSTER", "1")
    monkeypatch.setattr("fastloss.kernels.cuda.launch.ASSUMED", Device(processors=132, warp=32, clusters=ctas > 0))
    rows, classes = 1000, 128256
    logits, dloss, loss = untouched(rows, classes, dtype=torch.bfloat16), torch.empty(rows), torch.empty(rows)
    numbers = Rows(torch.empty(rows), None, torch.empty(rows), torch.empty(rows))
    with compiling(target) as launches:
        k.cross_entropy_forward_backward(
            logits, torch.empty(rows, dtype=torch.int64), torch.ones(1).expand(classes), -100, dloss, loss, numbers, logits
        )
    if ctas == 0:
        assert [launch.name for launch in launches] == ["_cross_entropy_forward_rows", "_cross_entropy_backward_rows"]
        return
    (launch,) = launches
    ptx = launch.kernel.asm["ptx"]
    assert launch.kernel.metadata.num_ctas == ctas
    assert launch.registers_spilled == 0
    assert "barrier.cluster" in ptx
    assert "mapa" in ptx
    assert set(re.findall(r"st\.global[\w.:]*", ptx)) == {"st.global.v4.b32", "st.global.b32"}  # the gradient; the row's numbers
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 4  # 32 logits for each thread


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1000, torch.bfloat16), *(pytest.param(c, d, marks=LONG_RUN) for c, d in [(16384, torch.float32), (10007, torch.float16)])],
    ids=str,
)
def test_one_visit_and_its_repair(classes: int, dtype: torch.dtype) -> None:
    """A row in registers, in 128-bit vectors. A repair looks at three numbers before anything else."""
    rows = 4096
    logits, dlogits = untouched(rows, classes, dtype=dtype), untouched(rows, classes, dtype=dtype)
    n, target, w = torch.empty(rows), torch.empty(rows).long(), torch.ones(1).expand(classes)
    numbers, last = Rows(n, None, n, n), torch.empty(2)
    with compiling("sm_90") as launches:
        k.foreseen_cross_entropy_forward_backward(logits, target, w, -100, Foreseen(last, n[:0], n[:1]), n, numbers, dlogits)
        k.cross_entropy_repair(logits, target, -100, numbers, n[:1].expand(rows), n[:1], last, dlogits)
    visit, repair = of_name(launches, "_cross_entropy_forward_backward_rows"), of_name(launches, "_cross_entropy_backward_rows")
    assert [launch.name for launch in launches] == [visit.name, "_sum", repair.name]
    for launch in (visit, repair):
        assert launch.registers_spilled == 0, launch.name
        ptx = launch.kernel.asm["ptx"]
        assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(re.findall(r"(?:ld|st)\.global[\w.:]*", ptx))
        assert len(re.findall(r"ld\.global\.b(?:16|32)", ptx)) <= 9, launch.name
    before_the_first_branch = re.split(r"\bbra\b", repair.kernel.asm["ptx"])[0]
    assert len(re.findall(r"ld\.global", before_the_first_branch)) == 3


def test_no_launch_waits_for_the_device() -> None:
    """Nothing in the package looks at a tensor's values on the host."""
    import inspect
    import pkgutil

    for module in pkgutil.iter_modules(k.__path__):
        source: Any = inspect.getsource(__import__(f"{k.__name__}.{module.name}", fromlist=["x"]))
        assert not re.search(r"\.item\(|\.tolist\(|\.cpu\(|synchronize|torch\.equal|autotune|libdevice\.\w|inline_asm", source), module.name
