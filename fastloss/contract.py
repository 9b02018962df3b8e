"""The launchers' contract: what `launchers.Kernels` says of an argument is looked at before each call. Launchers take addresses, and what
does not fit would be read or written out of bounds."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from .element_launchers import ElementKernels
from .kinds import Group, Kind
from .launchers import Kernels
from .storage import is_in_its_storage


class Place(NamedTuple):
    """Where a launcher takes a tensor: which argument, or which field of a group, and of what kind it must be."""

    argument: int
    field: int | None
    name: str
    kind: Kind

    def of(self, arguments: Sequence[Any]) -> Tensor:
        found = arguments[self.argument]
        return found if self.field is None else found[self.field]  # type: ignore[no-any-return]


Launcher = Callable[..., None]
watch: Callable[[str, Launcher, Sequence[Any], Sequence[Place]], None] | None = None
"""What tests put between the contract and the launchers: called with a launcher's name, itself, its arguments and where its tensors are."""


def checked(package: Any, device: str) -> Any:
    """The launchers of a kernel package for tensors on this type of device, each behind its contract."""
    return SimpleNamespace(**{name: _checked(name, getattr(package, name), device) for name in launcher_names()})


def launcher_names() -> list[str]:
    return [name for kernels in (Kernels, ElementKernels) for name in vars(kernels) if not name.startswith("_")]


def places(name: str) -> list[Place]:
    """Where this launcher takes tensors."""
    found = []
    for i, (argument, hint) in enumerate(get_type_hints(getattr(Kernels, name), include_extras=True).items()):
        for kind in getattr(hint, "__metadata__", ()):
            if isinstance(kind, Group):
                found += [Place(i, field, f"{argument}.{part}", kind.kind) for field, part in kind.fields]
            else:
                found.append(Place(i, None, argument, kind))
    return found


def _checked(name: str, launcher: Launcher, device: str) -> Launcher:
    everywhere = places(name)
    first, _, giver_name, giver = next(place for place in everywhere if type(place.kind).facts is not Kind.facts)
    foreign = [place for place in everywhere if not place.kind.ours]
    facts_of = giver.facts
    on_cpu = device == "cpu"

    def launch(*arguments: Any) -> None:
        if watch is None and not foreign:
            if arguments[first].device.type != device:
                raise RuntimeError(_complaint(name, giver_name, giver, arguments[first], arguments[first], device))
            return launcher(*arguments)
        facts = facts_of(arguments[first])
        if facts is None or facts.device.type != device:
            raise RuntimeError(_complaint(name, giver_name, giver, arguments[first], arguments[first], device))
        for i, field, argument, kind in foreign if watch is None else everywhere:
            t = arguments[i] if field is None else arguments[i][field]
            if not (t.is_cpu if on_cpu else t.device == facts.device) or not kind.fits(t, facts):
                raise RuntimeError(_complaint(name, argument, kind, t, arguments[first], device))
        if watch is None:
            return launcher(*arguments)
        return watch(name, launcher, arguments, everywhere)

    return launch


def _complaint(name: str, argument: str, kind: Kind, t: Tensor, first: Tensor, device: str) -> str:
    got = f"{t.dtype} {tuple(t.shape)} with strides {tuple(t.stride())} on {t.device}"
    if not is_in_its_storage(t):
        got += f", whose storage holds {t.untyped_storage().nbytes()} bytes: it was freed or cut"
    beside = "" if t is first else f" beside {first.dtype} {tuple(first.shape)} on {first.device}"
    return f"fastloss {name}: {argument} must be {kind.rule}, on {device}; got {got}{beside}"
