"""The loops of the losses over single numbers. A loss has `Inputs`, a NamedTuple of its tensors as they come, the first of them `Stored`,
and `Lines`, a NamedTuple of the same for one piece, each a `Line` or a number; what else it has to say is in `elementwise`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numba import njit
from numba.extending import overload
from torch import Tensor

from .arguments import Computed, Float64, Floats, Known, Stored, arguments
from .elements import Elements, Line, Strides, elements, in_use, last_piece, line_at, piece_of, prefetch_along, store_along
from .inline import INLINE
from .launch import Region, last_task, next_task, raise_flag, region
from .memory import load_one, store
from .reduction import sum_of
from .rows import bypass_caches, to_first_vector
from .simd import lane_max, lane_sum, lanes_of, splat, widen
from .stream import stream, to_alignment

ANYHOW, SIDE_BY_SIDE = 0, 1  # how the numbers of a piece lie; a loss may have more of the second kind


class Gradients(NamedTuple):
    """Where the gradient of a piece goes whose numbers lie side by side."""

    g: Any  # the upstream gradient of every element
    dx: Any  # a pointer
    past_caches: int


class Elementwise(NamedTuple):
    """The regions of a loss, and how they are launched."""

    forward: Region
    sum: Region
    backward: Region
    sum_backward: Region

    def losses(self, inputs: Any, layout: int, loss: Tensor) -> bool:
        """True if a region raised its flag, here and below."""
        way, near = elements(inputs[0]), layout if loss.stride(2) == 1 else ANYHOW
        block = self.forward.block
        return self.forward(way.tasks, block(inputs=inputs, layout=near, loss=loss, loss_strides=loss.stride(), way=way))

    def total(self, inputs: Any, layout: int, count: int, total: Tensor) -> bool:
        way, block = elements(inputs[0]), self.sum.block
        a = block(inputs=inputs, layout=layout, partial=_partial(way), count=count, total=total, way=way)
        return self.sum(max(1, way.tasks), a)

    def gradients(self, inputs: Any, layout: int, dloss: Tensor, dx: Tensor) -> None:
        way, block = elements(inputs[0]), self.backward.block
        self.backward(way.tasks, block(
            inputs=inputs, layout=_near(layout, dloss, dx), dloss=dloss, dloss_strides=dloss.stride(), dx=dx, dstrides=dx.stride(),
            past_caches=bypass_caches(inputs[0], dx), way=way,
        ))  # fmt: skip

    def total_and_gradients(self, inputs: Any, layout: int, dloss: Tensor, count: int, total: Tensor, dx: Tensor) -> bool:
        way, block = elements(inputs[0]), self.sum_backward.block
        return self.sum_backward(max(1, way.tasks), block(
            inputs=inputs, layout=_near(layout, dloss, dx), dloss=dloss, dloss_strides=dloss.stride(), dx=dx, dstrides=dx.stride(),
            past_caches=bypass_caches(inputs[0], dx), partial=_partial(way), count=count, total=total, way=way,
        ))  # fmt: skip


def _near(layout: int, dloss: Tensor, dx: Tensor) -> int:
    return layout if dloss.stride(2) == 0 and dx.stride(2) == 1 else ANYHOW


def _partial(way: Elements) -> Tensor:
    """A sum for each piece."""
    return torch.empty(way.pieces, dtype=torch.float64, device="cpu")


def elementwise(kinds: Any, lines: Any, nearest: Any, loss_at: Any, gradient_at: Any, outside_at: Any = None) -> Elementwise:
    """The regions of a loss, of its `Inputs` and `Lines`, and compiled functions:

    lines(inputs, piece)        its `Lines` of a piece, all of them `Line`s
    nearest(e, layout, visit, rest)   visit(e, rest) of `Lines` that the compiler knows more of: steps of 1, and numbers for all elements
    loss_at(e, k, n)            the losses of elements k .. k + n - 1
    gradient_at(e, g, k, n)     their gradients; g is a `Line` or a number
    outside_at(e, k, n)         more than 0 where a number is not allowed: the flag is raised

    Its first two `Lines` are as long as the tensor itself.
    """
    inputs, kind = kinds
    _hook(lines_of, inputs, lines)
    _hook(nearest_of, kind, nearest)
    _hook(losses_at, kind, loss_at)
    _hook(gradients_at, kind, gradient_at)
    _hook(wrong_at, kind, outside_at or _nothing_outside)
    return Elementwise(
        region(_block("Forward", inputs, loss=Floats, loss_strides=Strides))(_forward),
        region(_block("Sum", inputs, partial=Float64, count=int, total=Computed))(_sum),
        region(_block("Backward", inputs, **_GRADIENT))(_backward),
        region(_block("SumBackward", inputs, **_GRADIENT, partial=Float64, count=int, total=Computed))(_sum_backward),
    )


_GRADIENT: dict[str, Any] = {"dloss": Floats, "dloss_strides": Strides, "dx": Stored, "dstrides": Strides, "past_caches": Known}


def _block(name: str, inputs: Any, **more: Any) -> Any:
    """A block of arguments: see `arguments`."""
    kinds = {"inputs": inputs, "layout": Known, **more, "way": Elements}
    block: Any = namedtuple(name, list(kinds), module=inputs.__module__)  # type: ignore[misc]
    block.__annotations__ = kinds
    return block


# ---------------------------------------------------------------- what a loss says, by the kind of its inputs or lines


def lines_of(inputs: Any, piece: Any) -> Any:
    raise NotImplementedError("compiled code only")


def nearest_of(e: Any, layout: Any, visit: Any, rest: Any) -> Any:
    raise NotImplementedError("compiled code only")


def losses_at(e: Any, k: Any, n: Any) -> Any:
    raise NotImplementedError("compiled code only")


def gradients_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    raise NotImplementedError("compiled code only")


def wrong_at(e: Any, k: Any, n: Any) -> Any:
    raise NotImplementedError("compiled code only")


@njit(**INLINE)
def _nothing_outside(e: Any, k: Any, n: Any) -> Any:
    return splat(0.0, e[0].at)


def _hook(hook: Callable[..., Any], kind: Any, function: Any) -> None:
    """`hook` is `function` where its first argument is of this kind."""
    names = hook.__code__.co_varnames[: hook.__code__.co_argcount]
    made: dict[str, Any] = {"kind": kind, "function": function}
    exec(f"""
def typed({", ".join(names)}):
    if getattr({names[0]}, "instance_class", None) is not kind:
        return None
    return lambda {", ".join(names)}: function({", ".join(names)})
""", made)  # fmt: skip
    overload(hook, jit_options=INLINE)(made["typed"])


# ---------------------------------------------------------------- a piece


@njit(**INLINE)
def _prefetch(e: Any, k: Any) -> None:
    prefetch_along(e[0], k)
    prefetch_along(e[1], k)


@njit(**INLINE)
def _losses_of_piece(e: Any, out: Any) -> Any:
    """Write the losses. More than 0 in a lane that met a number that is not allowed."""
    wrong = splat(0.0, e[0].at)
    line, size = out
    for k in range(0, size, lanes_of(e[0].at)):
        _prefetch(e, k)
        wrong = wrong + wrong_at(e, k, size - k)
        store_along(line, k, size - k, losses_at(e, k, size - k))
    return wrong


@njit(**INLINE)
def _sum_of_piece(e: Any, size: Any) -> Any:
    """The sum of the losses, four vectors by four; and as above."""
    lanes = lanes_of(e[0].at)
    fours, whole = size // (4 * lanes) * (4 * lanes), size // lanes * lanes
    subtotal, wrong = widen(splat(0.0, e[0].at)), splat(0.0, e[0].at)
    for k in range(0, fours, 4 * lanes):
        four = splat(0.0, e[0].at)
        for i in range(k, k + 4 * lanes, lanes):
            _prefetch(e, i)
            wrong = wrong + wrong_at(e, i, lanes)
            four = four + losses_at(e, i, lanes)
        subtotal = subtotal + widen(four)
    for k in range(fours, whole, lanes):
        wrong = wrong + wrong_at(e, k, lanes)
        subtotal = subtotal + widen(losses_at(e, k, lanes))
    if whole < size:
        wrong = wrong + wrong_at(e, whole, size - whole)
        subtotal = subtotal + widen(in_use(losses_at(e, whole, size - whole), size - whole))
    return lane_sum(subtotal), wrong


@njit(**INLINE)
def _gradient_anyhow(e: Any, g: Any, dx: Any, size: Any) -> None:
    for k in range(0, size, lanes_of(e[0].at)):
        _prefetch(e, k)
        store_along(dx, k, size - k, gradients_at(e, g, k, size - k))


@njit(**INLINE)
def _gradient_of_piece(e: Any, rest: Any) -> None:
    """Where all lie side by side: up to the first aligned vector, whole vectors, what is left."""
    to, size = rest
    lanes = lanes_of(e[0].at)
    first = to_first_vector(to.dx, size, to.past_caches) % lanes
    last = first + (size - first) // lanes * lanes
    if first > 0:
        store(to.dx, 0, 1, first, gradients_at(e, to.g, 0, first))
    for k in range(first, last, lanes):
        _prefetch(e, k)
        stream(to.dx, k, gradients_at(e, to.g, k, lanes), to.past_caches)
    if last < size:
        store(to.dx, last, 1, size - last, gradients_at(e, to.g, last, size - last))


@njit(**INLINE)
def _sum_and_gradient_of_piece(e: Any, rest: Any) -> Any:
    """`_sum_of_piece`, and the gradient on the way: the compiler sees that both need the same exp."""
    to, size = rest
    if to.past_caches and to_alignment(to.dx) > 0:  # one after the other: the second finds the piece in the caches
        found = _sum_of_piece(e, size)
        _gradient_of_piece(e, rest)
        return found
    lanes = lanes_of(e[0].at)
    fours, whole = size // (4 * lanes) * (4 * lanes), size // lanes * lanes
    subtotal, wrong = widen(splat(0.0, e[0].at)), splat(0.0, e[0].at)
    for k in range(0, fours, 4 * lanes):
        four = splat(0.0, e[0].at)
        for i in range(k, k + 4 * lanes, lanes):
            _prefetch(e, i)
            wrong = wrong + wrong_at(e, i, lanes)
            four = four + losses_at(e, i, lanes)
            stream(to.dx, i, gradients_at(e, to.g, i, lanes), to.past_caches)
        subtotal = subtotal + widen(four)
    for k in range(fours, whole, lanes):
        wrong = wrong + wrong_at(e, k, lanes)
        subtotal = subtotal + widen(losses_at(e, k, lanes))
        stream(to.dx, k, gradients_at(e, to.g, k, lanes), to.past_caches)
    if whole < size:
        n = size - whole
        wrong = wrong + wrong_at(e, whole, n)
        subtotal = subtotal + widen(in_use(losses_at(e, whole, n), n))
        store(to.dx, whole, 1, n, gradients_at(e, to.g, whole, n))
    return lane_sum(subtotal), wrong


# ---------------------------------------------------------------- regions


def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, out = lines_of(a.inputs, piece), line_at(a.loss, a.loss_strides, piece)
            if a.layout == ANYHOW:
                wrong = _losses_of_piece(e, (out, piece.size))
            else:
                wrong = nearest_of(e, a.layout, _losses_of_piece, (Line(out.at, 1), piece.size))
            if lane_max(wrong) > 0:
                raise_flag(block)
        task = next_task(block)


def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e = lines_of(a.inputs, piece)
            if a.layout == ANYHOW:
                a.partial[number], wrong = _sum_of_piece(e, piece.size)
            else:
                a.partial[number], wrong = nearest_of(e, a.layout, _sum_of_piece, piece.size)
            if lane_max(wrong) > 0:
                raise_flag(block)
        if last_task(block):
            a.total[0] = sum_of(a.partial, 0, a.way.pieces) / a.count
        task = next_task(block)


def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, g, dx = lines_of(a.inputs, piece), line_at(a.dloss, a.dloss_strides, piece), line_at(a.dx, a.dstrides, piece)
            if a.layout == ANYHOW:
                _gradient_anyhow(e, g, dx, piece.size)
            else:
                nearest_of(e, a.layout, _gradient_of_piece, (Gradients(load_one(g.at, 0), dx.at, a.past_caches), piece.size))
        task = next_task(block)


def _sum_backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, g, dx = lines_of(a.inputs, piece), line_at(a.dloss, a.dloss_strides, piece), line_at(a.dx, a.dstrides, piece)
            if a.layout == ANYHOW:
                a.partial[number], wrong = _sum_of_piece(e, piece.size)
                _gradient_anyhow(e, g, dx, piece.size)
            else:
                to = Gradients(load_one(g.at, 0), dx.at, a.past_caches)
                a.partial[number], wrong = nearest_of(e, a.layout, _sum_and_gradient_of_piece, (to, piece.size))
            if lane_max(wrong) > 0:
                raise_flag(block)
        if last_task(block):
            a.total[0] = sum_of(a.partial, 0, a.way.pieces) / a.count
        task = next_task(block)
