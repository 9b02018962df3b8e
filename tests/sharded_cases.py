"""What ranks do in the tests of losses over sharded classes: every function here runs on every rank, with its slice of the same numbers."""

import importlib.util
import itertools
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers import LAYOUTS
from ranks import Rank
from torch import Tensor

import fastloss

EVEN = (0.5, 0.5)
SHARES = {1: (1.0,), 2: EVEN, 3: (0.0, 0.7, 0.3), 4: (0.3, 0.0, 0.4, 0.3)}
"""Of the classes, by the number of ranks: uneven, one rank without any."""


class Case(NamedTuple):
    """A call of vocab_parallel_cross_entropy, and of cross_entropy with the whole vocabulary."""

    shape: tuple[int, ...] = (7, 53)
    dtype: torch.dtype = torch.float32
    soft: bool = False
    weighted: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    layouts: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int, ...] | None = None
    explicit: bool = False  # vocab_start is given
    backend: str = "auto"

    @property
    def dim(self) -> int:
        return min(1, len(self.shape) - 1)

    def slice_of(self, rank: int, count: int) -> slice:
        classes = self.shape[self.dim]
        sizes = self.sizes or [round(share * classes) for share in SHARES[count][:-1]]
        sizes = [*sizes, classes - sum(sizes)][:count]
        return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def options(self) -> dict[str, Any]:
        o: dict[str, Any] = {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        return o if self.soft else {**o, "ignore_index": self.ignore_index}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Logits, target, weight and upstream gradient of the whole vocabulary."""
        g = torch.Generator().manual_seed(len(repr(self.shape)) + 7)
        classes, positions = self.shape[self.dim], self.shape[:1] * (len(self.shape) > 1) + self.shape[2:]
        logits = (torch.randn(self.shape, generator=g) * 3).to(self.dtype)
        target = torch.randint(classes, positions, generator=g)
        if target.numel() > 2:
            target.view(-1)[::4] = self.ignore_index
        weight = (torch.rand(classes, generator=g) + 0.1).to(self.dtype)
        shares = torch.softmax(torch.randn(self.shape, generator=g), self.dim).to(self.dtype)
        dloss = torch.randn(positions if self.reduction == "none" else (), generator=g) * 1.7
        return logits, shares if self.soft else target, weight if self.weighted else None, dloss

    def row_gradient(self) -> float:
        """The largest gradient of a row's loss: what its probabilities and its target are multiplied with."""
        _, target, weight, dloss = self.tensors()
        if self.reduction != "mean":
            return dloss.abs().max().item()
        if self.soft:
            return abs(dloss.item()) / (target.numel() / self.shape[self.dim])
        y = target[target != self.ignore_index]
        return abs(dloss.item()) / (weight[y].sum().item() if weight is not None else max(1, y.numel()))


class Found(NamedTuple):
    loss: Tensor
    dinput: Tensor
    dtarget: Tensor | None


def laid_out(tensor: Tensor, layout: str | None) -> Tensor:
    if layout is None or tensor.numel() == 0:
        return tensor.clone()
    leaf, view = LAYOUTS[layout](tensor)
    return view(leaf)


def sharded(rank: Rank, cases: list[Case]) -> list[Found]:
    """The loss and the gradients of this rank's slice."""
    return [_sharded(rank, case) for case in cases]


def _sharded(rank: Rank, case: Case) -> Found:
    logits, target, weight, dloss = case.tensors()
    mine, layouts = case.slice_of(rank.number, rank.count), dict(case.layouts)
    cut = (mine,) if case.dim == 0 else (slice(None), mine)
    x = laid_out(logits[cut], layouts.get("input")).detach().requires_grad_()
    y = laid_out(target[cut] if case.soft else target, layouts.get("target")).detach()
    w = None if weight is None else laid_out(weight[mine], layouts.get("weight")).detach()
    y.requires_grad_(case.soft)
    with fastloss.use_backend(case.backend):  # type: ignore[arg-type]
        loss = fastloss.vocab_parallel_cross_entropy(
            x, y, group=rank.group, vocab_start=mine.start if case.explicit else None, weight=w, **case.options()
        )
        loss.backward(laid_out(dloss.to(loss.dtype), layouts.get("dloss")))
    assert x.grad is not None
    return Found(loss.detach(), x.grad, y.grad)


def whole(case: Case, function: Any, dtype: torch.dtype | None = None) -> Found:
    """The same by one process with all classes, by F.cross_entropy or ours."""
    logits, target, weight, dloss = case.tensors()
    x = (logits if dtype is None else logits.to(dtype)).detach().clone().requires_grad_()
    y = (target.to(x.dtype) if case.soft else target).detach().clone().requires_grad_(case.soft)
    loss = function(x, y, weight=None if weight is None else weight.to(x.dtype), **case.options())
    loss.backward(dloss.to(loss.dtype))
    assert x.grad is not None
    return Found(loss.detach(), x.grad, y.grad)


class Call(NamedTuple):
    """A call that differs between ranks: what each has in place of what fits."""

    rows: tuple[int, ...] = ()
    dtype: tuple[torch.dtype, ...] = ()
    options: tuple[dict[str, Any], ...] = ()
    target: tuple[str, ...] = ()
    cut: tuple[tuple[int, int], ...] = ()
    weighted: tuple[bool, ...] = ()


def outcomes(rank: Rank, calls: list[Call]) -> list[str]:
    """What became of these calls, in words, and how often ranks talked."""
    return [_outcome(rank, call) for call in calls]


def _outcome(rank: Rank, call: Call) -> str:
    def mine(values: tuple[Any, ...], otherwise: Any) -> Any:
        return values[rank.number] if values else otherwise

    logits, target, weight, _ = Case(shape=(8, 40), weighted=True).tensors()
    rows, (first, last) = mine(call.rows, 8), mine(call.cut, (rank.number * 40 // rank.count, (rank.number + 1) * 40 // rank.count))
    x = logits[:, first:last].repeat(10, 1)[:rows].to(mine(call.dtype, torch.float32))
    y = target.repeat(10)[:rows]
    changes = {"fits": y, "flipped": y.flip(0), "short": y[:3], "shares": torch.softmax(x, 1), "on no rank": y.masked_fill(y == y[1], 40)}
    w = weight[first:last] if mine(call.weighted, False) else None
    talks = Talks()
    try:
        with talks:
            loss = fastloss.vocab_parallel_cross_entropy(
                x, changes[mine(call.target, "fits")], group=rank.group, weight=w, **mine(call.options, {})
            )
    except Exception as error:
        return f"{len(talks.sent)} {type(error).__name__}: {error}"
    return f"{len(talks.sent)} {loss.item():.9g}"


class Talks:
    """The collectives that torch ran meanwhile, with the shapes of their tensors, by torch's own profiler."""

    def __enter__(self) -> "Talks":
        self.profile = torch.autograd.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)

    @property
    def sent(self) -> list[tuple[str, Any]]:
        events = self.profile.function_events or []
        return [(event.name, event.input_shapes) for event in events if event.name.startswith("c10d::")]


def talk_of_a_step(rank: Rank, case: Case) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """What is sent going forward and coming back, once ranks know of one another."""
    _sharded(rank, case)
    logits, target, weight, dloss = case.tensors()
    mine = case.slice_of(rank.number, rank.count)
    x = logits[:, mine].clone().requires_grad_()
    w = None if weight is None else weight[mine]
    with Talks() as forward:
        loss = fastloss.vocab_parallel_cross_entropy(
            x, target[:, mine] if case.soft else target, group=rank.group, weight=w, **case.options()
        )
    with Talks() as backward:
        loss.backward(dloss.to(loss))
    return forward.sent, backward.sent


def staggered(rank: Rank, cases: list[Case], seconds: float) -> list[Found]:
    """The last rank comes first."""
    time.sleep(seconds * (rank.count - rank.number))
    return sharded(rank, cases)


def statistics(rank: Rank | None, shape: tuple[int, ...], dim: int, per_row: int, dtype: torch.dtype, outputs: tuple[str, ...]) -> Any:
    """Results and gradient of token_statistics: of a slice, or of all (in float64) where there is no rank."""
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    rows = tuple(n for i, n in enumerate(shape) if i != dim % len(shape))
    target = torch.randint(shape[dim], rows if per_row == 1 else (*rows, per_row), generator=g)
    target.view(-1)[::4] = -100
    classes = slice(None) if rank is None else Case(shape=(1, shape[dim])).slice_of(rank.number, rank.count)
    cut: list[slice] = [slice(None)] * len(shape)
    cut[dim] = classes
    x = (logits.double() if rank is None else logits)[tuple(cut)].detach().clone().requires_grad_()
    group = None if rank is None else rank.group or torch.distributed.group.WORLD
    found = fastloss.token_statistics(x, target if per_row else None, dim=dim, logit_scale=0.7, outputs=outputs, group=group)
    answers = [a for a in found if a is not None]
    floats = [a for a in answers if a.is_floating_point()]
    torch.autograd.backward(floats, [torch.randn(a.shape, generator=g).to(a) for a in floats])
    return [a.detach() for a in answers], x.grad


def infinities(rank: Rank | None, soft: bool, label_smoothing: float) -> Any:
    """Rows of which a slice, or everything, is -inf; NaN and inf, alone and among -inf."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(7, 40, generator=g)
    y, q = torch.randint(40, (7,), generator=g), torch.softmax(torch.randn(7, 40, generator=g), 1)
    inf, nan = float("inf"), float("nan")
    x[0, :20], x[1], x[2, 20:], x[3, 3], x[4, :20], x[4, 2], x[5, 0] = -inf, -inf, -inf, nan, -inf, nan, inf
    q[0, :20] = 0.0
    y[0], y[2] = 25, 7
    mine = slice(None) if rank is None else slice(rank.number * 40 // rank.count, (rank.number + 1) * 40 // rank.count)
    leaf = x[:, mine].clone().requires_grad_()
    target = q[:, mine] if soft else y
    if rank is None:
        loss = F.cross_entropy(leaf, target, reduction="none", label_smoothing=label_smoothing)
    else:
        loss = fastloss.vocab_parallel_cross_entropy(leaf, target, group=rank.group, reduction="none", label_smoothing=label_smoothing)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def compiled(rank: Rank, case: Case) -> tuple[Found, Found]:
    """By torch.compile in one graph, and without."""
    logits, target, _, dloss = case.tensors()
    x = logits[:, case.slice_of(rank.number, rank.count)]

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return fastloss.vocab_parallel_cross_entropy(x * 2, y, group=rank.group, **case.options())

    found = []
    for function in (torch.compile(loss_of, fullgraph=True, backend="aot_eager"), loss_of):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target)
        loss.backward(dloss.to(loss))
        assert leaf.grad is not None
        found.append(Found(loss.detach(), leaf.grad, None))
    return found[0], found[1]


def refusal_to_differentiate_twice(rank: Rank) -> str:
    x = torch.randn(3, 5).requires_grad_()
    loss = fastloss.vocab_parallel_cross_entropy(x, torch.tensor([1, 2, 3]), group=rank.group)
    try:
        torch.autograd.grad(loss, x, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return "differentiated"


def waits_in_vain(rank: Rank) -> str:
    """Rank 0 calls, the others do not."""
    group = rank.spare
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    if rank.number:
        time.sleep(3)
        return ""
    try:
        fastloss.vocab_parallel_cross_entropy(torch.randn(3, 5), torch.tensor([1, 2, 3]), group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "came back"


class Model(torch.nn.Module):
    """A body that all ranks have, and a slice of a head."""

    def __init__(self, classes: slice) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Linear(6, 8)
        head = torch.randn(40, 8)
        self.head = torch.nn.Parameter(head[classes].clone())

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.body(features)) @ self.head.t()


class _SumOfSlices(torch.autograd.Function):
    """What goes through all slices of the head has a gradient from each: they are added coming back."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def train(model: Model, x: Tensor, y: Tensor, loss_of: Any) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def beside_data_parallel(rank: Rank) -> tuple[list[float], Tensor]:
    """Four ranks: the head in two slices, times two halves of the batch, with DDP over the halves."""
    dist = torch.distributed
    vocab = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank.number // 2]
    batch = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank.number % 2]
    x, y = torch.randn(8, 6), torch.randint(40, (8,))
    model = Model(slice(rank.number % 2 * 25, 25 + rank.number % 2 * 15))
    parallel = torch.nn.parallel.DistributedDataParallel(model, process_group=batch)
    model.body.register_forward_hook(lambda module, given, made: _SumOfSlices.apply(made, vocab))
    half = slice(rank.number // 2 * 4, rank.number // 2 * 4 + 4)

    def loss_of(_: Model, x: Tensor, y: Tensor) -> Tensor:
        return fastloss.vocab_parallel_cross_entropy(parallel(x), y, group=vocab)

    return train(model, x[half], y[half], loss_of), model.head.detach()


def alone() -> tuple[list[float], Tensor]:
    """The same by one process."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(40, (8,))
    model = Model(slice(None))
    return train(model, x, y, lambda model, x, y: F.cross_entropy(model(x), y)), model.head.detach()


def dtensors(rank: Rank, wide: bool) -> list[str]:
    """What is not as with plain tensors, of DTensors sharded on classes, rows, or both."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = DeviceMesh.from_group(rank.group, "cpu") if rank.group else init_device_mesh("cpu", (2, 2))
    both = [[Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)]]
    placements: list[list[Any]] = [[Shard(1)], [Shard(0)]] if mesh.ndim == 1 else both if wide else both[:1]
    shapes, weights = ((10, 21), (5, 21, 3)) if wide else ((5, 21, 3),), (None, "shard", "whole") if wide else (None, "shard")
    wrong = []
    for shape, soft, weighted, reduction in itertools.product(shapes, (False, True), weights, ("none", "mean", "sum")):
        case = Case(shape, soft=soft, weighted=weighted is not None, reduction=reduction, label_smoothing=0.1)
        logits, target, weight, dloss = case.tensors()
        expected = whole(case, F.cross_entropy)
        for placed in placements:
            x = distribute_tensor(logits, mesh, placed).detach().requires_grad_()
            y = distribute_tensor(target, mesh, placed if soft else [Replicate() if p == Shard(1) else p for p in placed])
            own = [Shard(0) if p == Shard(1) and weighted == "shard" else Replicate() for p in placed]
            w = None if weight is None else distribute_tensor(weight, mesh, own)
            loss = fastloss.cross_entropy(x, y, weight=w, **case.options())
            loss.backward(distribute_tensor(dloss, mesh, loss.placements))
            assert x.grad is not None
            right = torch.allclose(loss.full_tensor(), expected.loss, atol=1e-6) and x.grad.placements == x.placements
            if not right or not torch.allclose(x.grad.full_tensor(), expected.dinput, atol=1e-6):
                wrong.append(f"{case} {placed} {weighted}")
    if mesh.ndim == 1:  # a sum over rows that float16 has no room for
        one_hot = torch.eye(21)[:1].half() * 40
        x, y = (distribute_tensor(t, mesh, [Shard(0)]) for t in (one_hot.repeat(4000, 1), torch.ones(4000, dtype=torch.int64)))
        loss = fastloss.cross_entropy(x, y)
        wrong += [] if loss.dtype == torch.float16 and abs(loss.full_tensor().item() - 40) < 0.1 else [f"float16: {loss}"]
    return wrong


def dtensors_explained(rank: Rank) -> tuple[list[str], float, float]:
    """Where calls go, and a loss with and without `loss_parallel`."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = DeviceMesh.from_group(rank.group, "cpu")
    x, y = torch.randn(10, 21), torch.randint(21, (10,))
    on_classes, on_rows = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(x, mesh, [Shard(0)])
    rows, all_rows = distribute_tensor(y, mesh, [Shard(0)]), distribute_tensor(y, mesh, [Replicate()])
    calls = (
        (on_classes, all_rows),
        (on_classes, y),
        (on_rows, rows),
        (distribute_tensor(x, mesh, [Replicate()]), all_rows),
        (on_rows, all_rows),
    )
    reasons = [fastloss.explain(fastloss.cross_entropy, *call).reason for call in calls]
    with fastloss.use_backend("torch"):
        reasons.append(fastloss.explain(fastloss.cross_entropy, on_classes, all_rows).reason)
    with loss_parallel():
        inside = fastloss.cross_entropy(on_classes, y)
    return reasons, inside.item(), fastloss.cross_entropy(x, y).item()


def example(rank: Rank) -> tuple[list[float], list[float]]:
    """The loss curves of examples/vocab_parallel.py, over all four ranks and over none."""
    spec = importlib.util.spec_from_file_location("vocab_parallel_example", Path(__file__).parent.parent / "examples" / "vocab_parallel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = 15
    mine = slice(module.VOCABULARY * rank.number // 4, module.VOCABULARY * (rank.number + 1) // 4)
    return module.train(mine, sharded=True), module.train(slice(0, module.VOCABULARY), sharded=False)


class Linear(NamedTuple):
    """A call of vocab_parallel_linear_cross_entropy."""

    options: dict[str, Any] = {}  # noqa: RUF012
    dtype: torch.dtype = torch.float32
    bias: bool = False
    weighted: bool = False
    reduce: bool = True
    backend: str = "auto"


def linear(rank: Rank | None, calls: list[Linear]) -> list[tuple[Tensor, ...]]:
    """The loss and the gradients of input, layer and bias: of a slice of the layer, or of all of it in float64 where there is no rank."""
    return [_linear(rank, call) for call in calls]


def _linear(rank: Rank | None, call: Linear) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    x, head, bias = torch.randn(2, 35, 12, generator=g), torch.randn(53, 12, generator=g), torch.randn(53, generator=g)
    y, weight, wide = torch.randint(53, (2, 35), generator=g), torch.rand(53, generator=g) + 0.1, torch.float64
    y[0, ::3] = -100
    mine = slice(None) if rank is None else Case(shape=(1, 53), sizes=(20, 25)[: rank.count - 1]).slice_of(rank.number, rank.count)
    leaves = [t.to(call.dtype).to(wide if rank is None else call.dtype).requires_grad_() for t in (x, head[mine], bias[mine])]
    options = dict(call.options)
    if call.bias:
        options["linear_bias"] = leaves[2]
    if call.weighted:
        options["weight"] = weight[mine].to(leaves[0].dtype)
    if rank is None:
        loss = fastloss.linear_cross_entropy(*leaves[:2], y, **options)
    else:
        fastloss.config.linear_chunk_bytes = 32 * 53 * 4  # several chunks
        options |= {"group": rank.group, "reduce_input_gradient": call.reduce}
        with fastloss.use_backend(call.backend):  # type: ignore[arg-type]
            loss = fastloss.vocab_parallel_linear_cross_entropy(*leaves[:2], y, **options)
            loss.backward(torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss))
        return loss.detach(), *(leaf.grad for leaf in leaves[: 2 + call.bias])  # type: ignore[misc]
    loss.backward(torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss))
    return loss.detach(), *(leaf.grad for leaf in leaves[: 2 + call.bias])  # type: ignore[misc]


def talk_of_a_linear_step(rank: Rank) -> tuple[list[str], list[str]]:
    """The collectives going forward and coming back, once ranks know of one another."""
    x, head = torch.randn(70, 12).requires_grad_(), torch.randn(20, 12).requires_grad_()

    def loss_of() -> Tensor:
        return fastloss.vocab_parallel_linear_cross_entropy(x, head, torch.arange(70) % 40, group=rank.group)

    loss_of()
    with Talks() as forward:
        loss = loss_of()
    with Talks() as backward:
        loss.backward()
    return [name for name, _ in forward.sent], [name for name, _ in backward.sent]
