"""Numbers at the edges, against fifty decimal digits where float64 is not enough."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, Tensors, check, class_inputs, kernel_call, on_device

mpmath.mp.dps = 50
INF = math.inf


@pytest.mark.parametrize("shift", [1e4, -1e4, 5e3, -5e3, 1e5], ids=str)
@pytest.mark.parametrize("shape", [(20, 11), (3, 70), (2, 9000)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shifted_logits_lose_no_digits(dtype: str, shape: tuple[int, int], shift: float) -> None:
    """The logits are rounded to the shifted scale; from there on the loss must be as exact as without the shift."""
    logits = (torch.randn(shape) * 3 + shift).to(DTYPES[dtype])
    target = torch.randint(shape[1], shape[:1])
    for options in ({}, {"label_smoothing": 0.1}):
        plain = kernel_call("cross_entropy", logits - shift, target, reduction="none", **options)
        shifted = kernel_call("cross_entropy", logits, target, reduction="none", **options)
        torch.testing.assert_close(shifted, plain, rtol=4 * torch.finfo(logits.dtype).eps, atol=0)
        check("cross_entropy", {"input": logits, "target": target}, reduction="none", **options)
    soft = torch.softmax(torch.randn(shape), 1).to(logits.dtype)
    check("cross_entropy", {"input": logits, "target": soft}, wanted=("input", "target"), reduction="none", ulps=8)
    check("log_softmax", {"input": logits}, dim=1)
    check("softmax", {"input": logits}, dim=1, scale=4.0)


def exact(logits: torch.Tensor, target: int) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    numbers = [mpmath.mpf(v) for v in logits.tolist()]
    powers = [mpmath.exp(v - max(numbers)) for v in numbers]
    total = mpmath.fsum(powers)
    loss = mpmath.log(total) - (numbers[target] - max(numbers))
    return loss, [p / total - (c == target) for c, p in enumerate(powers)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 11, 70, 1000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 300.0])
def test_against_fifty_digits(spread: float, classes: int, dtype: str) -> None:
    eps, ulps = torch.finfo(DTYPES[dtype]).eps, on_device(cpu=8, cuda=32)
    for rows in (1, 20):
        logits = (torch.randn(rows, classes) * spread).to(DTYPES[dtype]).requires_grad_()
        target = torch.randint(classes, (rows,))
        loss = kernel_call("cross_entropy", logits, target, reduction="none")
        loss.sum().backward()
        for row in range(min(rows, 3)):
            truth, gradient = exact(logits[row].detach(), int(target[row]))
            assert abs(loss[row].item() - truth) <= ulps * eps * max(truth, mpmath.mpf("0.1"))
            reach = ulps + (logits[row].max() - logits[row].min()).item()  # the ulp of x - top
            for c, (mine, expected) in enumerate(zip(logits.grad[row].tolist(), gradient, strict=True)):
                # every probability to a few ulp of itself, not only of the largest; p - 1 to those of 1
                scale = 1 if c == target[row] else abs(expected)
                assert abs(mine - expected) <= reach * eps * scale + 2 * mpmath.mpf(torch.finfo(torch.float32).smallest_normal)


def test_a_sure_and_right_prediction_keeps_its_tiny_loss() -> None:
    for gap in (10.0, 20.0, 40.0, 80.0):
        for rows, classes in ((20, 3), (2, 70)):
            logits = torch.full((rows, classes), -gap)
            logits[:, 1] = 0
            loss = kernel_call("cross_entropy", logits, torch.ones(rows, dtype=torch.long), reduction="none")
            theirs = F.cross_entropy(logits, torch.ones(rows, dtype=torch.long), reduction="none")
            truth = math.log1p((classes - 1) * math.exp(-gap))
            # on CUDA an ulp of the total, which is 1 and next to nothing
            assert ((loss - truth).abs() <= (theirs - truth).abs() + on_device(cpu=1e-37, cuda=2.0**-23)).all()


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", ["lowest", "lowest / 2", "float32 lowest"])
def test_rows_masked_by_the_lowest_number(dtype: str, kind: str, value: str) -> None:
    """A fill with finfo.min, of single classes and of whole rows, in the dtype of the logits."""
    fill = {
        "lowest": torch.finfo(DTYPES[dtype]).min,
        "lowest / 2": torch.finfo(DTYPES[dtype]).min / 2,
        "float32 lowest": torch.finfo(torch.float32).min,
    }[value]
    options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    for shape in ((20, 11), (3, 70)):
        tensors = class_inputs(shape, DTYPES[dtype], soft=kind == "probabilities")
        for columns in (slice(None), slice(None, -1), slice(0, 1)):
            tensors["input"] = torch.randn(shape, dtype=DTYPES[dtype])
            tensors["input"][1, columns] = fill
            if kind == "indices" or columns == slice(None):
                check("cross_entropy", tensors, reduction="none", ulps=8, **options)
            check("softmax", {"input": tensors["input"]}, dim=1, scale=1.0)
            check("log_softmax", {"input": tensors["input"]}, dim=1)


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("value", [1e20, 1e30, 1e37, 1e38])
def test_huge_logits(value: float, kind: str) -> None:
    options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    for shape in ((20, 11), (3, 70)):
        tensors = class_inputs(shape, torch.float32, soft=kind == "probabilities")
        for sign in (1, -1):
            tensors["input"] = torch.randn(shape)
            tensors["input"][1, 3] = sign * value
            tensors["input"][2, :3] = sign * value
            check("cross_entropy", tensors, reduction="none", ulps=8, **options)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
def test_extreme_class_weights(kind: str, factor: float) -> None:
    for shape in ((20, 11), (3, 70)):
        tensors = class_inputs(shape, torch.float32, weighted=True, soft=kind == "probabilities")
        tensors["weight"] = tensors["weight"] * factor
        tensors["weight"][0] = 1.0
        check("cross_entropy", tensors, label_smoothing=0.1 if kind == "smoothed" else 0.0, ulps=8)


@pytest.mark.parametrize("kind", ["indices", "smoothed", "nll_loss"])
def test_nan_in_an_ignored_row_is_not_looked_at(kind: str) -> None:
    """A deliberate difference: torch's gradient of such a row is NaN, ours is zero, as for every ignored row."""
    for shape in ((20, 11), (3, 70)):
        logits = torch.randn(shape)
        logits[1] = math.nan
        target = torch.randint(shape[1], shape[:1])
        target[1] = -100
        function = "nll_loss" if kind == "nll_loss" else "cross_entropy"
        options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
        mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, expected = kernel_call(function, mine, target, **options), getattr(F, function)(theirs, target, **options)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        assert (mine.grad[1] == 0).all()
        assert kind == "nll_loss" or theirs.grad[1].isnan().all()
        rest = torch.arange(shape[0]) != 1
        torch.testing.assert_close(mine.grad[rest], theirs.grad[rest])


def test_exponentials_below_the_smallest_normal_number_are_zero() -> None:
    """A deliberate difference: torch may return denormal probabilities, which are slow everywhere after."""
    logits = torch.tensor([[0.0, -88.0, -100.0, -104.0]])
    mine, theirs = kernel_call("softmax", logits, 1), torch.softmax(logits, 1)
    assert ((mine - theirs).abs() <= torch.finfo(torch.float32).smallest_normal).all()
    assert mine[0, 2] == 0


@pytest.mark.parametrize("gap", [0.5, 20.0, 80.0, 87.0, 87.3, 87.4, 88.0, 103.0, 1e3])
def test_exp_near_the_end_of_its_range(gap: float) -> None:
    for rows in (1, 20):
        check("softmax", {"input": torch.tensor([[0.0, -gap, -gap / 2]]).repeat(rows, 1)}, dim=1)


@pytest.mark.parametrize("classes", [8192, 8193, 16384 + 1, 50257, 128256])
def test_many_classes_sum_accurately(classes: int) -> None:
    tensors: Tensors = {"input": torch.randn(2, classes), "target": torch.randint(classes, (2,))}
    check("cross_entropy", tensors, reduction="none")
    check("cross_entropy", {**tensors, "input": torch.zeros(2, classes)}, reduction="none")
    check("softmax", {"input": tensors["input"]}, dim=1, scale=0.01)


def test_many_rows_sum_accurately() -> None:
    """300 000 equal losses: their float32 sum one by one would be off by thousands of ulp."""
    logits, target = torch.full((300_000, 3), 0.1), torch.zeros(300_000, dtype=torch.long)
    assert abs(kernel_call("cross_entropy", logits, target).item() - math.log(3)) < 3e-7
    assert abs(kernel_call("cross_entropy", logits, target, reduction="sum").item() / 300_000 - math.log(3)) < 3e-7


@pytest.mark.parametrize("function", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
@pytest.mark.parametrize("logit", [0.0, 0.3])
def test_many_equal_losses_sum_accurately(logit: float, function: str) -> None:
    """Adding equal numbers one by one always rounds to the same side."""
    for size in (8192, 900_000):
        logits = torch.full((size,), logit)
        tensors: Tensors = {"input": logits if "logits" in function else logits.sigmoid(), "target": torch.ones(size)}
        check(function, tensors)
        check(function, tensors, reduction="sum")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sums_do_not_overflow(dtype: str) -> None:
    """The sum of 4000 losses near 30 leaves float16, their mean does not."""
    logits = torch.zeros(4000, 3).to(DTYPES[dtype])
    logits[:, 1] = 30
    loss = kernel_call("cross_entropy", logits, torch.zeros(4000, dtype=torch.long))
    assert abs(loss.item() - 30) < 0.2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once_to_even(dtype: str) -> None:
    """Results equal the correctly rounded truth but where the truth lies within 1e-3 ulp of a tie (on CUDA, 5e-3)."""
    logits = (torch.randn(50, 37) * 3).to(DTYPES[dtype])
    truth = torch.softmax(logits.double(), 1)
    mine = kernel_call("softmax", logits, 1)
    rounded = truth.to(DTYPES[dtype])
    wrong = mine != rounded
    if wrong.any():
        up = torch.nextafter(rounded.float(), torch.tensor(INF)).double()
        assert wrong.double().mean() < on_device(cpu=1e-3, cuda=5e-3), (mine[wrong], rounded[wrong], up[wrong])


PAYLOADS = {torch.float32: (0x7FFFFFFF, 0x7F800001, -1, -0x3FFFFF), torch.float64: (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001, -1)}
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
CALLS = {
    "indices": ("cross_entropy", {"reduction": "none"}),
    "smoothed": ("cross_entropy", {"reduction": "none", "label_smoothing": 0.1}),
    "softmax": ("softmax", {"dim": 1}),
    "log_softmax": ("log_softmax", {"dim": 1}),
    "bce": ("binary_cross_entropy_with_logits", {"reduction": "none"}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_any_payload_stays_one(dtype: str, call: str) -> None:
    """CUDA's NaN is 0x7fffffff; arithmetic on its bits must not make a number of it."""
    function, options = CALLS[call]
    kind = DTYPES[dtype]
    for shape in ((20, 11), (5, 70), (3, 9000)):
        for payload in PAYLOADS.get(kind, (0x7FFF, -1)):
            logits = torch.randn(shape).to(kind)
            logits.view(INTEGERS[kind])[1, shape[1] // 2] = payload
            assert logits.isnan().sum() == 1
            tensors = {"input": logits}
            if function == "cross_entropy":
                tensors["target"] = torch.zeros(shape[0], dtype=torch.long)
            elif call == "bce":
                tensors["target"] = torch.rand(shape).to(kind)
            mine = kernel_call(function, *tensors.values(), **options)
            assert torch.equal(mine.isnan(), getattr(F, function)(*tensors.values(), **options).isnan())
            leaf = logits.clone().requires_grad_()
            kernel_call(function, leaf, *list(tensors.values())[1:], **options).float().nansum().backward()
            if call != "bce":
                assert leaf.grad[1].isnan().all()
            assert leaf.grad.isnan().sum() == (1 if call == "bce" else shape[1])
