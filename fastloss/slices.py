"""What losses over sharded classes have in common beside their talk (`sharded`): a slice's part of the work, and the rows' results."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rows, sharded
from .arguments import smoothing_misfit
from .kernels.groups import PAD, Answers, Rows, Smoothing
from .loss import compute_dtype
from .torch_launchers import kernels_or_torch


def statistics(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> None:
    """Write `top` and `total` of a slice [2, rows]; -inf and 0 where it has nothing but -inf, 0 and 0 for rows that do not count. Class
    indices serve to tell these: they are not looked up."""
    top, total = out
    if rows.classes_of(logits) == 0:
        top.fill_(-torch.inf)
        total.zero_()
        return
    nothing = top.new_empty(0)
    answers = Answers(nothing, nothing, torch.empty_like(top), nothing, top.new_empty(0, dtype=torch.int64))
    table = rows.class_table(target, top.numel(), logits.device)
    all_answers(rows.as_rows(logits), table, ignore_index, 1.0, answers, Rows(None, None, top, total))


def all_answers(x: Tensor, table: Tensor, ignore_index: int, logit_scale: float, answers: Answers, numbers: Rows) -> None:
    """What `token_statistics` says of a slice, lse among it. `top` is NaN where a logit is; -inf, and `total` 0, where all are -inf."""
    kernels_or_torch(x).token_statistics_forward(x, table, ignore_index, logit_scale, answers, numbers)
    only_inf = answers.lse == -torch.inf
    numbers.top.masked_fill_(only_inf, -torch.inf).masked_fill_(answers.lse.isnan(), torch.nan)
    numbers.total.masked_fill_(only_inf, 0.0)


def soft_statistics(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, out: Tensor) -> None:
    """Write `top`, `total`, sum k (-log p), p of the slice alone, and sum k [4, rows], with k_c = w_c (keep target_c + spread)."""
    top, total, loss, mass = out
    if rows.classes_of(logits) == 0:
        top.fill_(-torch.inf)
        out[1:].zero_()
        return
    x, q = rows.as_rows(logits), rows.as_rows(target)
    kernels_or_torch(logits).soft_cross_entropy_forward(x, q, weight, smoothing, loss, Rows(None, mass, top, total))
    lowest = top <= torch.finfo(top.dtype).min
    if bool(lowest.any()):  # rows of nothing but -inf, or NaN: the kernels make NaN of both, since to them a slice is all there is
        at = lowest.nonzero().squeeze(1)
        k = weight * (smoothing.keep * _some_rows(q, at) + smoothing.spread)
        at, k = _without_nan(_some_rows(x, at), at, k)
        top[at], total[at], loss[at] = -torch.inf, 0.0, (k * torch.inf).sum(1).to(loss.dtype)


def _some_rows(logits: Tensor, at: Tensor) -> Tensor:
    """[N, C] or [B, C, P] -> [some, C]."""
    if logits.dim() == 2:
        return logits[at]
    positions = logits.shape[2]
    return logits[at // positions, :, at % positions]


def _without_nan(x: Tensor, at: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    real = ~x.isnan().any(1)
    return at[real], k[real]


def slice_misfit(logits: Tensor, label_smoothing: Any) -> str | None:
    """Other than elsewhere, a slice may have no classes."""
    return None if logits.dim() > 0 and 0 in logits.shape else smoothing_misfit(logits, label_smoothing)


def refused_twice(name: str) -> Exception:
    return RuntimeError(
        f"{name}: its gradient cannot be differentiated again (create_graph=True, torch.func, batched gradients): a second derivative "
        "mixes the classes of all ranks. Gather the logits and use the function for one rank where you need one"
    )


def risen(mass: Tensor, rises: Tensor) -> Tensor:
    """How much mass (-log p) rises from the slice to all classes; nothing where there is no rise, also of an infinite mass."""
    return torch.where(rises == 0, 0.0, mass * rises)


class IndexTargets(NamedTuple):
    """Class indices, and how much they count for: what losses with such targets tell a slice."""

    target: Tensor  # [rows], int64, among all classes
    ignore_index: int
    label_smoothing: float
    weight: Tensor | None  # [C] of the slice, contiguous, in the compute dtype; None: one for each

    @property
    def numbers(self) -> int:
        """Of each row, that ranks send: top, total, x_y; sum w (-log p), p of the slice alone, if smoothed; w_y if weighted."""
        return 3 + (self.label_smoothing > 0) + (self.weight is not None)

    def call(self, function: str, logits: Tensor, first: int, options: dict[str, Any]) -> sharded.Call:
        """What a rank with these logits, or what stands for them, says of its call."""
        classes, compute = rows.classes_of(logits), compute_dtype(logits)
        options = {
            "target": "indices", **options, "ignore_index": self.ignore_index, "label_smoothing": float(self.label_smoothing),
            "weight": int(self.weight is not None),
        }  # fmt: skip
        total = self.target.new_full((), classes, dtype=torch.float64) if self.weight is None else self.weight.sum(dtype=torch.float64)
        digest = sharded.digest(self.target)
        return sharded.Call(
            function,
            self.target.numel(),
            self.numbers,
            logits.dtype,
            compute,
            options,
            classes,
            None if first < 0 else first,
            digest,
            total,
        )

    def some(self, at: Any) -> "IndexTargets":
        return self._replace(target=self.target[at])

    def write(self, logits: Tensor, first: int, out: Tensor) -> None:
        """Write the numbers of a slice whose first class this is [numbers, rows]."""
        classes = rows.classes_of(logits)
        y = in_slice(self.target, first, classes, self.ignore_index)
        if self.label_smoothing > 0:
            weight = rows.dense_class_weight(None, logits) if self.weight is None else self.weight
            found = out.new_empty(4, out.shape[1])
            soft_statistics(logits, logits.new_zeros(()).expand(logits.shape), weight, Smoothing(0.0, 1.0), found)
            out[:2].copy_(found[:2])
            out[3].copy_(found[2])
        else:
            statistics(logits, self.target, self.ignore_index, out[:2])
        out[2].copy_(pick(logits, y[:, None]).squeeze(1))
        if self.weight is not None:
            out[-1].copy_(torch.where(y == PAD, 0.0, self.weight[y.clamp(min=0)]) if classes else torch.zeros_like(out[-1]))

    def merge(self, gathered: sharded.Gathered) -> "IndexRows":
        """The rows' losses and numbers, from those of all slices."""
        numbers, weights, ranks, _ = gathered
        bad = refuse_out_of_bounds(self.target, ranks.classes, self.ignore_index)
        keep, spread = 1 - self.label_smoothing, self.label_smoothing / ranks.classes
        counts, merged = self.target != self.ignore_index, sharded.merge(numbers[:, 0], numbers[:, 1])
        row_weight = torch.ones_like(merged.top) if self.weight is None else sharded.in_rank_order(numbers[:, -1]).double()
        losses = keep * row_weight * (merged.total.log() - (sharded.in_rank_order(numbers[:, 2]).double() - merged.top))
        mass = keep * row_weight
        if self.label_smoothing > 0:
            losses = losses + spread * sharded.in_rank_order(numbers[:, 3].double() + risen(weights[:, None], merged.rises))
            mass = mass + spread * sharded.in_rank_order(weights)
        # nothing of a row that does not count, and NaN for everything of one whose target is no class
        values = torch.stack((counts.double(), mass, merged.top, merged.total)).masked_fill(bad, torch.nan)
        values = torch.where(counts, values, values.new_tensor((0.0, 0.0, 0.0, 1.0))[:, None])
        losses = losses.masked_fill(bad, torch.nan).masked_fill(~counts, 0.0)
        return IndexRows(losses, row_weight.masked_fill(~counts, 0.0), values)


class IndexRows(NamedTuple):
    """[rows], float64."""

    losses: Tensor
    row_weight: Tensor
    numbers: Tensor  # [4, rows]: the fields of `Rows`, of all classes; row_weight is 1 for rows that count, else 0

    def reduce(self, reduction: str, divisor: Tensor, loss: Tensor) -> None:
        """Write what 'mean' divides by, where it has a place, and the loss."""
        if divisor.numel():
            sum_rows(self.row_weight.to(divisor.dtype), divisor)
        reduce(self.losses, divisor, reduction, loss)


def in_slice(target: Tensor, first: int, classes: int, ignore_index: int) -> Tensor:
    """Class indices as the slice counts them; PAD for those of other ranks and those ignored."""
    y = target - first
    return torch.where((y >= 0) & (y < classes) & (target != ignore_index), y, PAD)


def pick(logits: Tensor, y: Tensor) -> Tensor:
    """The logits of classes y [rows, K] of the slice, 0 for PAD, in the compute dtype."""
    if rows.classes_of(logits) == 0:
        return torch.zeros(y.shape, dtype=compute_dtype(logits), device=y.device)
    x, here = rows.as_rows(logits), y != PAD
    index = y.masked_fill(~here, 0)
    if x.dim() == 2:
        found = x.detach().gather(1, index)
    else:
        batch, _, positions = x.shape
        found = x.detach().gather(1, index.view(batch, positions, -1).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
    return found.to(compute_dtype(logits)).masked_fill(~here, 0.0)


def refuse_out_of_bounds(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which targets are on no rank. On CPU they are an IndexError; on another device nobody waits for the answer."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if target.device.type == "cpu" and bool(bad.any()):
        raise IndexError(f"Target {int(target[bad][0])} is out of bounds.")
    return bad


def reduce(losses: Tensor, divisor: Tensor, reduction: str, loss: Tensor) -> None:
    """Write the loss, from the losses of the rows in float64."""
    if reduction == "none":
        loss.view(-1).copy_(losses)
        return
    total = loss.new_empty((), dtype=torch.float64)
    sum_rows(losses, total)
    if divisor.numel():
        total = total / divisor + 0 / divisor  # no weight at all is NaN, also where the total is not 0
    loss.copy_(total)


def sum_rows(numbers: Tensor, total: Tensor) -> None:
    kernels_or_torch(numbers).sum_rows(numbers.contiguous(), total)


def settled(result: Tensor, write: Any) -> Tensor:
    """A gradient like the logits, filled by `write(place)`."""
    written = rows.as_rows(result)
    if result.numel():
        write(written)
    return rows.settle(result, written)
