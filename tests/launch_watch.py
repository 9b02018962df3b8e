"""Stands between the contract and every launch of every test: what a launcher must write is poisoned first and nowhere poison afterwards,
what it may only read has the same bits afterwards, and no result lies in another argument's memory except in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.contract import Place

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}
# quiet NaNs with a payload that no kernel makes
_POISON = {torch.float32: 0x7FC0BEEF, torch.float64: 0x7FF80000DEADBEEF, torch.float16: 0x7EDE, torch.bfloat16: 0x7FDE}
_POISON[torch.int64] = _POISON[torch.float64]  # no class


def watch(name: str, launcher: Any, arguments: Sequence[Any], places: Sequence[Place]) -> None:
    """Launch, and complain of what the contract forbids."""
    tensors = [(place.name, place.of(arguments), place.kind) for place in places]
    written = [(argument, t) for argument, t, kind in tensors if kind.written]
    read = [(argument, t) for argument, t, kind in tensors if not kind.written]
    logits, kept = tensors[0][1], {argument for argument, _, kind in tensors if kind.kept}
    in_place = [argument for argument, t in written if _same_place(t, logits) and argument != tensors[0][0]]
    for argument, t in written:
        for other, o in tensors_but(argument, tensors):
            if _overlap(t, o):
                allowed = argument in in_place and other == tensors[0][0]
                assert allowed, f"{name}: {argument} lies in the memory of {other}"
        if argument not in in_place and argument not in kept:
            _bits(t).fill_(_POISON[t.dtype])
    before = [(argument, t, _bits(t).clone()) for argument, t in read if not any(_overlap(t, w) for _, w in written)]
    launcher(*arguments)
    for argument, t, bits in before:
        assert torch.equal(_bits(t), bits), f"{name}: {argument} was written to"
    for argument, t in written:
        assert argument in kept or not bool((_bits(t) == _POISON[t.dtype]).any()), f"{name}: {argument} was not written whole"


def tensors_but(argument: str, tensors: Sequence[tuple[str, Tensor, Any]]) -> list[tuple[str, Tensor]]:
    return [(other, t) for other, t, _ in tensors if other != argument]


def _bits(t: Tensor) -> Tensor:
    return t.detach().view(_BITS[t.dtype]) if t.dtype in _BITS else t.detach()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the one begins before the other ends, and it before the one does."""
    return a.numel() > 0 < b.numel() and a.data_ptr() <= _last(b) and b.data_ptr() <= _last(a)


def _last(t: Tensor) -> int:
    """The address of the last element."""
    return t.data_ptr() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) * t.element_size()


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
