"""What losses and their users want to know of each row of logits, together: with z = logit_scale input and p = softmax(z)

    log_prob = log p at the targets    entropy = -sum p log p    lse = log sum exp(z)    sum_sq_prob = sum p^2    argmax of z

A target that is `ignore_index` has log_prob 0; a row all of whose targets are has zeros for everything, and gets no gradient.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import is_int64
from ..backends import kernels_for
from ..kernels.groups import Answers, Rows, Slope
from ..loss import Loss, Spec, compute_dtype
from ..memory import empty_like

ANSWERS = ("log_prob", "entropy", "lse", "sum_sq_prob", "argmax")
MOST_CLASSES = (1 << 31) - 1  # a class number has 32 bits in the kernels


class Tensors(NamedTuple):
    input: Tensor  # logits of any shape
    target: Tensor | None  # class indices, the shape of `input` without its classes; or K of them for each row, behind all else


class Options(NamedTuple):
    dim: int  # of the classes, not negative
    ignore_index: int
    logit_scale: float
    wanted: str  # some of ANSWERS, separated by spaces


class Results(NamedTuple):
    """Answers not wanted have no elements."""

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    sum_sq_prob: Tensor
    argmax: Tensor
    top: Tensor  # [N], as `total`
    total: Tensor  # 0 for a row that does not count


class Saved(NamedTuple):
    input: Tensor
    target: Tensor | None
    entropy: Tensor
    sum_sq_prob: Tensor
    top: Tensor
    total: Tensor


class TokenStatistics(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    answers = len(ANSWERS)

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if not 0 <= o.dim < t.input.dim():
            return f"dim {o.dim} is not a dimension of logits of shape {tuple(t.input.shape)}"
        if not 0 < t.input.shape[o.dim] < MOST_CLASSES:
            return f"there are {t.input.shape[o.dim]} classes"
        if t.target is not None and (t.target.dtype.is_floating_point or t.target.dtype.is_complex or t.target.dtype == torch.bool):
            return f"target is {t.target.dtype}, not integers"
        if t.target is not None and not belongs(t.target, t.input, o.dim):
            return f"target of shape {tuple(t.target.shape)} does not belong to logits of shape {tuple(t.input.shape)}"
        if t.target is not None and t.target.numel() == 0 and t.input.numel() > 0:
            return "there are no targets"
        if not is_int64(o.ignore_index):
            return f"ignore_index is {o.ignore_index!r}"
        if not isinstance(o.logit_scale, (float, int)) or not 0 < o.logit_scale < math.inf:
            return f"logit_scale is {o.logit_scale!r}"
        return None

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        compute, shape, wanted = compute_dtype(t.input), positions(t.input, o.dim), wanted_of(t, o)
        row = Spec((math.prod(shape),), compute)
        shapes = {name: shape if name in wanted else (0,) for name in ANSWERS}
        if "log_prob" in wanted and t.target is not None:
            shapes["log_prob"] = tuple(t.target.shape)
        return *(Spec(shapes[name], torch.int64 if name == "argmax" else compute) for name in ANSWERS), row, row

    def definition(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        x, target, wanted = t.input.movedim(o.dim, -1), t.target, wanted_of(t, o)
        answers = dict.fromkeys(ANSWERS, x.reshape(-1)[:0])  # what is not wanted can be differentiated, too
        answers["argmax"] = x.new_empty(0, dtype=torch.int64)
        ignored = None
        if target is not None:
            y = (target.unsqueeze(-1) if target.dim() < x.dim() else target).long()
            skipped = y == o.ignore_index
            ignored = skipped.all(-1) if y.shape[-1] else torch.zeros_like(skipped.any(-1))
            x = x.masked_fill(ignored.unsqueeze(-1), 0.0)  # what it holds counts for nothing
        z = x * o.logit_scale
        log_p = torch.log_softmax(z, -1)
        if "log_prob" in wanted and target is not None:
            answers["log_prob"] = log_p.gather(-1, y.masked_fill(skipped, 0)).masked_fill(skipped, 0.0).reshape(target.shape)
        if "entropy" in wanted:
            p = log_p.exp()
            answers["entropy"] = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)  # 0 times -inf is 0
        if "lse" in wanted:
            answers["lse"] = torch.logsumexp(z, -1)
        if "sum_sq_prob" in wanted:
            answers["sum_sq_prob"] = log_p.exp().square().sum(-1)
        if "argmax" in wanted:
            answers["argmax"] = x.argmax(-1)
        if ignored is not None:
            for name in set(wanted) - {"log_prob"}:
                answers[name] = answers[name].masked_fill(ignored, 0)
        return tuple(answers.values())

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, logits = self.allocate(t, o), rows.as_rows(t.input, o.dim)
        answers = Answers(r.log_prob.view(r.top.numel(), -1) if r.log_prob.numel() else r.log_prob, *(a.view(-1) for a in r[1:5]))
        target, kernels = rows.class_table(t.target, r.top.numel(), t.input.device), kernels_for(t.input)
        kernels.token_statistics_forward(logits, target, o.ignore_index, o.logit_scale, answers, Rows(None, None, r.top, r.total))
        return tuple(r)

    def backward(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        count, dinput = s.top.numel(), empty_like(s.input)
        target = rows.class_table(s.target, count, s.input.device)
        slope, taken = slope_of([rows.answer_gradient(d, s.input) for d in dloss], s.entropy, s.sum_sq_prob, count)
        logits, written, numbers = rows.as_rows(s.input, o.dim), rows.as_rows(dinput, o.dim), Rows(None, None, s.top, s.total)
        kernels_for(s.input).token_statistics_backward(
            logits, target, o.ignore_index, o.logit_scale, numbers, slope, taken, written
        )  # fmt: skip
        return (rows.settle(dinput, written),)


def slope_of(upstream: Sequence[Tensor | None], entropy: Tensor, sum_sq_prob: Tensor, count: int) -> tuple[Slope, Tensor]:
    """What the backward of so many rows wants, from the gradients of their answers and the two answers that it needs; and that of
    log_prob as a table."""
    da, dh, dlse, ds = upstream[:4]
    nothing = entropy.new_empty(0)
    alpha, beta, gamma = entropy.new_zeros(count) if dlse is None else dlse.reshape(-1).contiguous(), nothing, nothing
    if dh is not None:
        beta = dh.reshape(-1).neg()
        alpha = torch.addcmul(alpha, beta, entropy.view(-1))
    if ds is not None:
        gamma = ds.reshape(-1) * 2
        alpha = torch.addcmul(alpha, gamma, sum_sq_prob.view(-1), value=-1)
    return Slope(alpha, beta, gamma), nothing if da is None else da.reshape(count, -1).contiguous()


def positions(logits: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of the logits without their classes."""
    return (*logits.shape[:dim], *logits.shape[dim + 1 :])


def wanted_of(t: Tensors, o: Options) -> list[str]:
    """Without a target there is no log_prob."""
    return [name for name in o.wanted.split() if name != "log_prob" or t.target is not None]


def belongs(target: Tensor, logits: Tensor, dim: int) -> bool:
    """Whether there is a target, or K of them, for each row."""
    shape, rows = tuple(target.shape), positions(logits, dim)
    return shape == rows or (len(shape) > len(rows) and shape[:-1] == rows)


token_statistics = TokenStatistics("token_statistics")
