"""The cheap question whether a call is of a kind that came last: no to all that only looks alike, and asked of few kinds."""

from typing import Any

import torch
import torch.fx.experimental.proxy_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastloss import guards, routing


def test_a_guard_knows_what_only_looks_alike() -> None:
    """The cheap question whether a call is of a kind that came last: torch's guard, and whether somebody is watching."""
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    recent: guards.Recent[str] = guards.Recent()

    def fits(*tensors: Any) -> bool:
        return recent.find([list(map(type, tensors))], tensors) == "known"

    for comes in range(2):
        assert not fits(x, y, None)
        recent.came_again("kind", [[Tensor, Tensor, type(None)]], (x, y, None), "known")
        assert len(recent) == comes, "a kind that comes once is not worth a guard; every supported torch has them"
    assert fits(torch.randn(4, 5), torch.ones(4, dtype=torch.int64), None)
    others = {
        "shape": torch.randn(5, 5),
        "strides": torch.randn(5, 4).t(),
        "dtype": x.double(),
        "wants a gradient": x.clone().requires_grad_(),
        "type": torch.nn.Parameter(x, requires_grad=False),
        "subclass": x.as_subclass(type("Sub", (Tensor,), {})),
        "device": x.to("meta"),
        "layout": x.to_sparse(),
        "compressed layout": x.to_sparse_csr(),
        "opaque layout": x.to_mkldnn(),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "negative view": torch._neg_view(x),
        "zero": torch._efficientzerotensor((4, 5)),
        "not a tensor": [1, 2],
    }
    with torch.inference_mode():
        others["of inference mode"] = torch.randn(4, 5)
    others["nested"] = torch.nested.nested_tensor([x, x[:2]])  # the guard would end the process
    assert [name for name, other in others.items() if fits(other, y, None)] == []
    assert not fits(x, None, y)
    assert not fits(x, y)
    assert not fits(x, y, torch.empty(0))
    seen: dict[str, bool] = {}

    def look(name: str, v: Any = x) -> Any:
        seen[name] = fits(v, y, None) and not routing.watched()
        return v

    batch = torch.randn(3, 4, 5)
    torch.func.vmap(lambda v: look("of a batch", v))(batch)
    torch.func.vmap(lambda v: (look("beside a batch"), v)[1])(batch)
    torch.func.grad(lambda v: look("of grad", v).sum())(x)
    torch.func.grad(lambda v: (look("beside grad"), v.sum())[1])(x)
    torch.fx.experimental.proxy_tensor.make_fx(lambda v: look("of make_fx", v))(x)
    torch.jit.trace(lambda v: look("of jit.trace", v), (x,), check_trace=False)
    with FakeTensorMode():
        look("fake mode")
    with torch.autocast("cpu"):
        look("autocast")
    with torch.inference_mode():
        look("inference mode")
    with torch.autograd.forward_ad.dual_level():
        look("forward mode")
    with torch.device("cpu"):
        look("default device")
    assert [name for name, looked in seen.items() if looked] == []
    look("nothing")
    assert seen["nothing"]


def test_the_kinds_that_came_last() -> None:
    """Those that come often are known by a guard, so many of them; whose every call is another kind makes none."""
    recent: guards.Recent[int] = guards.Recent()
    tensors = [(torch.empty(n),) for n in range(40)]
    for _ in range(3):
        for n, t in enumerate(tensors):
            recent.came_again(n, ["asked"], t, n)
    assert len(recent) == 0
    for n in range(12):
        for _ in range(2):
            recent.came_again(n, ["asked"], tensors[n], n)
    assert [recent.find(["asked"], t) for t in tensors[:12]] == [None] * 4 + list(range(4, 12))
    assert recent.find(["asked otherwise"], tensors[11]) is None
