"""Calls of a registered op like one before.

A compiled step calls the same op with tensors of the same shapes, strides and dtypes every time. Whether they fit, and what is launched,
was found out by the first call of a kind; the second one is recorded (`replay`), and those after it are its launches with new addresses.
To name a kind takes 3 us of Python, so those that were recorded last are known by a guard, torch's own for compiled programs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import config, contract, replay
from .guards import guard

Kind = tuple[Any, ...]

_MOST_KINDS, _MOST_GUARDED = 1 << 10, 4  # the latter of each function
_NEW: Any = object()
_SEEN: Any = object()  # once
_remembered: dict[Kind, replay.Program | None] = {}
_guarded: dict["Repeated", tuple["_Guarded", ...]] = {}


class _Guarded(NamedTuple):
    asked: list[Any]
    fits: Callable[..., bool]  # of the tensors that there are
    program: replay.Program


class Repeated:
    """A function that finds gradients and results from an op's flat arguments, the first so many of which are tensors. It is called with
    plain tensors on CPU alone, under no mode."""

    def __init__(self, find: Callable[..., replay.Found], tensors: int) -> None:
        self.find, self.tensors = find, tensors

    def __call__(self, *arguments: Any) -> replay.Found:
        if contract.watch is not None:
            return self.find(*arguments)
        tensors = arguments[: self.tensors]
        present = [t for t in tensors if t is not None]
        # all that a kind is, but for what a guard looks at
        asked = [arguments[self.tensors :], [t is None for t in tensors], torch.get_num_threads(), config.pool_min_bytes]
        for known in _guarded.get(self, ()):
            if known.asked == asked and known.fits(*present):
                return known.program.run(tensors) or self.find(*arguments)
        return self._by_kind(arguments, asked, present)

    def _by_kind(self, arguments: tuple[Any, ...], asked: list[Any], present: list[Tensor]) -> replay.Found:
        options, absent, *settings = asked
        each = (tuple(a) if type(a) is list else a for a in options)
        kind = (self, *each, *absent, *settings, *((t.shape, t.stride(), t.dtype, t.requires_grad) for t in present))
        tensors, program = arguments[: self.tensors], _remembered.get(kind, _NEW)
        if program is _SEEN:
            found, program = replay.record(lambda: self.find(*arguments), tensors)
            _remembered[kind] = program
            fits = None if program is None else guard(present)
            if program is not None and fits is not None:
                _guarded[self] = (_Guarded(asked, fits, program), *_guarded.get(self, ())[: _MOST_GUARDED - 1])
            return found
        if program is _NEW:
            found = self.find(*arguments)
            if len(_remembered) >= _MOST_KINDS:
                _remembered.clear()
            _remembered[kind] = _SEEN
            return found
        return (program and program.run(tensors)) or self.find(*arguments)
