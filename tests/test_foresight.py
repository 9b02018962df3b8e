"""The gradient in the forward: the same bits whether it was foreseen or not, used where it can be, and never in the way."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import DTYPES, LAYOUTS, foreseen
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import foresight, losses, memory

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "indices": ("cross_entropy", {}),
    "weighted": ("cross_entropy", {"weight": True}),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.1, "weight": True}),
    "probabilities": ("soft", {"label_smoothing": 0.1, "weight": True}),
    "bce": ("binary_cross_entropy_with_logits", {}),
    "bce, weights": ("binary_cross_entropy_with_logits", {"weight": True, "pos_weight": True}),
    "bce of probabilities": ("binary_cross_entropy", {}),
    "bce of probabilities, weights": ("binary_cross_entropy", {"weight": True}),
    "focal": ("sigmoid_focal_loss", {"gamma": 2.5}),
}
ONE_VISIT = [loss for loss in losses.LOSSES if loss.one_visit]


@pytest.fixture(autouse=True)
def nothing_seen_yet() -> Iterator[None]:
    foresight._last.clear()
    foresight._waiting.clear()
    yield
    foresight._last.clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """'ahead' or 'after' for every gradient that is computed."""
    calls: list[str] = []

    def spy(loss: Any, method: str, when: str) -> None:
        real = getattr(loss, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(when)
            return real(*args, **kwargs)

        monkeypatch.setattr(loss, method, call)

    for loss in ONE_VISIT:
        spy(loss, "forward_backward", "ahead")
        spy(loss, "backward", "after")
    return calls


def loss_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str = "mean") -> Callable[[torch.Tensor], torch.Tensor]:
    function, options = LOSSES[kind]
    options = {k: (torch.rand(shape[1]) + 0.5).to(dtype) if v is True else v for k, v in options.items()}
    if function == "cross_entropy":
        target = torch.randint(shape[1], shape[:1] + shape[2:])
        target.view(-1)[::3] = -100
    else:
        target = torch.rand(shape).to(dtype)
        if len(shape) > 2:
            options = {k: v.view(-1, 1) if k in ("weight", "pos_weight") and function != "soft" else v for k, v in options.items()}
    call = getattr(fastloss, "cross_entropy" if function == "soft" else function)
    return lambda logits: call(logits, target, reduction=reduction, **options)


def numbers(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits, or probabilities, some of them 0 and 1, where the loss is one of those."""
    logits = torch.randn(shape) * 3
    return (torch.sigmoid(logits * 4) if LOSSES[kind][0] == "binary_cross_entropy" else logits).to(dtype)


def step(loss: Callable[[torch.Tensor], torch.Tensor], leaf: torch.Tensor, view: Any, upstream: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = leaf.clone().requires_grad_()
    value = loss(view(leaf))
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    return value.detach(), gradient


@foreseen
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
def test_the_bits_do_not_depend_on_foresight(
    dtype: str, reduction: str, kind: str, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    cases = [((20, 11), "contiguous"), ((70, 60), "contiguous"), ((5, 70), "misaligned"), ((3, 9000), "padded"), ((40, 300), "transposed")]
    cases += [((2, 5, 40), "contiguous"), ((37, 130), "contiguous"), ((6, 1000), "every_other"), ((9, 1001), "contiguous")]
    for shape, layout in cases:
        leaf, view = LAYOUTS[layout](numbers(kind, shape, DTYPES[dtype]))
        loss = loss_of(kind, shape, DTYPES[dtype], reduction)
        for upstream in (1.0, -0.3):
            with monkeypatch.context() as patch:
                patch.setattr(fastloss.config, "foresight_max_bytes", 0)
                expected = step(loss, leaf, view, upstream)
            launched.clear()
            for _ in range(4):
                mine = step(loss, leaf, view, upstream)
                for a, b in zip(mine, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert launched[-1] == "ahead"


@foreseen
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["smoothed", "probabilities"])
def test_a_row_is_written_past_the_caches_while_the_next_one_is_read(kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two blocks and some, each of which begins elsewhere between two vectors; without weights there is a kernel of its own."""
    monkeypatch.setattr("fastloss.kernels.cpu.rows.STREAM_BYTES", 0)
    monkeypatch.setitem(LOSSES, "this", (LOSSES[kind][0], {**LOSSES[kind][1], **({} if weighted else {"weight": None})}))
    for shape in ((19, 4163), (3, 2048), (2, 70)):
        logits, loss = numbers("this", shape), loss_of("this", shape, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(fastloss.config, "foresight_max_bytes", 0)
            expected = step(loss, logits, lambda leaf: leaf, 1.0)
        for _ in range(3):
            mine = step(loss, logits, lambda leaf: leaf, 1.0)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_long_rows_whose_terms_are_not_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the second-level cache were tiny."""
    loss, leaf = loss_of(kind, (5, 9000), torch.float32), numbers(kind, (5, 9000))
    expected = step(loss, leaf, lambda x: x, 1.0)
    monkeypatch.setattr("fastloss.kernels.cpu.blocks.KEPT_BYTES", 1 << 10)
    for a, b in zip(step(loss, leaf, lambda x: x, 1.0), expected, strict=True):
        assert torch.equal(a, b)


@foreseen
def test_a_number_is_trusted_when_it_has_come_twice(launched: list[str]) -> None:
    loss, leaf = loss_of("indices", (20, 11), torch.float32), torch.randn(20, 11)

    def steps(*upstream: float) -> list[str]:
        launched.clear()
        for number in upstream:
            step(loss, leaf, lambda x: x, number)
        return launched.copy()

    assert steps(1.0, 1.0) == ["ahead", "ahead"]
    assert steps(0.25) == ["ahead", "after"]
    assert steps(0.25, 0.25, 0.25) == ["after", "ahead", "ahead"]
    assert steps(0.5, 0.25, 0.5, 0.25) == ["ahead", "after", "after", "after", "after"]
    assert steps(0.0, 0.0, -0.0, 0.0) == ["after"] * 4
    assert steps(float("nan"), float("nan"), float("nan")) == ["after"] * 3


def test_every_backward_has_a_gradient_of_its_own() -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    value = loss_of("indices", (20, 11), torch.float32)(leaf)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    copy = first.clone()
    second.fill_(7)
    third = torch.autograd.grad(value, leaf, torch.tensor(2.0))[0]
    assert torch.equal(first, copy)
    torch.testing.assert_close(third, 2 * copy)


def test_two_threads_that_want_the_same_gradient() -> None:
    leaf = torch.randn(200, 50, requires_grad=True)
    loss = loss_of("indices", (200, 50), torch.float32)
    for _ in range(20):
        value, found = loss(leaf), []
        barrier = threading.Barrier(2)

        def work(value: torch.Tensor = value, found: list[torch.Tensor] = found, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            found.append(torch.autograd.grad(value, leaf, retain_graph=True)[0])

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(*found)
        assert found[0].data_ptr() != found[1].data_ptr()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_derivative_is_as_without_foresight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, leaf = loss_of(kind, (6, 5), torch.float64), numbers(kind, (6, 5), torch.float64).requires_grad_()

    def second() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    foreseen = second()
    monkeypatch.setattr(fastloss.config, "foresight_max_bytes", 0)
    assert torch.equal(foreseen, second())
    assert foreseen.abs().sum() > 0


def test_logits_edited_after_the_loss_are_noticed() -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    logits = leaf * 1
    value = loss_of("indices", (20, 11), torch.float32)(logits)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def run_offloaded(loss: Callable[[torch.Tensor], torch.Tensor], leaf: torch.Tensor) -> torch.Tensor:
    with save_on_cpu():
        return loss(leaf)


NOT_AHEAD: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "checkpointed": lambda loss, leaf: checkpoint(loss, leaf, use_reentrant=False),
    "offloaded": run_offloaded,
}


@pytest.mark.parametrize("way", NOT_AHEAD)
def test_no_gradient_waits_where_memory_is_scarce(way: str, launched: list[str]) -> None:
    loss, leaf = loss_of("indices", (20, 11), torch.float32), torch.randn(20, 11, requires_grad=True)
    NOT_AHEAD[way](loss, leaf).backward()
    assert launched == ["after"]
    assert torch.equal(leaf.grad, step(loss, leaf.detach(), lambda x: x, 1.0)[1])


def test_an_older_torch_that_cannot_tell(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    monkeypatch.setattr(foresight, "_saved_tensors_hooks", foresight._perhaps_hooks)
    loss, leaf = loss_of("indices", (20, 11), torch.float32), torch.randn(20, 11, requires_grad=True)
    loss(leaf).backward()
    assert launched == ["after"]


def test_no_gradient_where_none_is_wanted(launched: list[str]) -> None:
    loss, leaf = loss_of("indices", (20, 11), torch.float32), torch.randn(20, 11, requires_grad=True)
    with torch.no_grad():
        loss(leaf)
    loss(leaf.detach())
    loss_of("indices", (20, 11), torch.float32, "none")(leaf)
    fastloss.cross_entropy(leaf * 1, torch.zeros(20, dtype=torch.long), inplace_backward=True).backward()
    assert launched == ["after"]


@foreseen
def test_an_abandoned_loss_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1 << 16)
    gc.collect()
    memory.empty_pool()
    value = loss_of("indices", (500, 100), torch.float32)(torch.randn(500, 100, requires_grad=True))
    assert memory.pool_bytes() == 0
    del value
    assert memory.pool_bytes() > 0
    memory.empty_pool()


def test_out_of_bounds_targets_are_refused_ahead_too() -> None:
    for rows, classes in ((20, 11), (3, 70)):
        for bad in (-1, classes, 2**32 + 1, -(2**40)):
            target = torch.zeros(rows, dtype=torch.long)
            target[-1] = bad
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds"):
                fastloss.cross_entropy(torch.randn(rows, classes, requires_grad=True), target)
            with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds"):
                fastloss.cross_entropy(torch.randn(rows, classes), target, label_smoothing=0.1)


def test_what_is_no_probability_is_refused_ahead_too() -> None:
    prob, weight = torch.rand(20, 11), torch.rand(11) + 0.5
    for bad in (-0.1, 1.5, float("nan")):
        for place in ((0, 0), (19, 10)):
            wrong = prob.clone()
            wrong[place] = bad
            for options in ({}, {"weight": weight}):
                with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
                    fastloss.binary_cross_entropy(wrong.clone().requires_grad_(), prob, **options)
                with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
                    fastloss.binary_cross_entropy(prob.clone().requires_grad_(), wrong, **options)
