"""The modules are torch's in everything but who computes."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch

import fastloss

LOSSES: dict[str, tuple[dict[str, Any], tuple[torch.Tensor, ...]]] = {
    "CrossEntropyLoss": (
        {"weight": torch.rand(5), "ignore_index": 2, "label_smoothing": 0.1, "reduction": "sum"},
        (torch.randn(4, 5), torch.tensor([0, 2, 4, 1])),
    ),
    "NLLLoss": ({"weight": torch.rand(5), "ignore_index": 2, "reduction": "none"}, (-torch.rand(4, 5), torch.tensor([0, 2, 4, 1]))),
    "BCELoss": ({"weight": torch.rand(5), "reduction": "sum"}, (torch.rand(4, 5), torch.rand(4, 5))),
    "BCEWithLogitsLoss": (
        {"weight": torch.rand(5), "pos_weight": torch.rand(5), "reduction": "none"},
        (torch.randn(4, 5), torch.rand(4, 5)),
    ),
    "Softmax": ({"dim": 1}, (torch.randn(4, 5),)),
    "LogSoftmax": ({"dim": 0}, (torch.randn(4, 5),)),
}
on_every_module = pytest.mark.parametrize("name", LOSSES)


def both(name: str) -> tuple[torch.nn.Module, torch.nn.Module, tuple[torch.Tensor, ...]]:
    options, inputs = LOSSES[name]
    return getattr(fastloss, name)(**options), getattr(torch.nn, name)(**options), inputs


@on_every_module
def test_is_torchs_module_and_computes_the_same(name: str) -> None:
    mine, theirs, inputs = both(name)
    assert isinstance(mine, type(theirs))
    assert fastloss.explain(mine, *inputs).path == "kernel"
    torch.testing.assert_close(mine(*inputs), theirs(*inputs))


@on_every_module
def test_defaults(name: str) -> None:
    _, inputs = LOSSES[name]
    options = {"dim": 1} if "oftmax" in name else {}
    mine, theirs = getattr(fastloss, name)(**options), getattr(torch.nn, name)(**options)
    assert fastloss.explain(mine, *inputs).path == "kernel"
    torch.testing.assert_close(mine(*inputs), theirs(*inputs))


@on_every_module
def test_repr_state_and_attributes(name: str) -> None:
    mine, theirs, _ = both(name)
    assert repr(mine) == repr(theirs)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert set(vars(mine)) == set(vars(theirs))
    other = getattr(fastloss, name)(**{k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in LOSSES[name][0].items()})
    other.load_state_dict(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@on_every_module
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies(name: str, way: str) -> None:
    mine, theirs, inputs = both(name)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(mine))
    elif way == "deepcopy":
        twin = copy.deepcopy(mine)
    else:
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(mine)
    torch.testing.assert_close(twin(*inputs), theirs(*inputs))


@on_every_module
def test_moves_to_another_dtype(name: str) -> None:
    mine, theirs, inputs = both(name)
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    assert fastloss.explain(mine.double(), *wide).path == "kernel"
    torch.testing.assert_close(mine(*wide), theirs.double()(*wide))


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss"])
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}], ids=str)
def test_legacy_arguments(name: str, legacy: dict[str, bool]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine, theirs = getattr(fastloss, name)(**legacy), getattr(torch.nn, name)(**legacy)
    ours, torchs = caught
    assert str(ours.message) == str(torchs.message)
    assert mine.reduction == theirs.reduction
    inputs = LOSSES[name][1]
    torch.testing.assert_close(mine(*inputs), theirs(*inputs))


def test_softmax_unpickled_from_torch_without_a_dim() -> None:
    module = fastloss.Softmax()
    del module.dim
    module.__setstate__(module.__dict__)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(module(torch.ones(2, 2)), torch.full((2, 2), 0.5))


@on_every_module
def test_forward_hooks_and_scripted_parents(name: str) -> None:
    mine, theirs, inputs = both(name)
    seen = []
    mine.register_forward_hook(lambda module, args, result: seen.append(result))
    torch.testing.assert_close(mine(*inputs), theirs(*inputs))
    assert len(seen) == 1
    assert isinstance(torch.nn.Sequential(mine)[0], type(theirs))
