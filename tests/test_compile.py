"""Compilers, tracers, modes and subclasses: torch's result, without a graph break, and our op in the graph where there is one."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastloss
from fastloss import losses
from fastloss.ops import OPS

Calls = dict[str, tuple[str, Callable[[int], torch.Tensor], Callable[[int], dict[str, Any]]]]


def indices(n: int) -> torch.Tensor:
    target = torch.arange(n) % 7
    target[::4] = -100
    return target


CALLS: Calls = {
    "indices": ("cross_entropy", lambda n: torch.randn(n, 7), lambda n: {"target": indices(n)}),
    "weighted": (
        "cross_entropy",
        lambda n: torch.randn(n, 7),
        lambda n: {"target": indices(n), "weight": torch.arange(1.0, 8), "reduction": "sum"},
    ),
    "smoothed": (
        "cross_entropy",
        lambda n: torch.randn(n, 7),
        lambda n: {"target": indices(n), "label_smoothing": 0.1, "reduction": "none"},
    ),
    "probabilities": ("cross_entropy", lambda n: torch.randn(n, 7), lambda n: {"target": torch.softmax(torch.randn(n, 7), 1)}),
    "image": ("cross_entropy", lambda n: torch.randn(n, 7, 3), lambda n: {"target": indices(n * 3).view(n, 3)}),
    "nll_loss": ("nll_loss", lambda n: -torch.rand(n, 7), lambda n: {"target": indices(n)}),
    "bce with logits": (
        "binary_cross_entropy_with_logits",
        lambda n: torch.randn(n, 7),
        lambda n: {"target": torch.rand(n, 7), "pos_weight": torch.rand(7)},
    ),
    "bce": (
        "binary_cross_entropy",
        lambda n: torch.rand(n, 7),
        lambda n: {"target": torch.rand(n, 7), "weight": torch.rand(7), "reduction": "none"},
    ),
    "softmax": ("softmax", lambda n: torch.randn(n, 7), lambda n: {"dim": 1}),
    "log_softmax": ("log_softmax", lambda n: torch.randn(n, 7), lambda n: {"dim": 0}),
}
on_every_call = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def split(options: dict[str, Any]) -> tuple[list[torch.Tensor], Callable[..., dict[str, Any]]]:
    """The tensors among the options, and how to put them back."""
    names = [k for k, v in options.items() if isinstance(v, torch.Tensor)]
    return [options[k] for k in names], lambda *tensors: {**options, **dict(zip(names, tensors, strict=True))}


def compiled_and_plain(call: str, n: int, compiled: Callable[..., Any]) -> None:
    """Loss and gradient of a compiled function of (input, *tensors) against torch's eager function."""
    function, make_input, make_options = CALLS[call]
    options = make_options(n)
    tensors, _ = split(options)
    mine, theirs = (make_input(n).requires_grad_() for _ in range(2))
    with torch.no_grad():
        theirs.copy_(mine)
    loss, expected = compiled(mine, *tensors), getattr(F, function)(theirs, **options)
    torch.testing.assert_close(loss, expected)
    dloss = torch.randn_like(expected)
    loss.backward(dloss)
    expected.backward(dloss)
    torch.testing.assert_close(mine.grad, theirs.grad)


def function_of_tensors(call: str, n: int = 6) -> Callable[..., torch.Tensor]:
    function, _, make_options = CALLS[call]
    _, join = split(make_options(n))
    return lambda x, *tensors: getattr(fastloss, function)(x * 1, **join(*tensors))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@on_every_call
def test_fullgraph(call: str, backend: str) -> None:
    compiled_and_plain(call, 6, torch.compile(function_of_tensors(call), fullgraph=True, backend=backend))


@pytest.mark.parametrize("call", ["smoothed", pytest.param("probabilities", marks=pytest.mark.long), "bce with logits", "softmax"])
def test_fullgraph_with_inductor(call: str) -> None:
    compiled_and_plain(call, 6, torch.compile(function_of_tensors(call), fullgraph=True))


@on_every_call
def test_dynamic_shapes_compile_once(call: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function_of_tensors(call), fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 8, 5, 33, 120):
        compiled_and_plain(call, n, compiled)
    assert len(graphs) == 1
    assert any("fastloss" in str(node.target) for node in graphs[0].graph.nodes)


@on_every_call
def test_automatic_dynamic_shapes_settle(call: str) -> None:
    """One graph for the first shape, one for all others."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function_of_tensors(call), fullgraph=True, backend=backend)
    for n in (6, 8, 5, 33):
        compiled_and_plain(call, n, compiled)
    assert len(graphs) == 2


def test_ignored_rows_do_not_leak_memory_into_the_loss() -> None:
    """Every element is written by the kernel, never left to what the buffer held (Liger #1338)."""
    compiled = torch.compile(lambda x, y: fastloss.cross_entropy(x, y, reduction="none").sum(), fullgraph=True, backend="aot_eager")
    logits = torch.randn(64, 9)
    target = torch.full((64,), -100)
    for _ in range(3):
        assert compiled(logits, target) == 0
    target[5] = 3
    torch.testing.assert_close(compiled(logits, target), F.cross_entropy(logits, target, reduction="sum"))


def test_the_module_compiles() -> None:
    module = fastloss.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(7))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(6, 7), indices(6)
    torch.testing.assert_close(compiled(logits, target), torch.nn.CrossEntropyLoss(module.weight, label_smoothing=0.1)(logits, target))


def test_results_large_enough_for_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor cannot have its memory."""
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1)
    x, target = torch.randn(20, 7), torch.arange(20) % 7
    for call in (lambda x: fastloss.softmax(x, 1), lambda x: fastloss.cross_entropy(x, target)):
        leaf = x.clone().requires_grad_()
        result = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf)
        torch.testing.assert_close(result, call(x))
        result.sum().backward()


def test_out_of_bounds_under_a_compiler() -> None:
    compiled = torch.compile(fastloss.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds."):
        compiled(torch.randn(3, 7), torch.tensor([0, 7, 1]))


@on_every_call
def test_export(call: str) -> None:
    function, make_input, make_options = CALLS[call]
    options = make_options(6)
    tensors, _ = split(options)

    class Loss(torch.nn.Module):
        def forward(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            return function_of_tensors(call)(x, *tensors)

    inputs = make_input(6)
    exported = torch.export.export(Loss(), (inputs, *tensors))
    # softmax ends many a model that is served where fastloss is not installed; torch before 2.7 does not say that it exports
    ours = "softmax" not in function or not hasattr(torch.compiler, "is_exporting")
    assert any("fastloss" in str(node.target) for node in exported.graph.nodes) == ours
    torch.testing.assert_close(exported.module()(inputs, *tensors), getattr(F, function)(inputs, **options))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@on_every_call
def test_make_fx_records_no_constants(call: str, mode: str) -> None:
    if (call, mode) == ("bce", "symbolic") and torch.__version__ < (2, 13):
        pytest.skip("an older torch cannot trace its own binary_cross_entropy")
    function, make_input, make_options = CALLS[call]
    tensors, join = split(make_options(6))
    graph = make_fx(function_of_tensors(call), tracing_mode=mode)(make_input(6), *tensors)
    other, fresh = make_input(6), split(make_options(6))[0]
    torch.testing.assert_close(graph(other, *fresh), getattr(F, function)(other, **join(*fresh)))


@on_every_call
def test_fake_and_meta_tensors(call: str) -> None:
    function, make_input, make_options = CALLS[call]
    real = getattr(F, function)(make_input(6), **make_options(6))
    with FakeTensorMode():
        fake = getattr(fastloss, function)(make_input(6), **make_options(6))
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in make_options(6).items()}
    meta = getattr(fastloss, function)(make_input(6).to("meta"), **options)
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


# ---------------------------------------------------------------- the registered ops

REDUCTIONS = ("none", "mean", "sum")


Sample = tuple[str, Any, tuple[Any, ...]]


def op_samples() -> Iterator[Sample]:
    """Name, loss, arguments; every option of every loss once."""
    for dtype, shape in ((torch.float32, (6, 7)), (torch.bfloat16, (2, 7, 3)), (torch.float64, (5, 50))):
        logits, weight = torch.randn(shape).to(dtype), torch.rand(shape[1]).to(dtype)
        target = indices(math.prod(shape) // shape[1]).view(shape[:1] + shape[2:])
        soft = torch.rand(shape).to(dtype)
        apart = torch.stack([target, target + 1], -1)[..., 0]
        for reduction, w, smoothing in (("none", None, 0.0), ("mean", weight, 0.1), ("sum", None, 0.1), ("mean", None, 0.0)):
            name = f"{dtype} {tuple(shape)} {reduction} {smoothing}"
            out = torch.float32 if dtype == torch.bfloat16 and reduction == "sum" else dtype
            yield f"indices {name}", losses.cross_entropy, (logits, apart, w, -100, smoothing, reduction, out)
            yield f"probabilities {name}", losses.soft_cross_entropy, (logits, soft, w, smoothing, reduction, out)
            entries = torch.stack([target, target.flip(0)], 1)
            for prob in (torch.rand(entries.shape).to(dtype), torch.rand(2, *(1,) * (target.dim() - 1))):
                yield f"entries {name}", losses.sparse_soft_cross_entropy, (logits, prob, entries, w, smoothing, reduction, out)
        for reduction in REDUCTIONS:
            name = f"{dtype} {tuple(shape)} {reduction}"
            yield f"nll {name}", losses.nll_loss, (logits, apart, weight, -100, reduction, dtype)
            a, b = torch.rand(2, 3, 4).to(dtype), torch.rand(2, 3, 4).to(dtype)
            row = torch.rand(4).to(dtype)
            yield f"bce {name}", losses.bce_with_logits, (a.transpose(0, 1), b.transpose(0, 1), None, row, reduction, dtype)
            yield f"prob {name}", losses.binary_cross_entropy, (a, b, row, reduction, dtype)
            yield f"focal {name}", losses.sigmoid_focal_loss, (a.transpose(0, 1), b.transpose(0, 1), 0.25, 2.0, reduction, dtype)
        outputs = (
            ("log_prob entropy lse sum_sq_prob argmax", target),
            ("log_prob", torch.stack([target, target], -1)),
            ("entropy lse", None),
        )
        for wanted, y in outputs:
            yield f"{wanted} {dtype} {tuple(shape)}", losses.token_statistics, (logits, y, 1, -100, 0.7, wanted)
        for way in (losses.softmax, losses.log_softmax):
            yield f"{way.name} {dtype} {tuple(shape)}", way, (logits, 1, dtype, dtype)
            yield f"{way.name} strided {dtype} {tuple(shape)}", way, (logits.transpose(0, 1).contiguous().transpose(0, 1), 0, dtype, dtype)


def is_long(name: str) -> bool:
    """All but float32."""
    return "float32" not in name


on_every_op = pytest.mark.parametrize("sample", [pytest.param(s, id=s[0], marks=[pytest.mark.long] * is_long(s[0])) for s in op_samples()])


@on_every_op
def test_opcheck(sample: Sample) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, with and without gradients."""
    _, loss, args = sample
    torch.library.opcheck(OPS[loss.name].forward, args)
    torch.library.opcheck(OPS[loss.name].forward, wanting_gradients(args, loss.differentiable))


@on_every_op
def test_opcheck_of_the_backward_ops(sample: Sample) -> None:
    """The same of the gradient, with every gradient wanted and only the first."""
    _, loss, args = sample
    t, o = loss.tensors(*args[: len(loss.tensors._fields)]), loss.options(*args[len(loss.tensors._fields) :])
    results = loss.forward(t, o)
    saved = loss.to_save(t, results)
    upstream = [torch.randn_like(answer) if answer.is_floating_point() else None for answer in results[: loss.answers]]
    for needed in {(True,) * loss.differentiable, (True, False)[: loss.differentiable]}:
        backward = (*upstream, *saved, *o, list(needed))
        torch.library.opcheck(OPS[loss.name].backward, backward)
        torch.library.opcheck(OPS[loss.name].backward, wanting_gradients(backward, len(upstream) + loss.differentiable))


# the ops of linear losses: test_linear_autograd; those of sharded classes refuse: test_vocab_parallel
TWICE = [loss for loss in losses.LOSSES if not loss.name.startswith(("linear", "vocab_parallel"))]


@pytest.mark.parametrize("loss", TWICE, ids=lambda loss: loss.name)
def test_ops_differentiate_twice(loss: Any) -> None:
    """In float64, by finite differences: the gradients of the gradients of every op."""
    args = next(args for name, found, args in op_samples() if found is loss and "float64" in name)
    inputs = tuple((0.1 + 0.8 * torch.rand(2, 3, dtype=torch.float64)).requires_grad_() for _ in range(loss.differentiable))
    entries = torch.tensor([[1, 2, -100], [0, 2, 2]])
    others = tuple((torch.tensor([1, 2]) if a.dim() == 1 else entries) if a.dtype == torch.int64
                   else torch.rand(2, 3).double() if a.dim() > 1 else torch.rand(3).double()
                   for a in args[loss.differentiable : len(loss.tensors._fields)] if a is not None)  # fmt: skip
    missing = len(loss.tensors._fields) - len(inputs) - len(others)
    options = args[len(loss.tensors._fields) :]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        result = OPS[loss.name].forward(*inputs, *others, *(None,) * missing, *options)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradgradcheck(call, inputs)


def wanting_gradients(args: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    """The same arguments, the `first` of them as leaves that require a gradient."""
    clones = (None if a is None else a.detach().clone(memory_format=torch.preserve_format) for a in args[:first])
    leaves = (None if a is None else a.requires_grad_() for a in clones)
    return *leaves, *args[first:]


# ---------------------------------------------------------------- modes and subclasses


@pytest.mark.parametrize("half", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
@on_every_call
def test_autocast(call: str, half: torch.dtype) -> None:
    function, make_input, make_options = CALLS[call]
    options, results = make_options(6), []
    for dtype in (torch.float32, half):
        inputs = make_input(6).to(dtype)
        moved = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and dtype == half else v for k, v in options.items()
        }
        for module in (fastloss, F):
            leaf = inputs.clone().requires_grad_()
            with torch.autocast("cpu", dtype=half):
                loss = getattr(module, function)(leaf, **moved)
            loss.backward(torch.ones_like(loss))
            results.append((loss.detach(), leaf.grad))
        (loss, gradient), (expected, expected_gradient) = results[-2:]
        assert (loss.dtype, gradient.dtype) == (expected.dtype, expected_gradient.dtype)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-5)


def test_autocast_makes_no_float32_copy_of_half_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.randn(6, 7).bfloat16(), indices(6)
    seen = []
    forward = losses.cross_entropy.forward
    monkeypatch.setattr(losses.cross_entropy, "forward", lambda t, o: (seen.append(t.input.dtype), forward(t, o))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastloss.cross_entropy(logits, target).dtype == torch.float32
    assert seen == [torch.bfloat16]


@on_every_call
def test_deterministic_mode(call: str) -> None:
    function, make_input, make_options = CALLS[call]
    inputs, options = make_input(6), make_options(6)
    assert torch.are_deterministic_algorithms_enabled()
    on = getattr(fastloss, function)(inputs, **options)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(on, getattr(fastloss, function)(inputs, **options))


class Logged(torch.Tensor):
    """A subclass that notes which functions it passes through."""

    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@on_every_call
def test_torch_function_subclasses_see_torchs_function(call: str) -> None:
    function, make_input, make_options = CALLS[call]
    inputs, options = make_input(6), make_options(6)
    Logged.names.clear()
    result = getattr(fastloss, function)(inputs.as_subclass(Logged), **options)
    assert function in Logged.names
    assert isinstance(result, Logged)
    torch.testing.assert_close(result.as_subclass(torch.Tensor), getattr(F, function)(inputs, **options))


@on_every_call
def test_torch_dispatch_subclasses(call: str) -> None:
    function, make_input, make_options = CALLS[call]
    inputs, options = make_input(6), make_options(6)
    result = getattr(fastloss, function)(TwoTensor(inputs, inputs.clone()), **options)
    assert isinstance(result, TwoTensor)
    torch.testing.assert_close(result.a, getattr(F, function)(inputs, **options))


@on_every_call
def test_modes_see_torchs_operators(call: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    function, make_input, make_options = CALLS[call]
    inputs, options = make_input(6), make_options(6)
    logs = []
    for module in (fastloss, F):
        with Counter() as counter:
            getattr(module, function)(inputs, **options)
        logs.append(counter.seen)
    assert logs[0] == logs[1]


def test_parameters_are_ordinary_logits() -> None:
    logits = torch.nn.Parameter(torch.randn(6, 7))
    assert fastloss.explain(fastloss.cross_entropy, logits, indices(6)).path == "kernel"


def test_dtensor_goes_by_its_placements() -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        logits, target = torch.randn(6, 7), indices(6)
        mesh = DeviceMesh("cpu", [0])
        sharded = distribute_tensor(logits, mesh, [Shard(0)])
        targets = distribute_tensor(target, mesh, [Shard(0)])
        assert fastloss.explain(fastloss.cross_entropy, sharded, targets).path == "kernel"
        whole = [distribute_tensor(t, mesh, [Replicate()]) for t in (logits, target)]
        assert fastloss.explain(fastloss.cross_entropy, *whole).path == "torch"
        result = fastloss.cross_entropy(sharded, targets, reduction="sum")
        torch.testing.assert_close(result.full_tensor(), F.cross_entropy(logits, target, reduction="sum"))
    finally:
        distributed.destroy_process_group()
