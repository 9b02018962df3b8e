"""Any shape torch accepts, as one of the two that the kernels know: [N, C] or [B, C, P] for rows, [A, B, P] for elements. Views only,
unless strides leave no choice."""

from typing import NamedTuple

import torch
from torch import Tensor


def as_rows(logits: Tensor, dim: int = 1) -> Tensor:
    """[N, C] or [B, C, P] with the classes of dimension `dim`; (C,) counts as one row."""
    if logits.dim() == 1:
        return logits.unsqueeze(0)
    if logits.dim() == 2:
        return logits if dim in (1, -1) else logits.unsqueeze(0)
    if dim in (-1, logits.dim() - 1):
        return logits.flatten(0, -2)
    return logits.flatten(0, dim - 1).flatten(2) if dim > 0 else logits.flatten(1).unsqueeze(0)


class Elements(NamedTuple):
    """Tensors as [A, B, P], and the way back."""

    tensors: tuple[Tensor | None, ...]
    permuted: torch.Size
    inverse: tuple[int, ...]

    def restore(self, tensor: Tensor) -> Tensor:
        """[A, B, P] in the shape the call had."""
        return tensor.reshape(self.permuted).permute(self.inverse)


def as_elements(logits: Tensor, *others: Tensor | None) -> Elements:
    """The tensors broadcast to the shape of `logits`, as [A, B, P] with the smallest stride of the logits along P."""
    shape, dims = logits.shape, logits.dim()
    everything = (logits, *(None if t is None else t.expand(shape) for t in others))
    order = tuple(range(dims))
    if not logits.is_contiguous() and 0 not in logits.stride():
        order = tuple(sorted(order, key=lambda d: -logits.stride()[d]))
        everything = tuple(None if t is None else t.permute(order) for t in everything)
    first = everything[0]
    assert first is not None
    sizes = _merged(first.shape, [t.stride() for t in everything if t is not None])
    if len(sizes) > 3:  # no view will do: copies, in the order of the call
        everything = tuple(None if t is None else t.expand(shape).contiguous() for t in (logits, *others))
        order, first, sizes = tuple(range(dims)), logits, [logits.numel()]
    target = (*(1,) * (3 - len(sizes)), *sizes)
    inverse = tuple(order.index(d) for d in range(dims))
    return Elements(tuple(None if t is None else t.reshape(target) for t in everything), first.shape, inverse)


def _merged(shape: torch.Size, strides: list[tuple[int, ...]]) -> list[int]:
    """The sizes that are left when neighbouring dimensions are merged wherever that is one stride for every tensor."""
    sizes: list[int] = []
    inner: list[int] = []
    for d in reversed(range(len(shape))):
        if shape[d] == 1:
            continue
        here = [s[d] for s in strides]
        if sizes and all(h == i * sizes[-1] for h, i in zip(here, inner, strict=True)):
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            inner = here
    return sizes[::-1] or [1]
