"""What `token_statistics` says of rows of logits, for those of a linear layer, without ever holding all logits: of
z = softcap(scale (input W^T + b)).

The backward makes the logits of a chunk again, and looks at them twice: for the numbers of its rows, and to write the gradient over them.
Numbers saved by the forward would not do, since another product need not round like the first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import linear_misfit
from ..backends import kernels_for
from ..chunks import Chunks, layer_of, logits_of, not_ignored, stand_in, without_ignored
from ..kernels.groups import Answers, Rows
from ..loss import Loss, Spec, compute_dtype
from . import token_statistics as whole
from .token_statistics import ANSWERS, slope_of


class Tensors(NamedTuple):
    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None  # (C,)
    target: Tensor | None  # class indices, (N,) or (N, K)


class Options(NamedTuple):
    ignore_index: int
    logit_scale: float
    logit_softcap: float  # 0: none
    chunk_rows: int  # 0: by `config.linear_chunk_bytes`
    products: torch.dtype  # of the matrix products
    sums: torch.dtype  # of the sums of half precision products over chunks
    dtype: torch.dtype  # other than `products` under autocast
    wanted: str  # some of ANSWERS, separated by spaces


class Results(NamedTuple):
    """Answers not wanted have no elements."""

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    sum_sq_prob: Tensor
    argmax: Tensor


class LinearTokenStatistics(Loss[Tensors, Options, Tensors]):
    tensors, options, results, saved = Tensors, Options, Results, Tensors
    answers = len(ANSWERS)
    differentiable = 3

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if t.input.dim() != 2 or t.linear_weight.dim() != 2:
            return f"input of shape {tuple(t.input.shape)}, linear_weight of shape {tuple(t.linear_weight.shape)}"
        logits = stand_in(t, o.products)
        return linear_misfit(t.input, t.linear_weight, t.linear_bias, o) or whole.token_statistics.misfit(*_given(logits, t, o))

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return whole.token_statistics.outputs(*_given(stand_in(t, o.products), t, o))[: len(ANSWERS)]

    def definition(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        logits = logits_of(t._replace(input=without_ignored(t.input, t.target, o.ignore_index)), o)
        return whole.token_statistics.definition(*_given(logits, t, o))

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, target = self.allocate(t, o), rows.class_table(t.target, len(t.input), t.input.device)
        chosen = _counting(target, o)
        answers = Answers(r.log_prob.view(len(t.input), -1) if r.log_prob.numel() else r.log_prob, *r[1:])
        found = answers if chosen is None else Answers(*(_taken(answer, chosen) for answer in answers))
        target = _taken(target, chosen)
        for at, z in Chunks(layer_of(t, o), chosen=chosen):
            _look(z, target[at], o, Answers(*(answer[at] for answer in found)))
        if chosen is not None:
            for answer, some in zip(answers, found, strict=True):
                if answer.numel():
                    answer.zero_().index_copy_(0, chosen, some)
        return tuple(r)

    def backward(self, dloss: Any, s: Tensors, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, target = layer_of(s, o), rows.class_table(s.target, len(s.input), s.input.device)
        chosen, upstream = _counting(target, o), [rows.answer_gradient(d, stand_in(s, layer.products)) for d in dloss]
        target, upstream = _taken(target, chosen), [None if d is None else _taken(d, chosen) for d in upstream]
        chunks = Chunks(layer, needed, chosen)
        for at, z in chunks:
            entropy, sum_sq_prob = (_room(z, d is not None) for d in (upstream[1], upstream[3]))
            nothing = _room(z, False)
            numbers = _look(z, target[at], o, Answers(nothing, entropy, nothing, sum_sq_prob, nothing.long()))
            slope, taken = slope_of([None if d is None else d[at] for d in upstream], entropy, sum_sq_prob, len(z))
            kernels_for(z).token_statistics_backward(z, target[at], o.ignore_index, 1.0, numbers, slope, taken, z)
        return chunks.gradients()


def _given(logits: Tensor, t: Tensors, o: Options) -> tuple[whole.Tensors, whole.Options]:
    """To `token_statistics`, once there are logits."""
    return whole.Tensors(logits, t.target), whole.Options(1, o.ignore_index, 1.0, o.wanted)


def _counting(target: Tensor, o: Options) -> Tensor | None:
    """The rows of [N, K] targets whose logits are wanted; None for all."""
    return not_ignored(target.view(-1), o.ignore_index, target.shape[1]) if target.numel() else None


def _taken(numbers: Tensor, chosen: Tensor | None) -> Tensor:
    """Of numbers [N] or [N, K], those of the chosen rows."""
    return numbers if chosen is None or numbers.numel() == 0 else numbers.index_select(0, chosen)


def _look(z: Tensor, target: Tensor, o: Options, answers: Answers) -> Rows:
    """Write the answers of a chunk. What the backward wants of its rows."""
    numbers = Rows(None, None, _room(z, True), _room(z, True))
    kernels_for(z).token_statistics_forward(z, target, o.ignore_index, 1.0, answers, numbers)
    return numbers


def _room(z: Tensor, wanted: bool) -> Tensor:
    """For a number of each row, without elements if none is wanted."""
    return torch.empty(len(z) if wanted else 0, dtype=compute_dtype(z), device=z.device)


linear_token_statistics = LinearTokenStatistics("linear_token_statistics")
