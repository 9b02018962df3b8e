"""What shipped broken elsewhere: one test for each trap of the checklist, numbered as there."""

import itertools
import math
import mmap
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors, check, class_inputs, kernel_call

import fastloss
from fastloss.backends import kernels
from fastloss.kernels.groups import Rows, Smoothing

INF, NAN, LOWEST = math.inf, math.nan, torch.finfo(torch.float32).min

Made = tuple[str, Tensors, dict[str, Any]]


def made(name: str, shape: tuple[int, int] = (20, 11), dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    """A call by the name of its family: function, tensors, options."""
    if name in ("softmax", "log_softmax"):
        return name, {"input": torch.randn(shape).to(dtype)}, {"dim": 1}
    if name == "binary_cross_entropy_with_logits":
        return (
            name,
            {"input": torch.randn(shape).to(dtype), "target": torch.rand(shape).to(dtype), "pos_weight": torch.rand(shape[1]).to(dtype)},
            options,
        )
    if name == "binary_cross_entropy":
        return (
            name,
            {"input": torch.rand(shape).to(dtype), "target": torch.rand(shape).to(dtype), "weight": torch.rand(shape[1]).to(dtype)},
            options,
        )
    if name == "nll_loss":
        return name, class_inputs(shape, dtype, ignored=-100, weighted=True), options
    tensors = class_inputs(shape, dtype, ignored=None if name == "probabilities" else -100, weighted=True, soft=name == "probabilities")
    return "cross_entropy", tensors, {**options, "label_smoothing": 0.1 if name == "smoothed" else 0.0}


FAMILIES = [
    "indices",
    "smoothed",
    "probabilities",
    "nll_loss",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "softmax",
    "log_softmax",
]
SHAPES = {"rows_in_lanes": (20, 11), "row_by_row": (5, 70)}
on_every_family = pytest.mark.parametrize("family", FAMILIES)
on_both_walks = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


@on_every_family
@on_both_walks
def test_trap_1_nothing_of_the_users_is_written_to(family: str, shape: tuple[int, int]) -> None:
    function, tensors, options = made(family, shape)
    tensors = {k: None if t is None else t.clone() for k, t in tensors.items()}
    leaf = tensors["input"].requires_grad_()
    before = {k: (t.detach().clone(), t._version) for k, t in tensors.items() if t is not None}
    with torch.no_grad():
        kernel_call(function, **tensors, **options)
    loss = kernel_call(function, **tensors, **options)
    dloss = torch.randn_like(loss)
    upstream = dloss.clone()
    loss.backward(dloss)
    assert torch.equal(dloss, upstream)
    assert dloss._version == 0
    for name, (copy, version) in before.items():
        assert torch.equal(tensors[name].detach(), copy), name
        assert tensors[name]._version == version, name
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() != leaf.data_ptr()


@on_every_family
def test_trap_2_backward_twice(family: str) -> None:
    function, tensors, options = made(family)
    results = []
    for module in (fastloss, F):
        leaf = tensors["input"].clone().requires_grad_()
        loss = getattr(module, function)(**{**tensors, "input": leaf}, **options).sum()
        loss.backward(torch.tensor(1.0), retain_graph=True)
        once, leaf.grad = leaf.grad.clone(), None
        loss.backward(torch.tensor(3.7))
        torch.testing.assert_close(leaf.grad, once * 3.7)
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@on_every_family
@pytest.mark.parametrize("kind", ["scalar", "vector", "expanded", "every_other", "transposed"])
def test_trap_3_every_kind_of_upstream_gradient(family: str, kind: str) -> None:
    function, tensors, options = made(family)
    if kind == "scalar":
        if "softmax" not in function:
            for reduction, factor in itertools.product(("mean", "sum"), (0.0, -2.5, 1e-3)):
                gradients = []
                for module in (fastloss, F):
                    leaf = tensors["input"].clone().requires_grad_()
                    getattr(module, function)(**{**tensors, "input": leaf}, **{**options, "reduction": reduction}).backward(
                        torch.tensor(factor)
                    )
                    gradients.append(leaf.grad)
                torch.testing.assert_close(*gradients)
        return
    options = options if "softmax" in function else {**options, "reduction": "none"}
    shape = kernel_call(function, **tensors, **options).shape
    dloss = {
        "vector": torch.randn(shape),
        "expanded": torch.randn(1).expand(shape),
        "every_other": torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2],
        "transposed": torch.randn(shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
    }[kind]
    gradients = []
    for module in (fastloss, F):
        leaf = tensors["input"].clone().requires_grad_()
        getattr(module, function)(**{**tensors, "input": leaf}, **options).backward(dloss)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", ["indices", "smoothed", "nll_loss"])
@on_both_walks
def test_trap_4_all_rows_ignored(shape: tuple[int, int], family: str, reduction: str) -> None:
    function, tensors, options = made(family, shape)
    for weight in (None, tensors["weight"]):
        for image in (False, True):
            target = torch.full_like(tensors["target"], -100)
            logits = tensors["input"]
            if image:
                logits, target = logits.t().unsqueeze(0), target.unsqueeze(0)
                if weight is not None:
                    assert logits.shape[1] == weight.numel()
            check(function, {"input": logits.contiguous(), "target": target, "weight": weight}, reduction=reduction, **options)


# trap 5 (a vocabulary that is no multiple of the block, with a softcap) waits for the softcap; ragged sizes are in test_cross_entropy


SPECIAL_ROWS: dict[str, Callable[[int], torch.Tensor]] = {
    "all -1e4": lambda c: torch.full((c,), -1e4),
    "all equal": lambda c: torch.full((c,), 3.25),
    "all 0": lambda c: torch.zeros(c),
    "one +1e4": lambda c: torch.randn(c).index_fill(0, torch.tensor(c // 2), 1e4),
    "masked by -inf": lambda c: torch.randn(c).index_fill(0, torch.arange(0, c - 1, 2), -INF),
    "first 3/4 masked by -inf": lambda c: torch.randn(c).index_fill(0, torch.arange(c * 3 // 4), -INF),
    "last 3/4 masked by -inf": lambda c: torch.randn(c).index_fill(0, torch.arange(c // 4, c), -INF),
    "masked by the lowest number": lambda c: torch.randn(c).index_fill(0, torch.arange(c * 3 // 4), LOWEST),
    "one class left": lambda c: torch.full((c,), -INF).index_fill(0, torch.tensor(c - 1), 0.5),
    "all -inf": lambda c: torch.full((c,), -INF),
    "NaN": lambda c: torch.randn(c).index_fill(0, torch.tensor(c - 1), NAN),
    "all NaN": lambda c: torch.full((c,), NAN),
    "+inf": lambda c: torch.randn(c).index_fill(0, torch.tensor(1), INF),
    "two +inf": lambda c: torch.randn(c).index_fill(0, torch.tensor([0, c - 1]), INF),
    "+inf and -inf": lambda c: torch.tensor([INF, -INF]).repeat(c)[:c],
    "NaN and -inf": lambda c: torch.tensor([-INF, NAN]).repeat(c)[:c],
}


@pytest.mark.parametrize("row", SPECIAL_ROWS)
@pytest.mark.parametrize("classes", [3, 40, 70, 17000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_trap_6_special_logits(dtype: str, classes: int, row: str) -> None:
    """Among ordinary rows; 17000 classes are three chunks, so whole chunks are masked."""
    rows = 20 if classes < 100 else 2
    logits = torch.randn(rows, classes)
    logits[rows // 2] = SPECIAL_ROWS[row](classes)
    logits = logits.to(DTYPES[dtype])
    for target in (0, classes - 1, classes // 2):
        tensors: Tensors = {"input": logits, "target": torch.full((rows,), target)}
        check("cross_entropy", tensors, reduction="none")
        check("cross_entropy", tensors)
    if classes < 100:
        check("cross_entropy", tensors, reduction="none", label_smoothing=0.1, ulps=8)
        check(
            "cross_entropy",
            {"input": logits, "target": torch.softmax(torch.randn(rows, classes), 1).to(logits.dtype)},
            reduction="none",
            ulps=8,
        )
        check("softmax", {"input": logits}, dim=1, ulps=4, scale=4.0)
        check("log_softmax", {"input": logits}, dim=1)


@pytest.mark.parametrize("ignore_index", [0, -1, 255, 10], ids=["0", "-1", "255 > C", "C - 1"])
@pytest.mark.parametrize("family", ["indices", "smoothed", "nll_loss"])
@on_both_walks
def test_trap_7_unusual_ignore_index(shape: tuple[int, int], family: str, ignore_index: int) -> None:
    function, tensors, options = made(family, shape)
    ignore_index = shape[1] - 1 if ignore_index == 10 else ignore_index
    tensors["target"] = tensors["target"].where(tensors["target"] >= 0, ignore_index)
    assert (tensors["target"] == ignore_index).any()
    for reduction in REDUCTIONS:
        check(function, tensors, ignore_index=ignore_index, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", ["indices", "smoothed", "nll_loss"])
@on_both_walks
def test_trap_8_weight_zero_for_all_targets(shape: tuple[int, int], family: str, reduction: str) -> None:
    function, tensors, options = made(family, shape)
    tensors["weight"] = tensors["weight"].clone()
    tensors["weight"][3] = 0
    tensors["target"] = torch.full_like(tensors["target"], 3)
    check(function, tensors, reduction=reduction, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@on_both_walks
def test_trap_9_smoothing_with_weight(shape: tuple[int, int], soft: bool, smoothing: float) -> None:
    tensors = class_inputs(shape, torch.float32, weighted=True, soft=soft)
    for reduction in REDUCTIONS:
        check(
            "cross_entropy",
            tensors,
            wanted=("input", "target") if soft else ("input",),
            reduction=reduction,
            label_smoothing=smoothing,
            ulps=4,
        )


@pytest.mark.parametrize(
    "shape", [(4, 1), (4, 2), (0, 3), (0, 70), (1, 3), (1, 70), (2, 3, 0), (0, 3, 4), (2, 3, 0, 5), (2, 70, 0)], ids=str
)
def test_trap_10_degenerate_shapes(shape: tuple[int, ...]) -> None:
    for soft, reduction, smoothing in itertools.product((False, True), REDUCTIONS, (0.0, 0.1)):
        tensors = class_inputs(shape, torch.float32, soft=soft)
        check("cross_entropy", tensors, reduction=reduction, label_smoothing=smoothing, scale=1.0 if shape[1] == 1 else 0.0)
    for reduction in REDUCTIONS:
        check("nll_loss", class_inputs(shape, torch.float32), reduction=reduction)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@on_every_family
def test_trap_11_layouts(family: str, layout: str) -> None:
    for shape in SHAPES.values():
        function, tensors, options = made(family, shape)
        check(function, tensors, layouts={"input": layout}, **options)


@pytest.mark.parametrize("elements", [1, 3, 7, 13])
@on_every_family
def test_trap_12_misaligned_memory(family: str, elements: int) -> None:
    for shape, dtype in itertools.product(SHAPES.values(), (torch.float32, torch.bfloat16)):
        function, tensors, options = made(family, shape, dtype)
        memory = torch.full((tensors["input"].numel() + 16,), NAN, dtype=dtype)
        shifted = memory[elements : elements + tensors["input"].numel()].view(shape)
        shifted.copy_(tensors["input"])
        assert shifted.data_ptr() % 64
        aligned = kernel_call(function, **tensors, **options)
        assert torch.equal(kernel_call(function, **{**tensors, "input": shifted}, **options), aligned)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_trap_13_other_integer_targets_raise_like_torch(function: str, dtype: torch.dtype) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 1]).to(dtype)
    with pytest.raises(RuntimeError) as theirs:
        getattr(F, function)(logits, target)
    with pytest.raises(RuntimeError) as mine:
        getattr(fastloss, function)(logits, target)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("bad", [-1, -101, 10**15, -(10**15), 2**31, 2**32, "C"], ids=str)
@pytest.mark.parametrize("family", ["indices", "smoothed", "nll_loss"])
@on_both_walks
def test_trap_14_out_of_bounds_targets(shape: tuple[int, int], family: str, bad: int | str) -> None:
    """An IndexError, from far outside a read would be a crash; all reductions, and where the kernels would not need the row's weight."""
    function, tensors, options = made(family, shape)
    number = shape[1] if isinstance(bad, str) else bad
    tensors["target"] = tensors["target"].clone()
    tensors["target"][-1] = number
    for reduction, weight in itertools.product(REDUCTIONS, (None, tensors["weight"])):
        with pytest.raises(IndexError, match=f"Target {number} is out of bounds."):
            kernel_call(function, **{**tensors, "weight": weight}, reduction=reduction, **options)


@pytest.mark.long
def test_trap_15_more_than_2_to_the_31_elements() -> None:
    """Rows on both sides of element 2**31, without the memory: all rows but two share one."""
    classes = 1 << 16
    rows = (1 << 15) + 2
    memory = torch.randn(classes * 2, dtype=torch.float16)
    logits = memory.as_strided((rows, classes), (0, 1))
    target = torch.arange(rows) % classes
    assert logits.numel() > 2**31
    loss = kernel_call("cross_entropy", logits, target, reduction="none")
    expected = torch.logsumexp(memory[:classes].double(), 0) - memory[target].double()
    assert (loss.double() - expected).abs().max() < 2e-2


def test_trap_15_offsets_beyond_2_to_the_31() -> None:
    """Index arithmetic in 64 bits: strides as large as 2**31 elements, in a mapping of which few pages are touched."""
    step = (1 << 31) + 64
    try:
        block = mmap.mmap(-1, 4 * (3 * step + 256), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    except (OSError, ValueError, OverflowError):
        pytest.skip("no room for a large mapping")
    memory = torch.frombuffer(block, dtype=torch.float32)
    for shape, strides in (((3, 70), (step, 1)), ((70, 3), (1, step)), ((2, 5, 3), (step, 7, 2))):
        small = torch.randn(shape)
        logits = memory.as_strided(shape, strides)
        logits.copy_(small)
        target = torch.randint(shape[1], shape[:1] + shape[2:])
        for options in ({}, {"label_smoothing": 0.1}):
            mine, theirs = logits.detach().requires_grad_(), small.clone().requires_grad_()
            loss, expected = kernel_call("cross_entropy", mine, target, **options), F.cross_entropy(theirs, target, **options)
            torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(kernel_call("softmax", logits, 1), torch.softmax(small, 1))


@on_every_family
def test_trap_16_second_derivatives_are_right(family: str) -> None:
    """Those by the input and by the upstream gradient; nll_loss has none by the input."""
    function, tensors, options = made(family, (4, 5), torch.float64)
    results = []
    for module in (fastloss, F):
        leaf = (tensors["input"].detach() * 0.8 + 0.1).requires_grad_()
        loss = getattr(module, function)(**{**tensors, "input": leaf}, **options)
        dloss = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape).requires_grad_()
        (gradient,) = torch.autograd.grad(loss, leaf, dloss, create_graph=True)
        by_dloss, by_input = torch.autograd.grad((gradient**2).sum(), (dloss, leaf), allow_unused=True)
        if function == "nll_loss":
            by_input = torch.zeros_like(leaf) if by_input is None else by_input
        else:
            assert by_input.abs().max() > 0
        results.append((by_dloss, by_input))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", [("input",), ("target",), ("input", "target")], ids=str)
def test_trap_17_each_operand_alone_requires_grad(wanted: tuple[str, ...]) -> None:
    check("cross_entropy", class_inputs((20, 11), torch.float32, weighted=True, soft=True), wanted=wanted)
    for function in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
        tensors = {"input": torch.rand(4, 5), "target": torch.rand(4, 5)}
        results = []
        for module in (fastloss, F):
            leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in tensors.items()}
            results.append(torch.autograd.grad(getattr(module, function)(**leaves), [leaves[k] for k in wanted], torch.tensor(1.7)))
        torch.testing.assert_close(*results)


# trap 18 (fullgraph compilation, ignored rows, dynamic shapes) is test_compile; trap 19 (the second GPU) needs two GPUs


@on_every_family
def test_trap_20_same_bits_on_every_run_and_for_every_number_of_threads(family: str) -> None:
    for shape in ((5000, 11), (37, 20000)):
        function, tensors, options = made(family, shape)
        runs = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = tensors["input"].clone().requires_grad_()
            loss = kernel_call(function, **{**tensors, "input": leaf}, **options)
            loss.backward(torch.ones_like(loss) * 1.7)
            runs.append((loss.detach(), leaf.grad))
        for loss, gradient in runs[1:]:
            assert torch.equal(loss, runs[0][0])
            assert torch.equal(gradient, runs[0][1])


def test_trap_21_import_without_numba_and_triton() -> None:
    """And the losses still work, on torch, with the reason told."""
    script = """
import sys
sys.modules["numba"] = sys.modules["triton"] = sys.modules["llvmlite"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("numba", "triton") else find(name, *a)
import torch, fastloss
fastloss.config.min_numel = 0
x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, 3, 4])
fastloss.cross_entropy(x, y).backward()
print(fastloss.explain(fastloss.cross_entropy, x, y))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "numba is not installed" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
@on_both_walks
def test_trap_22_every_element_is_written(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], family: str) -> None:
    """Results and gradients come from memory full of NaN, whatever allocated it."""

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, NAN)

    monkeypatch.setattr(fastloss.memory, "empty_like", poisoned)
    for reduction in ("none", "mean"):
        function, tensors, options = made(family, shape)
        if "softmax" not in function:
            options = {**options, "reduction": reduction}
        for layout in ("contiguous", "transposed", "padded"):
            check(function, tensors, layouts={"input": layout}, ulps=8, scale=1.0, **options)


def test_trap_22_launchers_write_only_where_they_should() -> None:
    """Buffers of NaN with NaN around them: all inside is written, nothing around is."""
    numba = kernels("numba")
    for rows, classes, dtype in ((20, 11, torch.float32), (5, 70, torch.float32), (5, 70, torch.float16), (20, 11, torch.float64)):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        logits, target, ones = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,)), torch.ones(1, dtype=compute)
        target[::3] = -100

        def guarded(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            memory = torch.full((math.prod(shape) + 64,), NAN, dtype=dtype)
            return memory, memory[32:-32].view(shape)

        vectors = [guarded(rows, dtype=compute) for _ in range(5)]
        whole, dlogits = guarded(rows, classes, dtype=dtype)
        loss, row_weight, top, total, mass = (inner for _, inner in vectors)
        numbers, smoothing = Rows(row_weight, mass, top, total), Smoothing(0.9, 0.1 / classes)
        weight = ones.expand(classes)
        for smoothed in (False, True):
            for memory, _ in (*vectors, (whole, dlogits)):
                memory.fill_(NAN)
            if smoothed:
                numba.smoothed_cross_entropy_forward(logits, target, weight, -100, smoothing, loss, numbers)
                numba.smoothed_cross_entropy_backward(logits, target, weight, -100, smoothing, numbers, ones.expand(rows), dlogits)
            else:
                numba.cross_entropy_forward(logits, target, weight, -100, loss, numbers)
                numba.cross_entropy_backward(logits, target, -100, numbers, ones.expand(rows), dlogits)
            for memory, inner in (*vectors[: 5 if smoothed else 4], (whole, dlogits)):
                assert not inner.isnan().any()
                assert memory[:32].isnan().all()
                assert memory[-32:].isnan().all()
            assert (dlogits[target == -100] == 0).all()
            ignored = [loss, row_weight, mass] if smoothed else [loss, row_weight]
            assert all((vector[target == -100] == 0).all() for vector in ignored)


@on_both_walks
def test_trap_22_launchers_take_a_class_weight_of_any_stride(shape: tuple[int, int]) -> None:
    """The functions hand over dense weights; the launchers' contract is any stride, 0 included."""
    numba = kernels("numba")
    (rows, classes), smoothing = shape, Smoothing(0.9, 0.1 / shape[1])
    logits, soft, target = torch.randn(shape), torch.rand(shape), torch.randint(classes, (rows,))
    apart = torch.full((classes * 2,), NAN)
    apart[::2] = torch.rand(classes)
    dloss = torch.randn(rows)
    for weight in (apart[::2], torch.tensor([1.7]).expand(classes)):
        results = []
        for w in (weight, weight.contiguous()):
            loss, row_weight, mass, top, total, soft_loss, soft_mass, hard_loss = (torch.full((rows,), NAN) for _ in range(8))
            dlogits, dsoft, dtarget = (torch.full((rows, classes), NAN) for _ in range(3))
            numbers, soft_numbers = Rows(row_weight, mass, top, total), Rows(None, soft_mass, top, total)
            numba.cross_entropy_forward(logits, target, w, -100, hard_loss, numbers)
            numba.smoothed_cross_entropy_forward(logits, target, w, -100, smoothing, loss, numbers)
            numba.smoothed_cross_entropy_backward(logits, target, w, -100, smoothing, numbers, dloss, dlogits)
            numba.soft_cross_entropy_forward(logits, soft, w, smoothing, soft_loss, soft_numbers)
            numba.soft_cross_entropy_backward(logits, soft, w, smoothing, soft_numbers, dloss, dsoft)
            numba.soft_cross_entropy_target_backward(logits, w, smoothing.keep, soft_numbers, dloss, dtarget)
            results.append((hard_loss, row_weight, loss, mass, dlogits, soft_loss, soft_mass, dsoft, dtarget))
        torch.testing.assert_close(*results)
