"""What is infinite or NaN in torch is so here: class weights and logits at and beyond the ends of float32, smoothed and soft targets."""

import pytest
import torch
import torch.nn.functional as F
from helpers import kernel_call
from torch import Tensor

INF, NAN, TOP = float("inf"), float("nan"), torch.finfo(torch.float32).max


def put(tensor: Tensor, at: dict[int, float]) -> Tensor:
    tensor = tensor.clone()
    for c, value in at.items():
        tensor[..., c] = value
    return tensor


CASES: dict[str, tuple[dict[int, float], dict[int, float]]] = {  # logits, class weights
    "weight inf": ({}, {1: INF}),
    "weight inf, late": ({}, {-2: INF}),
    "weight -inf": ({}, {1: -INF}),
    "weights inf and -inf": ({}, {1: -INF, -2: INF}),
    "weight nan": ({}, {1: NAN}),
    "weight inf, one sure class": ({0: 500.0}, {1: INF}),
    "weight inf of the sure class": ({0: 500.0}, {0: INF}),
    "weight inf of the top": ({1: 9.0}, {1: INF}),
    "logit -inf": ({1: -INF}, {}),
    "logit -inf, weight 0": ({1: -INF}, {1: 0.0}),
    "logit -inf, weight inf": ({1: -INF}, {1: INF}),
    "logit inf": ({1: INF}, {}),
    "logit inf, weight inf": ({1: INF}, {1: INF}),
    "logit nan, weight inf": ({1: NAN}, {-2: INF}),
    "all logits 2^103": (dict.fromkeys(range(5), 2.0**103), {}),
    "the largest of all": ({1: TOP}, {}),
    "lowest, then largest": ({0: -TOP, -2: TOP}, {}),
    "largest, then lowest": ({0: TOP, -2: -TOP}, {}),
    "lowest with weight 0, then largest": ({0: -TOP, -2: TOP}, {0: 0.0}),
    "largest, then lowest with weight 0": ({0: TOP, -2: -TOP}, {-2: 0.0}),
}


@pytest.mark.parametrize("soft", [False, True], ids=["smoothed", "soft"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 9000), (2, 5, 20)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cross_entropy(name: str, shape: tuple[int, ...], soft: bool) -> None:
    logits_at, weights_at = CASES[name]
    classes = shape[1]
    x = put(torch.randn(shape).movedim(1, -1), logits_at).movedim(-1, 1).contiguous().requires_grad_()
    weight = put(torch.rand(classes) + 0.5, weights_at)
    target = torch.softmax(torch.randn(shape), 1) if soft else torch.randint(classes, shape[:1] + shape[2:])
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "none"}
    mine = kernel_call("cross_entropy", x, target, **options)
    torchs = F.cross_entropy(x, target, **options)
    wide = {**options, "weight": weight.double()}
    truth = F.cross_entropy(x.detach().double(), target.double() if soft else target, **wide)
    dloss = torch.randn_like(mine)
    gradients = [torch.autograd.grad(loss, x, dloss)[0] for loss in (mine, torchs)]
    # torch's is too large for float32: ours may be as infinite, 0 x infinity, or right after all
    too_large = ~torchs.isfinite() & truth.isfinite()
    right = torch.isclose(mine.double(), truth, rtol=1e-5)
    assert (~mine.isfinite() | right)[too_large].all()
    torch.testing.assert_close(mine[~too_large], torchs[~too_large], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6, equal_nan=True)
