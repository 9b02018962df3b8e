"""What the launchers of token_statistics must compute, against float64 formulas in plain torch: see `kernel_checks`."""

from collections.abc import Sequence
from typing import Any

import kernel_checks as check
import torch
from torch import Tensor

from fastloss.kernels.groups import Answers, Rows, Slope

ALL = Answers._fields
IGNORED, NAN = check.NOT_A_ROW, float("nan")


class Truth:
    """Everything about rows of logits [rows, C] and classes [rows, K], in float64; a class outside [0, C) makes NaN."""

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int, scale: float) -> None:
        x, classes = check.by_row(logits), logits.shape[1]
        self.skipped = target == ignore_index
        self.counts = ~self.skipped.all(1) if target.shape[1] else torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.out_of_range = ~self.skipped & ((target < 0) | (target >= classes))
        self.y = torch.where(self.skipped | self.out_of_range, 0, target)
        x = torch.where(self.counts[:, None], x, 0.0)
        self.x, self.scale, self.log_p = x, scale, torch.log_softmax(x * scale, 1)
        self.p = self.log_p.exp()
        self.p_log_p = torch.where(self.p == 0, 0.0, self.p * self.log_p)

    def row(self, numbers: Tensor) -> Tensor:
        return torch.where(self.counts, numbers, torch.zeros_like(numbers))

    def answers(self) -> Answers:
        log_prob = torch.where(self.out_of_range, NAN, self.log_p.gather(1, self.y))
        lse = torch.logsumexp(self.x * self.scale, 1)
        rows = (-self.p_log_p.sum(1), lse, self.p.square().sum(1), self.x.argmax(1))
        return Answers(torch.where(self.skipped, 0.0, log_prob), *map(self.row, rows))

    def gradient(self, slope: Slope, dlog_prob: Tensor) -> Tensor:
        alpha, beta, gamma = (part.double()[:, None] if part.numel() else 0.0 for part in slope)
        d = self.p * (alpha + gamma * self.p) + beta * self.p_log_p
        if dlog_prob.numel():
            given = torch.where(self.skipped, 0.0, torch.where(self.out_of_range, NAN, dlog_prob.double()))
            d = d - self.p * given.sum(1, keepdim=True) + torch.zeros_like(d).scatter_add(1, self.y, given)
        return torch.where(self.counts[:, None], d * self.scale, 0.0)


def forward(
    k: Any, logits: Tensor, target: Tensor, ignore_index: int = IGNORED, scale: float = 1.0, wanted: Sequence[str] = ALL
) -> tuple[Answers, Rows]:
    rows = Rows(None, None, check.poisoned_rows(logits), check.poisoned_rows(logits))
    made = {name: check.poisoned_rows(logits) for name in ALL}
    made["log_prob"] = check.poisoned(target, made["lse"].dtype)
    made["argmax"] = torch.full_like(rows.top, -7, dtype=torch.int64)
    answers = Answers(*(made[name] if name in wanted else made[name].new_empty(0) for name in ALL))
    k.token_statistics_forward(logits, target, ignore_index, scale, answers, rows)
    check.assert_inside(*answers[:4], rows.top, rows.total)
    return answers, rows


def token_statistics(
    k: Any, logits: Tensor, target: Tensor, ignore_index: int = IGNORED, scale: float = 1.0, wanted: Sequence[str] = ALL,
    parts: Sequence[str] = ("beta", "gamma", "dlog_prob"), inplace: bool = False,
) -> None:  # fmt: skip
    """Both directions: `wanted` answers, and a gradient of `parts` besides alpha."""
    before, truth = logits.clone(), Truth(logits, target, ignore_index, scale)
    answers, rows = forward(k, logits, target, ignore_index, scale, wanted)
    largest = max(1.0, truth.log_p[truth.log_p.isfinite()].abs().max().item(), 0.0) if truth.log_p.isfinite().any() else 1.0
    for name, got, want in zip(ALL, answers, truth.answers(), strict=True):
        if name == "argmax" and name in wanted:
            assert torch.equal(got, want), name
        elif name in wanted and got.numel():
            check.assert_close(got, want, scale=largest, what=name)
    dlog_prob = torch.randn_like(check.poisoned(target, rows.top.dtype)) if "dlog_prob" in parts else rows.top.new_empty(0)
    beta, gamma = (check.random_rows(logits) if name in parts else rows.top.new_empty(0) for name in ("beta", "gamma"))
    slope = Slope(check.random_rows(logits), beta, gamma)
    dlogits = logits if inplace else check.poisoned(logits)
    k.token_statistics_backward(logits, target, ignore_index, scale, rows, slope, dlog_prob, dlogits)
    if not inplace:
        assert torch.allclose(logits, before, rtol=0, atol=0, equal_nan=True), "logits changed"
        check.assert_inside(dlogits)
    worst = max([1.0, *(part.abs().max().item() for part in (*slope, dlog_prob) if part.numel())])
    want = truth.gradient(slope, dlog_prob)
    check.assert_close(check.by_row(dlogits).to(logits.dtype), want, scale=4 * worst * max(1.0, scale), what="dlogits")


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, per_row: int) -> tuple[Tensor, Tensor]:
    """Logits; targets [rows, K]: a class twice, one ignored in each row, row 1 ignored as a whole and its logits NaN."""
    classes, rows = shape[1], shape[0] * (shape[2] if len(shape) == 3 else 1)
    logits = torch.randn(shape).mul(3).to(dtype)
    target = torch.randint(classes, (rows, per_row))
    if per_row > 2:
        target[:, -1], target[:, 1] = target[:, 0], IGNORED
    if rows > 1 and per_row:
        target[1] = IGNORED
        by_position = logits.view(shape[0], classes, -1)
        by_position[1 // by_position.shape[2], :, 1 % by_position.shape[2]] = NAN
    return check.laid_out(logits, layout), target
