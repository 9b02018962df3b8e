"""What users do that has ended, or could end, a process: each case in a child, so that a crash is a failure with a name."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import every_other
from test_after_the_call import FAMILIES, upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss import ops as _ops  # noqa: F401  registers torch.ops.fastloss
from fastloss.losses import LOSSES

CRASHES = 3
DEFAULT = fastloss.config.min_numel  # as imported: for a test, conftest makes it 0


def outcomes(kind: str, names: list[str]) -> dict[str, str]:
    """What a child says of every case. It runs all of them; where it dies another goes on after that case, three times."""
    found: dict[str, str] = {}
    left = list(names)
    for _ in range(CRASHES):
        done = subprocess.run([sys.executable, __file__, kind, *left], capture_output=True, text=True, timeout=300)
        found |= dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
        left = [name for name in left if name not in found]
        if not left:
            break
        found[left.pop(0)] = f"exit code {done.returncode} {done.stderr[-300:]}"
    return found | dict.fromkeys(left, "not run: too many crashes")


def release(tensor: Tensor) -> None:
    """Free the memory and keep the tensor, as FSDP does."""
    tensor.untyped_storage().resize_(0)


def released(name: str) -> str:
    """One call, one of its tensors freed."""
    family, reduction, argument, when = name.split("|")
    function, inputs, options = FAMILIES[family]
    options = options if "softmax" in function else {**options, "reduction": reduction}
    gradients = []
    for api in (F, fastloss):
        leaf = inputs.clone().requires_grad_()
        arguments = {"input": leaf * 1, **{k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}}
        try:
            if api is fastloss and when == "before":
                release(arguments[argument])
            result = getattr(api, function)(**arguments)
            dloss = upstream(result)
            if api is fastloss and when == "between":
                release({**arguments, "result": result, "dloss": dloss}[argument])
            result.backward(dloss)
        except RuntimeError:
            return "RuntimeError"
        gradients.append(leaf.grad)
    return "right" if torch.allclose(*gradients, rtol=1e-4, atol=1e-6) else "wrong"


def released_cases() -> list[str]:
    names = []
    for family, (function, _, options) in FAMILIES.items():
        tensors = ["input", *(k for k, v in options.items() if isinstance(v, Tensor))]
        for reduction in ("none",) if "softmax" in function else ("none", "mean"):
            names += [f"{family}|{reduction}|{argument}|before" for argument in tensors]
            names += [f"{family}|{reduction}|{argument}|between" for argument in (*tensors, "dloss", "result")]
    return names


def test_memory_freed_before_the_call_or_before_the_backward() -> None:
    """torch raises; in the backward only where it needs that memory, and not everywhere: freed logits of BCE crash it."""
    found = outcomes("released", released_cases())
    for name in found:
        needed = name.endswith("before") or "|dloss|" in name or ("softmax" in name and "|result|" in name)
        found[name] = "fine" if found[name] == "RuntimeError" or (found[name] == "right" and not needed) else found[name]
    assert {name: what for name, what in found.items() if what != "fine"} == {}


# ---------------------------------------------------------------- the registered ops, called as they are

OPS = [loss.name for loss in LOSSES]


class Recorded(TorchDispatchMode):
    """Every call of an op of ours, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastloss":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


@contextmanager
def alone() -> Iterator[None]:
    """One rank of torch.distributed that has all classes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def calls_of(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """A well-formed call of an op and of its backward, whatever their schemas have besides the tensors of the loss."""
    torch.manual_seed(0)
    elementwise = name in ("bce_with_logits", "binary_cross_entropy", "sigmoid_focal_loss")
    x = torch.rand((3, 5, 4) if elementwise else (20, 11)) * 0.8 + 0.1
    target = (
        torch.softmax(torch.randn(20, 11), 1)
        if "soft_cross_entropy" in name and "sparse" not in name
        else torch.rand(3, 5, 4)
        if elementwise
        else torch.arange(20) % 11
    )
    weight = torch.rand(3, 5, 4) if elementwise else torch.rand(11)
    x.requires_grad_()
    known = {
        "input": x, "logits": x, "log_prob": x, "prob": x, "target": target, "weight": weight, "pos_weight": weight + 1,
        "ignore_index": 3, "label_smoothing": 0.1, "reduction": "none", "dtype": torch.float32, "input_dtype": torch.float32, "dim": 1,
        "indices": torch.randint(11, (20, 3)), "probabilities": torch.rand(20, 3), "alpha": 0.3, "gamma": 2.0,
        "wanted": "log_prob entropy lse", "linear_weight": torch.rand(11, 7), "linear_bias": torch.rand(11), "logit_scale": 0.7,
        "logit_softcap": 0.0, "chunk_rows": 8,
        "products": torch.float32, "sums": torch.float32, "first": 0, "group": "",
        "reduce_input_gradient": True,
    }  # fmt: skip
    if "linear" in name:
        known["input"] = x[:, :7].detach().requires_grad_()
    op = getattr(torch.ops.fastloss, name).default
    with Recorded() as recorded:
        results = op(*(known[argument.name] for argument in op._schema.arguments))
        loss = results if isinstance(results, Tensor) else results[0]
        loss.backward(upstream(loss))
    return [(op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)) for op, args in recorded.calls]


def freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    release(copy)
    return copy


OTHER_DTYPE = {torch.float32: torch.float64, torch.int64: torch.int32}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: every_other(t)[1](every_other(t)[0]),
    "expanded": lambda t: t[:1].expand(t.shape),
    "short": lambda t: t[:-1].clone(),
    "long": lambda t: torch.cat([t, t]),
    "dtype": lambda t: t.to(OTHER_DTYPE[t.dtype]),
    "bool": lambda t: t.bool(),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
}
WELL_FORMED, CONVERTED = ("strided", "expanded"), ("dtype", "bool")
ALSO_CALLED = {
    "input": ("logits", "prob", "target", "weight", "entropy"),  # or whatever does not belong to it any more
    "dloss": ("dloss", "dprob", "dlog_prob", "upstream gradient"),
    "result": ("prob",),
    "pos_weight": ("weight",),
}


def misused(name: str) -> str:
    """'right', 'named' for an error that names the argument, or what happened instead."""
    if name.startswith("vocab_parallel") and not dist.is_initialized():
        with alone():
            return misused(name)
    op_name, which, position, fault = name.split("|")
    op, args = calls_of(op_name)[int(which)]
    at, argument = int(position), op._schema.arguments[int(position)].name
    changed = FAULTS[fault](args[at])
    meant = changed.contiguous() if fault in WELL_FORMED else changed.to(args[at].dtype) if fault in CONVERTED else args[at]
    expected = op(*args[:at], meant, *args[at + 1 :])
    try:
        results = op(*args[:at], changed, *args[at + 1 :])
    except (RuntimeError, ValueError) as error:
        named = any(word in str(error) for word in (argument, *ALSO_CALLED.get(argument, ())))
        if fault in WELL_FORMED and which == "0":  # a backward may insist on what the forward has made
            return f"{argument} refused: {error!s:.150}"
        return "named" if named else f"does not name {argument}: {error!s:.150}"
    except Exception as error:
        return f"{argument}: {type(error).__name__}: {error!s:.150}"
    pairs = list(zip(*((r,) if isinstance(r, Tensor) else r for r in (results, expected)), strict=True))
    if fault == "meta":  # torch asks the fake then: no numbers, and none that are wrong
        return "right" if all(a.is_meta for a, _ in pairs) else f"{argument} accepted"
    atol = 1e-6 if "linear" in op_name else 1e-8  # torch's products add in another order for other strides
    same = all(a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=atol, equal_nan=True) for a, b in pairs)
    return "right" if same else f"{argument} accepted"


def test_registered_ops_check_before_they_take_an_address() -> None:
    """Every tensor of every op and of its backward: strided is right; what is not what the op needs is an error that names it."""
    with alone():
        names = [
            f"{op}|{which}|{position}|{fault}"
            for op in OPS
            for which, (_, args) in enumerate(calls_of(op))
            for position, tensor in enumerate(args)
            for fault in FAULTS
            if isinstance(tensor, Tensor) and tensor.numel() > 1 and not (fault in ("short", "long") and op.endswith("softmax"))
        ]
    assert len(names) > 300
    found = outcomes("misused", names)
    assert {name: what for name, what in found.items() if what not in ("right", "named")} == {}


@pytest.mark.long
def test_a_registered_op_with_everything_expanded() -> None:
    """Millions of rows that are one row in memory."""
    logits, target, rows = torch.randn(1, 4), torch.tensor([2]), 1 << 20
    script = f"""
import torch, fastloss.ops
logits, target = torch.tensor({logits.tolist()}), torch.tensor([2])
loss = torch.ops.fastloss.cross_entropy(logits.expand({rows}, 4), target.expand({rows}), None, -100, 0.0, "mean", torch.float32)
print((loss if isinstance(loss, torch.Tensor) else loss[0]).item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    assert float(done.stdout) == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-4)


# ---------------------------------------------------------------- programs

SERVE = """
import sys
sys.modules["fastloss"] = None  # to import it is an error
import torch
for model, x, out in zip(*[iter(sys.argv[1:])] * 3):
    torch.save(torch.export.load(model).module()(torch.load(x)), out)
"""


def test_an_exported_model_is_served_without_fastloss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported program must not want our library where it is loaded (pytorch #145394, #143786)."""
    files, expected = [], []
    for limit, rows, classes, strict in ((0, 3, 5, True), (DEFAULT, 300, 1000, False)):
        monkeypatch.setattr(fastloss.config, "min_numel", limit)
        for last in (fastloss.Softmax(-1), fastloss.LogSoftmax(-1)):
            model, x = torch.nn.Sequential(torch.nn.Linear(6, classes), last).eval(), torch.randn(rows, 6)
            paths = [str(tmp_path / f"{len(files)}{end}") for end in (".pt2", ".x", ".out")]
            torch.export.save(torch.export.export(model, (x,), strict=strict), paths[0])
            torch.save(x, paths[1])
            files.append(paths)
            expected.append(model.double()(x.double()).float())
    done = subprocess.run(
        [sys.executable, "-c", SERVE, *(path for paths in files for path in paths)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-600:]
    for (_, _, out), value in zip(files, expected, strict=True):
        torch.testing.assert_close(torch.load(out), value.detach(), rtol=1e-4, atol=1e-6)


MICRO_BATCHES = """
import gc, torch, torch.nn.functional as F, fastloss
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
rows, classes, batches = 256, 8192, 5
weight = torch.randn(classes, 8, requires_grad=True)
data = [(torch.randn(rows, 8), torch.randint(classes, (rows,)), torch.rand(rows, classes)) for _ in range(batches)]
LOSSES = {
    "cross_entropy": lambda api, x, y, q: api.cross_entropy(x, y, reduction="sum"),
    "probabilities": lambda api, x, y, q: api.cross_entropy(x, q, reduction="sum"),
    "bce": lambda api, x, y, q: api.binary_cross_entropy_with_logits(x, q, reduction="sum"),
}
def forward(api, loss, weight, features, y, q):
    return LOSSES[loss](api, features @ weight.T, y, q)
for loss in LOSSES:
    gradients = []
    for api in (F, fastloss):
        forward(api, loss, weight, *data[0]).backward()  # compiled and warm
        weight.grad = None
        fastloss.memory.empty_pool()
        before = resident()
        total = sum(forward(api, loss, weight, *batch) for batch in data) / (batches * rows)
        between = resident() - before
        total.backward()
        gradients.append(weight.grad)
        weight.grad = None
        print(loss, api.__name__, between / (batches * rows * classes * 4))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_micro_batches_keep_no_more_memory_than_torch() -> None:
    """Losses of micro-batches are summed and one backward follows (torchtune #1875, #1917). In multiples of the logits, at the defaults."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run([sys.executable, "-c", MICRO_BATCHES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-600:]
    kept = {}
    for line in done.stdout.splitlines():
        loss, api, times = line.split()
        kept[loss, api] = float(times)
    assert {loss: times for (loss, api), times in kept.items() if times > kept[loss, "torch.nn.functional"] + 0.25} == {}


if __name__ == "__main__":
    fastloss.config.min_numel = 0
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        print(case, {"released": released, "misused": misused}[sys.argv[1]](case), sep="\t", flush=True)
