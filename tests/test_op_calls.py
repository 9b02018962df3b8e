"""Calls of a registered op like one before: the same bits as the first time, the same errors, no confusion of what only looks alike."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_compile import Sample, op_samples
from torch import Tensor

from fastloss import contract, losses, op_calls
from fastloss.ops import OPS

N, C = 48, 40


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in compiled code, which calls ops without a wish for derivatives."""
    monkeypatch.setattr(contract, "watch", None)  # every launch would be looked at, and so none made from memory
    forget()
    with torch.no_grad():
        yield
    forget()


def forget() -> None:
    op_calls._remembered.clear()
    op_calls._recent.clear()


def samples() -> Iterator[Sample]:
    """Every option of every loss once in float32, and a loss that is rounded."""
    return (s for s in op_samples() if "float32" in s[0] or s[0] == "indices torch.bfloat16 (2, 7, 3) mean 0.0")


def backward_arguments(loss: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    t, o = loss.tensors(*args[: len(loss.tensors._fields)]), loss.options(*args[len(loss.tensors._fields) :])
    results = loss.forward(t, o)
    upstream = [torch.randn_like(answer) if answer.is_floating_point() else None for answer in results[: loss.answers]]
    return *upstream, *loss.to_save(t, results), *o, [True] * loss.differentiable


def elsewhere(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers, not in the same memory."""
    return tuple(a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in arguments)


def each(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


# torch sums upstream gradients, so every call takes the long way
NEEDS_TORCH = {("sparse_soft_cross_entropy", "backward"), ("token_statistics", "backward")}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sample", list(samples()), ids=lambda s: s[0])
def test_the_same_bits_every_time(sample: Sample, direction: str) -> None:
    _, loss, args = sample
    op = getattr(OPS[loss.name], direction)
    arguments = elsewhere(args if direction == "forward" else backward_arguments(loss, args))  # without gaps
    first = each(op(*arguments))
    for _ in range(4):
        for found, expected in zip(each(op(*elsewhere(arguments))), first, strict=True):
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    (program,) = op_calls._remembered.values()
    if (loss.name, direction) not in NEEDS_TORCH:
        assert program is not None, "computes something by torch"


def forward_arguments(**options: Any) -> tuple[Any, ...]:
    o = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "dtype": torch.float32, **options}
    return torch.randn(N, C), torch.randint(C, (N,)), None, *o.values()


def test_compiled_code_takes_this_way() -> None:
    """With the default backend and with one that hands gradients to autograd itself."""
    import fastloss

    torch._dynamo.reset()
    for backend in ("inductor", "aot_eager"):
        forget()
        compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y), backend=backend, fullgraph=True)
        with torch.enable_grad():
            for _ in range(4):
                x, y = torch.randn(N, C, requires_grad=True), torch.randint(C, (N,))
                expected = torch.nn.functional.cross_entropy(x, y)
                loss = compiled(x, y)
                (2 * loss).backward()
                torch.testing.assert_close(loss, expected)
                torch.testing.assert_close(x.grad, 2 * torch.autograd.grad(expected, x)[0])
        assert len(op_calls._remembered) == 2
        assert None not in op_calls._remembered.values()
        assert [len(recent) for recent in op_calls._recent.values()] == [1, 1]
    torch._dynamo.reset()


def test_an_index_that_is_no_class() -> None:
    op, arguments = OPS["cross_entropy"].forward, forward_arguments()
    expected = op(*arguments)[0]
    for _ in range(3):
        op(*arguments)
    right, arguments[1][3] = int(arguments[1][3]), C
    with pytest.raises(IndexError, match=str(C)):
        op(*arguments)
    arguments[1][3] = right
    assert torch.equal(op(*arguments)[0], expected)


@pytest.mark.parametrize("which", [0, 1, 3, 5])
def test_memory_that_was_freed(which: int) -> None:
    for repeat in range(4):
        op, arguments = OPS["cross_entropy"].backward, backward_arguments(losses.cross_entropy, forward_arguments())
        if repeat < 3:
            op(*arguments)
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    tensors[min(which, len(tensors) - 1)].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed or cut"):
        op(*arguments)


def test_other_options_and_other_wishes() -> None:
    x, y, w, *rest = forward_arguments()
    op = OPS["cross_entropy"].forward
    for _ in range(4):
        for ignore_index in (-100, 3):
            for smoothing in (0.0, 0.1):
                found = op(x, y, w, ignore_index, smoothing, *rest[2:])[0]
                expected = torch.nn.functional.cross_entropy(x, y, ignore_index=ignore_index, label_smoothing=smoothing)
                torch.testing.assert_close(found, expected)
    p, q = torch.rand(5, 3), torch.rand(5, 3)
    saved = backward_arguments(losses.soft_cross_entropy, (p, q, None, 0.0, "mean", torch.float32))
    for _ in range(4):
        for needed in ([True, False], [False, True], [True, True]):
            shapes = [tuple(g.shape) for g in OPS["soft_cross_entropy"].backward(*saved[:-1], needed)]
            assert shapes == [(5, 3) if wanted else (0,) for wanted in needed]


def test_where_a_derivative_is_wanted_or_more_than_numbers_matters() -> None:
    """The kernel is not called straight away then."""
    op, arguments = OPS["cross_entropy"].forward, forward_arguments()
    for _ in range(3):
        op(*arguments)
    x, *others = arguments
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        op(leaf, *others)[0].backward()
        assert leaf.grad is not None
    negative = op(torch._neg_view(x), *others)[0]
    torch.testing.assert_close(negative, op(-x, *others)[0])
    zero = op(torch._efficientzerotensor(N, C), *others)[0]
    torch.testing.assert_close(zero, op(torch.zeros(N, C), *others)[0])
    assert op(x.to("meta"), others[0].to("meta"), *others[1:])[0].is_meta
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        op(*arguments)
    assert seen[0] is op


def test_many_threads() -> None:
    op, wrong = OPS["cross_entropy"].forward, []

    def calls(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x, y = torch.randn(N, C, generator=g), torch.randint(C, (N,), generator=g)
            with torch.no_grad():
                loss = op(x, y, None, -100, 0.0, "mean", torch.float32)[0]
            wrong.append(float(loss - torch.nn.functional.cross_entropy(x, y)))

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 360
    assert max(map(abs, wrong)) < 1e-5


def test_which_tensors_there_are() -> None:
    """The same tensors in other places: a weight is no pos_weight."""
    op, x, y, w = OPS["bce_with_logits"].forward, torch.randn(N, C), torch.rand(N, C), torch.rand(N, C)
    for _ in range(5):
        for places in ((w, None), (None, w)):
            expected = torch.nn.functional.binary_cross_entropy_with_logits(x, y, weight=places[0], pos_weight=places[1])
            torch.testing.assert_close(each(op(x, y, *places, "mean", torch.float32))[0], expected)


def test_kinds_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_calls, "_MOST_KINDS", 4)
    for n in range(2, 20):
        OPS["softmax"].forward(torch.randn(n, C), 1, torch.float32, torch.float32)
        assert len(op_calls._remembered) <= 4


def test_what_ranks_say_to_one_another_is_said_every_time() -> None:
    """A group of one rank now may be another group later, of the same name."""
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loss = losses.vocab_parallel_token_statistics
        o = loss.options(1, -100, 1.0, "entropy lse", distributed.group.WORLD.group_name)
        for _ in range(3):
            OPS[loss.name].forward(torch.randn(N, C), torch.zeros(N, dtype=torch.int64), *o)
    finally:
        distributed.destroy_process_group()
    assert not op_calls._remembered
