"""Calls like one before: the same bits as the first time, the same errors, and no confusion of what only looks alike."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss import calls, contract
from fastloss.kernels.cpu.launch import Region

N, C = 48, 40
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(contract, "watch", None)  # every launch would be looked at, and so none made from memory
    calls._remembered.clear()
    yield
    calls._remembered.clear()


def indices(g: torch.Generator, *shape: int) -> Tensor:
    y = torch.randint(C, shape or (N,), generator=g)
    y.view(-1)[1] = -100
    return y


def logits(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (N, C), generator=g).to(dtype)


def simplex(g: torch.Generator) -> Tensor:
    return torch.softmax(logits(g), 1)


CALLS: dict[str, tuple[Callable[..., Tensor], Inputs]] = {
    "mean": (fastloss.cross_entropy, lambda g: (logits(g), indices(g))),
    "sum": (partial(fastloss.cross_entropy, reduction="sum"), lambda g: (logits(g), indices(g))),
    "none": (partial(fastloss.cross_entropy, reduction="none"), lambda g: (logits(g), indices(g))),
    "float64": (fastloss.cross_entropy, lambda g: (logits(g).double(), indices(g))),
    "many tasks": (fastloss.cross_entropy, lambda g: (logits(g, 200, 1000), indices(g, 200) % 1000)),
    "weights": (fastloss.cross_entropy, lambda g: (logits(g), indices(g), torch.rand(C, generator=g))),
    "smoothed": (partial(fastloss.cross_entropy, label_smoothing=0.1), lambda g: (logits(g), indices(g))),
    "smoothed sum": (partial(fastloss.cross_entropy, label_smoothing=0.1, reduction="sum"), lambda g: (logits(g), indices(g))),
    "probabilities": (fastloss.cross_entropy, lambda g: (logits(g), simplex(g))),
    "every other class": (fastloss.cross_entropy, lambda g: (logits(g, N, 2 * C)[:, ::2], indices(g))),
    "transposed": (fastloss.cross_entropy, lambda g: (logits(g, C, N).t(), indices(g))),
    "a column of labels": (fastloss.cross_entropy, lambda g: (logits(g), indices(g, N, 3)[:, 1])),
    "images": (fastloss.cross_entropy, lambda g: (logits(g, 3, C, 5, 7), indices(g, 3, 5, 7))),
    "few": (partial(fastloss.sparse_soft_cross_entropy), lambda g: (logits(g), indices(g, N, 2).abs() % C, torch.rand(N, 2, generator=g))),
    "nll_loss": (fastloss.nll_loss, lambda g: (logits(g), indices(g))),
    "bce with logits": (fastloss.binary_cross_entropy_with_logits, lambda g: (logits(g), simplex(g))),
    "pos_weight": (
        lambda x, y, p: fastloss.binary_cross_entropy_with_logits(x, y, pos_weight=p),
        lambda g: (logits(g), simplex(g), torch.rand(C, generator=g)),
    ),
    "bce": (fastloss.binary_cross_entropy, lambda g: (simplex(g), simplex(g))),
    "focal": (partial(fastloss.sigmoid_focal_loss, reduction="mean"), lambda g: (logits(g), simplex(g))),
    "bfloat16": (fastloss.cross_entropy, lambda g: (logits(g, dtype=torch.bfloat16), indices(g))),
    "softmax": (partial(fastloss.softmax, dim=1), lambda g: (logits(g),)),
}
NEEDS_TORCH = {"a column of labels"}  # a copy of the labels


def found(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    x, *others = tensors
    x = x.detach().requires_grad_()
    loss = function(x, *others)
    loss.sum().backward()
    with torch.no_grad():
        plain = function(x.detach(), *others)
    assert x.grad is not None
    return [loss.detach(), x.grad, plain]


def computed_anew(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastloss.serving.kind_of", lambda *_: None)
        patch.setattr("fastloss.functional.kind_of", lambda *_: None)
        return found(function, tensors)


def programs() -> list[Any]:
    return [program for call in calls._remembered.values() for program in (call.programs or {}).values()]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name: str) -> None:
    function, inputs = CALLS[name]
    for seed in range(5):
        tensors = inputs(torch.Generator().manual_seed(seed))
        for ours, anew in zip(found(function, tensors), computed_anew(function, tensors), strict=True):
            assert ours.stride() == anew.stride()
            assert torch.equal(ours, anew)
    assert programs()
    if name not in NEEDS_TORCH:
        assert all(program is not None for program in programs()), (
            "computes something by torch, so every call of this kind takes the long way"
        )


def test_results_are_not_shared() -> None:
    x, y = torch.randn(N, C), torch.randint(C, (N,))
    kept = [found(fastloss.cross_entropy, (x, y)) for _ in range(4)]
    kept[-1][1].zero_()
    kept[-1][0].zero_()
    assert all(k[1].abs().sum() > 0 and k[0] > 0 for k in kept[:-1])
    assert torch.equal(found(fastloss.cross_entropy, (x, y))[1], kept[0][1])


def test_an_index_that_is_no_class() -> None:
    x, y = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
    for _ in range(3):
        fastloss.cross_entropy(x, y)
    y[3] = C
    with pytest.raises(IndexError, match=str(C)):
        fastloss.cross_entropy(x, y)
    y[3] = 0
    assert torch.equal(fastloss.cross_entropy(x, y).detach(), computed_anew(fastloss.cross_entropy, (x, y))[0])


@pytest.mark.parametrize("which", [0, 1])
def test_memory_that_was_freed(which: int) -> None:
    for repeat in range(4):
        tensors = torch.randn(N, C), torch.randint(C, (N,))
        x = tensors[0].requires_grad_()
        if repeat < 3:
            fastloss.cross_entropy(x, tensors[1])
    with torch.no_grad():
        tensors[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed or cut"):
        fastloss.cross_entropy(x, tensors[1])


def test_tensors_that_share_memory() -> None:
    """As every other time, and as the first time, when nobody can tell whose address is whose."""
    loss = fastloss.binary_cross_entropy_with_logits
    for first_shared in (False, True):
        calls._remembered.clear()
        for shared in (first_shared, not first_shared) * 3:
            both = torch.rand(2 * N, C)
            x, y = both[:N], both[N:] if shared else torch.rand(N, C)
            assert torch.equal(found(loss, (x, y))[1], computed_anew(loss, (x, y))[1])
            assert torch.equal(found(loss, (x, x))[1], computed_anew(loss, (x, x))[1])


def test_an_option_that_only_looks_equal() -> None:
    x, y = torch.randn(N, C), torch.randint(2, (N,))
    for _ in range(3):
        fastloss.cross_entropy(x, y, ignore_index=1)
    for wrong in (1.0, "1"):
        with pytest.raises(TypeError):
            fastloss.cross_entropy(x, y, ignore_index=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        fastloss.cross_entropy(x, y, ignore_index=[1])  # type: ignore[arg-type]


def test_who_else_must_see_the_call() -> None:
    x, y = torch.randn(N, C), torch.randint(C, (N,))
    for _ in range(3):
        fastloss.cross_entropy(x, y)

    class Seen(torch.Tensor):
        pass

    assert type(fastloss.cross_entropy(x.as_subclass(Seen), y)) is Seen
    batched = torch.func.vmap(fastloss.cross_entropy)(torch.randn(3, N, C), torch.randint(C, (3, N)))
    assert batched.shape == (3,)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(fastloss.cross_entropy(dual, y)).tangent is not None
    names = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        fastloss.cross_entropy(x, y)
    assert "cross_entropy" in names
    with torch.autocast("cpu", torch.bfloat16):
        assert fastloss.cross_entropy(x.bfloat16(), y).dtype is torch.float32
    assert fastloss.cross_entropy(x.bfloat16(), y).dtype is torch.bfloat16
    assert fastloss.explain(fastloss.cross_entropy, x, y).path == "kernel"


def test_what_was_decided_is_decided_again_under_other_settings() -> None:
    x, y = torch.randn(N, C), torch.randint(C, (N,))
    for _ in range(3):
        fastloss.cross_entropy(x, y)
    with fastloss.use_backend("torch"):
        assert torch.equal(fastloss.cross_entropy(x, y), torch.nn.functional.cross_entropy(x, y))
    with fastloss.use_backend("numba"):
        fastloss.cross_entropy(x, y)
        with pytest.raises(fastloss.BackendError):
            fastloss.cross_entropy(x, y, reduce=True, size_average=True)
    with pytest.raises(fastloss.BackendError), fastloss.use_backend("numba"):
        fastloss.cross_entropy(x, y, reduce=True, size_average=True)


def test_another_upstream_gradient() -> None:
    for scale in (1.0, 0.5, 0.5, 0.5, 3.0, 1.0, 0.5):
        x, y = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
        (fastloss.cross_entropy(x, y) * scale).backward()
        expected = torch.autograd.grad(torch.nn.functional.cross_entropy(x, y) * scale, x)[0]
        torch.testing.assert_close(x.grad, expected)


def test_many_threads() -> None:
    wrong: list[float] = []

    def steps(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x, y = torch.randn(N, C, generator=g).requires_grad_(), torch.randint(C, (N,), generator=g)
            fastloss.cross_entropy(x, y).backward()
            gradient = torch.softmax(x.detach(), 1)
            gradient[torch.arange(N), y] -= 1
            assert x.grad is not None
            wrong.append(float((x.grad * N - gradient).abs().max()))

    threads = [threading.Thread(target=steps, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 360
    assert max(wrong) < 1e-5


def test_a_call_in_the_middle_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a finalizer or a signal handler between two launches: neither has the other's scratch."""
    function, inputs = CALLS["many tasks"]
    outer, inner = (inputs(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = [computed_anew(function, tensors) for tensors in (outer, inner)]
    for _ in range(3):
        found(function, outer)
    launch, running, seen = Region.run, [False], []

    def run(*arguments: Any) -> bool:
        raised = launch(*arguments)
        if not running[0]:
            running[0] = True
            with torch.enable_grad():  # not as in the forward around it
                seen.append(found(function, inner))
            running[0] = False
        return raised

    monkeypatch.setattr(Region, "run", run)
    mine = found(function, outer)
    assert len(seen) > 5
    for ours, anew in [(mine, expected[0]), *((other, expected[1]) for other in seen)]:
        assert all(torch.equal(a, b) for a, b in zip(ours, anew, strict=True))


def test_kinds_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MOST_KINDS", 4)
    for n in range(2, 20):
        fastloss.cross_entropy(torch.randn(n, C), torch.randint(C, (n,)))
        assert len(calls._remembered) <= 4


def test_no_compiler_is_loaded() -> None:
    """torch keeps Dynamo away from dispatch modes by importing it, which would take a second of everybody's first steps."""
    program = """
import sys, torch, fastloss
fastloss.config.min_numel = 0
for _ in range(4):
    fastloss.cross_entropy(torch.randn(32, 10, requires_grad=True), torch.randint(10, (32,))).backward()
print(sorted({"torch._dynamo", "torch.distributed.tensor", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_rounded_loss_beyond_its_dtype_is_infinite() -> None:
    x, y = torch.tensor([[6e4, 0.0]] * 3, dtype=torch.float16), torch.ones(3, dtype=torch.int64)
    found = [fastloss.cross_entropy(x, y, reduction="sum") for _ in range(3)]
    assert [float(loss) for loss in found] == [float("inf")] * 3
    assert {loss.dtype for loss in found} == {torch.float16}
