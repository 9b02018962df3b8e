"""Whatever torch rejects is rejected with torch's exception and text; whatever it accepts, however odd, gives torch's result."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import fastloss

f16, bf16, f32, f64, i64 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64
INF, NAN = float("inf"), float("nan")


class Call(NamedTuple):
    name: str
    function: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


CALLS: list[Call] = []


def call(name: str, function: str, make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    CALLS.append(Call(name, function, make))


def x(*shape: int, dtype: torch.dtype = f32, grad: bool = False) -> torch.Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return tensor.requires_grad_(grad)


def u(*shape: int, dtype: torch.dtype = f32, grad: bool = False) -> torch.Tensor:
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return tensor.requires_grad_(grad)


def y(*values: int, dtype: torch.dtype = i64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def both(name: str, make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    call(name, "cross_entropy", make)
    call(name, "nll_loss", make)


# ---------------------------------------------------------------- class indices: cross_entropy and nll_loss

both("target -1", lambda: ((x(3, 5), y(0, -1, 2)), {}))
both("target = C", lambda: ((x(3, 5), y(0, 5, 2)), {}))
both("target far below", lambda: ((x(3, 5), y(0, -(2**40), 2)), {}))
both("target far above", lambda: ((x(30, 5), torch.full((30,), 2**40)), {}))
both("target -1, none", lambda: ((x(3, 5), y(0, -1, 2)), {"reduction": "none"}))
both("target = C = ignore_index", lambda: ((x(3, 5), y(0, 5, 2)), {"ignore_index": 5}))
both("target -100", lambda: ((x(3, 5), y(0, -100, 2)), {}))
both("out of range in an image", lambda: ((x(2, 5, 3), torch.full((2, 3), 7)), {}))
both("out of range in one of many rows", lambda: ((x(3, 70), y(0, 70, 2)), {}))
both("out of range and requires grad", lambda: ((x(3, 5, grad=True), y(0, 5, 2)), {}))
both("batch mismatch", lambda: ((x(3, 5), y(0, 1)), {}))
both("target (3, 1)", lambda: ((x(3, 5), y(0, 1, 2)[:, None]), {}))
both("target (3, 5) int64", lambda: ((x(3, 5), torch.zeros(3, 5, dtype=i64)), {}))
both("target (3, 4) float", lambda: ((x(3, 5), x(3, 4)), {}))
for _dtype in (f32, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, f64, bf16, torch.complex64):
    both(f"target {_dtype}", lambda d=_dtype: ((x(3, 5), torch.tensor([0, 1, 1]).to(d)), {}))
for _dtype in (i64, torch.int32, torch.bool, torch.complex64, f16, bf16, f64, torch.float8_e4m3fn):
    both(f"input {_dtype}", lambda d=_dtype: ((x(3, 5).to(d), y(0, 1, 2)), {}))
both("weight too short", lambda: ((x(3, 5), y(0, 1, 2), u(4)), {}))
both("weight 2-d", lambda: ((x(3, 5), y(0, 1, 2), u(1, 5)), {}))
both("weight float64", lambda: ((x(3, 5), y(0, 1, 2), u(5, dtype=f64)), {}))
both("weight float32 for float16", lambda: ((x(3, 5, dtype=f16), y(0, 1, 2), u(5)), {}))
both("weight int64", lambda: ((x(3, 5), y(0, 1, 2), torch.ones(5, dtype=i64)), {}))
both("weight requires grad", lambda: ((x(3, 5), y(0, 1, 2), u(5, grad=True)), {}))
both("weight and input require grad", lambda: ((x(3, 5, grad=True), y(0, 1, 2), u(5, grad=True)), {}))
both("weight a list", lambda: ((x(3, 5), y(0, 1, 2), [1.0] * 5), {}))
for _reduction in ("bad", "elementwise_mean", None, "Mean", 1):
    both(f"reduction {_reduction!r}", lambda r=_reduction: ((x(3, 5), y(0, 1, 2)), {"reduction": r}))
for _options in (
    {"size_average": False},
    {"size_average": True},
    {"reduce": False},
    {"reduce": True},
    {"size_average": False, "reduce": True},
):
    both(str(_options), lambda o=_options: ((x(3, 5), y(0, 1, 2)), o))
for _shape in ((0, 5), (0, 5, 2, 2), (2, 5, 0), (2, 5, 0, 3), (0, 0), (0, 70)):
    for _reduction in ("mean", "sum", "none"):
        both(
            f"input {_shape} {_reduction}",
            lambda s=_shape, r=_reduction: ((x(*s), torch.zeros(s[:1] + s[2:], dtype=i64)), {"reduction": r}),
        )
both("C = 0", lambda: ((x(3, 0), y(0, 0, 0)), {}))
both("C = 0, all ignored", lambda: ((x(3, 0), y(-100, -100, -100)), {}))
both("C = 0, all ignored, weight", lambda: ((x(3, 0), y(-100, -100, -100), u(0)), {}))
both("C = 1", lambda: ((x(3, 1), y(0, 0, 0)), {}))
for _reduction in ("mean", "sum", "none"):
    both(f"all ignored {_reduction}", lambda r=_reduction: ((x(3, 5, grad=True), y(-100, -100, -100)), {"reduction": r}))
both("all ignored in an image", lambda: ((x(2, 5, 3, grad=True), torch.full((2, 3), -100)), {}))
both("target weights are 0", lambda: ((x(3, 5), y(0, 0, 0), torch.tensor([0.0, 1, 1, 1, 1])), {}))
both("one row, target ()", lambda: ((x(5), torch.tensor(2)), {}))
both("one row, target (), none", lambda: ((x(5), torch.tensor(2)), {"reduction": "none"}))
both("one row, target (1,)", lambda: ((x(5), y(2)), {}))
both("one row, target (1,), none", lambda: ((x(5), y(2)), {"reduction": "none"}))
both("one row, target (2,)", lambda: ((x(5), y(2, 1)), {}))
both("one row, target ignored", lambda: ((x(5), torch.tensor(-100)), {}))
both("one row, out of range", lambda: ((x(5), torch.tensor(5)), {}))
both("0-d input", lambda: ((x(), torch.tensor(0)), {}))
both("0-d input, target (1,)", lambda: ((x(), y(0)), {}))
both("target a list", lambda: ((x(3, 5), [0, 1, 2]), {}))
both("input a list", lambda: (([[0.0, 1.0]], y(0)), {}))
both("target None", lambda: ((x(3, 5), None), {}))
both("no target", lambda: ((x(3, 5),), {}))
for _index in (1.0, True, None, 2**63, -(2**63) - 1, "0"):
    both(f"ignore_index {_index!r}", lambda i=_index: ((x(3, 5), y(0, 1, 2)), {"ignore_index": i}))
both("unknown option", lambda: ((x(3, 5), y(0, 1, 2)), {"smoothing": 0.1}))
both("NaN logits", lambda: ((row(NAN, 1, 2), y(1)), {}))
both("+inf at target", lambda: ((row(INF, 1, 2), y(0)), {}))
both("+inf elsewhere", lambda: ((row(INF, 1, 2), y(1)), {}))
both("-inf elsewhere", lambda: ((row(-INF, 1, 2), y(1)), {}))
both("-inf at target", lambda: ((row(-INF, 1, 2), y(0)), {}))
both("all -inf", lambda: ((row(-INF, -INF), y(0)), {}))
both("-inf in an ignored row", lambda: ((torch.tensor([[-INF, 1], [1.0, 1]]), y(-100, 0)), {}))
both("NaN in an ignored row", lambda: ((torch.tensor([[NAN, 1], [1.0, 1]]), y(-100, 0)), {}))
both("meta", lambda: ((x(3, 5).to("meta"), y(0, 1, 2).to("meta")), {}))
both("target on meta", lambda: ((x(3, 5), y(0, 1, 2).to("meta")), {}))
both("sparse input", lambda: ((x(3, 5).to_sparse(), y(0, 1, 2)), {}))
both("spatial mismatch", lambda: ((x(2, 5, 3), torch.zeros(2, 4, dtype=i64)), {}))
both("4-d spatial mismatch", lambda: ((x(2, 5, 3, 3), torch.zeros(2, 3, 4, dtype=i64)), {}))
both("5-d spatial mismatch", lambda: ((x(2, 5, 3, 3, 2), torch.zeros(2, 3, 4, 2, dtype=i64)), {}))
both("integer gradient", lambda: ((x(3, 5, grad=True), y(0, 1, 2)), {}))
both("expanded input", lambda: ((x(1, 5).expand(3, 5), y(0, 1, 2)), {}))

# ---------------------------------------------------------------- cross_entropy alone

for _smoothing in (-0.1, 1.5, 1.0, 0, 1, True, NAN, INF, "0.1", None, torch.tensor(0.1)):
    call(f"label_smoothing {_smoothing!r}", "cross_entropy", lambda s=_smoothing: ((x(3, 5), y(0, 1, 2)), {"label_smoothing": s}))
for _smoothing in (0.1, 1.0):
    _o = {"label_smoothing": _smoothing}
    call(f"target -1, {_o}", "cross_entropy", lambda o=_o: ((x(3, 5), y(0, -1, 2)), o))
    call(f"weight requires grad, {_o}", "cross_entropy", lambda o=_o: ((x(3, 5), y(0, 1, 2), u(5, grad=True)), o))
    call(f"all ignored, {_o}", "cross_entropy", lambda o=_o: ((x(3, 5, grad=True), y(-100, -100, -100)), o))
    call(f"target weights are 0, {_o}", "cross_entropy", lambda o=_o: ((x(3, 5), y(0, 0, 0), torch.tensor([0.0, 1, 1, 1, 1])), o))
    call(f"N = 0, {_o}", "cross_entropy", lambda o=_o: ((x(0, 5), y()), o))
    call(f"C = 0, {_o}", "cross_entropy", lambda o=_o: ((x(3, 0), y(0, 0, 0)), o))
    call(f"-inf elsewhere, {_o}", "cross_entropy", lambda o=_o: ((row(-INF, 1, 2), y(1)), o))
    call(f"-inf elsewhere, its weight 0, {_o}", "cross_entropy", lambda o=_o: ((row(-INF, 1, 2), y(1), torch.tensor([0.0, 1, 1])), o))
for _dtype in (f64, bf16, f16, torch.complex64):
    call(f"probabilities {_dtype}", "cross_entropy", lambda d=_dtype: ((x(3, 5), u(3, 5).to(d)), {}))
call("input float64, probabilities float32", "cross_entropy", lambda: ((x(3, 5, dtype=f64), u(3, 5)), {}))
for _weight in ("float64", "short", "one", "grad", "2-d"):
    _made = {"float64": u(5, dtype=f64), "short": u(4), "one": u(1), "grad": u(5, grad=True), "2-d": u(1, 5)}[_weight]
    call(f"probabilities, weight {_weight}", "cross_entropy", lambda w=_made: ((x(3, 5, grad=True), u(3, 5), w), {}))
for _shape in ((0, 5), (3, 0), (2, 5, 0)):
    for _reduction in ("mean", "sum", "none"):
        call(f"probabilities {_shape} {_reduction}", "cross_entropy", lambda s=_shape, r=_reduction: ((x(*s), u(*s)), {"reduction": r}))
        call(
            f"smoothed probabilities {_shape} {_reduction}", "cross_entropy",
            lambda s=_shape, r=_reduction: ((x(*s), u(*s)), {"reduction": r, "label_smoothing": 0.1}),
        )  # fmt: skip
call("one row of probabilities", "cross_entropy", lambda: ((x(5), u(5)), {}))
call("one row of probabilities, none", "cross_entropy", lambda: ((x(5), u(5)), {"reduction": "none"}))
call("one class, probabilities (1,)", "cross_entropy", lambda: ((x(1), u(1)), {"reduction": "none"}))
call("0-d input, float target", "cross_entropy", lambda: ((x(), u()), {}))
for _index in (0, 2, -5, -100, -1, True):
    call(f"probabilities, ignore_index {_index}", "cross_entropy", lambda i=_index: ((x(3, 5), u(3, 5)), {"ignore_index": i}))
call("-inf elsewhere, probability 0 there", "cross_entropy", lambda: ((row(-INF, 1, 2), row(0, 1, 0)), {}))
call("-inf elsewhere, probability 1 there", "cross_entropy", lambda: ((row(-INF, 1, 2), row(1, 0, 0)), {}))
call("+inf, probabilities", "cross_entropy", lambda: ((row(INF, 1, 2), row(0, 1, 0)), {}))
call("NaN, probabilities", "cross_entropy", lambda: ((row(NAN, 1, 2), row(0, 1, 0)), {}))
call("NaN probability", "cross_entropy", lambda: ((row(3, 1, 2), row(0, NAN, 0)), {}))
call("negative probabilities", "cross_entropy", lambda: ((x(3, 5), x(3, 5)), {}))

# ---------------------------------------------------------------- the binary cross-entropies

for _function in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
    call("target (5,)", _function, lambda: ((u(3, 5), u(5)), {}))
    call("target (1, 5)", _function, lambda: ((u(3, 5), u(1, 5)), {}))
    for _dtype in (i64, torch.int32, torch.bool, f64, bf16, f16, torch.complex64):
        call(f"target {_dtype}", _function, lambda d=_dtype: ((u(3, 5), torch.ones(3, 5).to(d)), {}))
        call(f"input {_dtype}", _function, lambda d=_dtype: ((torch.ones(3, 5).to(d), torch.ones(3, 5)), {}))
        call(f"input and target {_dtype}", _function, lambda d=_dtype: ((torch.ones(3, 5).to(d), torch.ones(3, 5).to(d)), {}))
        call(f"weight {_dtype}", _function, lambda d=_dtype: ((u(3, 5), u(3, 5), torch.ones(3, 5).to(d)), {}))
    for _shape in ((4,), (2, 3, 5), (3, 1), (1,), (), (3, 5), (5, 3), (1, 3, 5)):
        for _reduction in ("mean", "none"):
            call(f"weight {_shape} {_reduction}", _function, lambda s=_shape, r=_reduction: ((u(3, 5), u(3, 5), u(*s)), {"reduction": r}))
    call("weight requires grad", _function, lambda: ((u(3, 5, grad=True), u(3, 5), u(3, 5, grad=True)), {}))
    call("target requires grad", _function, lambda: ((u(3, 5, grad=True), u(3, 5, grad=True)), {}))
    call("0-d", _function, lambda: ((u(), u()), {}))
    for _reduction in ("mean", "sum", "none"):
        call(f"empty {_reduction}", _function, lambda r=_reduction: ((u(0, 5), u(0, 5)), {"reduction": r}))
    for _reduction in ("bad", "elementwise_mean", None):
        call(f"reduction {_reduction!r}", _function, lambda r=_reduction: ((u(3, 5), u(3, 5)), {"reduction": r}))
    for _options in ({"size_average": False}, {"size_average": True}, {"reduce": False}, {"reduce": True}):
        call(str(_options), _function, lambda o=_options: ((u(3, 5), u(3, 5)), o))
    for _value in (2.0, -0.5, 1.0001, NAN):
        call(f"target {_value}", _function, lambda v=_value: ((u(2, 3), torch.full((2, 3), v)), {}))
    for _value in (2.0, -0.5, 1.0001, NAN, INF):
        call(f"input {_value}", _function, lambda v=_value: ((torch.full((2, 3), v), u(2, 3)), {}))
        call(f"one input {_value} of many", _function, lambda v=_value: ((torch.tensor([0.5] * 40 + [v]), u(41)), {"reduction": "none"}))
    call("target a list", _function, lambda: ((u(3), [0.0, 1.0, 1.0]), {}))
    call("input a list", _function, lambda: (([0.0, 1.0, 1.0], u(3)), {}))
    call("target None", _function, lambda: ((u(3), None), {}))
    call("sparse input", _function, lambda: ((u(3, 5).to_sparse(), u(3, 5)), {}))
    call("meta", _function, lambda: ((u(3, 5).to("meta"), u(3, 5).to("meta")), {}))
    call("target on meta", _function, lambda: ((u(3, 5), u(3, 5).to("meta")), {}))
for _shape in ((4,), (2, 3, 5), (3, 1), (), (5,)):
    call(
        f"pos_weight {_shape}",
        "binary_cross_entropy_with_logits",
        lambda s=_shape: ((u(3, 5), u(3, 5)), {"pos_weight": u(*s), "reduction": "none"}),
    )
call("pos_weight float64", "binary_cross_entropy_with_logits", lambda: ((u(3, 5), u(3, 5)), {"pos_weight": u(5, dtype=f64)}))
call("pos_weight requires grad", "binary_cross_entropy_with_logits", lambda: ((u(3, 5), u(3, 5)), {"pos_weight": u(5, grad=True)}))
for _logit, _target in ((INF, 1.0), (INF, 0.0), (-INF, 0.0), (-INF, 1.0), (NAN, 1.0)):
    call(f"logit {_logit}, target {_target}", "binary_cross_entropy_with_logits", lambda x=_logit, t=_target: ((row(x), row(t)), {}))
for _prob, _target in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
    call(
        f"probability {_prob}, target {_target}", "binary_cross_entropy", lambda p=_prob, t=_target: ((row(p).requires_grad_(), row(t)), {})
    )

# ---------------------------------------------------------------- softmax and log_softmax

for _function in ("softmax", "log_softmax"):
    for _dim in (None, 2, -3, 1.0, True, "1", 0, -1):
        call(f"dim {_dim!r}", _function, lambda d=_dim: ((x(3, 5), d), {}))
    call("no dim", _function, lambda: ((x(3, 5, 2, 2),), {}))
    for _dtype in (i64, torch.bool, torch.complex64, f16, bf16, f64):
        call(f"input {_dtype}", _function, lambda d=_dtype: ((x(3, 5).to(d), 1), {}))
    for _dtype in (f32, bf16, f64, i64):
        call(f"integers to {_dtype}", _function, lambda d=_dtype: ((torch.arange(15).view(3, 5), 1), {"dtype": d}))
        call(f"bfloat16 to {_dtype}", _function, lambda d=_dtype: ((x(3, 5, dtype=bf16), 1), {"dtype": d}))
    for _dim in (0, -1, 1):
        call(f"0-d, dim {_dim}", _function, lambda d=_dim: ((x(), d), {}))
    for _shape in ((3, 0), (0, 3), (0,)):
        call(f"input {_shape}", _function, lambda s=_shape: ((x(*s), 0), {}))
    call("all -inf", _function, lambda: ((row(-INF, -INF), 1), {}))
    call("input a list", _function, lambda: (([1.0], 0), {}))
    call("dtype a string", _function, lambda: ((x(3, 5), 1), {"dtype": "float32"}))
    call("sparse", _function, lambda: ((x(3, 5).to_sparse(), 1), {}))
    call("meta", _function, lambda: ((x(3, 5).to("meta"), 1), {}))


class Outcome(NamedTuple):
    """What became of a call: an exception, or a result with the gradients of what required one; and the warnings."""

    error: str | None
    result: torch.Tensor | None
    gradients: list[torch.Tensor | None]
    warned: list[str]


def outcome(function: Callable[..., torch.Tensor], made: tuple[tuple[Any, ...], dict[str, Any]]) -> Outcome:
    args, options = made
    leaves = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*args, **options)
            if result.requires_grad:
                result.backward(torch.full_like(result, 1.7))
            end = None
        except Exception as error:
            # which function is named, and the list of all dispatch keys, are not the point
            text = re.sub(r"^(\w+\.)*\w+\(\)", "function()", str(error))
            end, result = f"{type(error).__name__}: {text[:300]}", None
    messages = [str(w.message) for w in caught if "non-leaf" not in str(w.message)]
    return Outcome(end, None if result is None else result.detach(), [leaf.grad for leaf in leaves], messages)


def refused_by_an_older_torch(case: Call) -> bool:
    """What torch 2.8 still refuses and 2.11 answers. Ours is the newest torch's answer, as every torch gives it for the target alone."""
    return torch.__version__ < (2, 11) and case.function == "cross_entropy" and case.name.startswith("one row, target (1,)")


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.function}: {c.name}") for c in CALLS])
def test_same_outcome_as_torch(case: Call) -> None:
    theirs = outcome(getattr(F, case.function), case.make())
    mine = outcome(getattr(fastloss, case.function), case.make())
    if refused_by_an_older_torch(case) and theirs.error:
        (logits, target), options = case.make()
        theirs = outcome(F.cross_entropy, ((logits, target[0]), options))
    assert mine.error == theirs.error
    assert mine.warned == theirs.warned
    for actual, expected in zip([mine.result, *mine.gradients], [theirs.result, *theirs.gradients], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, expected.device)
            if expected.device.type != "meta":
                torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance(*case.make()))


def tolerance(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, float]:
    """torch rounds to half precision on its way to a float32 result of half and float32 numbers; the kernels do not."""
    dtypes = {t.dtype for t in (*args, *options.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return {"rtol": 2**-7, "atol": 2**-7} if len(dtypes) > 1 and dtypes & {torch.bfloat16, torch.float16} else {}
