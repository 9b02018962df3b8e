"""token_statistics compiled for GPUs that are not here, see test_cuda_compiled; and on one, where there is one."""

import re
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its compiler cannot compile the CUDA kernels")

import kernel_checks as check
from test_cuda_compiled import untouched
from token_statistics_checks import ALL, IGNORED, token_statistics
from triton_compiler import compiling

import fastloss.kernels.cuda as k
from fastloss.kernels.groups import Answers, Rows, Slope


def launch(dtype: torch.dtype, shape: tuple[int, ...], per_row: int = 1, wanted: Sequence[str] = ALL) -> None:
    """Both directions, on memory that nothing writes to."""
    real, rows = check.real(dtype), shape[0] * (shape[2] if len(shape) == 3 else 1)
    x, n, target = untouched(*shape, dtype=dtype), torch.empty(rows, dtype=real), torch.empty(rows, per_row, dtype=torch.int64)
    made = Answers(torch.empty(rows, per_row, dtype=real), n, n, n, torch.empty(rows, dtype=torch.int64))
    answers = Answers(*(answer if name in wanted else answer[:0] for name, answer in zip(ALL, made, strict=True)))
    beta, gamma = (n if name in wanted else n[:0] for name in ("entropy", "sum_sq_prob"))
    k.token_statistics_forward(x, target, IGNORED, 0.7, answers, Rows(None, None, n, n))
    k.token_statistics_backward(x, target, IGNORED, 0.7, Rows(None, None, n, n), Slope(n, beta, gamma), answers.log_prob, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("target", "classes"), [("sm_90", 128256), *(pytest.param(target, 50257, marks=pytest.mark.long) for target in ("sm_80", "sm_100"))]
)
@pytest.mark.parametrize("wanted", [("log_prob", "entropy", "lse"), ALL], ids=["usual", "all"])
def test_hot_loops_on_nvidia(wanted: Sequence[str], target: str, classes: int, dtype: torch.dtype) -> None:
    """Vectors of 128 bits only, but for the one target; no barrier, no spill."""
    with compiling(target) as launches:
        launch(dtype, (1000, classes), wanted=wanted)
    assert [one.name for one in launches] == ["_token_statistics_forward_rows", "_token_statistics_backward_rows"]
    for one in launches:
        assert one.registers_spilled == 0, one.name
        loop = next(loop for loop in one.loops() if "ld.global" in loop)  # another one, if any, looks again at odd rows
        loads = {"ld.global.v4.b32"} | ({"ld.global.b64"} if "backward" in one.name else set())
        assert set(re.findall(r"ld\.global[\w.:]*", loop)) == loads
        assert not re.search(r"\bbar\.|barrier|shfl|\.shared", loop), one.name
        if "backward" in one.name:
            assert set(re.findall(r"st\.global[\w.:]*", loop)) == {"st.global.v4.b32"}


@pytest.mark.parametrize(
    ("target", "dtype", "shape"),
    [("sm_80", torch.bfloat16, (1000, 10)), ("sm_80", torch.bfloat16, (8, 1000, 256)), ("sm_90", torch.float32, (1000, 1000)),
     ("sm_80", torch.float64, (300, 4096)), ("sm_100", torch.float32, (2, 128256)), ("gfx942", torch.bfloat16, (300, 4096)),
     ("gfx942", torch.float32, (8, 1000, 256))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("per_row", [1, pytest.param(64, marks=pytest.mark.long)])
def test_compiles_without_spills(per_row: int, target: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with compiling(target) as launches:
        launch(dtype, shape, per_row)
    for one in launches:
        assert one.registers_spilled == 0, one.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (1000, 10), (64, 300), (2, 128256), (700, 5001), (300, 50257), (4, 19, 1024)], ids=str)
def test_on_the_device(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, device="cuda").mul(3).to(dtype)
    for per_row in (0, 1, 5):
        target = torch.randint(shape[1], (logits.numel() // shape[1], per_row), device="cuda")
        target[:1] = IGNORED
        token_statistics(k, logits, target, scale=0.7)
