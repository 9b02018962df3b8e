"""Every tensor that a call takes, in every layout that a tensor can have: logits, targets, weights and upstream gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import ARGUMENTS, DTYPES, LAYOUTS, REDUCTIONS, check, check_layouts, class_inputs, kernel_call
from torch import Tensor

import fastloss

GRID = [(call, argument, layout) for call, arguments in ARGUMENTS.items() for argument in arguments for layout in LAYOUTS]


@pytest.mark.parametrize(("call", "argument", "layout"), GRID)
def test_one_argument(call: str, argument: str, layout: str) -> None:
    """The others are contiguous. Two dtypes: the others differ in nothing that has to do with addresses."""
    reduction = {} if "softmax" in call else {"reduction": "none"}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((19, 11), (3, 70), (2, 60, 5), (5, 6, 3, 2)):
            check_layouts(call, {argument: layout}, shape, dtype, **reduction)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("call", [call for call in ARGUMENTS if "softmax" not in call])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_arguments_at_once(dtype: str, call: str, layout: str) -> None:
    for shape in ((19, 11), (3, 70), (2, 60, 5)):
        for reduction in ("mean", "sum"):
            check_layouts(call, dict.fromkeys(ARGUMENTS[call][:-1], layout), shape, DTYPES[dtype], reduction=reduction)


LABELS: dict[str, Callable[[int, int], Tensor]] = {
    "a column": lambda n, c: torch.randint(c, (n, 3))[:, 1],
    "every second": lambda n, c: torch.randint(c, (2 * n,))[::2],
    "from the second on": lambda n, c: torch.randint(c, (n + 1,))[1:],
    "one for all": lambda n, c: torch.randint(c, ()).expand(n),
    "a diagonal": lambda n, c: torch.randint(c, (n, n)).diagonal(),
    "bytes": lambda n, c: torch.randint(min(c, 256), (n, 3), dtype=torch.uint8)[:, 1],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_labels_as_users_cut_them(function: str, labels: str) -> None:
    for shape in ((1, 5), (50, 7), (33, 100), (3, 2000)):
        target = LABELS[labels](*shape)
        for reduction in REDUCTIONS:
            check(function, {"input": torch.randn(shape), "target": target}, reduction=reduction, ulps=8, scale=1.0)


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_labels_that_are_no_classes_are_named(function: str) -> None:
    """Not the number that lies in the gap, and not an error from within."""
    labels = torch.zeros(40, 2, dtype=torch.long)
    labels[17, 0], labels[:, 1] = 9, -3
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        kernel_call(function, torch.randn(40, 9), labels[:, 0])


def test_an_upstream_gradient_that_is_one_of_many_numbers() -> None:
    logits, target = torch.randn(20, 9, requires_grad=True), torch.randint(9, (20,))
    for number in (torch.full((5,), 1.7)[2], torch.full((1,), 1.7).expand(4)[3], torch.arange(6.0).view(2, 3)[:, 1][1]):
        mine, theirs = (torch.autograd.grad(library.cross_entropy(logits, target), logits, number)[0] for library in (fastloss, F))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("function", "argument"),
    [("cross_entropy", "input"), ("cross_entropy", "target"), ("cross_entropy", "weight"), ("nll_loss", "target")],
)
def test_compiled(function: str, argument: str) -> None:
    """The registered ops: all layouts in one graph, since a compilation takes seconds."""
    tensors = class_inputs((6, 12, 5), torch.float32, ignored=-100, weighted=True)
    leaves, views = zip(*(LAYOUTS[layout](tensors[argument]) for layout in LAYOUTS), strict=True)
    source = tensors["input"].requires_grad_()
    sources = [leaf.requires_grad_() for leaf in leaves] if argument == "input" else [source]

    def losses(call: Callable[..., Tensor], input: Tensor, target: Tensor, weight: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        arguments = {"input": input, "target": target, "weight": weight}
        return [call(**{**arguments, argument: view(leaf)}) for view, leaf in zip(views, leaves, strict=True)]

    results = []
    for library, compiler in ((fastloss, torch.compile(backend="eager", fullgraph=True)), (F, lambda call: call)):
        values = compiler(partial(losses, getattr(library, function)))(source, tensors["target"], tensors["weight"], leaves)
        upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(0))
        results.append((values, torch.autograd.grad(torch.stack(values), sources, upstream)))
    for part in (0, 1):
        for layout, mine, theirs in zip(LAYOUTS, results[0][part], results[1][part], strict=part == 0):
            torch.testing.assert_close(mine, theirs, msg=lambda text, layout=layout: f"{layout}: {text}")
