"""The same checks on a real GPU: everything the interpreter cannot know. Skipped, with the reason, where there is none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import contract, rows, self_checks
from fastloss.kernels.groups import Rows

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed")

import kernel_checks as check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (3, 1), (70, 2), (1000, 10), (64, 300), (4096, 1000), (1, 50257), (1, 128256), (2, 128256), (2, 151936), (64, 32000), (700, 5001),
    (300, 50257), (2, 7, 5), (4, 19, 1024),
]  # fmt: skip


@pytest.fixture(autouse=True)
def by_the_kernels() -> Iterator[None]:
    """Or an error: what goes to torch instead would be right, too."""
    with fastloss.use_backend("triton"):
        yield


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at every launch waits for the device: in a graph capture that is an error, between streams it hides one."""
    monkeypatch.setattr(contract, "watch", None)


@pytest.fixture
def k() -> Any:
    import fastloss.kernels.cuda

    torch.manual_seed(0)
    return fastloss.kernels.cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_index_targets(k: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, device="cuda").mul(3).to(dtype)
    target = torch.randint(shape[1], (logits.numel() // shape[1],), device="cuda")
    if target.numel() > 1:  # the only row must be looked at
        target[0] = check.NOT_A_ROW
    weight = torch.rand(shape[1], dtype=check.real(dtype), device="cuda") + 0.5
    check.cross_entropy(k, logits, target, weight)
    check.cross_entropy(k, logits, target, weight, smoothing=0.1)
    check.cross_entropy(k, logits, target, weight, one_visit=True)
    check.nll_loss(k, logits, target, weight)
    check.cross_entropy(k, logits, target, inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(k: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, device="cuda").mul(3).to(dtype)
    q = torch.softmax(torch.randn(shape, device="cuda"), 1).to(dtype)
    check.soft_cross_entropy(k, logits, q, torch.rand(shape[1], dtype=check.real(dtype), device="cuda") + 0.5, 0.1)
    indices = torch.randint(shape[1], (logits.numel() // shape[1], 5), device="cuda")
    check.sparse_soft_cross_entropy(k, logits, indices, torch.rand(indices.shape, dtype=check.real(dtype), device="cuda"))
    check.softmax(k, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise(k: Any, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 40, 1000, device="cuda") * 8).to(dtype)
    w = torch.rand(1, 40, 1, dtype=check.real(dtype), device="cuda").expand(x.shape)
    check.bce_with_logits(k, x, torch.rand_like(x), w, w + 1)
    check.binary_cross_entropy(k, torch.sigmoid(x / 4), torch.rand_like(x), w)
    check.tails(k, "cuda")
    for size in (5, 100001, 2**21):
        values = torch.randn(size, dtype=check.real(dtype), device="cuda")
        check.sum_rows(k, values)
        check.mean_of_rows(k, values, torch.rand_like(values))


@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_mixed_dtypes(k: Any, dtype: torch.dtype, other: torch.dtype) -> None:
    """Targets, weights and results of another dtype than the logits."""
    for shape in SHAPES:
        logits = torch.randn(shape, device="cuda").mul(3).to(dtype)
        q = torch.softmax(torch.randn(shape, device="cuda"), 1).to(other)
        check.soft_cross_entropy(k, logits, q, torch.rand(shape[1], device="cuda") + 0.5, 0.1)
        check.softmax(k, logits, other)
    x, y = (torch.randn(3, 40, 1000, device="cuda") * 8).to(dtype), torch.rand(3, 40, 1000, device="cuda").to(other)
    w = torch.rand(3, 40, 1000, device="cuda").to(dtype)
    check.bce_with_logits(k, x, y, w, w[:1, :, :1].expand(x.shape), other)
    check.binary_cross_entropy(k, torch.sigmoid(x / 4), y, w)
    check.sigmoid_focal_loss(k, x, y, alpha=0.25, gamma=2.0)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_softmax_under_autocast_is_float32(function: str, dtype: torch.dtype | None) -> None:
    """On CUDA alone: on CPU autocast leaves it in half precision."""
    x, d = torch.randn(300, 1000, device="cuda").bfloat16(), torch.randn(300, 1000, device="cuda")
    found = []
    for module in (fastloss, torch.nn.functional):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            result = getattr(module, function)(leaf, dim=1, dtype=dtype)
        result.backward(d)
        found.append((result.detach(), leaf.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_same_bits_on_every_run(k: Any) -> None:
    logits, target = torch.randn(64, 50257, device="cuda"), torch.randint(50257, (64,), device="cuda")
    weight, runs = torch.ones(1, device="cuda").expand(50257), []
    for _ in range(3):
        loss, row_weight, top, total = (check.poisoned_rows(logits) for _ in range(4))
        k.cross_entropy_forward(logits, target, weight, -100, loss, Rows(row_weight, None, top, total))
        runs.append(torch.stack([loss, row_weight, top, total]))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_more_than_2_to_the_31_logits(k: Any) -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    rows, classes = 17000, 128256
    logits = torch.randn(1, classes, device="cuda", dtype=torch.bfloat16).expand(rows, classes).contiguous()
    target = torch.full((rows,), classes - 1, device="cuda")
    loss, row_weight, top, total = (check.poisoned_rows(logits) for _ in range(4))
    numbers = Rows(row_weight, None, top, total)
    k.cross_entropy_forward(logits, target, torch.ones(1, device="cuda").expand(classes), -100, loss, numbers)
    assert (loss == loss[0]).all()
    assert loss[0].isfinite()
    k.cross_entropy_backward(logits, target, -100, numbers, torch.ones(1, device="cuda").expand(rows), logits)
    assert torch.equal(logits[0], logits[-1])
    assert logits[-1, -1] < 0


def test_in_a_cuda_graph(k: Any) -> None:
    logits, target = torch.randn(64, 5001, device="cuda"), torch.randint(5001, (64,), device="cuda")
    loss, row_weight, top, total = (check.poisoned_rows(logits) for _ in range(4))
    weight, numbers = torch.ones(1, device="cuda").expand(5001), Rows(row_weight, None, top, total)
    k.cross_entropy_forward(logits, target, weight, -100, loss, numbers)
    eager = loss.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        k.cross_entropy_forward(logits, target, weight, -100, loss, numbers)
    loss.fill_(float("nan"))
    graph.replay()
    assert torch.equal(loss, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_loss(k: Any, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 40, 1000, device="cuda") * 8).to(dtype)
    check.sigmoid_focal_loss(k, x, torch.rand_like(x), alpha=0.25, gamma=2.0)


def test_every_function_through_the_public_api() -> None:
    for call, error, allowed in self_checks.errors("cuda"):
        assert error <= allowed, call


def forget_ones() -> None:
    rows._one.cache_clear()
    rows._ones.cache_clear()


def step(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = fastloss.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def test_on_a_stream_that_is_not_the_default(unwatched: None) -> None:
    """What the call allocates, and a one that it keeps, belong to the stream of the call."""
    forget_ones()
    logits, target = torch.randn(2048, 5001, device="cuda", requires_grad=True), torch.randint(5001, (2048,), device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(step(logits, target))
    torch.cuda.synchronize()
    loss, gradient = step(logits, target)
    for mine, slope in found:
        assert torch.equal(mine, loss)
        assert torch.equal(slope, gradient)


@pytest.mark.parametrize("warm", [True, False], ids=["called before", "first call in the capture"])
def test_a_step_of_the_public_api_in_a_cuda_graph(unwatched: None, warm: bool) -> None:
    """Forward and backward; what the capture keeps for later calls must not be something that only a replay fills."""
    logits, target = torch.randn(64, 5001, device="cuda", requires_grad=True), torch.randint(5001, (64,), device="cuda")
    step(logits, target)  # compiles
    if not warm:
        forget_ones()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step(logits, target)
    expected = step(logits, target)  # before any replay
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.double(), target).float())


@pytest.mark.parametrize("function", ["cross_entropy", "binary_cross_entropy_with_logits", "softmax"])
def test_compiled_by_torch(function: str) -> None:
    logits = torch.randn(512, 1000, device="cuda", requires_grad=True)
    others = {"cross_entropy": (torch.randint(1000, (512,), device="cuda"),), "softmax": (1,)}.get(function, (torch.rand_like(logits),))
    call = getattr(fastloss, function)

    def value(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = call(x * 2, *others)
        return found.square().sum()

    found = torch.autograd.grad(torch.compile(value, fullgraph=True)(logits), logits)
    torch.testing.assert_close(found, torch.autograd.grad(value(logits), logits))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one(k: Any) -> None:
    logits, target = torch.randn(8, 5001, device="cuda:1"), torch.randint(5001, (8,), device="cuda:1")
    check.cross_entropy(k, logits, target)
    assert torch.cuda.current_device() == 0
