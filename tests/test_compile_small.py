"""Few logits under a compiler: torch's loss, which it compiles, where the size is known; our op where it may be another one later."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastloss

MEASURE = 1000  # config.min_numel, here
pytestmark = pytest.mark.skipif(torch.__version__ < (2, 8), reason="an older torch cannot be asked for a size without a guard")


@pytest.fixture(autouse=True)
def as_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(fastloss.config, "min_numel", MEASURE)
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that notes whether a graph has one of our ops."""

    def __init__(self) -> None:
        self.ours: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        self.ours.append(any("fastloss" in str(node.target) for node in graph.graph.nodes))
        return graph.forward


def compiled_loss(**options: Any) -> tuple[Callable[..., Any], list[bool]]:
    graphs = Graphs()
    return torch.compile(lambda x, y: fastloss.cross_entropy(x, y), fullgraph=True, backend=graphs, **options), graphs.ours


def check(compiled: Callable[..., Any], n: int, c: int = 20) -> None:
    x, y = torch.randn(n, c, requires_grad=True), torch.randint(c, (n,))
    torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))


def test_a_known_size_decides() -> None:
    compiled, ours = compiled_loss(dynamic=False)
    for n in (MEASURE // 20 - 1, MEASURE // 20):
        check(compiled, n)
    assert ours == [False, True]


def test_rows_of_few_classes_are_not_worth_less_logits() -> None:
    compiled, ours = compiled_loss(dynamic=False)
    for n in (MEASURE // 10 - 1, MEASURE // 10):
        check(compiled, n, 10)
    assert ours == [False, True]


def test_losses_that_are_worth_more_logits_in_eager_mode_are_so_here() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda x, y: fastloss.nll_loss(x, y), fullgraph=True, backend=graphs, dynamic=False)
    share = int(fastloss.losses.nll_loss.worth.forward)
    assert share > 1
    for n in (share * MEASURE // 20 - 1, share * MEASURE // 20):
        assert compiled(torch.ones(n, 20), torch.zeros(n, dtype=torch.int64)) == -1
    assert graphs.ours == [False, True]


def test_the_user_decides_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, ours = compiled_loss(dynamic=False)
    check(compiled, 4)
    with fastloss.use_backend("numba"):
        check(compiled, 4)
    with fastloss.use_backend("torch"):
        check(compiled, MEASURE)
    monkeypatch.setattr(fastloss.config, "min_numel", 0)
    check(compiled, 4)
    assert ours == [False, True, False, True]


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_size_that_may_change_is_not_asked_for(dynamic: bool | None) -> None:
    """One graph for all sizes, below and above: at once, or from the second size on."""
    compiled, ours = compiled_loss(dynamic=dynamic)
    for n in (3, 4, MEASURE, 7, 2 * MEASURE):
        check(compiled, n)
    assert ours == ([True] if dynamic else [False, True])


def test_a_marked_size_stays_dynamic() -> None:
    compiled, ours = compiled_loss()
    x, y = torch.randn(4, 20), torch.randint(20, (4,))
    for t in (x, y):
        torch._dynamo.mark_dynamic(t, 0)  # an error if anything were to depend on it
    torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))
    check(torch.no_grad()(compiled), MEASURE)
    assert ours[0]


def total(found: fastloss.TokenStatistics) -> torch.Tensor:
    assert found.log_prob is not None
    assert found.entropy is not None
    return found.log_prob.sum() + found.entropy.sum()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "nll_loss": lambda x, y: fastloss.nll_loss(x, y),
    "binary_cross_entropy": lambda x, y: fastloss.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid()),
    "binary_cross_entropy_with_logits": lambda x, y: fastloss.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "sigmoid_focal_loss": lambda x, y: fastloss.sigmoid_focal_loss(x, x.detach().sigmoid(), reduction="sum"),
    "log_softmax": lambda x, y: fastloss.log_softmax(x, 1)[:, 0].sum(),
    "sparse_soft_cross_entropy": lambda x, y: fastloss.sparse_soft_cross_entropy(x, y[:, None], torch.ones(len(y), 1)),
    "token_statistics": lambda x, y: total(fastloss.token_statistics(x, y)),
    "linear_cross_entropy": lambda x, y: fastloss.linear_cross_entropy(x, x.detach() * 2, y),
    "linear_token_statistics": lambda x, y: total(fastloss.linear_token_statistics(x, x.detach() * 2, y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name: str) -> None:
    """Without our op, without a graph break, and with the numbers of the kernels."""
    graphs, call = Graphs(), FUNCTIONS[name]
    compiled = torch.compile(call, fullgraph=True, backend=graphs)
    mine = torch.randn(6, 6, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    with fastloss.use_backend("numba"):
        expected = call(theirs, y)
    found = compiled(mine, y)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert graphs.ours == [False]


def test_what_is_exported_needs_no_fastloss() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return fastloss.cross_entropy(x, y)

    x, y = torch.randn(4, 20), torch.randint(20, (4,))
    exported = torch.export.export(Model(), (x, y))
    assert not any("fastloss" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, y), F.cross_entropy(x, y))
    rows = torch.export.Dim("rows", min=2, max=1 << 20)
    exported = torch.export.export(Model(), (x, y), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    assert any("fastloss" in str(node.target) for node in exported.graph.nodes)
