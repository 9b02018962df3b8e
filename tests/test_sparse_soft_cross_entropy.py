"""Sparse soft targets against `cross_entropy` with the dense target that they stand for, in float64 and in the same dtype."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors, assert_no_worse, copy_of, kernel_call
from torch import Tensor

import fastloss
from fastloss import foresight
from fastloss.kernels.cpu import rows

PAD = -100
# rows in lanes and one by one, some of a partial vector, several blocks, images
SHAPES = {(1, 5): 3, (40, 10): 2, (16, 48): 1, (3, 70): 5, (2, 60, 5): 3, (3, 2500): 64, (1, 20011): 7, (2, 5, 3, 4): 2, (9, 33): 0}


def by_entry(probabilities: Tensor, indices: Tensor) -> Tensor:
    """A (K,) tensor is one number for each entry, whatever the positions."""
    if probabilities.dim() == 1 and indices.dim() > 2 and probabilities.shape[0] == indices.shape[1]:
        probabilities = probabilities.view(-1, *(1,) * (indices.dim() - 2))
    return probabilities.expand(indices.shape)


def dense(input: Tensor, indices: Tensor, probabilities: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """What the entries stand for."""
    prob = torch.where(indices == PAD, 0.0, by_entry(probabilities, indices)).to(input.dtype)
    dim = min(1, input.dim() - 1)
    target = torch.zeros_like(input).scatter_add(dim, indices.clamp(min=0), prob)
    return F.cross_entropy(input, target, weight, **options)


def sparse(**arguments: Any) -> Tensor:
    return kernel_call("sparse_soft_cross_entropy", **arguments)


def results(call: Callable[..., Tensor], tensors: Tensors, views: Any = None, **options: Any) -> list[Tensor]:
    """Value and gradients of logits and probabilities, under a random upstream gradient."""
    leaves = {k: None if t is None else copy_of(t).requires_grad_(k in ("input", "probabilities")) for k, t in tensors.items()}
    value = call(**{k: None if t is None else (views or {}).get(k, lambda leaf: leaf)(t) for k, t in leaves.items()}, **options)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, [leaves["input"], leaves["probabilities"]], upstream)]


def check(tensors: Tensors, views: Any = None, **options: Any) -> None:
    """What cancels in a gradient is as large as dloss sum_k q_k."""
    scale = 3.0 + tensors["indices"].shape[min(1, tensors["indices"].dim() - 1)]
    wide = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}
    found = (results(call, t, views, **options) for call, t in ((sparse, tensors), (dense, tensors), (dense, wide)))
    for what, mine, other, truth in zip(("value", "dinput", "dprobabilities"), *found, strict=True):
        assert_no_worse(mine, other, truth, f"{what} {options}", ulps=8, scale=scale if what == "dinput" else 0.0)


def make(shape: tuple[int, ...], count: int, dtype: torch.dtype, weighted: bool = False) -> Tensors:
    """Some entries are padding, some classes come twice, the last one comes."""
    indices = torch.randint(shape[1], (shape[0], count, *shape[2:]))
    indices[torch.rand(indices.shape) < 0.2] = PAD
    indices.view(-1)[-1:] = shape[1] - 1
    if count > 1:
        indices[0, 1] = indices[0, 0]
    return {
        "input": (torch.randn(shape) * 3).to(dtype),
        "indices": indices,
        "probabilities": torch.rand(indices.shape).to(dtype),
        "weight": (torch.rand(shape[1]) + 0.1).to(dtype) if weighted else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_dense_target(reduction: str, dtype: str) -> None:
    for (shape, count), smoothing, weighted in itertools.product(SHAPES.items(), (0.0, 0.1, 1.0), (False, True)):
        check(make(shape, count, DTYPES[dtype], weighted), reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["input", "indices", "probabilities", "weight"])
def test_layouts(argument: str, layout: str) -> None:
    for shape, dtype, smoothing in itertools.product(((19, 11), (3, 70), (2, 60, 5), (2, 5, 3, 4)), DTYPES.values(), (0.0, 0.1)):
        tensors = make(shape, 3, dtype, weighted=True)
        leaf, view = LAYOUTS[layout](tensors[argument])
        check({**tensors, argument: leaf}, {argument: view}, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (5, 1), (5, 2), (2, 3), (2, 1), (1, 2, 1), (5, 2, 3), (5, 1, 3), (3,)])
def test_probabilities_broadcast(shape: tuple[int, ...]) -> None:
    """As torch aligns them; (2,) is one number for each entry, and so is what is left of it without positions."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if shape not in ((5, 1), (5, 2)):
            check({**make((5, 7, 3), 2, dtype), "probabilities": torch.rand(shape).to(dtype)}, reduction="mean")
        if shape in ((), (1,), (2,), (5, 1), (5, 2)):
            check({**make((5, 7), 2, dtype), "probabilities": torch.rand(shape).to(dtype)}, reduction="sum")


def test_one_number_for_each_entry_also_where_positions_would_fit() -> None:
    tensors = make((5, 7, 2), 2, torch.float32)
    check({**tensors, "probabilities": torch.tensor([0.3, 0.7])})


def test_one_row_without_a_batch() -> None:
    for smoothing in (0.0, 0.1):
        check({"input": torch.randn(9), "indices": torch.tensor([2, PAD, 8, 2]), "probabilities": torch.rand(4)}, label_smoothing=smoothing)
    value = sparse(input=torch.randn(9), indices=torch.tensor([2, 8]), probabilities=torch.rand(2), reduction="none")
    assert value.shape == ()


def test_probabilities_in_another_dtype() -> None:
    """The mixing weight of float32 training with logits in bfloat16: its gradient is float32, and not of rounded numbers."""
    tensors = make((40, 10), 2, torch.bfloat16)
    lam = torch.tensor([0.3, 0.7])
    value, dinput, dlam = results(sparse, {**tensors, "probabilities": lam})
    assert (value.dtype, dinput.dtype, dlam.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = results(dense, {**tensors, "input": tensors["input"].double(), "probabilities": lam.double()})
    torch.testing.assert_close(dinput.double(), wide[1], rtol=2**-7, atol=1e-6)


# ---------------------------------------------------------------- the user's open case S4e


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(64, 10), (6, 1000), (2, 21, 8, 8)])
def test_s4e_cutmix_pair(shape: tuple[int, ...], lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """lam CE(x, y_a) + (1 - lam) CE(x, y_b): value and gradient, in one visit to the logits."""
    monkeypatch.setattr(foresight, "_last", {})
    positions = (shape[0], *shape[2:])
    ours, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    y_a, y_b = torch.randint(shape[1], positions), torch.randint(shape[1], positions)
    launched, kernels = [], fastloss.backends.kernels("numba")
    for name in ("forward", "backward", "forward_backward"):
        launcher = getattr(kernels, f"sparse_soft_cross_entropy_{name}")
        watched = lambda *arguments, name=name, launcher=launcher: (launched.append(name), launcher(*arguments))  # noqa: E731
        monkeypatch.setattr(kernels, f"sparse_soft_cross_entropy_{name}", watched)
    loss = fastloss.sparse_soft_cross_entropy(ours, torch.stack([y_a, y_b], 1), torch.tensor([lam, 1 - lam]))
    loss.backward()
    expected = lam * F.cross_entropy(theirs, y_a) + (1 - lam) * F.cross_entropy(theirs, y_b)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert launched == ["forward_backward"]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", [(20, 10), (3, 3000)])
def test_large_logits_lose_nothing(shape: tuple[int, ...]) -> None:
    for shift in (-1e4, 1e4):
        tensors = make(shape, 4, torch.float32)
        check({**tensors, "input": tensors["input"] + shift})
        check({**tensors, "input": tensors["input"] * 3e3})


@pytest.mark.parametrize("shape", [(20, 10), (3, 3000)])
def test_masked_classes(shape: tuple[int, ...]) -> None:
    """A class at -inf that no entry names counts for nothing, where the dense target's 0 x inf is NaN."""
    tensors = make(shape, 2, torch.float32)
    tensors["indices"] = torch.tensor([[0, 2]]).expand(shape[0], 2)
    masked = tensors["input"].clone()
    masked[:, 3] = -torch.inf
    without = torch.cat([tensors["input"][:, :3], tensors["input"][:, 4:]], 1)
    found, expected = (results(sparse, {**tensors, "input": x}, reduction="none") for x in (masked, without))
    for mine, other in zip(found[::2], expected[::2], strict=True):
        torch.testing.assert_close(mine, other)
    assert bool((found[1][:, 3] == 0).all())
    tensors["indices"] = torch.tensor([[0, 3]]).expand(shape[0], 2)
    assert bool((results(sparse, {**tensors, "input": masked}, reduction="none")[0] == torch.inf).all())


@pytest.mark.parametrize("shape", [(20, 10), (3, 3000)])
def test_rows_of_padding_count_for_nothing(shape: tuple[int, ...]) -> None:
    """They are not read without smoothing, and 'mean' counts them, as it counts rows of zeros."""
    for foreseen in (False, True):
        tensors = make(shape, 2, torch.float32)
        tensors["indices"][1] = PAD
        expected = results(dense, tensors, reduction="mean")
        tensors["input"][1] = torch.nan
        found = results(sparse, tensors, reduction="mean")
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other)
        if foreseen:
            leaf = tensors["input"].clone().requires_grad_()
            sparse(input=leaf, indices=tensors["indices"], probabilities=tensors["probabilities"]).backward()
            assert bool((leaf.grad[1] == 0).all())
            assert bool(leaf.grad.isfinite().all())


def test_entries_of_one_class_add_up() -> None:
    logits = torch.randn(3, 3000, requires_grad=True)
    indices = torch.tensor([7, 7, 2999, 7]).expand(3, 4)
    many = sparse(input=logits, indices=indices, probabilities=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    one = sparse(input=logits, indices=indices[:, 1:3], probabilities=torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(many, one)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (many, one)))


@pytest.mark.parametrize("shape", [(40, 10), (5, 3000), (2, 21, 40)])
def test_same_bits_for_every_thread_count_and_way(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreseen or not, past the caches or not, on one thread or two, misaligned or not."""
    for smoothing in (0.0, 0.1):
        tensors, found = make(shape, 5, torch.float32), []
        for threads, stream, upstream, layout in itertools.product(
            (1, 2), (1 << 25, 1), (1.0, 0.5), ("contiguous", "padded", "misaligned")
        ):
            torch.set_num_threads(threads)
            monkeypatch.setattr(rows, "STREAM_BYTES", stream)
            leaf, view = LAYOUTS[layout](tensors["input"])
            leaf.requires_grad_()
            value = sparse(**{**tensors, "input": view(leaf)}, label_smoothing=smoothing)
            value.backward(torch.tensor(upstream))
            found.append((value.detach(), view(leaf.grad) / upstream))
        assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))
