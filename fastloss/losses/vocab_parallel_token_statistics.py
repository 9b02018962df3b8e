"""`token_statistics` of logits whose classes are sharded over ranks. Ranks send of each row what they want to know of it, p of the slice
alone, and the logits of its targets (0 from those that do not have them). With share_r the part of rank r's classes in all of p,

    entropy = sum_r share_r (entropy_r - log share_r)    sum_sq_prob = sum_r share_r^2 sum_sq_prob_r

whose terms have one sign. The argmax is that of the first rank with the largest logit, or that is NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows, sharded, slices
from ..kernels.groups import PAD, Answers, Rows
from ..loss import Loss, Spec, compute_dtype
from ..memory import empty_like
from ..torch_launchers import kernels_or_torch
from .token_statistics import ANSWERS, slope_of, token_statistics, wanted_of


class Tensors(NamedTuple):
    input: Tensor  # this rank's logits of any shape
    target: Tensor | None  # class indices of all classes, as in `token_statistics`


class Options(NamedTuple):
    dim: int  # of the classes, not negative
    ignore_index: int
    logit_scale: float
    wanted: str  # some of ANSWERS, separated by spaces
    group: str


class Results(NamedTuple):
    """Answers not wanted have no elements."""

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    sum_sq_prob: Tensor
    argmax: Tensor
    top: Tensor  # [N] of all classes, as `total`
    total: Tensor  # 0 for a row that does not count
    local: Tensor  # [N, K]: the targets as the slice counts classes, PAD where they are another rank's or ignored


class Saved(NamedTuple):
    input: Tensor
    target: Tensor | None
    entropy: Tensor
    sum_sq_prob: Tensor
    top: Tensor
    total: Tensor
    local: Tensor


class VocabParallelTokenStatistics(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    answers = len(ANSWERS)

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if 0 <= o.dim < t.input.dim() and t.input.shape[o.dim] == 0:
            return None  # a slice may have no classes
        return token_statistics.misfit(t, o)  # type: ignore[arg-type]  # what it asks for is there

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        found = token_statistics.outputs(t, o)  # type: ignore[arg-type]
        count = found[-1].shape[0]
        return *found, Spec((count, 0 if t.target is None else t.target.numel() // max(1, count)), torch.int64)

    def definition(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        """Where one rank has all classes."""
        return token_statistics.definition(t, o)  # type: ignore[arg-type]

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, logits = self.allocate(t, o), rows.as_rows(t.input, o.dim)
        count, classes, compute = r.top.numel(), t.input.shape[o.dim], compute_dtype(t.input)
        target, sent = rows.class_table(t.target, count, t.input.device), _Sent(wanted_of(t, o))  # type: ignore[arg-type]

        def local(first: int, _: int, out: Tensor) -> None:
            y = slices.in_slice(target, first, classes, o.ignore_index)
            if sent.log_prob:
                out[sent.own :].copy_(slices.pick(logits, y).t())
            _write_statistics(logits, target, o, sent, out)

        options: dict[str, Any] = {"ignore_index": o.ignore_index, "logit_scale": float(o.logit_scale), "outputs": sent.bits}
        numbers, _, ranks, rank = sharded.exchange(
            sharded.Call(
                "token_statistics", count, sent.own + (target.shape[1] if sent.log_prob else 0), t.input.dtype, compute, options,
                classes, None, sharded.digest(target),
            ),
            local, o.group, t.input.device,
        )  # fmt: skip
        bad = slices.refuse_out_of_bounds(target, ranks.classes, o.ignore_index)
        merged, wide = sharded.merge(numbers[:, 0], numbers[:, 1], o.logit_scale), numbers.double()
        counts = (target != o.ignore_index).any(1) if target.shape[1] else torch.ones_like(merged.top, dtype=torch.bool)
        log_share = -merged.rises
        share, log_total = log_share.exp(), merged.total.log()
        if r.log_prob.numel():
            x_y = sharded.in_rank_order(wide[:, sent.own :]).t()
            log_prob = o.logit_scale * (x_y - merged.top[:, None]) - log_total[:, None]
            r.log_prob.view(log_prob.shape).copy_(log_prob.masked_fill(bad, torch.nan).masked_fill(target == o.ignore_index, 0.0))
        if r.entropy.numel():
            terms = share * (wide[:, sent.entropy] - log_share)
            r.entropy.view(-1).copy_(sharded.in_rank_order(terms.masked_fill(share == 0, 0.0)).masked_fill(~counts, 0.0))
        if r.lse.numel():
            r.lse.view(-1).copy_((o.logit_scale * merged.top + log_total).masked_fill(~counts, 0.0))
        if r.sum_sq_prob.numel():
            terms = share * share * wide[:, sent.sum_sq_prob]
            r.sum_sq_prob.view(-1).copy_(sharded.in_rank_order(terms.masked_fill(share == 0, 0.0)).masked_fill(~counts, 0.0))
        if r.argmax.numel():
            largest = numbers[:, sent.argmax].contiguous().view(_INTEGERS[compute]).long()
            starts = torch.tensor([s for s, n in zip(ranks.starts, ranks.sizes, strict=True) if n], device=largest.device)
            first = numbers[:, 0].argmax(0, keepdim=True)
            r.argmax.view(-1).copy_((largest + starts[:, None]).gather(0, first).squeeze(0).masked_fill(~counts, 0))
        r.top.copy_(merged.top.masked_fill(~counts, 0.0))
        r.total.copy_(merged.total.masked_fill(bad.any(1), torch.nan).masked_fill(~counts, 0.0))
        r.local.copy_(slices.in_slice(target, ranks.starts[rank], classes, o.ignore_index))
        return tuple(r)

    def backward(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        count, local = s.top.numel(), s.local.contiguous()
        slope, taken = slope_of([rows.answer_gradient(d, s.input) for d in dloss], s.entropy, s.sum_sq_prob, count)
        if taken.numel():
            target = rows.class_table(s.target, count, s.input.device)
            elsewhere = (local == PAD) & (target != o.ignore_index)
            slope = slope._replace(alpha=slope.alpha - taken.masked_fill(~elsewhere, 0.0).sum(1))
        logits, numbers = rows.as_rows(s.input, o.dim), Rows(None, None, s.top, s.total)
        dinput = empty_like(s.input)
        written = rows.as_rows(dinput, o.dim)
        if dinput.numel():
            kernels_or_torch(s.input).token_statistics_backward(logits, local, PAD, o.logit_scale, numbers, slope, taken, written)
        return (rows.settle(dinput, written),)

    def gradient(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        raise slices.refused_twice("token_statistics")


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # the bits of a number as a class


class _Sent:
    """Which number of a row is what on its way: top, total, the answers that are wanted, and the logits of the targets from `own` on."""

    def __init__(self, wanted: list[str]) -> None:
        places = iter(range(2, 5))
        self.entropy, self.sum_sq_prob, self.argmax = (next(places) if a in wanted else 0 for a in ("entropy", "sum_sq_prob", "argmax"))
        self.own, self.log_prob = next(places, 5), "log_prob" in wanted
        self.bits = sum(1 << i for i, answer in enumerate(ANSWERS) if answer in wanted)


def _write_statistics(logits: Tensor, target: Tensor, o: Options, sent: _Sent, out: Tensor) -> None:
    """Write top, total and the answers that are wanted of a slice."""
    if rows.classes_of(logits) == 0:
        out.zero_()
        out[0].fill_(-torch.inf)
        return
    nothing = out.new_empty(0)
    largest = out.new_empty(out.shape[1] if sent.argmax else 0, dtype=torch.int64)
    answers = Answers(
        nothing, out[sent.entropy] if sent.entropy else nothing, out.new_empty(out.shape[1]),
        out[sent.sum_sq_prob] if sent.sum_sq_prob else nothing, largest,
    )  # fmt: skip
    slices.all_answers(logits, target, o.ignore_index, o.logit_scale, answers, Rows(None, None, out[0], out[1]))
    if sent.argmax:
        out[sent.argmax].view(_INTEGERS[out.dtype]).copy_(largest)


vocab_parallel_token_statistics = VocabParallelTokenStatistics("vocab_parallel_token_statistics")
