"""Token statistics for tests: the torch operations that people write instead, targets at random, and the comparison."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import LAYOUTS, assert_no_worse, copy_of
from torch import Tensor

import fastloss
from fastloss import TokenStatistics, token_statistics

ALL = TokenStatistics._fields
SMOOTH = ALL[:-1]
Found = tuple[dict[str, Tensor], Tensor]


def composed(
    input: Tensor, target: Tensor | None = None, *, dim: int = -1, ignore_index: int = -100, logit_scale: float = 1.0, **rest: Any
) -> TokenStatistics:
    x = input.movedim(dim, -1)
    x = x if x.dtype == torch.float64 else x.float()
    y = torch.zeros(x.shape[:-1], dtype=torch.int64) if target is None else target
    y = (y.unsqueeze(-1) if y.dim() < x.dim() else y).long()
    skipped = y == ignore_index
    ignored = skipped.all(-1)
    x = x.masked_fill(ignored.unsqueeze(-1), 0.0) * logit_scale
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    log_prob = log_p.gather(-1, y.masked_fill(skipped, 0)).masked_fill(skipped, 0.0)
    entropy, lse = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1), torch.logsumexp(x, -1)
    rest_of = (t.masked_fill(ignored, 0) for t in (entropy, lse, (p * p).sum(-1), x.argmax(-1)))
    return TokenStatistics(log_prob.view(x.shape[:-1] if target is None else target.shape), *rest_of)


def ours(input: Tensor, target: Tensor | None = None, **options: Any) -> TokenStatistics:
    assert fastloss.explain(token_statistics, input, target, **options).path == "kernel"
    return token_statistics(input, target, **options)


def results(
    call: Callable[..., TokenStatistics], leaf: Tensor, view: Any, target: Tensor | None, upstream: dict[str, Tensor], **options: Any
) -> Found:
    """The answers, and the gradient of those that have an upstream gradient."""
    leaf = copy_of(leaf).requires_grad_()
    found = call(view(leaf), target, **options)._asdict()
    values = [found[name] for name in upstream]
    (gradient,) = torch.autograd.grad(values, leaf, [up.to(v.dtype) for up, v in zip(upstream.values(), values, strict=True)])
    return {name: answer.detach() for name, answer in found.items() if answer is not None}, gradient


def check(
    x: Tensor, target: Tensor | None, *, outputs: Sequence[str] = ALL, with_gradient: Sequence[str] = SMOOTH, layout: str = "contiguous",
    dim: int = -1, ulps: float = 8, **options: Any,
) -> Found:  # fmt: skip
    outputs = [name for name in outputs if target is not None or name != "log_prob"]
    leaf, view = LAYOUTS[layout](x)
    rows = composed(x, target, dim=dim)
    upstream = {n: torch.randn(getattr(rows, n).shape) * 1.7 for n in with_gradient if n in outputs}
    everything = {"dim": dim, "outputs": outputs, **options}
    mine, gradient = results(ours, leaf, view, target, upstream, **everything)
    theirs, expected = results(composed, leaf, view, target, upstream, **everything)
    truth, true_gradient = results(composed, leaf.double(), view, target, upstream, **everything)
    assert set(mine) == set(outputs)
    for name, found in mine.items():
        what = f"{name} of {tuple(x.shape)} {x.dtype} {layout} {options}"
        if name == "argmax":
            assert torch.equal(found, theirs[name]), what
        else:
            assert_no_worse(found, theirs[name], truth[name], what, ulps, scale=math.log(x.shape[dim]) + 1)
    count = 1 if target is None or target.dim() < x.dim() else target.shape[-1]
    what = f"gradient of {tuple(x.shape)} {x.dtype} {layout} {options}"
    assert_no_worse(gradient, expected, true_gradient, what, ulps, scale=4.0 * count)
    return mine, gradient


def make(shape: tuple[int, ...], dim: int, count: int = 0, dtype: torch.dtype = torch.float32, ignored: int = -100) -> Any:
    """Logits, and targets: some are ignored, whole rows too, some come twice, the last class comes."""
    positions = [n for i, n in enumerate(shape) if i != dim % len(shape)]
    target = torch.randint(shape[dim], [*positions, count] if count else positions)
    if target.numel() > 3:
        target[torch.rand(target.shape) < 0.2] = ignored
        target[::3] = ignored
    if count > 1:
        target[..., 1] = target[..., 0]
    target.view(-1)[-1:] = shape[dim] - 1
    return (torch.randn(shape) * 3).to(dtype), target
