"""The logits of a linear layer, some rows at a time, and the layer's gradients from those of its logits.

    logits = softcap(scale (x W^T + b)),    softcap(z) = cap tanh(z / cap)

The matrix products are torch's. There are never more logits than those of one chunk of rows: they are made in one piece of memory, looked
at, overwritten with their gradient, and used up by dx = G W and dW += G^T x, before those of the next chunk take their place.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import config, memory
from .loss import compute_dtype
from .rows import settle

_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of a chunk's logits
_FEWEST = {"cpu": 128, "cuda": 1024}  # rows: every chunk reads and writes all of dW
_HALF = (torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """A linear layer with its input, and how it is computed."""

    input: Tensor  # (D,) or (N, D)
    weight: Tensor  # (C, D) or (C, d1, ..., D)
    bias: Tensor | None  # the shape of `weight` without D
    scale: float
    softcap: float  # 0: none
    products: torch.dtype  # of the matrix products, and so of the logits
    sums: torch.dtype  # of the sums over chunks, where products are half precision
    chunk_rows: int  # 0: as many as `config.linear_chunk_bytes` has room for

    @property
    def columns(self) -> int:
        """Logits of one row of the input."""
        return math.prod(self.weight.shape[:-1])


def layer_of(t: Any, o: Any) -> Layer:
    """From the tensors and the options of a loss."""
    products = o.products if _multiplies(o.products, t.input.device.type) else torch.float32
    return Layer(t.input, t.linear_weight, t.linear_bias, o.logit_scale, o.logit_softcap, products, o.sums, o.chunk_rows)


@cache
def _multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether products of this dtype are fast. Where a CPU cannot multiply half precision, torch takes up to 100 times as long as in
    float32."""
    if device != "cpu" or dtype not in _HALF:
        return True
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


# ---------------------------------------------------------------- without computing


def stand_in(t: Any, dtype: torch.dtype) -> Tensor:
    """Shape, dtype and device of the logits (C,), (N, C) or (N, C, d1, ...) of a loss's tensors, without their memory."""
    nothing: Tensor = t.input.new_empty((), dtype=dtype)
    return nothing.expand(*t.input.shape[:-1], *t.linear_weight.shape[:-1])


def logits_of(t: Any, o: Any) -> Tensor:
    """All logits, in plain torch, in the dtype of the input whatever autocast says: for definitions."""
    with without_autocast(t.input.device):
        return all_logits(t.input, t.linear_weight, t.linear_bias, o.logit_scale, o.logit_softcap)


def all_logits(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Any, softcap: float) -> Tensor:
    """The logits (..., C) or (N, C, d1, ...) in plain torch."""
    flat = torch.nn.functional.linear(input, weight.flatten(0, -2), None if bias is None else bias.flatten())
    z = flat if weight.dim() == 2 else flat.unflatten(-1, weight.shape[:-1])
    z = z if isinstance(scale, (int, float)) and scale == 1 else scale * z
    return softcap * torch.tanh(z / softcap) if softcap else z


def without_ignored(input: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """The input (..., D), 0 in each row whose target (...), or targets (..., K), are `ignore_index`: what it holds counts for nothing."""
    if target is None or target.numel() == 0:
        return input
    ignored = target == ignore_index
    return input.masked_fill((ignored if target.dim() < input.dim() else ignored.all(-1)).unsqueeze(-1), 0.0)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    active = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


# ---------------------------------------------------------------- chunk by chunk


class Chunks:
    """To be gone through once: for each chunk, which of the chosen rows' numbers are its own, and its logits [n, C] or [n, C, P].

    `chosen` are the rows of the input to take (None: all); the gradient of the others is zero. `needed` says for input, weight and bias
    whether there is to be a gradient. If any, the loop's body leaves the gradient of the logits in their place.
    """

    def __init__(self, layer: Layer, needed: tuple[bool, ...] = (False, False, False), chosen: Tensor | None = None) -> None:
        self.layer, self.chosen = layer, chosen
        self.input = layer.input.detach().reshape(-1, layer.input.shape[-1])
        self.weight = _in_dtype(layer.weight.detach().reshape(layer.columns, -1), layer.products)
        self.bias = None if layer.bias is None else layer.bias.detach().reshape(-1).to(layer.products)
        self.rows = len(self.input) if chosen is None else len(chosen)
        self.capped_twice = bool(layer.softcap) and any(needed)
        self.size = rows_of_chunk(self.rows, layer, 2 if self.capped_twice else 1)
        self.dinput = _InputGradient(layer, chosen) if needed[0] else None
        self.dweight = _WeightGradient(layer, self.rows <= self.size) if needed[1] else None
        self.dbias = _BiasGradient(layer) if needed[2] else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        classes, positions = self.layer.weight.shape[0], self.layer.columns // self.layer.weight.shape[0]
        room, tanh = self._room(), self._room() if self.capped_twice else None
        for begin in range(0, self.rows, self.size):
            here = slice(begin, min(begin + self.size, self.rows))
            x = self._input(here)
            z = self._logits(x, room[: len(x)], None if tanh is None else tanh[: len(x)])
            yield slice(begin * positions, here.stop * positions), z if positions == 1 else z.view(-1, classes, positions)
            if tanh is not None:
                torch.ops.aten.tanh_backward.grad_input(z, tanh[: len(x)], grad_input=z)
            for gradient in (self.dinput, self.dweight, self.dbias):
                if gradient is not None:
                    gradient.take(z, x, self.weight, here)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of input, weight and bias, after the last chunk; None where not needed."""
        return tuple(None if gradient is None else gradient.result() for gradient in (self.dinput, self.dweight, self.dbias))

    def _room(self) -> Tensor:
        return memory.empty((min(self.size, self.rows), self.layer.columns), self.layer.products, self.input.device)

    def _input(self, here: slice) -> Tensor:
        x = self.input[here] if self.chosen is None else self.input.index_select(0, self.chosen[here])
        return x.to(self.layer.products)

    def _logits(self, x: Tensor, z: Tensor, tanh: Tensor | None) -> Tensor:
        softcap, scale = self.layer.softcap, self.layer.scale
        _multiply(x, self.weight.t(), scale / softcap if softcap else scale, z if tanh is None else tanh, self.bias)
        if not softcap:
            return z
        if tanh is None:
            return z.tanh_().mul_(softcap)
        return torch.mul(tanh.tanh_(), softcap, out=z)


def rows_of_chunk(rows: int, layer: Layer, copies: int = 1) -> int:
    """How many rows of the input a chunk has; the last one may have fewer. All about the same, in whole tiles of a matrix product."""
    if layer.chunk_rows:
        return layer.chunk_rows
    device = layer.input.device.type
    budget = config.linear_chunk_bytes or _BYTES.get(device, _BYTES["cuda"])
    most = max(budget // (copies * layer.columns * layer.products.itemsize), _FEWEST.get(device, 1))
    even = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    return min(most, -(-even // 32) * 32)


def not_ignored(target: Tensor, ignore_index: int, positions: int) -> Tensor | None:
    """The rows of the input that any of their targets asks for, so many a row, of [rows * positions]; None for all, and where counting them
    would mean to wait for the device."""
    if target.device.type != "cpu":
        return None
    found = (target != ignore_index).view(-1, positions).any(1).nonzero().view(-1)
    return None if len(found) * positions == len(target) else found


def some_rows(numbers: Tensor, chosen: Tensor | None, positions: int) -> Tensor:
    """Of numbers [N * P], those of the chosen rows."""
    if chosen is None:
        return numbers
    if numbers.stride(0) == 0:
        return numbers[:1].expand(len(chosen) * positions)
    return numbers.view(-1, positions).index_select(0, chosen).view(-1)


def _multiply(a: Tensor, b: Tensor, factor: float, result: Tensor, added: Tensor | None = None, onto: bool = False) -> None:
    """result = factor (a b + added), or what it was + factor a b."""
    if added is not None:
        torch.addmm(added, a, b, beta=factor, alpha=factor, out=result)
    elif onto or factor != 1:
        torch.addmm(result, a, b, beta=1 if onto else 0, alpha=factor, out=result)
    else:
        torch.mm(a, b, out=result)


def _add(total: Tensor, part: Tensor) -> None:
    """total += part, of another dtype. torch on CPU makes a copy of `part` first: of some rows at a time it stays in the cache."""
    rows = max(1, (1 << 20) // total.shape[1]) if total.device.type == "cpu" else len(total)
    for some, more in zip(total.split(rows), part.split(rows), strict=True):
        some.add_(more)


def _in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else memory.empty(t.shape, dtype, t.device).copy_(t)


class _InputGradient:
    """dx = scale G W, chunk by chunk."""

    def __init__(self, layer: Layer, chosen: Tensor | None) -> None:
        self.layer, self.chosen = layer, chosen
        self.gradient = memory.empty_like(layer.input)
        self.rows = self.gradient if self.gradient.dim() == 2 else self.gradient.unsqueeze(0)
        if chosen is not None:
            self.gradient.zero_()

    def take(self, g: Tensor, x: Tensor, weight: Tensor, here: slice) -> None:
        if self.chosen is None and self.rows.dtype is weight.dtype:
            _multiply(g, weight, self.layer.scale, self.rows[here])
            return
        found = torch.empty_like(x)
        _multiply(g, weight, self.layer.scale, found)
        if self.chosen is None:
            self.rows[here].copy_(found)
        else:
            self.rows.index_copy_(0, self.chosen[here], found.to(self.rows.dtype))

    def result(self) -> Tensor:
        return self.gradient


class _WeightGradient:
    """dW = scale G^T x, summed over chunks in the dtype for that: half precision would be rounded once for each chunk."""

    def __init__(self, layer: Layer, only_chunk: bool) -> None:
        self.layer, self.empty = layer, True
        sums = layer.products if only_chunk or layer.products not in _HALF else layer.sums
        self.gradient = memory.empty_like(layer.weight)
        self.flat = self.gradient.reshape(layer.columns, -1)
        self.total = self._place(sums)
        self.part = self.total if sums is layer.products else self._place(layer.products)

    def _place(self, dtype: torch.dtype) -> Tensor:
        return self.flat if self.flat.dtype is dtype else memory.empty(self.flat.shape, dtype, self.flat.device)

    def take(self, g: Tensor, x: Tensor, weight: Tensor, here: slice) -> None:
        _multiply(g.t(), x, self.layer.scale, self.part, onto=self.part is self.total and not self.empty)
        if self.part is not self.total:
            if self.empty:
                self.total.copy_(self.part)
            else:
                _add(self.total, self.part)
        self.empty = False

    def result(self) -> Tensor:
        if self.empty:
            self.flat.zero_()
        elif self.total is not self.flat:
            self.flat.copy_(self.total)
        return settle(self.gradient, self.flat)


class _BiasGradient:
    """db = scale times the sum of G over rows."""

    def __init__(self, layer: Layer) -> None:
        assert layer.bias is not None
        self.layer, self.bias = layer, layer.bias
        self.total = torch.zeros(layer.columns, dtype=compute_dtype(layer.bias), device=layer.bias.device)

    def take(self, g: Tensor, x: Tensor, weight: Tensor, here: slice) -> None:
        self.total.add_(g.sum(0, dtype=self.total.dtype), alpha=self.layer.scale)

    def result(self) -> Tensor:
        return torch.empty_like(self.bias).copy_(self.total.view(self.bias.shape))
