"""Softmax cross-entropy of a linear layer's logits whose classes, and so the layer, are sharded over ranks: `linear_cross_entropy` of all
slices one below the other, with the same input on every rank.

Going forward, chunk by chunk the logits of a slice leave behind a few numbers of every row; ranks exchange those of all rows at once.
Coming back, the logits are made again, and what the slices give to the input's gradient is added over the ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows, sharded, slices
from ..arguments import class_indices_misfit, dtype_misfit, linear_misfit, smoothing_misfit
from ..chunks import Chunks, layer_of, logits_of, not_ignored, stand_in
from ..kernels.groups import Rows, Smoothing
from ..loss import Loss, Spec
from ..torch_launchers import kernels_or_torch

NAME = "vocab_parallel_linear_cross_entropy"


class Tensors(NamedTuple):
    input: Tensor  # (N, D), the same on every rank
    linear_weight: Tensor  # (C, D), this rank's classes
    linear_bias: Tensor | None  # (C,)
    target: Tensor  # class indices of all classes (N,), int64 or uint8
    weight: Tensor | None  # (C,), of this rank's classes


class Options(NamedTuple):
    first: int  # this rank's first class; -1: after those of the ranks before it
    ignore_index: int
    label_smoothing: float  # eps
    logit_scale: float
    logit_softcap: float  # 0: none
    chunk_rows: int  # 0: by `config.linear_chunk_bytes`
    products: torch.dtype  # of the matrix products
    sums: torch.dtype  # of the sums of half precision products over chunks
    reduction: str
    dtype: torch.dtype  # of the loss
    group: str
    reduce_input_gradient: bool


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [4, N]: the fields of `Rows`, of all classes; row_weight is 1 for rows that count, else 0
    local: Tensor  # [N]: the target as the slice counts classes, PAD where it is another rank's or ignored
    classes: Tensor  # of all ranks, one number


class Saved(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor
    local: Tensor
    classes: Tensor


class VocabParallelLinearCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    differentiable = 3

    def misfit(self, t: Tensors, o: Options) -> str | None:
        misfit = linear_misfit(t.input, t.linear_weight, t.linear_bias, o)
        if misfit is not None:
            return misfit
        if t.input.dim() != 2 or t.linear_weight.dim() != 2:
            return f"input of shape {tuple(t.input.shape)}, linear_weight of shape {tuple(t.linear_weight.shape)}"
        logits = stand_in(t, o.products)
        misfit = dtype_misfit(logits, "weight", t.weight) if o.dtype is o.products else None
        misfit = misfit or smoothing_misfit(logits, o.label_smoothing)
        return misfit or class_indices_misfit(logits, t.target, t.weight, o.ignore_index)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        logits = stand_in(t, o.products)
        return (
            rows.loss_spec(logits, o.reduction, o.dtype),
            rows.divisor_spec(logits, o.reduction),
            rows.numbers_spec(logits, 4),
            Spec((rows.rows_in(logits),), torch.int64),
            Spec((), torch.int64),
        )

    def definition(self, t: Tensors, o: Options) -> Tensor:
        """Where one rank has all classes."""
        return rows.index_loss(logits_of(t, o), t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, layer = self.allocate(t, o), layer_of(t, o)
        logits, target = stand_in(t, layer.products), rows.as_indices(t.target)
        weight = None if t.weight is None else rows.dense_class_weight(t.weight, logits)
        targets = slices.IndexTargets(target, o.ignore_index, o.label_smoothing, weight)
        chosen = not_ignored(target, o.ignore_index, 1)

        def local(first: int, _: int, out: Tensor) -> None:
            found = out if chosen is None else out.new_empty(out.shape[0], len(chosen))
            mine = targets if chosen is None else targets.some(chosen)
            for at, x in Chunks(layer, chosen=chosen):
                mine.some(at).write(x, first, found[:, at])
            if chosen is not None:
                out.zero_()
                out[:, chosen] = found

        options = {"reduction": o.reduction, "reduce": int(o.reduce_input_gradient and t.input.requires_grad)}
        call = targets.call(NAME, logits, o.first, options)
        gathered = sharded.exchange(call, local, o.group, t.input.device)
        found, ranks = targets.merge(gathered), gathered.slices
        r.numbers.copy_(found.numbers)
        r.local.copy_(slices.in_slice(target, ranks.starts[gathered.rank], call.classes, o.ignore_index))
        r.classes.fill_(ranks.classes)
        found.reduce(o.reduction, r.divisor, r.loss)
        return tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        layer = layer_of(s, o)
        logits, kernels = stand_in(s, layer.products), kernels_or_torch(s.input)
        weight, g = rows.dense_class_weight(s.weight, logits), rows.row_gradient(dloss, s.divisor, logits)
        smoothing = Smoothing(1 - o.label_smoothing, o.label_smoothing / int(s.classes) if o.label_smoothing > 0 else 0.0)
        chosen = not_ignored(rows.as_indices(s.target), o.ignore_index, 1)
        numbers, local = s.numbers.contiguous(), s.local.contiguous()
        if chosen is not None:
            numbers, local, g = numbers[:, chosen], local[chosen], g[chosen]
        chunks = Chunks(layer, needed, chosen)
        for at, x in chunks:
            prob = rows.ones(len(x), g.dtype, g.device)[:, None]
            kernels.sparse_soft_cross_entropy_backward(
                x, local[at, None], prob, weight, smoothing, Rows(*numbers[:, at].unbind()), g[at], x
            )  # fmt: skip
        dinput, dweight, dbias = chunks.gradients()
        if dinput is not None and o.reduce_input_gradient:
            sharded.all_reduce(dinput, o.group)
        return dinput, dweight, dbias

    def gradient(self, dloss: Any, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        raise slices.refused_twice(NAME)


vocab_parallel_linear_cross_entropy = VocabParallelLinearCrossEntropy(NAME)
