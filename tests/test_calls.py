"""Calls like one before: the same bits as the first time, the same errors, and no confusion of what only looks alike."""

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from helpers import foreseen
from torch import Tensor

import fastloss
from fastloss import calls, contract, op_calls

N, C = 48, 40
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(contract, "watch", None)  # every launch would be looked at, and so none made from memory
    forget()
    yield
    forget()


def forget() -> None:
    for memory in (calls, op_calls):
        memory._remembered.clear()
        memory._recent.clear()


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
    "column by column": (fastloss.cross_entropy, lambda g: (logits(g, 3, C, 5), indices(g, 3, 6)[:, 1:])),
    "bytes for labels": (fastloss.cross_entropy, lambda g: (logits(g), (indices(g) % C).to(torch.uint8))),
    "bfloat16": (fastloss.cross_entropy, lambda g: (logits(g, dtype=torch.bfloat16), indices(g))),
    "none of bfloat16": (
        partial(fastloss.cross_entropy, reduction="none"),
        lambda g: (logits(g, 3, C, 5, dtype=torch.bfloat16), indices(g, 3, 5)),
    ),
    "nll_loss of bfloat16": (fastloss.nll_loss, lambda g: (logits(g, dtype=torch.bfloat16), indices(g))),
    "many rows": (fastloss.cross_entropy, lambda g: (logits(g, 40_000, 3), indices(g, 40_000) % 3)),
    "many rows of bfloat16": (fastloss.cross_entropy, lambda g: (logits(g, 40_000, 3, dtype=torch.bfloat16), indices(g, 40_000) % 3)),
    "softmax": (partial(fastloss.softmax, dim=1), lambda g: (logits(g),)),
    "log_softmax": (partial(fastloss.log_softmax, dim=0), lambda g: (logits(g),)),
}


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
        remember_nothing(patch)
        return found(function, tensors)


def remember_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fastloss.routing.watched", lambda: True)
    patch.setattr(op_calls.Repeated, "__call__", lambda self, *arguments: self.find(*arguments))


def programs() -> list[Any]:
    """Of forwards and visits, and of backwards."""
    found = [program for call in calls._remembered.values() for program in call.programs.values()]
    return found + [program for program in op_calls._remembered.values() if program is not op_calls._SEEN]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of gradients that come from the pool, and of scratch that does."""
    if pooled:
        monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1)
    function, inputs = CALLS[name]
    for seed in range(5):
        tensors = inputs(torch.Generator().manual_seed(seed))
        for ours, anew in zip(found(function, tensors), computed_anew(function, tensors), strict=True):
            assert ours.stride() == anew.stride()
            assert torch.equal(ours, anew)
    assert programs()
    assert all(program is not None for program in programs()), "computes something by torch, so every call of this kind takes the long way"


def test_a_copy_of_the_same_shape_in_another_order() -> None:
    """As many classes a row as positions: what torch makes of the indices has their shape and their address, and is not a copy of them."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        tensors = logits(g, 3, C, 5), torch.randint(C, (3, 5, 5), generator=g), torch.rand(3, 5, 5, generator=g)
        for ours, anew in zip(
            found(fastloss.sparse_soft_cross_entropy, tensors), computed_anew(fastloss.sparse_soft_cross_entropy, tensors), strict=True
        ):
            assert torch.equal(ours, anew)


@pytest.mark.parametrize("pooled", [False, True])
def test_results_are_not_shared(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pooled:
        monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1)
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
        forget()
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


def test_calls_under_autocast_are_remembered() -> None:
    x, y = torch.randn(N, C).bfloat16(), torch.randint(C, (N,))
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(fastloss.cross_entropy(x, y))
    assert programs()
    assert all(program is not None for program in programs())
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert len({float(loss) for loss in losses}) == 1


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


NOT_VISITED = {"none", "none of bfloat16", "softmax", "log_softmax", "nll_loss", "nll_loss of bfloat16"}
VISITED = [name for name in CALLS if name not in NOT_VISITED]  # their gradients come with the loss


def visited(name: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A loss that was made by a program, its logits, and what it was made of."""
    function, inputs = CALLS[name]
    x, *others = inputs(torch.Generator().manual_seed(0))
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        logits = leaf * 1
        loss = function(logits, *others)
        assert loss.grad_fn is not None
    assert loss.grad_fn.name() == "_VisitBackward"
    return loss, logits, (x, *others)


def anew(name: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The same as if nothing were remembered."""
    x = tensors[0].detach().requires_grad_()
    logits = x * 1
    with pytest.MonkeyPatch.context() as patch:
        remember_nothing(patch)
        return CALLS[name][0](logits, *tensors[1:]), logits


@foreseen
@pytest.mark.parametrize("name", VISITED)
def test_a_visit_under_any_upstream_gradient(name: str) -> None:
    loss, logits, tensors = visited(name)
    other, others_logits = anew(name, tensors)
    for number in (1.0, -0.3, 1.0):
        upstream = torch.full_like(loss, number)
        found = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
        expected = torch.autograd.grad(other, others_logits, upstream, retain_graph=True)[0]
        assert torch.equal(found, expected)
        found.fill_(7)  # each backward has a gradient of its own
    both = torch.stack([torch.ones_like(loss), torch.full_like(loss, 2.0)])
    found = torch.autograd.grad(loss, logits, both, is_grads_batched=True)[0]
    assert torch.equal(found, torch.autograd.grad(other, others_logits, both, is_grads_batched=True)[0])


@foreseen
@pytest.mark.parametrize("name", VISITED)
def test_a_second_derivative_of_a_visit(name: str) -> None:
    loss, logits, tensors = visited(name)
    found = []
    for value, x in ((loss, logits), anew(name, tensors)):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert loss.grad_fn.foresight._gradients == []  # type: ignore[union-attr]  # no longer waits: nobody will come for it
    assert torch.equal(*found)


@foreseen
def test_arithmetic_on_a_visit() -> None:
    loss, logits, _ = visited("mean")
    assert not loss._is_view()
    before = float(loss.detach())
    loss += 1
    assert float(loss.detach()) == before + 1
    loss.backward()
    loss, logits, _ = visited("mean")
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@foreseen
def test_a_visit_holds_nothing_after_its_backward() -> None:
    loss, logits, _ = visited("mean")
    storage = weakref.ref(logits.untyped_storage())
    loss.backward()
    del logits
    assert storage() is None
    loss, *_ = visited("mean")
    gradient = weakref.ref(loss.grad_fn.foresight._gradients[0][0])  # type: ignore[union-attr]
    del loss
    assert gradient() is None, "a cycle"


def test_gradients_of_probabilities_too() -> None:
    """Not every gradient comes with the loss."""
    for _ in range(4):
        x, q = torch.randn(N, C, requires_grad=True), torch.softmax(torch.randn(N, C), 1).requires_grad_()
        found = torch.autograd.grad(fastloss.cross_entropy(x, q), (x, q))
        for ours, theirs in zip(found, torch.autograd.grad(torch.nn.functional.cross_entropy(x, q), (x, q)), strict=True):
            torch.testing.assert_close(ours, theirs)


BACKWARDS: dict[str, tuple[Callable[..., Tensor], Inputs]] = {
    name: CALLS[name] for name in ("none", "none of bfloat16", "softmax", "log_softmax", "mean", "nll_loss", "bfloat16", "images")
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_under_upstream_gradients_of_any_layout(name: str) -> None:
    """The numbers of the forward may come back from a hook in other memory, in another order of it; the upstream gradient, too."""
    function, inputs = BACKWARDS[name]
    layouts: list[Callable[[Tensor], Tensor]] = [
        torch.clone,
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch.stack((t, t))[1],
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
        lambda t: t.flatten()[:1].expand(t.shape) if t.dim() == 1 else t.clone(),
    ]
    g = torch.Generator().manual_seed(0)
    for seed, layout in enumerate(layouts * 4):
        x, *others = inputs(torch.Generator().manual_seed(seed))
        leaf = x.detach().requires_grad_()
        upstream = layout(torch.randn(function(x, *others).shape, generator=g).to(x.dtype))
        gradients = []
        for anew in (False, True):
            with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), layout):
                if anew:
                    remember_nothing(patch)
                gradients += torch.autograd.grad(function(leaf, *others), leaf, upstream)
        assert torch.equal(*gradients)
        assert gradients[0].stride() == gradients[1].stride()


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


def test_a_call_in_the_middle_of_another() -> None:
    """By a finalizer or a signal handler between two launches: neither has the other's scratch."""
    function, inputs = CALLS["many tasks"]
    outer, inner = (inputs(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = [computed_anew(function, tensors) for tensors in (outer, inner)]
    for _ in range(3):
        found(function, outer)
    running, seen = [False], []

    def interrupted(run: Callable[[int], None], block: int) -> None:
        run(block)
        if not running[0]:
            running[0] = True
            with torch.enable_grad():  # not as in the forward around it
                seen.append(found(function, inner))
            running[0] = False

    for call in calls._remembered.values():
        for which, program in call.programs.items():
            assert program is not None
            steps = tuple(step._replace(run=partial(interrupted, step.run)) for step in program.steps)
            call.programs[which] = program._replace(steps=steps)
    mine = found(function, outer)
    assert len(seen) > 1
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
