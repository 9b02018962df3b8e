"""The contract of the launchers is code: whatever does not fit is refused by name before an address is taken."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from launch_watch import watch
from torch import Tensor

from fastloss import contract, kinds, launchers
from fastloss.backends import kernels
from fastloss.kernels.groups import Answers, Focus, Foreseen, Reduction, Rows, Slope, Smoothing

ROWS = [f"rows.{name}" for name in Rows._fields]
ANSWERS = [f"answers.{name}" for name in Answers._fields]
LAUNCHERS = contract.launcher_names()
N, C = 6, 5
MADE: dict[str, Callable[[], Tensor]] = {
    "_Logits": lambda: torch.randn(N, C),
    "_LikeLogits": lambda: torch.rand(N, C),
    "_Floats": lambda: torch.rand(N, C),
    "_FloatResults": lambda: torch.empty(N, C),
    "_Gradient": lambda: torch.empty(N, C),
    "_KeptGradient": lambda: torch.empty(N, C),
    "_OnlyGradient": lambda: torch.empty(N, C),
    "_Indices": lambda: torch.randint(C, (N,)),
    "_AnyIndices": lambda: torch.randint(C, (N,)),
    "_EntryIndices": lambda: torch.randint(C, (N, 2)),
    "_EntryNumbers": lambda: torch.rand(N, 2),
    "_EntryResults": lambda: torch.empty(N, 2),
    "_SomeEntryNumbers": lambda: torch.rand(N, 2),
    "_SomeEntryResults": lambda: torch.empty(N, 2),
    "_SomeRowNumbers": lambda: torch.rand(N),
    "_SomeRowResults": lambda: torch.empty(N),
    "_SomeRowClasses": lambda: torch.empty(N, dtype=torch.int64),
    "_ClassWeight": lambda: torch.rand(C),
    "_WeightAlone": lambda: torch.rand(C),
    "_RowNumbers": lambda: torch.rand(N) + 0.5,
    "_RowResults": lambda: torch.empty(N),
    "_RowGradient": lambda: torch.rand(N),
    "_Numbers": lambda: torch.rand(N),
    "_OneNumber": lambda: torch.rand(()),
    "_FirstNumber": lambda: torch.rand(()),
    "_LastNumbers": lambda: torch.rand(2),
    "_Total": lambda: torch.empty(()),
    "_Divisor": lambda: torch.empty(()),
    "_Elements": lambda: torch.rand(1, N, C),
}


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def cut(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(max(0, t.untyped_storage().nbytes() - t.element_size()))
    return t


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "cut": cut,
    "of bytes": lambda t: t.to(torch.int8),
    "of another device": lambda t: t.to("meta"),
    "short": lambda t: t[..., :-1].contiguous() if t.dim() else t.new_empty(0),
    "apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "one for all": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
}
# what a kind allows beyond its plain form
_STRIDED = {
    "_Logits",
    "_LikeLogits",
    "_Floats",
    "_ClassWeight",
    "_WeightAlone",
    "_Elements",
    "_EntryNumbers",
    "_Total",
    "_Divisor",
    "_OneNumber",
    "_FirstNumber",
}
ALLOWED = {
    "apart": {*_STRIDED, "_FloatResults", "_Gradient", "_KeptGradient", "_OnlyGradient"},
    "one for all": {*_STRIDED, "_RowGradient"},
    # nothing tells how long they should be
    "short": {"_WeightAlone", "_AnyIndices", "_Numbers", "_OnlyGradient", "_Divisor", "_EntryIndices"},
}
ALONE = {("token_statistics_forward", "logits", "short")}  # no other argument has as many numbers as there are classes


def kind_of(hint: Any) -> Any:
    return hint.__metadata__[0] if hasattr(hint, "__metadata__") else None


def arguments_of(launcher: str) -> dict[str, Any]:
    hints = get_type_hints(getattr(launchers.Kernels, launcher), include_extras=True)
    hints.pop("return")
    if launcher.startswith(("bce", "binary", "sigmoid")):
        results = dict.fromkeys(("_Gradient", "_FloatResults"), lambda: torch.empty(1, N, C))
        made = {**MADE, "_Floats": MADE["_Elements"], **results}
    else:
        made = MADE
    numbers: dict[str, Any] = {"ignore_index": -100, "keep": 0.9, "count": 2, "smoothing": Smoothing(0.9, 0.02)}
    numbers |= {"focus": Focus(0.3, 0.7, 2.0), "logit_scale": 0.7, "answers": Answers(*(None,) * 5), "slope": Slope(None, None, None)}
    numbers |= {"rows": Rows(None, None, None, None), "reduction": Reduction(1.0, torch.empty(()), torch.empty(()))}
    numbers |= {"foreseen": Foreseen(torch.ones(2), torch.empty(()), torch.empty(()))} if launcher.startswith("foreseen") else {}
    arguments = {name: numbers[name] if name in numbers else made[type(kind_of(hint)).__name__]() for name, hint in hints.items()}
    for name, kind in kinds_of(launcher).items():
        if "." in name:
            put(arguments, name, made[type(kind).__name__]())
    return arguments


def kinds_of(launcher: str) -> dict[str, Any]:
    """The kinds of a launcher's tensors by name; those in a group are called `rows.top`."""
    return {place.name: place.kind for place in contract.places(launcher)}


def put(arguments: dict[str, Any], name: str, tensor: Tensor) -> None:
    argument, _, field = name.partition(".")
    arguments[argument] = arguments[argument]._replace(**{field: tensor}) if field else tensor


def taken(arguments: dict[str, Any], name: str) -> Tensor:
    argument, _, field = name.partition(".")
    return getattr(arguments[argument], field) if field else arguments[argument]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_fits_is_launched(launcher: str) -> None:
    getattr(kernels("numba"), launcher)(*arguments_of(launcher).values())


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_does_not_fit_is_refused_by_name(launcher: str, damage: str) -> None:
    """While launches are watched, results too; what the user can reach, always: the next test."""
    for name, kind in kinds_of(launcher).items():
        if type(kind).__name__ in ALLOWED.get(damage, ()) or (launcher, name, damage) in ALONE:
            continue
        arguments = arguments_of(launcher)
        put(arguments, name, DAMAGE[damage](taken(arguments, name)))
        giver = next(n for n, k in kinds_of(launcher).items() if type(k).facts is not kinds.Kind.facts)
        named = ".*" if name == giver and damage in ("of bytes", "short", "of another device") else name
        with pytest.raises(RuntimeError, match=rf"fastloss {launcher}: {named} must be .*; got torch\."):
            getattr(kernels("numba"), launcher)(*arguments.values())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_comes_from_outside_is_looked_at_in_production(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "watch", None)
    for name, kind in kinds_of(launcher).items():
        if kind.ours:
            continue
        arguments = arguments_of(launcher)
        put(arguments, name, freed(taken(arguments, name)))
        with pytest.raises(RuntimeError, match=f"{name} must be .* was freed or cut"):
            getattr(kernels("numba"), launcher)(*arguments.values())


def made_on(device: str, launcher: str) -> dict[str, Any]:
    arguments = arguments_of(launcher)
    for name in kinds_of(launcher):
        put(arguments, name, taken(arguments, name).to(device))
    return arguments


@pytest.mark.parametrize(("kernels_of", "made"), [("cpu", "meta"), ("cuda", "cpu"), ("cuda", "meta")])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_refuse_tensors_of_another_device(launcher: str, kernels_of: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In production too: the address of a CUDA tensor means nothing on a CPU, nor the other way round. No kernel package is needed."""
    monkeypatch.setattr(contract, "watch", None)
    package = contract.checked(SimpleNamespace(**dict.fromkeys(LAUNCHERS, None)), kernels_of)
    with pytest.raises(RuntimeError, match=rf"fastloss {launcher}: .* must be .*, on {kernels_of}; got .* on {made}"):
        getattr(package, launcher)(*made_on(made, launcher).values())


@pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_tensor_on_another_device_is_refused(launcher: str, device: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that losses make themselves lie beside the first; they are looked at while launches are watched."""
    package = contract.checked(SimpleNamespace(**dict.fromkeys(LAUNCHERS, None)), device)
    for watched in (True, False):
        monkeypatch.setattr(contract, "watch", watch if watched else None)
        for name, kind in kinds_of(launcher).items():
            if kind.ours and not watched:
                continue
            arguments = made_on(device, launcher)
            put(arguments, name, torch.zeros_like(taken(arguments, name), device=other))
            with pytest.raises(RuntimeError, match=rf"fastloss {launcher}: .* must be .*, on {device}; got"):
                getattr(package, launcher)(*arguments.values())


def test_only_what_losses_make_themselves_is_taken_on_trust() -> None:
    trusted = {name for launcher in LAUNCHERS for name, kind in kinds_of(launcher).items() if kind.ours}
    assert trusted == {
        "loss",
        "reduction.divisor",
        "reduction.total",
        "foreseen.divisor",
        "foreseen.total",
        "divisor",
        "mean",
        "result",
        "row_weight",
        *ROWS,
        *ANSWERS,
        "total",
        "dlogits",
        "dtarget",
        "dlog_prob",
        "dprob",
        "prob",
        "log_prob",
        "values",
    }
    for launcher in LAUNCHERS:
        if launcher.endswith("backward") and "forward" not in launcher:
            assert not any(kind.ours for name, kind in kinds_of(launcher).items() if name in ("row_weight", *ROWS))


BROKEN: dict[str, tuple[Callable[..., None], str]] = {
    "leaves a hole": (lambda values, total: None, "total was not written whole"),
    "writes what it may read": (lambda values, total: (total.fill_(1), values.add_(1)), "values was written to"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_watch_sees_a_broken_launcher(broken: str) -> None:
    launcher, complaint = BROKEN[broken]
    with pytest.raises(AssertionError, match=complaint):
        watch("sum_rows", launcher, (torch.rand(N), torch.empty(())), contract.places("sum_rows"))


def test_the_watch_sees_results_in_the_memory_of_arguments() -> None:
    values = torch.rand(N)
    with pytest.raises(AssertionError, match="total lies in the memory of values"):
        kernels("numba").sum_rows(values, values[0])


def test_every_tensor_of_every_launcher_has_a_kind() -> None:
    for launcher in LAUNCHERS:
        parameters = inspect.signature(getattr(launchers.Kernels, launcher)).parameters
        assert {name.partition(".")[0] for name in kinds_of(launcher)} == set(parameters) - {
            "self",
            "count",
            "focus",
            "ignore_index",
            "keep",
            "logit_scale",
            "smoothing",
        }
