"""Every public function and class has an example in its docstring, and the examples are true, by our kernels and by torch."""

import doctest
import inspect
from pathlib import Path

import pytest
import torch

import fastloss
from fastloss import functional, linear, modules, routing, sparse_targets, statistics

NEEDS_NONE = {"BackendError", "Route", "Warmed", "get_backend", "set_backend", "use_backend"}


@pytest.mark.parametrize("min_numel", [0, 1 << 18], ids=["kernels", "defaults"])
@pytest.mark.parametrize("module", [functional, linear, modules, routing, sparse_targets, statistics], ids=lambda module: module.__name__)
def test_examples(module: object, min_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "min_numel", min_numel)
    result = doctest.testmod(module, extraglobs={"torch": torch})  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("min_numel", [0, 1 << 18], ids=["kernels", "defaults"])
@pytest.mark.parametrize("page", ["recipes", "migration"])
def test_pages(page: str, min_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "min_numel", min_numel)
    result = doctest.testfile(str(Path(__file__).parent.parent / "docs" / f"{page}.md"), module_relative=False)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", sorted(set(fastloss.__all__) - NEEDS_NONE))
def test_everything_public_has_an_example(name: str) -> None:
    public = getattr(fastloss, name)
    if callable(public):
        assert ">>> " in (inspect.getdoc(public) or ""), name
