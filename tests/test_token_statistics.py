"""token_statistics against the torch operations that people write instead, in float64 and in the same dtype."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from answers import ALL, SMOOTH, check, composed, make, ours, results
from helpers import DTYPES, LAYOUTS
from torch import Tensor

import fastloss
from fastloss import TokenStatistics, token_statistics
from fastloss.backends import kernels

# rows in lanes and one by one, part of a vector, several blocks, blocks shared out, images: shape, dim
SHAPES = [((1, 5), -1), ((40, 10), 1), ((16, 48), 1), ((3, 70), -1), ((2, 60, 5), 1), ((2, 5, 3, 4), 1), ((3, 2500), 1), ((1, 20011), 1)]
SHAPES += [((33, 7), 0), ((2, 3, 9), 2), ((11,), 0)]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(dtype: str, count: int) -> None:
    for (shape, dim), scale in itertools.product(SHAPES, (1.0, 0.7)):
        check(*make(shape, dim, count, DTYPES[dtype], ignored=2), dim=dim, ignore_index=2, logit_scale=scale)
        found, _ = check(make(shape, dim, dtype=DTYPES[dtype])[0], None, dim=dim, logit_scale=scale)
        assert {t.dtype for t in found.values()} == {torch.float64 if dtype == "float64" else torch.float32, torch.int64}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    for shape, dim, count, dtype in itertools.product(((19, 11), (3, 70), (2, 60, 5), (2, 5, 3, 4)), (1, 0, -1), (0, 3), DTYPES.values()):
        if dtype in (torch.float32, torch.bfloat16) or shape == (2, 60, 5):
            x, y = make(shape, dim, count, dtype)
            check(x, y, dim=dim, layout=layout)
            leaf, view = LAYOUTS[layout](y)
            check(x, view(leaf), dim=dim)


@pytest.mark.parametrize("shape", [(40, 10), (3, 2500)])
def test_what_has_no_gradient_costs_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of outputs, and of some that have a gradient."""
    package, given = kernels("numba"), []
    launcher = package.token_statistics_backward
    monkeypatch.setattr(package, "token_statistics_backward", lambda *a: (given.append((a[5], a[6])), launcher(*a)))
    x, y = make(shape, 1)
    choices = [c for n in range(1, 6) for c in itertools.combinations(ALL, n)]
    for outputs in choices:
        for wanted in choices:
            if set(wanted) <= set(outputs) and "argmax" not in wanted and torch.rand(()) < 0.4:
                check(x, y, outputs=outputs, with_gradient=wanted)
                slope, dlog_prob = given[-1]
                there = (bool(dlog_prob.numel()), bool(slope.beta.numel()), bool(slope.gamma.numel()))
                assert there == ("log_prob" in wanted, "entropy" in wanted, "sum_sq_prob" in wanted)
    assert len(given) > 30


def test_upstream_gradients_of_any_layout() -> None:
    x, y = make((4, 6, 30), -1, 2)
    for layout in LAYOUTS:
        gradients = []
        for call in (ours, composed):
            leaf = x.clone().requires_grad_()
            found = call(leaf, y, outputs=ALL)
            ups = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for t in found[:4]]
            views = [view(up) for up, view in (LAYOUTS[layout](up) for up in ups)]
            gradients.append(torch.autograd.grad(found[:4], leaf, views)[0])
        torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- numbers that are easy to get wrong


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("shape", [(40, 10), (7, 70), (4, 2500)])
def test_ignored_rows_are_not_looked_at(shape: tuple[int, ...], count: int) -> None:
    x, y = make(shape, 1, count)
    y[1], x[1] = -100, torch.nan
    found, gradient = check(x, y)
    assert all(bool((t[1] == 0).all()) for t in (*found.values(), gradient))
    assert bool(gradient.isfinite().all())
    y[:] = -100
    found, gradient = check(torch.full_like(x, torch.nan), y)
    assert not any(bool(t.any()) for t in (*found.values(), gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 10), (3, 3000)])
def test_magnitudes(shape: tuple[int, ...], dtype: str) -> None:
    """One class 1e4 above the others is sure: entropy 0, to the last bit."""
    x, y = make(shape, 1, 2, DTYPES[dtype])
    # torch's logsumexp loses digits coming back, and float64 has no wider truth
    wanted = ("log_prob", "entropy", "sum_sq_prob") if dtype == "float64" else SMOOTH
    for large in (x - 1e4, x + 1e4, x * (300 if dtype == "float16" else 3e3)):
        check(large, y, with_gradient=wanted)
    x[:, 3] += 1e4
    found, _ = check(x, y)
    assert bool((found["entropy"] == 0).all())
    assert bool((ours(x, outputs="sum_sq_prob").sum_sq_prob == 1).all())


@pytest.mark.parametrize("shape", [(20, 10), (5, 70), (3, 3000)])
def test_infinities(shape: tuple[int, ...]) -> None:
    """0 times -inf counts 0. What has no distribution is NaN as in torch, in each of the answers; so is a target of probability 0 -inf."""
    x, y = make(shape, 1, 2)
    x[:, ::2] = -torch.inf
    y[:] = torch.tensor([1, -100])
    found, gradient = check(x, y)
    assert bool(found["entropy"].isfinite().all())
    assert bool(gradient.isfinite().all())
    y[:, 1] = 2
    assert bool((ours(x, y).log_prob[:, 1] == -torch.inf).all())
    for odd in (torch.nan, torch.inf, -torch.inf):
        x, y = make(shape, 1)
        x[1, 4], x[2, :], y[:] = odd, odd, 1
        for found, expected in zip(ours(x, y, outputs=ALL), composed(x, y), strict=True):
            assert torch.equal(found.isnan(), expected.isnan())
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 10), (6, 70), (6, 3000), (2, 20011)])
def test_argmax_is_the_first(shape: tuple[int, ...], dtype: str) -> None:
    x = torch.randint(3, shape).to(DTYPES[dtype])
    for _ in range(2):
        for layout in ("contiguous", "transposed", "every_other"):
            leaf, view = LAYOUTS[layout](x)
            assert torch.equal(ours(view(leaf), outputs="argmax").argmax, x.argmax(1))
        x[0, -3:], x[1, :3] = torch.nan, torch.nan


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("count", [0, 3])
def test_same_bits_for_every_thread_count_and_batch(count: int, layout: str) -> None:
    for classes, dtype in itertools.product((3, 31, 70, 3000, 40000), (torch.float32, torch.bfloat16)):
        rows = 40 if classes < 3000 else 3
        x, y = make((rows, classes), 1, count, dtype)
        up = {n: torch.randn(getattr(composed(x, y), n).shape) for n in SMOOTH}
        leaf, view = LAYOUTS[layout](x)
        whole, gradient = results(ours, leaf, view, y, up, outputs=ALL)
        for n in range(1, rows + 1):
            torch.set_num_threads(1 + n % 2)
            part = view(leaf)[-n:].detach()
            found, dpart = results(ours, part, lambda t, part=part: t, y[-n:], {k: u[-n:] for k, u in up.items()}, outputs=ALL)
            for name, answer in found.items():
                assert torch.equal(answer, whole[name][-n:]), (name, classes, n)
            assert torch.equal(dpart, view(gradient)[-n:]), (classes, n)


# ---------------------------------------------------------------- derivatives, transforms, compilers


def double() -> tuple[Tensor, Tensor]:
    x, y = make((4, 5), 1, 2, torch.float64)
    return x.requires_grad_(), y


@pytest.mark.parametrize("outputs", [SMOOTH, ("entropy",), ("lse", "sum_sq_prob")], ids=str)
def test_derivatives_of_first_and_second_order(outputs: tuple[str, ...]) -> None:
    x, y = double()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in token_statistics(x, y, logit_scale=0.7, outputs=outputs) if t is not None)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


def objective(call: Callable[..., TokenStatistics], x: Tensor, y: Tensor) -> Tensor:
    found = call(x, y, outputs=ALL)
    return -found.log_prob.sum() + 0.1 * found.entropy.sum() + (found.lse**2).sum() * (found.argmax > 1).sum()


def test_torch_func() -> None:
    x, y = double()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f)), torch.func.hessian):
        mine, theirs = (transform(lambda x, y, call=call: objective(call, x, y))(x.detach(), y) for call in (token_statistics, composed))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: objective(token_statistics, x, y), fullgraph=True, backend=backend)
    for shape, count in (((6, 7), 0), ((8, 7), 0), ((2, 3, 7), 2)):
        x, y = make(shape, -1, count)
        x.requires_grad_()
        found, expected = compiled(x, y), objective(composed, x, y)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))


# ---------------------------------------------------------------- who serves, and what is refused


def test_explain_and_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make((40, 10), 1, dtype=torch.bfloat16)
    expected = ours(x, y, outputs=ALL)
    with fastloss.use_backend("torch"):
        assert fastloss.explain(token_statistics, x, y) == ("torch", "torch", "backend 'torch' was chosen")
        plain = token_statistics(x, y, outputs=ALL)
    monkeypatch.setattr(fastloss.config, "min_numel", 1 << 20)
    assert "400 logits are fewer than" in fastloss.explain(token_statistics, x, y).reason
    for other in (plain, token_statistics(x, y, outputs=ALL)):
        for a, b in zip(other, expected, strict=True):
            torch.testing.assert_close(a, b)
    with (
        fastloss.use_backend("numba"),
        pytest.raises(fastloss.BackendError, match="token_statistics: backend 'numba' was chosen, but logit"),
    ):
        token_statistics(x, y, logit_scale=-1.0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("shape", [(40, 10), (3, 3000)])
def test_a_target_that_is_no_class(shape: tuple[int, ...], count: int, backend: Any) -> None:
    for wrong in (shape[1], -1, -101, 2**31, 2**63 - 1, -(2**63)):
        x, y = make(shape, 1, count)
        y.view(-1)[-1] = wrong
        with fastloss.use_backend(backend), pytest.raises(IndexError, match=rf"Target {wrong} is out of bounds."):
            token_statistics(x, y)


X, Y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "output": ((X, Y), {"outputs": ("entropy", "kl")}, ValueError, "outputs must be some of log_prob, entropy, .*, got 'kl'"),
    "no target": ((X,), {"outputs": ("log_prob",)}, ValueError, "outputs: 'log_prob' needs a target, got none"),
    "dim": ((X, Y), {"dim": 2}, IndexError, r"dim must be a dimension of the logits, in \[-2, 1\], got 2"),
    "rows": ((X, Y[:3]), {}, ValueError, r"target must have shape \(4\) or \(4, K\), like the logits without dim 1, got \(3,\)"),
    "floats": ((X, Y.float()), {}, RuntimeError, "target must hold class indices, got torch.float32"),
    "a list": (([1.0],), {}, TypeError, "input must be a Tensor, got list"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named(what: str) -> None:
    arguments, options, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        token_statistics(*arguments, **options)


def test_nothing_in() -> None:
    x = torch.randn(0, 5, requires_grad=True)
    for target in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)):
        found = ours(x, target, outputs=ALL)
        assert [t.shape for t in found] == [target.shape, *[(0,)] * 4]
        assert torch.autograd.grad(found[0].sum() + found[1].sum(), x)[0].shape == (0, 5)
    none = token_statistics(torch.randn(4, 5), torch.zeros(4, 0, dtype=torch.int64))
    assert none.log_prob.shape == (4, 0)
    assert bool((none.entropy > 0).all())
