"""Rows whose largest logit lies far above the first ones of its block, which the terms of that block are relative to.

Where it is not too far, terms above 1 are summed; else the block is gone over again. None of it may show.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import DTYPES, check, kernel_call
from torch import Tensor

import fastloss

# 128 vectors a block, of which the first eight say what the terms are relative to: two whole blocks, and a part of one
CLASSES = {"float32": 4500, "bfloat16": 4500, "float64": 2300}
HEIGHTS = (3.0, 20.0, 23.99, 24.0, 24.01, 30.0, 70.0, 100.0, 300.0, 1e4)


def spiked(dtype: str) -> Iterator[tuple[int, Tensor]]:
    """Rows with their top here and there, one row for each height, then rows whose blocks begin with what counts for nothing."""
    classes = CLASSES[dtype]
    block = 1024 if dtype == "float64" else 2048
    for place in (0, block // 16 - 1, block // 16, block - 1, block, block + block // 2, 2 * block, classes - 1):
        logits = torch.randn(len(HEIGHTS), classes, generator=torch.Generator().manual_seed(place), device="cpu")
        logits[:, place] = logits.amax(1) + torch.tensor(HEIGHTS)
        yield place, logits.to(DTYPES[dtype])
    for fill in (-math.inf, torch.finfo(DTYPES[dtype]).min, -1e4, -60.0):
        logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(1), device="cpu").to(DTYPES[dtype])
        logits[0, :block] = logits[1, block : block + block // 16] = logits[2, : block // 2] = logits[3] = fill
        logits[3, block + 700] = 1
        yield block + 700, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.long)])
def test_a_top_may_lie_as_far_above_as_it_likes(dtype: str) -> None:
    for place, logits in spiked(dtype):
        rows, classes = logits.shape
        for target in (torch.full((rows,), place), torch.randint(classes, (rows,))):
            finite = logits.gather(1, target[:, None]) > -1e4
            target[~finite[:, 0]] = -100  # an infinite loss says nothing
            check("cross_entropy", {"input": logits, "target": target}, reduction="none", ulps=8)
        check("softmax", {"input": logits}, dim=1, scale=4.0)
        check("log_softmax", {"input": logits}, dim=1, ulps=8)
        if (logits > -1e5).all():  # else torch's sum of all losses overflows
            weight = torch.rand(classes).to(logits.dtype)
            check("cross_entropy", {"input": logits, "target": target, "weight": weight}, reduction="none", label_smoothing=0.1, ulps=8)
            soft = torch.softmax(torch.randn(rows, classes), 1).to(logits.dtype)
            check("cross_entropy", {"input": logits, "target": soft}, reduction="none", ulps=8)


@pytest.mark.parametrize("dtype", CLASSES)
def test_whoever_makes_a_gradient_goes_over_a_block_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One visit, a forward and a backward, and a backward that hands out blocks one by one: the same bits."""
    for place, logits in spiked(dtype):
        if not logits.isfinite().all():
            continue
        target = torch.full((logits.shape[0],), place)
        found = []
        for limit in (1 << 30, 0):
            monkeypatch.setattr(fastloss.config, "foresight_max_bytes", limit)
            for _ in range(4):
                leaf = logits.clone().requires_grad_()
                kernel_call("cross_entropy", leaf, target).backward()
            found.append(leaf.grad)
        assert torch.equal(*found), place
        alone = [logits[row : row + 1].clone().requires_grad_() for row in range(len(logits))]
        for row, leaf in enumerate(alone):
            kernel_call("cross_entropy", leaf, target[row : row + 1], reduction="sum").backward()
        together = logits.clone().requires_grad_()
        kernel_call("cross_entropy", together, target, reduction="sum").backward()
        assert torch.equal(torch.cat([leaf.grad for leaf in alone]), together.grad), place


def test_a_row_too_long_to_be_kept_is_gone_over_again() -> None:
    """A term lost, or twice as large, would be seen by the sum of the probabilities."""
    logits = torch.randn(3, 300_000)
    logits[0, 123_456] = 40
    logits[1, 2048 * 70 : 2048 * 70 + 128] = -1e5
    logits[2, 299_999] = 90
    target = torch.tensor([123_456, 7, 299_998])
    check("cross_entropy", {"input": logits, "target": target}, reduction="none")
    check("softmax", {"input": logits}, dim=1, scale=4.0)
    for scale in (1.0, 0.5):
        check("cross_entropy", {"input": logits, "target": torch.softmax(logits * scale, 1)}, reduction="none", ulps=8)


@pytest.mark.parametrize("dtype", CLASSES)
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_what_is_no_number_is_met_wherever_it_lies(odd: float, dtype: str) -> None:
    for place in (0, 500, 2047, 2048, 2290):
        logits = torch.randn(2, CLASSES[dtype]).to(DTYPES[dtype])
        logits[0, place] = odd
        check("cross_entropy", {"input": logits, "target": torch.tensor([3, 4])}, reduction="none")
        check("softmax", {"input": logits}, dim=1, scale=4.0)


def test_a_sure_and_right_prediction_has_no_negative_loss() -> None:
    for height in HEIGHTS:
        logits = torch.randn(8, 5000)
        logits[:, 3000] += height + 5
        loss = kernel_call("cross_entropy", logits, torch.full((8,), 3000), reduction="none")
        assert (loss >= 0).all(), height
