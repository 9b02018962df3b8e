"""What users do with a result after the call: on ours exactly what it does on torch's, be it numbers, a changed graph or an error."""

import copy
import io
import operator
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

DEFAULT = fastloss.config.min_numel  # as imported: for a test, conftest makes it 0
Call = Callable[[Tensor], Tensor]  # the function under test, of its first argument alone

TARGET = torch.arange(20) % 11
SOFT = torch.softmax(torch.sin(torch.arange(220.0)), 0).view(20, 11) * 20
PROB = torch.sigmoid(torch.cos(torch.arange(220.0))).view(20, 11)
WEIGHT = torch.linspace(0.5, 2, 11)

# function, its first argument, the others
FAMILIES: dict[str, tuple[str, Tensor, dict[str, Any]]] = {
    "indices": ("cross_entropy", PROB * 3, {"target": TARGET.where(TARGET > 0, -100), "weight": WEIGHT}),
    "smoothed": ("cross_entropy", PROB * 3, {"target": TARGET, "label_smoothing": 0.1}),
    "probabilities": ("cross_entropy", PROB * 3, {"target": SOFT}),
    "nll_loss": ("nll_loss", -PROB, {"target": TARGET}),
    "bce with logits": ("binary_cross_entropy_with_logits", PROB * 3, {"target": PROB.flip(0), "pos_weight": WEIGHT}),
    "bce": ("binary_cross_entropy", PROB, {"target": PROB.flip(0), "weight": WEIGHT}),
    "softmax": ("softmax", PROB * 3, {"dim": 1}),
    "softmax along 0": ("softmax", PROB * 3, {"dim": 0}),
    "log_softmax": ("log_softmax", PROB * 3, {"dim": 1}),
}


def upstream(result: Tensor) -> Tensor:
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(result.dtype)


def aux(x: Tensor, result: Tensor) -> Tensor:
    """Another term of the loss."""
    return (x.float() ** 2).mean().to(result.dtype)


def trained(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Call, Tensor], Any]:
    def use(call: Call, x: Tensor) -> Any:
        steps = optimizer([x])
        for _ in range(3):
            result = call(x)
            steps.zero_grad()
            result.backward(upstream(result))
            steps.step()
        return x, x.grad

    return use


def edited(edit: Callable[[Tensor, Tensor], Any]) -> Callable[[Call, Tensor], Any]:
    """An edit of the result, given the leaf too, and then its backward."""

    def use(call: Call, x: Tensor) -> Any:
        result = call(x)
        edit(result, x)
        result.backward(upstream(result))
        return result, x.grad

    return use


def detached(edit: Callable[[Tensor], Any]) -> Callable[[Call, Tensor], Any]:
    """Something with the bare numbers of the result, and the same with the gradient."""

    def use(call: Call, x: Tensor) -> Any:
        result = call(x)
        result.backward(upstream(result))
        return edit(result.detach()), result, edit(x.grad), x.grad

    return use


def backward_first(edit: Callable[[Tensor], Any]) -> Callable[[Call, Tensor], Any]:
    """Something with the gradient, and then another backward into it."""

    def use(call: Call, x: Tensor) -> Any:
        for _ in range(2):
            result = call(x)
            result.backward(upstream(result))
            edit(x)
        return x.grad

    return use


def subtracted_without_a_graph(result: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        result -= 1


def plus_one(x: Tensor) -> None:
    x.grad.detach_()
    x.grad.zero_()
    x.grad += 1


def attributes(call: Call, x: Tensor) -> Any:
    result = call(x)
    result.backward(upstream(result))
    return [(t.retains_grad, t._is_view(), t.storage_offset(), t.stride()) for t in (result, x.grad, call(x.detach()))]


def saved(tensor: Tensor) -> Any:
    """Through torch.save, which writes whole storages: no more bytes than the numbers need."""
    file = io.BytesIO()
    torch.save(tensor, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file), size < tensor.nbytes + 4000


def queued(tensor: Tensor) -> Tensor:
    """Through a queue between processes, as a DataLoader sends its batches."""
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(tensor)
    received: Tensor = queue.get()
    return received.clone()


def hooks(call: Call, x: Tensor) -> Any:
    seen: list[Tensor] = []
    x.register_hook(lambda g: seen.append(g.clone()))
    x.register_hook(lambda g: g * 2)
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    result = call(x)
    result.register_hook(lambda g: seen.append(g.clone()))
    result.register_hook(lambda g: g + 1)
    result.retain_grad()
    result.backward(upstream(result))
    return seen, result.grad, x.grad


def collected(call: Call, x: Tensor) -> Any:
    """Losses written into a buffer, and one backward."""
    losses = torch.zeros(2, *call(x).shape, dtype=call(x).dtype)
    losses[0] = call(x)
    losses[1] = call(x.clone())
    losses.backward(upstream(losses))
    return losses, x.grad


def resized(call: Call, x: Tensor) -> Any:
    """To more memory than there is."""
    result, into = call(x.detach()), call(x.detach()).resize_(0)
    return torch.add(torch.ones(7000, dtype=into.dtype), 1, out=into), result.resize_(64, 64).shape


USES: dict[str, Callable[[Call, Tensor], Any]] = {
    "loss += aux": edited(lambda result, x: operator.iadd(result, aux(x, result))),
    "loss *= 3": edited(lambda result, x: operator.imul(result, 3)),
    "loss /= 3": edited(lambda result, x: operator.itruediv(result, 3)),
    "loss -= 1 without a graph": edited(subtracted_without_a_graph),
    "loss[0] = 0": edited(lambda result, x: result.fill_(0) if result.dim() == 0 else result[0].fill_(0)),
    "loss[...] = 0": edited(lambda result, x: result.__setitem__(..., 0)),
    "loss[mask] *= 2": edited(lambda result, x: result.masked_fill_(result > result.mean(), 2)),
    "loss.clamp_": edited(lambda result, x: result.clamp_(max=1)),
    "relu in place": edited(lambda result, x: F.relu(result, inplace=True)),
    "dropout in place": edited(lambda result, x: F.dropout(result, 0.0, inplace=True)),
    "loss.data": edited(lambda result, x: result.data.mul_(2)),
    "loss.unsqueeze_": edited(lambda result, x: result.unsqueeze_(0)),
    "loss.requires_grad_(False)": edited(lambda result, x: result.requires_grad_(False)),
    "loss.detach_()": lambda call, x: call(x).detach_(),
    "attributes": attributes,
    "clone": lambda call, x: [call(x).clone().backward(upstream(call(x))), x.grad],
    "an edit after the backward": detached(lambda tensor: tensor.add_(1)),
    "grad.detach_().zero_() += 1": backward_first(plus_one),
    "zero_grad(set_to_none=False)": backward_first(lambda x: torch.optim.SGD([x], lr=0.1).zero_grad(set_to_none=False)),
    "gradients accumulate": backward_first(lambda x: None),
    "clip_grad_norm_": backward_first(lambda x: torch.nn.utils.clip_grad_norm_([x], 0.01)),
    "SGD, momentum, foreach": trained(lambda leaves: torch.optim.SGD(leaves, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True)),
    "Adam, fused": trained(lambda leaves: torch.optim.Adam(leaves, lr=0.01, eps=0.1, fused=True)),
    "autograd.grad": lambda call, x: torch.autograd.grad(call(x), x, upstream(call(x))),
    "hooks": hooks,
    "a buffer of losses": collected,
    "pickle": detached(lambda tensor: pickle.loads(pickle.dumps(tensor))),
    "pickle with a graph": lambda call, x: pickle.loads(pickle.dumps(call(x))),
    "deepcopy": detached(copy.deepcopy),
    "deepcopy with a graph": lambda call, x: copy.deepcopy(call(x)),
    "torch.save": detached(saved),
    "numpy": detached(lambda tensor: None if tensor.dtype == torch.bfloat16 else torch.from_numpy(tensor.numpy()).add_(1)),
    "numpy with a graph": lambda call, x: call(x).numpy(),
    "share_memory_": detached(lambda tensor: (tensor.share_memory_().add_(1), tensor.is_shared())),
    "a queue": detached(queued),
    "resize_ and out=": resized,
    "set_": detached(lambda tensor: tensor.set_(torch.ones(3, dtype=tensor.dtype))),
}


def outcome(api: Any, family: str, dtype: torch.dtype, reduction: str, use: Callable[[Call, Tensor], Any]) -> Any:
    """What a use returns, or the kind of its error."""
    function, inputs, options = FAMILIES[family]
    options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    if "softmax" not in function:
        options["reduction"] = reduction
    autocast = dtype == torch.bfloat16

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            result: Tensor = getattr(api, function)(x, **options)
        return result

    try:
        return described(use(call, inputs.to(dtype, copy=True).requires_grad_()))
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)[:25]


def described(seen: Any) -> Any:
    """Numbers as they are; of a tensor also all that decides what may be done with it."""
    if isinstance(seen, (tuple, list)):
        return [described(each) for each in seen]
    if not isinstance(seen, Tensor):
        return seen
    return [seen.detach().clone(), seen.requires_grad, seen.grad_fn is None, seen.is_leaf]


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return isinstance(mine, list) and len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(theirs, Tensor):
        # torch's log_softmax in bfloat16 is 0.02 off, its gradient 0.012 (ours 0.015 and 0.009); hooks double that
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if theirs.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        fits = isinstance(mine, Tensor) and mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return fits and torch.allclose(mine, theirs, **tolerance, equal_nan=True)
    return bool(mine == theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use", USES)
def test_results_are_used_as_torchs(use: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their dtype and reduction, in plain memory and from the pool."""
    wrong = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for reduction in ("mean",) if "softmax" in family else ("none", "mean", "sum"):
            theirs = outcome(F, family, dtype, reduction, USES[use])
            # memory of the pool cannot grow: a difference of ours (docs/differences.md)
            for pool_min_bytes in (1 << 22,) if "resize_" in use else (1 << 22, 1):
                monkeypatch.setattr(fastloss.config, "pool_min_bytes", pool_min_bytes)
                mine = outcome(fastloss, family, dtype, reduction, USES[use])
                if not same(mine, theirs):
                    wrong.append(f"{dtype} {reduction} {'pool' if pool_min_bytes == 1 else 'plain'}: {mine!s:.200}, torch {theirs!s:.200}")
    assert not wrong, f"{len(wrong)} differ: " + wrong[0]


@pytest.mark.parametrize("function", ["cross_entropy", "binary_cross_entropy_with_logits", "softmax", "log_softmax"])
def test_large_results_at_the_default_settings(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MB and more come from the pool: rows left out of the loss in place, and a result that leaves its graph in place."""
    monkeypatch.setattr(fastloss.config, "min_numel", DEFAULT)
    inputs = torch.linspace(-3, 3, 1 << 21).view(-1, 2).roll(1)
    others = {
        "cross_entropy": {"target": torch.arange(1 << 20) % 2, "reduction": "none"},
        "binary_cross_entropy_with_logits": {"target": inputs.sigmoid().flip(0), "reduction": "none"},
    }.get(function, {"dim": 1})
    results = []
    for api in (fastloss, F):
        x = inputs.clone().requires_grad_()
        result = getattr(api, function)(x, **others)
        assert result.nbytes >= 1 << 22
        detached = getattr(api, function)(x, **others).detach_()
        detached[:2] = 7
        if "softmax" not in function:
            result[0] = 0
            result *= 0.5
        result.backward(torch.sin(inputs if result.dim() == 2 else inputs[:, 0]))
        results.append((result.detach(), x.grad, detached))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", ["numbers", "graph"])
def test_results_are_edited_in_compiled_code(edit: str, family: str) -> None:
    function, inputs, options = FAMILIES[family]
    results = []

    def edited(api: Any, x: Tensor) -> Tensor:
        result: Tensor = getattr(api, function)(x, **options)
        if edit == "graph":
            return result.detach_()
        result += aux(x, result)
        result *= 3
        return F.relu(result, inplace=True)

    for api, run in ((F, edited), (fastloss, torch.compile(edited, backend="eager"))):
        x = inputs.clone().requires_grad_()
        result = run(api, x)
        results.append([result, result.requires_grad])
        if edit == "numbers" and "softmax" not in family:  # softmax needs its result again: see above
            result.backward(upstream(result))
            results[-1].append(x.grad)
    torch.testing.assert_close(*results)
