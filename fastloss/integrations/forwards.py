"""One model's forward replaced, and given back."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

_MARK = "_fastloss"


def replace(model: Any, name: str, around: Callable[..., Any]) -> None:
    """Let `around(model, theirs, *args, **kwargs)` be the forward of this model, where `theirs` is the one it had, with its signature."""
    model.__dict__[_saved(name)] = model.__dict__.get("forward")
    theirs = model.forward

    @functools.wraps(getattr(theirs, "__func__", theirs))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__[_saved(name)]
        return around(self, MethodType(type(self).forward, self) if before is None else before, *args, **kwargs)

    signature, self_parameter = inspect.signature(theirs), inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY else p for p in signature.parameters.values()]
    vars(forward).update({"__signature__": signature.replace(parameters=[self_parameter, *parameters]), _MARK: name})
    model.forward = MethodType(forward, model)  # a method, no closure over the model: a deep copy of the model calls itself


def replaced(model: Any, name: str) -> bool:
    return getattr(model.__dict__.get("forward"), _MARK, None) == name


def restore(model: Any, name: str) -> None:
    """Give a model its forward back. One that was not replaced under this name is left alone."""
    if not replaced(model, name):
        return
    before = model.__dict__.pop(_saved(name))
    if before is None:
        del model.forward
    else:
        model.forward = before


def _saved(name: str) -> str:
    return f"_forward_before_{name}"
