"""Both kernel packages offer exactly what `fastloss.launchers.Kernels` says, under the same names."""

import importlib
import inspect
from typing import Any

import pytest

from fastloss.contract import launcher_names
from fastloss.launchers import Kernels

LAUNCHERS = {name: getattr(Kernels, name) for name in launcher_names()}


def package(name: str, needs: str) -> Any:
    oldest = {"triton": "3.4", "numba": "0.61"}[needs]
    pytest.importorskip(needs, minversion=oldest, reason=f"{needs} {oldest} is not installed")
    return importlib.import_module(f"fastloss.kernels.{name}")


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("name", "needs"), [("cuda", "triton"), ("cpu", "numba")])
def test_launcher_has_the_protocols_signature(name: str, needs: str, launcher: str) -> None:
    promised = list(inspect.signature(LAUNCHERS[launcher]).parameters.values())[1:]  # without self
    offered = inspect.signature(getattr(package(name, needs), launcher))
    assert list(offered.parameters) == [p.name for p in promised]
    assert offered.return_annotation in (None, "None")
    assert all(p.default is inspect.Parameter.empty for p in offered.parameters.values())


@pytest.mark.parametrize(("name", "needs"), [("cuda", "triton"), ("cpu", "numba")])
def test_the_package_offers_nothing_else(name: str, needs: str) -> None:
    assert sorted(package(name, needs).__all__) == sorted(LAUNCHERS)
