"""What ranks tell one another that have a slice of the classes each: a header, and a few numbers of every row, in one all_gather.

A rank's buffer is a header of fixed size, and room for its numbers [numbers, rows]. Every rank must send the same number of bytes, so how
many that are is part of what the ranks agreed on last (`Agreement`), never of what one of them is called with now. Each round, all ranks

    1. send a header and, if this call looks like what was agreed on, the numbers;
    2. hold all headers against one another, and raise the same error everywhere if they do not fit together;
    3. are done if slices and room are those agreed on; else agree on the new ones, and go round once more.

Whatever a rank does in a round follows from what all of them sent and agreed on before, so they all take the same branch: no rank waits
for another that is not coming. One round is the rule, two where something changed: the first call of a group, other slices, more rows
than there was room for. A rank whose arguments are refused sends a header that says so. All numbers travel as bytes, so any dtype may.
"""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

FUNCTIONS = ("vocab_parallel_cross_entropy", "token_statistics", "vocab_parallel_linear_cross_entropy")
PROTOCOL = 1  # of the header and what follows it: ranks with different versions of fastloss must not talk past one another
MOST_OPTIONS = 6
_UNKNOWN = -1
Option = int | float | str


class Call(NamedTuple):
    """What a rank is called with. All but slice and weights must be the same on every rank."""

    function: str
    rows: int
    numbers: int  # of each row
    dtype: torch.dtype  # of the logits
    compute: torch.dtype  # of the numbers
    options: dict[str, Option]
    classes: int  # in this rank's slice
    first: int | None  # its first class; None for the sum of the sizes before it
    targets: Tensor | None = None  # a digest of the targets, which are the same on every rank; int64
    weights: Tensor | None = None  # sum of the slice's class weights; float64

    @property
    def nbytes(self) -> int:
        return self.rows * self.numbers * self.compute.itemsize

    @property
    def room(self) -> int:
        """The same, so that the header behind it is aligned."""
        return -(-self.nbytes // 8) * 8


class Slices(NamedTuple):
    """How the classes lie on the ranks."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def classes(self) -> int:
        return sum(self.sizes)


class Agreement(NamedTuple):
    """What all ranks of a group know since their last call."""

    slices: Slices | None
    room: int  # bytes behind the header


class Gathered(NamedTuple):
    numbers: Tensor  # [ranks, numbers, rows], of the ranks that have classes
    weights: Tensor  # [ranks], float64, of the same
    slices: Slices
    rank: int


_agreements: WeakKeyDictionary[Any, Agreement] = WeakKeyDictionary()
_HEAD = ("protocol", "function", "refused", "rows", "numbers", "dtype", "targets", "classes", "first", "weights")
_HEADER = 8 * (len(_HEAD) + MOST_OPTIONS)
Local = Callable[[int, int, Tensor], None]
"""Writes the numbers [numbers, rows] of a slice, from its first class and the number of all classes."""


def exchange(call: Call, local: Local, group_name: str, device: torch.device) -> Gathered:
    """The numbers of all ranks. `local` may be called twice, or not at all if a rank's call does not fit."""
    group = group_of(group_name)
    rank, ranks = group.rank(), group.size()
    agreed = _agreements.get(group, Agreement(None, 0))
    while True:
        sent = torch.empty(_HEADER + agreed.room, dtype=torch.uint8, device=device)
        problem = _write_numbers(call, local, agreed, rank, sent[_HEADER:])
        _write_header(call, problem is not None, sent[:_HEADER])
        everything = all_gather(sent, group).view(ranks, -1)
        headers = everything[:, :_HEADER].view(torch.int64)
        slices = _agree(call, headers.tolist(), problem)
        if slices == agreed.slices and call.nbytes <= agreed.room:
            if call.room < agreed.room // 2:  # the next call will be like this one
                _agreements[group] = Agreement(slices, call.room)
            numbers = everything[:, _HEADER : _HEADER + call.nbytes].view(call.compute).view(ranks, call.numbers, call.rows)
            weights = headers.view(torch.float64)[:, _HEAD.index("weights")]
            if 0 in slices.sizes:
                with_classes = [r for r in range(ranks) if slices.sizes[r]]
                numbers, weights = numbers[with_classes], weights[with_classes]
            return Gathered(numbers, weights, slices, rank)
        agreed = _agreements[group] = Agreement(slices, call.room)


def refuse(function: str, error: Exception, group_name: str, device: torch.device) -> None:
    """Raise an error of this rank's arguments, once the others know of it."""
    call = Call(function, 0, 0, torch.float32, torch.float32, {}, 0, None)
    group = group_of(group_name)
    sent = torch.empty(_HEADER + _agreements.get(group, Agreement(None, 0)).room, dtype=torch.uint8, device=device)
    _write_header(call, True, sent[:_HEADER])
    all_gather(sent, group)
    raise error


def group_of(name: str) -> Any:
    """The process group of this name; '' is the default group. torch raises where there is none."""
    from torch.distributed import distributed_c10d

    c10d: Any = distributed_c10d
    return c10d._resolve_process_group(name) if name else c10d._get_default_group()


def all_gather(sent: Tensor, group: Any) -> Tensor:
    """What all ranks sent, one after the other."""
    gathered = sent.new_empty(group.size() * sent.numel())
    _gather_function()(gathered, sent, group=group)
    return gathered


def all_reduce(tensor: Tensor, group_name: str) -> None:
    """Put the sum over the ranks in a tensor's place."""
    import torch.distributed as dist

    dist.all_reduce(tensor, group=group_of(group_name))


@cache
def _gather_function() -> Any:
    import torch.distributed as dist

    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


# ---------------------------------------------------------------- the header


def _write_numbers(call: Call, local: Local, agreed: Agreement, rank: int, place: Tensor) -> Exception | None:
    """Write the numbers of the slice where they look like what was agreed on; what was raised instead, if anything."""
    if agreed.slices is None or call.nbytes > agreed.room or call.classes != agreed.slices.sizes[rank]:
        return None
    if call.first not in (None, agreed.slices.starts[rank]):
        return None
    try:
        out = place[: call.nbytes].view(call.compute).view(call.numbers, call.rows)
        local(agreed.slices.starts[rank], agreed.slices.classes, out)
    except Exception as error:
        return error
    return None


def _write_header(call: Call, refused: bool, place: Tensor) -> None:
    first = _UNKNOWN if call.first is None else call.first
    function, dtype = FUNCTIONS.index(call.function), _code(str(call.dtype).removeprefix("torch."))
    codes = [PROTOCOL, function, refused, call.rows, call.numbers, dtype, 0, call.classes, first, 0]  # in the order of _HEAD
    options = [_code(value) for value in call.options.values()]
    header = place.view(torch.int64)
    header.copy_(torch.tensor(codes + options + [0] * (MOST_OPTIONS - len(options)), dtype=torch.int64, device="cpu"))
    if call.targets is not None:
        header[_HEAD.index("targets")] = call.targets
    if call.weights is not None:
        header.view(torch.float64)[_HEAD.index("weights")] = call.weights


def _agree(call: Call, headers: list[list[int]], problem: Exception | None) -> Slices:
    """How the classes lie on the ranks, from all headers; what does not fit together is an error, in the same words on every rank."""
    named = [dict(zip((*_HEAD, *call.options), header, strict=False)) for header in headers]
    _must_agree(call.function, named, "protocol", int)
    refused = [rank for rank, header in enumerate(named) if header["refused"]]
    if refused:
        raise problem or RuntimeError(f"{call.function}: rank {refused[0]} refused its arguments; its own error says why")
    _must_agree(call.function, named, "function", FUNCTIONS)
    like: dict[str, Any] = {"rows": 0, "dtype": "", **call.options, "numbers": 0, "targets": 0}
    for name, value in like.items():
        _must_agree(call.function, named, name, type(value))
    sizes, firsts = tuple(header["classes"] for header in named), [header["first"] for header in named]
    sums = [sum(sizes[:rank]) for rank in range(len(sizes))]
    starts = tuple(sums if all(first == _UNKNOWN for first in firsts) else firsts)
    end = 0
    for start, size in sorted(zip(starts, sizes, strict=True)):
        if start != end:
            shown = ", ".join("none" if s == _UNKNOWN else f"[{s}, {s + n})" for s, n in zip(starts, sizes, strict=True))
            raise RuntimeError(f"{call.function}: the ranks' slices do not lie side by side from class 0 on: {shown}, by rank")
        end += size
    if end == 0:
        raise RuntimeError(f"{call.function}: there are no classes on any rank")
    return Slices(sizes, starts)


def _must_agree(function: str, headers: list[dict[str, int]], name: str, kind: Any) -> None:
    found = [header[name] for header in headers]
    if len(set(found)) > 1:
        if name == "targets":
            raise RuntimeError(f"{function}: the ranks have different targets; all ranks must have those of the same rows")
        shown = ", ".join(f"{_shown(code, kind)} on rank {rank}" for rank, code in enumerate(found))
        raise RuntimeError(f"{function}: the ranks disagree about {name}: {shown}")


def _code(value: Option) -> int:
    """An option as 64 bits: a string by its first eight letters."""
    if isinstance(value, str):
        return int.from_bytes(value.encode()[:8].ljust(8, b"\0"), "little")
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(value)


def _shown(code: int, kind: Any) -> Option:
    if kind is FUNCTIONS:
        return str(FUNCTIONS[code])
    if kind is str:
        return repr(code.to_bytes(8, "little").rstrip(b"\0").decode(errors="replace"))
    return float(struct.unpack("<d", struct.pack("<q", code))[0]) if kind is float else int(code)


def digest(target: Tensor) -> Tensor:
    """A number that other targets, or the same ones in another order, hardly ever have."""
    flat = target.reshape(-1).long()
    return (flat * (torch.arange(flat.numel(), device=flat.device) * 2 + 1)).sum()


# ---------------------------------------------------------------- the arithmetic, [rows] of float64


class Merged(NamedTuple):
    """The statistics of all classes, from those of the slices."""

    top: Tensor  # [rows], float64, as all here
    total: Tensor
    rises: Tensor  # [ranks, rows]: log sum exp(x) of all classes, less that of the slice


def merge(tops: Tensor, totals: Tensor, scale: float = 1.0) -> Merged:
    """The rule by which kernels merge the blocks of a row, in rank order: the same bits on every rank. [ranks, rows] each; a slice of
    nothing but -inf has -inf and 0."""
    tops, totals = tops.double(), totals.double()
    top = tops.amax(0)
    total = in_rank_order((scale * (tops - top)).exp() * totals)
    return Merged(top, total, scale * (top - tops) + (total.log() - totals.log()))


def in_rank_order(terms: Tensor) -> Tensor:
    """The sum of [ranks, rows] over the ranks."""
    total = terms[0]
    for share in terms[1:]:
        total = total + share
    return total
