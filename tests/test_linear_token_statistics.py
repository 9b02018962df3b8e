"""linear_token_statistics against the same in plain torch, from all logits, in the same dtype and in float64."""

import itertools
from typing import Any

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_no_worse
from test_linear_cross_entropy import Largest
from torch import Tensor

import fastloss
from fastloss import chunks, composed, losses
from fastloss.losses.token_statistics import ANSWERS
from fastloss.ops import OPS

N, D, C = 23, 12, 33
LAYER = ("input", "linear_weight", "linear_bias")
LOSS: Any = losses.linear_token_statistics


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven rows."""
    monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 7})
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 1)


def tensors(rows: tuple[int, ...] = (N,), more: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments; `more` is (K,). Every third row is ignored, and of K targets some others."""
    target = torch.randint(C, (*rows, *more))
    target.view(-1, *more)[::3] = -100
    if more:
        target[..., 0].view(-1)[::4] = -100
    made = torch.randn(*rows, D), torch.randn(C, D) * 0.7, torch.randn(C)
    return {**{name: t.to(dtype) for name, t in zip(LAYER, made, strict=True)}, "target": target}


def ours(outputs: tuple[str, ...] = ANSWERS, **arguments: Any) -> dict[str, Tensor]:
    route = fastloss.explain(fastloss.linear_token_statistics, **arguments, outputs=outputs)
    assert route.path == "kernel", route.reason
    found = fastloss.linear_token_statistics(**arguments, outputs=outputs)
    return {name: answer for name, answer in found._asdict().items() if answer is not None}


def theirs(outputs: tuple[str, ...] = ANSWERS, **arguments: Any) -> dict[str, Tensor]:
    rest = {"target": None, "linear_bias": None, "ignore_index": -100, "logit_scale": 1.0, "logit_softcap": None, **arguments}
    found = dict(zip(ANSWERS, composed.linear_token_statistics(wanted=" ".join(outputs), **rest), strict=True))
    return {name: found[name] for name in outputs}


def wanting(t: dict[str, Any], names: tuple[str, ...] = LAYER) -> list[Tensor]:
    return [t[name].requires_grad_() for name in names if t[name] is not None]


def upstream_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn(answer.shape) * 1.7 for name, answer in found.items() if answer.is_floating_point()}


def gradients(found: dict[str, Tensor], leaves: list[Tensor], upstream: dict[str, Tensor], again: bool = False) -> tuple[Tensor, ...]:
    names = [name for name in found if name in upstream]
    return torch.autograd.grad([found[k] for k in names], leaves, [upstream[k].to(found[k].dtype) for k in names], retain_graph=again)


def check(t: dict[str, Any], layout: str = "contiguous", argument: str = "input", **options: Any) -> None:
    leaf, view = LAYOUTS[layout](t[argument])
    upstream, results = upstream_of(theirs(**t, **options)), []
    for function, dtype in ((ours, None), (theirs, None), (theirs, torch.float64)):
        new = {k: a.detach().clone() for k, a in {**t, argument: leaf}.items() if a is not None}
        new = {k: a.to(dtype or a.dtype) if k in LAYER else a for k, a in new.items()}
        leaves = wanting({"linear_bias": None, **new})
        found = function(**{**new, argument: view(new[argument])}, **options)
        results.append((found, gradients(found, leaves, upstream)))
    (mine, grads), (eager, eager_grads), (truth, true_grads) = results
    for name, answer in mine.items():
        if name != "argmax":
            assert_no_worse(answer, eager[name], truth[name], name, 6)
        elif t["input"].dtype in (torch.float32, torch.float64):  # half precision rounds the largest together, each in its way
            assert torch.equal(answer, truth[name])
    for name, *g in zip(LAYER, grads, eager_grads, true_grads, strict=False):
        assert_no_worse(*g, f"gradient of {name}", 6)


@pytest.mark.parametrize("more", [(), (3,)], ids=["one target", "three targets"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(dtype: str, more: tuple[int, ...]) -> None:
    for scale, cap in ((1.0, None), (-0.3, None), (0.7, 1.5)):
        t = tensors((N,), more, DTYPES[dtype])
        check(t, logit_scale=scale, logit_softcap=cap)
        check({**t, "linear_bias": None}, logit_scale=scale, logit_softcap=cap)


def test_shapes() -> None:
    for rows, more in itertools.product(((), (1,), (3, 5), (2, 3, 4)), ((), (1,), (4,))):
        t = tensors(rows, more)
        check(t)
        check({**t, "target": t["target"].clamp(min=0)})
    check({**t, "target": None}, outputs=ANSWERS[1:])


@pytest.mark.parametrize("argument", [*LAYER, "target"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(layout: str, argument: str) -> None:
    t = tensors((N,), (3,))
    t["target"][0] = 1  # expanded, it is all there is
    check(t, layout, argument, outputs=ANSWERS[:3])


@pytest.mark.parametrize("wanted", [names for count in (1, 2, 3) for names in itertools.combinations(LAYER, count)], ids=str)
def test_every_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    t, upstream = tensors(), upstream_of(theirs(**tensors()))
    leaves = wanting(t, wanted)
    torch.testing.assert_close(*(gradients(f(**t), leaves, upstream) for f in (ours, theirs)))


def test_subsets_of_answers_and_of_upstream_gradients() -> None:
    t = tensors((N,), (2,))
    leaves, upstream = wanting(t), upstream_of(theirs(**t))
    for outputs in (names for count in range(1, 6) for names in itertools.combinations(ANSWERS, count)):
        mine, eager = (f(outputs, **t) for f in (ours, theirs))
        assert tuple(mine) == outputs
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)
        for left_out in (None, *outputs):
            some = {k: d for k, d in upstream.items() if k in outputs and k != left_out}
            if some:
                torch.testing.assert_close(*(gradients(found, leaves, some, again=True) for found in (mine, eager)), rtol=1e-4, atol=1e-5)


def test_ignored_rows_are_never_looked_at() -> None:
    t = tensors()
    t["input"][::3] = float("nan")
    leaves, upstream = wanting(t), upstream_of(theirs(**t))
    for f in (ours, theirs):
        found = f(**t)
        grads = gradients(found, leaves, upstream)
        assert not any(bool(answer[::3].any()) for answer in (*found.values(), grads[0]))
        assert all(bool(g.isfinite().all()) for g in grads)
    found = ours(**{**t, "target": torch.full((N,), 5)}, ignore_index=5)
    assert not any(bool(g.any()) for g in (*found.values(), *gradients(found, leaves, upstream)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_backward_twice_and_in_other_chunks(monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float) -> None:
    """Whose logits need not be rounded like the first."""
    t = tensors(dtype=DTYPES[dtype])
    t["input"] *= 30
    leaves, before, found = wanting(t), {k: a.detach().clone() for k, a in t.items()}, ours(**t)
    upstream = upstream_of(found)
    first, second = (gradients(found, leaves, upstream, again=True) for _ in range(2))
    monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 1000})
    for a, b, c in zip(first, second, gradients(found, leaves, upstream), strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() <= tolerance * c.norm()
    assert all(torch.equal(t[k], a) for k, a in before.items())


def test_derivatives_of_any_order() -> None:
    t = tensors((4,), (2,), torch.float64)
    leaves, target = tuple(wanting(t)), t["target"]

    def call(*layer: Tensor) -> tuple[Tensor, ...]:
        found = fastloss.linear_token_statistics(*layer[:2], target, linear_bias=layer[2], logit_softcap=2.0, outputs=ANSWERS)
        return found[:4]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    x = tuple(a.detach() for a in leaves)
    torch.testing.assert_close(torch.func.jvp(call, x, x)[1], torch.autograd.functional.jvp(call, x, x)[1])


@pytest.mark.parametrize("half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_autocast(dtype: str, half: torch.dtype) -> None:
    """Products in autocast's dtype, answers in float32; not worse than eager."""
    t = tensors(dtype=DTYPES[dtype])
    exact = {k: a.double() if k in LAYER else a for k, a in t.items()}
    leaves, wide = wanting(t), wanting(exact)
    with torch.autocast("cpu", half):
        mine, eager = ours(ANSWERS[:4], **t), theirs(ANSWERS[:4], **t)
    truth = theirs(ANSWERS[:4], **exact)
    upstream = upstream_of(truth)
    assert all(answer.dtype == (torch.float64 if dtype == "float64" else torch.float32) for answer in mine.values())
    results = ((*found.values(), *gradients(found, to, upstream)) for found, to in ((mine, leaves), (eager, leaves), (truth, wide)))
    for m, e, true in zip(*results, strict=True):
        assert m.dtype == e.dtype
        assert (m - true).norm() <= 2 * (e - true).norm() + 1e-3


def test_compiles_whole() -> None:
    def step(**t: Any) -> Any:
        return fastloss.linear_token_statistics(**{**t, "input": t["input"] * 2}, logit_softcap=3.0, outputs=ANSWERS)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows, more in (((N,), ()), ((N - 4,), ()), ((3, 5), (2,))):
        t = tensors(rows, more)
        leaves, (mine, eager) = wanting(t), (f(**t)._asdict() for f in (compiled, step))
        upstream = upstream_of(eager)
        torch.testing.assert_close(mine, eager)
        torch.testing.assert_close(*(gradients(found, leaves, upstream) for found in (mine, eager)))


def arguments_of_op(t: dict[str, Any], cap: float, wanted: tuple[str, ...]) -> tuple[Any, Any]:
    dtype = t["input"].dtype
    options = LOSS.options(-100, 0.7, cap, 0, dtype, torch.float32, dtype, " ".join(wanted))
    return LOSS.tensors(*(t[name] for name in (*LAYER, "target"))), options


def test_registered_ops() -> None:
    for dtype, wanted, more in ((torch.float32, ANSWERS, (2,)), (torch.bfloat16, ("log_prob", "lse"), ())):
        t = tensors((5,), more, dtype)
        wanting(t)
        given, o = arguments_of_op(t, 2.0, wanted)
        torch.library.opcheck(OPS[LOSS.name].forward, (*given, *o))
        results = [r.detach() for r in OPS[LOSS.name].forward(*given, *o)]
        up = [torch.rand_like(r).requires_grad_() if r.is_floating_point() and r.numel() else None for r in results]
        torch.library.opcheck(OPS[LOSS.name].backward, (*up, *given, *o, [True] * 3))
    with pytest.raises(RuntimeError, match="linear_weight of shape"):
        OPS[LOSS.name].forward(given[0], given[1][:, :2], *given[2:], *o)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_there_are_never_all_logits(cap: float) -> None:
    given, o = arguments_of_op(tensors((2000,)), cap, ANSWERS)
    with Largest() as watch:
        results = LOSS.forward(given, o)
        LOSS.backward((*results[:4], None), given, o, (True,) * 3, None)
    assert 7 * C * 4 <= watch.bytes <= 2000 * D * 4 < 2000 * C * 4


def test_errors_and_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    t, call = tensors(), fastloss.linear_token_statistics
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"outputs": ("odds",)}, ValueError, "outputs must be some of log_prob, .* got 'odds'"),
        ({"target": None, "outputs": ("log_prob",)}, ValueError, "'log_prob' needs a target"),
        ({"target": t["target"][:5]}, ValueError, r"target must have shape \(23\) or \(23, K\), .* got \(5,\)"),
        ({"target": t["target"].float()}, RuntimeError, "target must hold class indices"),
        ({"target": t["target"] + 50}, IndexError, "out of bounds"),
        ({"target": [1, 2]}, TypeError, "target must be a Tensor, got list"),
        ({"linear_weight": None}, TypeError, "linear_weight must be a Tensor, got NoneType"),
        ({"linear_weight": torch.randn(C, 2, D)}, RuntimeError, r"linear_weight must have shape \(C, D\), got \(33, 2, 12\)"),
        ({"linear_weight": torch.randn(C, 5)}, RuntimeError, "expected equal input and linear_weight last dimensions"),
        ({"linear_bias": torch.randn(5)}, RuntimeError, r"expected linear_bias shape \(33,\), got \(5,\)"),
        ({"linear_weight": t["linear_weight"].double()}, RuntimeError, "dtype"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive or None, got 0.0"),
    )
    for change, error, words in cases:
        with pytest.raises(error, match=words):
            call(**{**t, **change})
    assert fastloss.explain(call, **t) == ("numba", "kernel", "torch.float32 on cpu")
    assert fastloss.explain(call, **{**t, "linear_weight": t["linear_weight"].double()}).path == "torch"
    monkeypatch.setattr(fastloss.config, "min_numel", 190)
    assert "759 logits are fewer than 760: config.min_numel" in fastloss.explain(call, **t).reason
    torch.testing.assert_close(call(**t).log_prob, theirs(**t)["log_prob"])
