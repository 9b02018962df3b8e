"""What was decided of a call like this one before.

Which path a call takes, and what it does there, depends on its *kind*: the shapes, strides and dtypes of its tensors, its options, and what
modes and settings are on. Small calls spend more time on these questions than in the kernels, so for a kind that came before they are not
asked again, and where there is a `replay` of it, nor is anything that the answers led to.

To name a kind takes 5 us of Python. The kinds that came last are known by a guard, torch's own for compiled programs, which takes 1.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import _C, Tensor

from . import backends, config, contract, replay, routing
from .foresight import Subject, subject_of
from .guards import Recent
from .loss import Loss, fields
from .op_calls import repeated
from .record import record

Kind = tuple[Any, ...]

_MOST_KINDS, _MOST_PROGRAMS = 1 << 10, 8  # remembered; programs of a kind differ in the upstream gradient that is foreseen
# Sets of dispatch keys, as numbers: torch 2.6 cannot compare them
_PLAIN = _C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()  # of a tensor that is nothing but numbers in memory
_INCLUDED, _EXCLUDED = _C._dispatch_tls_local_include_set().raw_repr(), _C._dispatch_tls_local_exclude_set().raw_repr()  # by no mode
_UNDER_AUTOCAST = _C._dispatch_tls_local_exclude_set().remove(_C.DispatchKey.AutocastCPU).raw_repr()
_OPTIONS = {type(None), bool, int, float, str, torch.dtype}
_FORWARD = "forward"


class Call:
    """A kind of call on its way to the kernels: which loss, and with what options."""

    __slots__ = ("graph", "loss", "needed", "options", "programs", "recorded", "subject")

    def __init__(self, loss: Any, o: Any, t: tuple[Tensor | None, ...] = ()) -> None:
        self.loss: Loss[Any, Any, Any] = loss
        self.options = o
        self.programs: dict[Any, replay.Program | None] = {}  # of its forward, and of its one visit under an upstream gradient
        self.recorded = False
        self.graph = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in t)
        self.subject: Subject | None = None  # of the one visit, if there is to be one
        if self.graph and loss.one_visit and loss.one_visit_pays(t, o):
            self.subject = subject_of(loss.name, t[: loss.one_visit], o.reduction)
            self.needed = tuple(tensor is not None and tensor.requires_grad for tensor in t[: loss.differentiable])

    def forward(self, tensors: Any) -> tuple[Tensor, ...]:
        """The loss's `forward`. Its program makes no more than the answers where there will be no backward."""
        program = self.programs.get(_FORWARD)
        found = None if program is None else program.run(tensors)
        if found is None:
            t = self.loss.tensors(*tensors)
            results = None if self.graph else self.loss.answers
            found = self._recorded(_FORWARD, t, lambda: ((), self.loss.forward(t, self.options)), results)
        return found[1]

    def forward_backward(self, dloss: Any, t: Any, needed: tuple[bool, ...]) -> replay.Found:
        """The loss's `forward_backward`. Its program makes the answers, and all the gradients that are needed, or there is none."""
        compute = partial(self.loss.forward_backward, dloss, t, self.options, needed)
        return compute() if any(self.needed[self.loss.one_visit :]) else self._recorded(dloss, t, compute, self.loss.answers)

    def backward(self, upstream: tuple[Any, ...], saved: tuple[Any, ...], needed: list[bool]) -> tuple[Tensor | None, ...]:
        """The loss's `backward`, of what its forward saved, in plain tensors."""
        if not saved[0].is_cpu:
            return _backward(self.loss, upstream, saved, self.options, needed)
        return _repeated_backward(self.loss)(*upstream, *saved, self.options, needed)[0]

    def _recorded(self, which: Any, t: Any, compute: Callable[[], replay.Found], results: int | None) -> replay.Found:
        programs = self.programs
        if not self.recorded or which in programs:
            return compute()
        if len(programs) >= _MOST_PROGRAMS:
            programs.clear()
        found, programs[which] = record(compute, t, results)
        return found


def _backward(loss: Any, upstream: Any, saved: Any, o: Any, needed: list[bool]) -> tuple[Tensor | None, ...]:
    dloss = upstream if loss.answers > 1 else upstream[0]
    return loss.backward(dloss, loss.saved(*saved), o, tuple(needed), None)  # type: ignore[no-any-return]


@cache
def _repeated_backward(loss: Any) -> Callable[..., replay.Found]:
    def find(*arguments: Any) -> replay.Found:
        *tensors, o, needed = arguments
        return _backward(loss, tuple(tensors[: loss.answers]), tensors[loss.answers :], o, needed), ()

    return repeated(loss, find, loss.answers + len(fields(loss.saved)))


THEIRS: Call = Call(None, None)  # torch serves it
_remembered: dict[Kind, Call] = {}
_recent: dict[str, Recent[Call]] = defaultdict(Recent)  # by function


def recall(function: str, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Kind | None, Call | None]:
    """The call that was remembered for calls of this kind, `THEIRS` if torch serves them; or the kind, if it is new and can have a call."""
    if routing.watched():
        return None, None
    modes = torch.is_grad_enabled(), torch.get_num_threads(), backends.get_backend(), contract.watch
    # 1 is True and 1.0, but not as an option
    asked = [list(map(type, (*tensors, *options))), options, *modes, config.min_numel, config.pool_min_bytes, config.pool_max_bytes]
    recent = _recent[function]
    call = recent.find(asked, tensors)
    if call is not None:
        return None, call
    kind = _kind_of(function, tensors, options, asked)
    call = None if kind is None else _remembered.get(kind)
    if call is None:
        return kind, None
    recent.came_again(kind, asked, tensors, call)
    return None, call


def remember(kind: Kind | None, call: Call, t: tuple[Tensor | None, ...] = ()) -> Call:
    """The call, from now on that of its kind."""
    if kind is not None:
        if len(_remembered) >= _MOST_KINDS:
            _remembered.clear()
        _remembered[kind] = call
        call.recorded = bool(t) and contract.watch is None  # what is watched is to be launched as it is the first time
    return call


def _kind_of(function: str, tensors: tuple[Any, ...], options: tuple[Any, ...], asked: list[Any]) -> Kind | None:
    """The kind of a call on CPU; None where more matters than that: a subclass, a transform, a compiler, a mode other than autocast."""
    excluded = _C._dispatch_tls_local_exclude_set().raw_repr()
    if (
        not _OPTIONS.issuperset(map(type, options))
        or excluded not in (_EXCLUDED, _UNDER_AUTOCAST)
        or _C._dispatch_tls_local_include_set().raw_repr() != _INCLUDED
        or _C._get_tracing_state() is not None
    ):
        return None
    found: list[Any] = [function, excluded]
    for t in tensors:
        if t is None:
            found.append(None)
            continue
        if (type(t) is not Tensor and type(t) is not torch.nn.Parameter) or _C._dispatch_keys(t).raw_repr() != _PLAIN:
            return None
        found += t.shape, t.stride(), t.dtype, t.requires_grad
    types, *rest = asked
    return *found, *types, *rest
