"""Sparse soft targets against `cross_entropy` with the dense target that they stand for, in float64 and in the same dtype."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entries import PAD, check, dense, make, results, sparse
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors
from torch import Tensor

import fastloss
from fastloss import foresight
from fastloss.kernels.cpu import rows

# rows in lanes and one by one, some of a partial vector, several blocks, images
SHAPES = {(1, 5): 3, (40, 10): 2, (16, 48): 1, (3, 70): 5, (2, 60, 5): 3, (3, 2500): 64, (1, 20011): 7, (2, 5, 3, 4): 2, (9, 33): 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_dense_target(reduction: str, dtype: str) -> None:
    for (shape, count), smoothing, weighted in itertools.product(SHAPES.items(), (0.0, 0.1, 1.0), (False, True)):
        check(make(shape, count, DTYPES[dtype], weighted), reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["input", "indices", "probabilities", "weight"])
def test_layouts(argument: str, layout: str, dtype: torch.dtype) -> None:
    for shape, smoothing in itertools.product(((19, 11), (3, 70), (2, 60, 5), (2, 5, 3, 4)), (0.0, 0.1)):
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


# ---------------------------------------------------------------- derivatives, transforms, compilers


def double(count: int = 3) -> Tensors:
    return make((4, 5), count, torch.float64, weighted=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_derivatives_of_first_and_second_order(smoothing: float) -> None:
    tensors = double()
    leaves = [tensors[name].requires_grad_() for name in ("input", "probabilities")]

    def call(input: Tensor, probabilities: Tensor) -> Tensor:
        return fastloss.sparse_soft_cross_entropy(input, tensors["indices"], probabilities, tensors["weight"], label_smoothing=smoothing)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_torch_func() -> None:
    tensors = double()
    names = "input", "indices", "probabilities"
    ours, theirs = (
        torch.func.vmap(torch.func.grad(lambda x, i, q, call=call: call(input=x, indices=i, probabilities=q), argnums=(0, 2)))(
            *(tensors[name] for name in names)
        )
        for call in (fastloss.sparse_soft_cross_entropy, dense)
    )
    torch.testing.assert_close(ours, theirs)
    _, tangent = torch.func.jvp(
        lambda x: fastloss.sparse_soft_cross_entropy(x, tensors["indices"], tensors["probabilities"]),
        (tensors["input"],),
        (torch.ones_like(tensors["input"]),),
    )
    assert tangent.abs() < 1e-12  # what is the same for all classes changes nothing


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fastloss.sparse_soft_cross_entropy, fullgraph=True, backend=backend)
    for shape in ((6, 7), (8, 7), (2, 7, 3)):
        tensors = make(shape, 2, torch.float32)
        for probabilities in (tensors["probabilities"], torch.tensor([0.3, 0.7])):
            found = (results(call, {**tensors, "probabilities": probabilities}) for call in (compiled, dense))
            for mine, other in zip(*found, strict=True):
                torch.testing.assert_close(mine, other)


# ---------------------------------------------------------------- who serves, and what is refused


def test_explain_and_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch serves, the numbers and the errors are the same; also for masked classes."""
    call, tensors = fastloss.sparse_soft_cross_entropy, make((40, 10), 2, torch.float32, weighted=True)
    assert fastloss.explain(call, **tensors).path == "kernel"
    kernels = results(sparse, tensors, label_smoothing=0.1)
    with fastloss.use_backend("torch"):
        assert fastloss.explain(call, **tensors).reason == "backend 'torch' was chosen"
        for wrong in (10, -1):
            tensors["indices"][0, 0] = wrong
            with pytest.raises(IndexError, match="out of bounds"):
                call(**tensors)
        tensors["indices"][0, 0] = PAD
        composed = results(call, tensors, label_smoothing=0.1)
    monkeypatch.setattr(fastloss.config, "min_numel", 1 << 20)
    for other in (composed, results(call, tensors, label_smoothing=0.1)):
        torch.testing.assert_close(other[0], results(dense, tensors, label_smoothing=0.1)[0])
    assert kernels[0].shape == composed[0].shape
    with fastloss.use_backend("numba"), pytest.raises(fastloss.BackendError, match="weight requires a gradient"):
        call(**{**tensors, "weight": torch.rand(10, requires_grad=True)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    tensors = make((40, 10), 2, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, dinput, _ = results(sparse, tensors)
    assert (value.dtype, dinput.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(
        value.double(), dense(**{k: t.double() if k != "indices" and t is not None else t for k, t in tensors.items()})
    )


@pytest.mark.parametrize("shape", [(40, 10), (3, 3000), (2, 21, 8)])
def test_an_index_that_is_no_class(shape: tuple[int, ...]) -> None:
    for wrong in (shape[1], -1, -101, 2**31, 2**63 - 1, -(2**63)):
        tensors = make(shape, 3, torch.float32)
        tensors["indices"][1, 2] = wrong
        tensors["input"].requires_grad_()
        with pytest.raises(IndexError, match=rf"Target {wrong} is out of bounds."):
            sparse(**tensors)


X, Y, Q = torch.randn(4, 5), torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 2)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "reduction": ((X, Y, Q), {"reduction": "most"}, ValueError, "reduction must be one of none, mean, sum, got 'most'"),
    "smoothing": ((X, Y, Q), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0, got 1.5"),
    "a list": ((X, Y, [0.5, 0.5]), {}, TypeError, "probabilities must be a Tensor, got list"),
    "int32": ((X, Y.int(), Q), {}, RuntimeError, "indices must be int64, got torch.int32"),
    "integer probabilities": ((X, Y, Y), {}, RuntimeError, "probabilities must be floating point, got torch.int64"),
    "rows": ((X, Y[:3], Q), {}, ValueError, r"indices must have shape \(4, K\) to match logits of shape \(4, 5\), got \(3, 2\)"),
    "positions": ((X[:, :, None], Y, Q), {}, ValueError, r"indices must have shape \(4, K, 1\)"),
    "no batch": ((X[0], Y, Q), {}, ValueError, r"indices must have shape \(K\) to match logits of shape \(5,\), got \(4, 2\)"),
    "no classes": ((X[0, 0], Y, Q), {}, ValueError, "indices must have shape"),
    "entries": ((X, Y, torch.rand(3)), {}, ValueError, r"probabilities must be broadcastable to indices of shape \(4, 2\), got \(3,\)"),
    "weight": ((X, Y, Q, torch.rand(4)), {}, RuntimeError, r"weight must have shape \(5,\), one for each class, got \(4,\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named(what: str) -> None:
    arguments, options, kind, message = REFUSED[what]
    with pytest.raises(kind, match=f"sparse_soft_cross_entropy: {message}"):
        fastloss.sparse_soft_cross_entropy(*arguments, **options)


def test_nothing_in_and_no_entries() -> None:
    empty = fastloss.sparse_soft_cross_entropy(torch.randn(0, 5), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2))
    assert empty.isnan()
    assert fastloss.sparse_soft_cross_entropy(torch.randn(4, 5), torch.zeros(4, 0, dtype=torch.long), torch.rand(4, 0)) == 0


def test_the_module() -> None:
    tensors = make((40, 10), 2, torch.float32, weighted=True)
    module = fastloss.SparseSoftCrossEntropyLoss(tensors["weight"], reduction="sum", label_smoothing=0.1)
    expected = dense(**tensors, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(module(tensors["input"], tensors["indices"], tensors["probabilities"]), expected)
