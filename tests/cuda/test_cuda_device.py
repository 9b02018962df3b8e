"""The same checks on a real GPU: everything the interpreter cannot know. Skipped, with the reason, where there is none."""

from typing import Any

import pytest
import torch

from fastloss.kernels.groups import Rows

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed")

import kernel_checks as check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 1), (70, 2), (1000, 10), (64, 300), (1, 50257), (2, 128256), (700, 5001), (300, 50257), (2, 7, 5), (4, 19, 1024)]


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
    target[0] = check.NOT_A_ROW
    weight = torch.rand(shape[1], dtype=check.real(dtype), device="cuda") + 0.5
    check.cross_entropy(k, logits, target, weight)
    check.cross_entropy(k, logits, target, weight, smoothing=0.1)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one(k: Any) -> None:
    logits, target = torch.randn(8, 5001, device="cuda:1"), torch.randint(5001, (8,), device="cuda:1")
    check.cross_entropy(k, logits, target)
    assert torch.cuda.current_device() == 0
