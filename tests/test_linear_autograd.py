"""linear_cross_entropy in programs: whose gradient is wanted, upstream gradients, derivatives of any order, compilers, autocast."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import fastloss
from fastloss import chunks, foresight, losses
from fastloss.composed import linear_cross_entropy as composed
from fastloss.ops import OPS

N, D, C = 19, 6, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of four rows; and no number was seen before."""
    monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 4})
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 1)
    monkeypatch.setattr(foresight, "_last", {})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(dtype: torch.dtype = torch.float32, wanted: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
    made = [torch.randn(N, D), torch.randn(C, D), torch.randn(C)]
    return [t.to(dtype).requires_grad_(w) for t, w in zip(made, wanted, strict=True)]


def indices() -> Tensor:
    target = torch.randint(C, (N,))
    target[::4] = -100
    return target


def loss_of(function: Any, t: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    loss: Tensor = function(t[0], t[1], target, linear_bias=t[2], **options)
    return loss


def both(t: list[Tensor], target: Tensor, **options: Any) -> Iterator[Tensor]:
    return (loss_of(function, t, target, **options) for function in (fastloss.linear_cross_entropy, composed))


def same(mine: Any, theirs: Any, **tolerance: Any) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_every_subset_of_gradients(wanted: tuple[bool, ...], reduction: str) -> None:
    """A frozen trunk and a trained head, a frozen head, a bias alone."""
    t, target = leaves(wanted=wanted), indices()
    inputs = [x for x in t if x.requires_grad]
    for expected in (True, False):  # with the gradient in the forward, and without
        foresight._last.clear() if expected else foresight._last.update(dict.fromkeys(foresight._last, (1.0, False)))
        mine, theirs = (torch.autograd.grad(loss.sum(), inputs) for loss in both(t, target, reduction=reduction))
        same(mine, theirs)
    soft = torch.rand(N, C, requires_grad=True)
    mine, theirs = (torch.autograd.grad(loss.sum(), [*inputs, soft]) for loss in both(t, soft, reduction=reduction))
    same(mine, theirs)
    alone = [x.detach() for x in t]
    mine, theirs = (torch.autograd.grad(loss.sum(), soft) for loss in both(alone, soft, reduction=reduction))
    same(mine, theirs)


def test_heads_that_are_no_leaves() -> None:
    """LoRA: the head is a sum; and a head tied to the embedding that made the input."""
    t, target = leaves(wanted=(True, False, False)), indices()
    a, b, table = torch.randn(C, 2, requires_grad=True), torch.randn(2, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    tokens, results = torch.randint(C, (N,)), []
    for f in (fastloss.linear_cross_entropy, composed):
        lora, tied = loss_of(f, [t[0], t[1] + a @ b, t[2]], target), f(F.embedding(tokens, table).tanh(), table, target)
        results.append((*torch.autograd.grad(lora, [a, b, t[0]]), *torch.autograd.grad(tied, table)))
    same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradients_that_change(dtype: torch.dtype) -> None:
    t, target = leaves(dtype), indices()
    for number in (1.0, 1.0, 0.25, 0.25, 0.25, -3.0, 0.0, 65536.0, 1.0):
        mine, theirs = (torch.autograd.grad(loss * number, t) for loss in both(t, target))
        rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (0.05, 0.02)
        same(mine, theirs, rtol=rtol, atol=atol * abs(number))
        again = torch.autograd.grad(fastloss.linear_cross_entropy(t[0], t[1], target, linear_bias=t[2]) * number, t)
        assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "the bits depend on what was foreseen"


def test_twice_through_one_graph_and_nothing_written() -> None:
    t, target = leaves(), indices()
    before = [x.detach().clone() for x in (*t, target)]
    versions = [x._version for x in (*t, target)]
    loss = loss_of(fastloss.linear_cross_entropy, t, target)
    first = [g.clone() for g in torch.autograd.grad(loss, t, retain_graph=True)]
    second = torch.autograd.grad(loss, t, torch.tensor(3.7), retain_graph=True)
    third = torch.autograd.grad(loss, t)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    same(second, [3.7 * g for g in first])
    assert all(torch.equal(a, b) for a, b in zip(before, (*t, target), strict=True))
    assert versions == [x._version for x in (*t, target)]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_derivatives_of_any_order(soft: bool) -> None:
    t = [x.detach().requires_grad_() for x in leaves(torch.float64)]
    t[0] = t[0][:3].detach().requires_grad_()
    target = torch.rand(3, C, dtype=torch.float64).requires_grad_() if soft else indices()[:3]
    options = {"label_smoothing": 0.1, "logit_scale": 0.5, "logit_softcap": 2.0, "reduction": "none"}
    inputs = (*t, target) if soft else tuple(t)

    def loss(*x: Tensor) -> Tensor:
        return fastloss.linear_cross_entropy(x[0], x[1], x[3] if soft else target, linear_bias=x[2], **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_functorch() -> None:
    t, target = [x.detach() for x in leaves()], indices()

    def function(f: Any) -> Any:
        return lambda *x: f(x[0], x[1], target, linear_bias=x[2])

    mine, theirs = (torch.func.grad(function(f), (0, 1, 2))(*t) for f in (fastloss.linear_cross_entropy, composed))
    same(mine, theirs)
    mine, theirs = (torch.func.jvp(function(f), tuple(t), tuple(t)) for f in (fastloss.linear_cross_entropy, composed))
    same(mine, theirs)
    batch = torch.randn(3, N, D)
    mine, theirs = (torch.vmap(function(f), (0, None, None))(batch, *t[1:]) for f in (fastloss.linear_cross_entropy, composed))
    torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------- compilers


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_compiles_whole(soft: bool, backend: str) -> None:
    t, target = leaves(), torch.rand(N, C) if soft else indices()
    options = {"label_smoothing": 0.1, "logit_softcap": 3.0}
    compiled = torch.compile(
        lambda t, y: loss_of(fastloss.linear_cross_entropy, [2 * x for x in t], y, **options) * 2, fullgraph=True, backend=backend
    )
    for n in (N, N - 3, N - 5):
        few = [t[0][:n], *t[1:]]
        expected = loss_of(composed, [2 * x for x in few], target[:n], **options) * 2
        mine = compiled(few, target[:n])
        torch.testing.assert_close(mine, expected)
        same(torch.autograd.grad(mine, t), torch.autograd.grad(expected, t))


def test_exports_and_runs_without_data() -> None:
    module, x, y = fastloss.LinearCrossEntropyLoss(D, C, bias=True), torch.randn(N, D), indices()
    exported = torch.export.export(module, (x, y))
    assert any("fastloss" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, y), module(x, y))
    meta = fastloss.linear_cross_entropy(x.to("meta"), torch.empty(C, D, device="meta"), y.to("meta"), reduction="none")
    assert (meta.shape, meta.device.type) == ((N,), "meta")


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_registered_ops_differentiate_twice(soft: bool) -> None:
    loss: Any = losses.linear_soft_cross_entropy if soft else losses.linear_cross_entropy
    inputs = [torch.rand(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3), (4, 3), (4,), (2, 4))]
    o = loss.options(*(() if soft else (-100,)), 0.1, 0.7, 2.0, 0, torch.float64, torch.float64, "mean", torch.float64)
    rest = () if soft else (torch.tensor([3, 1]),)
    assert torch.autograd.gradgradcheck(lambda *t: OPS[loss.name].forward(*t, *rest, None, *o)[0], inputs[: loss.differentiable])


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_ops(dtype: torch.dtype, soft: bool) -> None:
    loss: Any = losses.linear_soft_cross_entropy if soft else losses.linear_cross_entropy
    for reduction, cap, out in (("mean", 2.0, ()), ("none", 0.0, (2,))):
        x, w, b = torch.randn(N, D).to(dtype), torch.randn(C, *out, D).to(dtype), torch.randn(C, *out).to(dtype)
        target = torch.rand(N, C, *out).to(dtype) if soft else torch.randint(C, (N, *out))
        o = loss.options(*(() if soft else (-100,)), 0.1, 0.7, cap, 0, dtype, torch.float32, reduction, dtype)
        args = [
            x.requires_grad_(),
            w.requires_grad_(),
            b.requires_grad_(),
            target.requires_grad_() if soft else target,
            torch.rand(C).to(dtype),
        ]
        torch.library.opcheck(OPS[loss.name].forward, (*args, *o))
        value, divisor = (r.detach() for r in OPS[loss.name].forward(*args, *o))
        dloss = torch.rand_like(value).requires_grad_()
        torch.library.opcheck(OPS[loss.name].backward, (dloss, *args, divisor, *o, [True] * loss.differentiable))
    with pytest.raises(RuntimeError, match="linear_weight of shape"):
        OPS[loss.name].forward(x, w[..., :2], b, target, None, *o)


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast(half: torch.dtype, given: torch.dtype) -> None:
    """Products in autocast's dtype, loss and sums in float32; the gradients are not worse than eager's."""
    t, target, weight = leaves(given), indices(), torch.rand(C).to(given)
    exact = [x.detach().double().requires_grad_() for x in t]
    truth = loss_of(composed, exact, target, weight=weight.double())
    true = torch.autograd.grad(truth, exact)
    with torch.autocast("cpu", half):
        route = fastloss.explain(fastloss.linear_cross_entropy, t[0], t[1], target, linear_bias=t[2], weight=weight)
        mine, theirs = both(t, target, weight=weight)
        inside = torch.autograd.grad(loss_of(fastloss.linear_cross_entropy, t, target, weight=weight), t)
    assert route.path == "kernel", route.reason
    assert mine.dtype == theirs.dtype == (torch.float64 if given is torch.float64 else torch.float32)
    assert (mine - truth).abs() <= 2 * (theirs - truth).abs() + 1e-2
    found, expected = torch.autograd.grad(mine, t), torch.autograd.grad(theirs, t)
    assert all(torch.equal(a, b) for a, b in zip(found, inside, strict=True))
    for g, e, r in zip(found, expected, true, strict=True):
        assert g.dtype == e.dtype
        assert (g - r).norm() <= 2 * (e - r).norm() + 1e-6


def test_float16_loss_scale_keeps_small_gradients() -> None:
    """p / N would underflow in float16 before the loss scale: it is there when the gradient is computed."""
    rows = 4096
    x, w = torch.randn(rows, D).half().requires_grad_(), torch.zeros(3000, D).half().requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    for _ in range(3):
        loss = fastloss.linear_cross_entropy(x, w, target)
        (dw,) = torch.autograd.grad(loss.float() * 2.0**15, w)
    exact = w.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(composed(x.detach().double(), exact, target) * 2.0**15, exact)
    assert bool(dw[1:].any())
    torch.testing.assert_close(dw.double(), truth, rtol=5e-3, atol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    t, target = leaves(), indices()
    mine = checkpoint(lambda *x: loss_of(fastloss.linear_cross_entropy, list(x), target), *t, use_reentrant=reentrant)
    theirs = loss_of(composed, t, target)
    torch.testing.assert_close(mine, theirs)
    mine.backward()
    same([x.grad for x in t], torch.autograd.grad(theirs, t))


def test_training_is_torchs() -> None:
    """Twenty steps with weight decay of a head and what is below it, beside eager ones."""
    results = []
    for function in (fastloss.linear_cross_entropy, composed):
        torch.manual_seed(0)
        trunk, head, y = torch.nn.Linear(D, D), torch.nn.Linear(D, C), torch.randint(C, (N,))
        x = torch.randn(N, D)
        optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=0.05)
        for _ in range(20):
            loss = function(trunk(x).relu(), head.weight, y, linear_bias=head.bias, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([loss.detach(), head.weight.detach(), trunk.weight.detach()])
    same(*results, rtol=1e-3, atol=1e-4)


def test_same_bits_on_every_run() -> None:
    t, target = leaves(), indices()
    runs = [torch.autograd.grad(loss_of(fastloss.linear_cross_entropy, t, target), t) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("op", [op for op in op_db if op.name.endswith("linear_cross_entropy")], ids=lambda op: op.variant_test_name)
def test_torchs_own_samples(op: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            call = (sample.input.detach(), *(a.detach() for a in sample.args))
            torch.testing.assert_close(
                fastloss.linear_cross_entropy(*call, **sample.kwargs), F.linear_cross_entropy(*call, **sample.kwargs), equal_nan=True
            )
    for error in op.error_inputs("cpu"):
        with pytest.raises(error.error_type, match=error.error_regex):
            fastloss.linear_cross_entropy(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)
