"""Programs that users of other projects reported as broken: a step of training each, on our kernels against torch and float64.

Small with every call forced on the kernels, and of a real size at the default settings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse, kernel_call
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fastloss

DEFAULT = fastloss.config.min_numel  # as imported: for a test, conftest makes it 0
INF = float("inf")


class OnKernels:
    """fastloss's functions, each call with the proof that the kernels served it."""

    def __getattr__(self, function: str) -> Callable[..., Tensor]:
        return partial(kernel_call, function)


def small_and_real(*small: Any, real: Any) -> pytest.MarkDecorator:
    """Shapes for forced kernels, and one for the default settings."""
    forced = [pytest.param(0, shape, id=str(shape)) for shape in small]
    return pytest.mark.parametrize(("limit", "shape"), [*forced, pytest.param(DEFAULT, real, id="defaults")], indirect=["limit"])


@pytest.fixture
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fastloss.config, "min_numel", request.param)
    return int(request.param)


def compare(step: Callable[..., dict[str, Tensor]], *arguments: Any) -> None:
    """`step(api, dtype, *arguments)` in float32, and in float64 for the truth."""
    truth, theirs = (step(F, dtype, *arguments) for dtype in (torch.float64, torch.float32))
    for name, mine in step(OnKernels(), torch.float32, *arguments).items():
        assert_no_worse(mine, theirs[name], truth[name], f"{step.__name__}: {name}", ulps=16)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def attention(api: Any, dtype: torch.dtype, length: int, function: str) -> dict[str, Tensor]:
    query, key = torch.randn(2, 2, length, 16, generator=rng()).to(dtype)
    scores = query.requires_grad_() @ key.transpose(1, 2) / 4
    memory = StorageWeakRef(scores.untyped_storage())
    prob = getattr(api, function)(scores, dim=-1)
    del scores
    assert memory.expired(), f"{function} of {api} keeps its input"
    prob.square().sum().backward()
    return {"gradient": query.grad}


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@small_and_real(48, real=700)
def test_attention_frees_its_scores(limit: int, shape: int, function: str) -> None:
    """The backward needs the probabilities only; the scores are the largest tensor there is (pytorch #49600, #72450)."""
    compare(attention, shape, function)


EDITED: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda api, x, y, q: api.cross_entropy(x, y),
    "cross_entropy none": lambda api, x, y, q: api.cross_entropy(x, y, reduction="none").mean(),
    "cross_entropy smoothed": lambda api, x, y, q: api.cross_entropy(x, y, label_smoothing=0.1),
    "cross_entropy probabilities": lambda api, x, y, q: api.cross_entropy(x, q),
    "log_softmax": lambda api, x, y, q: -(q * api.log_softmax(x, dim=-1)).sum(-1).mean(),
    "softmax": lambda api, x, y, q: (q - api.softmax(x, dim=-1)).square().sum(-1).mean(),
}


@pytest.mark.parametrize("loss", EDITED)
@small_and_real((4, 6), real=(900, 1000))
def test_logits_edited_after_the_loss(limit: int, shape: tuple[int, int], loss: str) -> None:
    """Accuracy among the classes seen so far, by masking the logits in place (pytorch #9391). torch never needs them again. Nor do our
    softmax and log_softmax; our cross_entropy does and may say so (docs: differences), but its gradient is never that of the mask."""
    rows, classes = shape

    def step(api: Any, dtype: torch.dtype) -> Tensor:
        features, y = torch.randn(rows, 6, generator=rng()).to(dtype), torch.randint(classes // 2, (rows,), generator=rng())
        q = torch.rand(shape, generator=rng()).softmax(-1).to(dtype)
        weight = torch.randn(classes, 6, generator=rng()).to(dtype).requires_grad_()
        logits = features @ weight.T
        value = EDITED[loss](api, logits, y, q)
        with torch.no_grad():
            logits[:, classes // 2 :] = -INF
        value.backward()
        return weight.grad

    try:
        mine = step(OnKernels(), torch.float32)
    except RuntimeError as error:
        if "cross_entropy" not in loss or "modified by an inplace operation" not in str(error):
            raise
        return
    assert_no_worse(mine, step(F, torch.float32), step(F, torch.float64), loss, ulps=16)


def grpo(api: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Padded vocabulary sliced off, temperature, tokens banned by -inf, entropy bonus, clipped ratio, k3 penalty, masked mean."""
    batch, length, vocab, pad = shape
    g = rng()
    raw = 3 * torch.randn(batch, length, vocab + pad, generator=g)
    banned = torch.rand(vocab, generator=g) < 0.3
    banned[::2] = False
    tokens = torch.randint(vocab // 2, (batch, length), generator=g) * 2
    mask = torch.arange(length) < torch.randint(1, length, (batch, 1), generator=g)
    exact = F.log_softmax((raw[..., :vocab].double() / 0.7).masked_fill(banned, -INF), -1).gather(2, tokens[..., None])[..., 0]
    old, ref = (exact + torch.randn(2, batch, length, generator=g).double() * 0.2).to(dtype)
    advantage = torch.randn(batch, 1, generator=g).to(dtype)

    logits = raw.to(dtype).requires_grad_()
    x = (logits[..., :vocab] / 0.7).masked_fill(banned, -INF)
    logp = -api.cross_entropy(x.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    entropy = -(api.softmax(x, dim=-1) * api.log_softmax(x, dim=-1).masked_fill(banned, 0)).sum(-1)
    ratio, delta = (logp - old).exp(), ref - logp
    gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    objective = ((-gain + 0.04 * (delta.exp() - delta - 1) - 0.01 * entropy) * mask).sum() / mask.sum()
    objective.backward()
    assert logits.grad.isfinite().all()
    return {"objective": objective.detach(), "gradient": logits.grad}


@small_and_real((2, 5, 30, 2), (2, 5, 301, 19), real=(2, 60, 8001, 191))
def test_a_grpo_step_with_banned_tokens(limit: int, shape: tuple[int, ...]) -> None:
    """Entropy or its gradient turned NaN where a token is banned (trl #7221, #7251)."""
    compare(grpo, shape)


DISTILLATIONS: dict[str, Callable[..., Tensor]] = {
    "mended": lambda api, x, q, mask: -((q * api.log_softmax(x, dim=-1)).masked_fill(x.isinf(), 0).sum(-1) * mask).sum() / mask.sum(),
    "kl_div": lambda api, x, q, mask: F.kl_div(api.log_softmax(x, dim=-1)[:, ~x[0].isinf()], q[:, ~x[0].isinf()], reduction="batchmean"),
    "probabilities": lambda api, x, q, mask: api.cross_entropy(x, q),
    "smoothed": lambda api, x, q, mask: api.cross_entropy(x, q, label_smoothing=0.1, reduction="none")[mask.bool()].sum(),
}


def distillation(api: Any, dtype: torch.dtype, shape: tuple[int, int], loss: str) -> dict[str, Tensor]:
    """Temperature 4, the same range of the vocabulary banned for student and teacher, every other token masked."""
    student, teacher = 3 * torch.randn(2, *shape, generator=rng())
    student[:, shape[1] // 3 : shape[1] // 2] = teacher[:, shape[1] // 3 : shape[1] // 2] = -INF
    logits, mask = student.to(dtype).requires_grad_(), (torch.arange(shape[0]) % 2).to(dtype)
    with torch.inference_mode():
        q = api.softmax(teacher.to(dtype) / 4, dim=-1)
    value = DISTILLATIONS[loss](api, logits / 4, q.clone(), mask) * 16
    value.backward()
    return {"loss": value.detach(), "gradient": logits.grad}


@pytest.mark.parametrize("loss", DISTILLATIONS)
@small_and_real((4, 12), (40, 12), (4, 2100), real=(120, 8003))
def test_distillation_with_a_masked_vocabulary(limit: int, shape: tuple[int, int], loss: str) -> None:
    """NaN where student logits are -inf, then a NaN gradient after the loss was mended (LMOps #38, trl #5594)."""
    compare(distillation, shape, loss)


def clip(api: Any, image: Tensor, text: Tensor, scale: Tensor) -> Any:
    logits, label = scale.exp() * image @ text.T, torch.arange(len(image))
    return (api.cross_entropy(logits, label) + api.cross_entropy(logits.T, label)) / 2


def simclr(api: Any, image: Tensor, text: Tensor, scale: Tensor) -> Any:
    both = torch.cat([image, text])
    logits = scale.exp() * both @ both.T
    logits.fill_diagonal_(-INF)
    return api.cross_entropy(logits, torch.arange(len(both)).roll(len(image)), reduction="sum") / len(both)


def soft_clip(api: Any, image: Tensor, text: Tensor, scale: Tensor) -> Any:
    logits = scale.exp() * text @ image.T
    target = api.softmax((image @ image.T + text @ text.T) / 2 * scale.exp(), dim=-1)
    both = api.cross_entropy(logits, target, reduction="none") + api.cross_entropy(logits.T, target.T, reduction="none")
    return both.mean() / 2


def contrast(api: Any, dtype: torch.dtype, pairs: int, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Features on a sphere and a learned scale."""
    unit = F.normalize(torch.randn(2, pairs, 24, generator=rng()), dim=2).to(dtype)
    image, text = (features.clone().requires_grad_() for features in unit)
    scale = torch.tensor(2.6592, dtype=dtype, requires_grad=True)
    value = loss(api, image, text, scale)
    value.backward()
    return {"loss": value.detach(), **{f"d{name}": leaf.grad for name, leaf in {"image": image, "text": text, "scale": scale}.items()}}


@pytest.mark.parametrize("loss", [clip, simclr, soft_clip])
@small_and_real(3, 20, 70, real=1000)
def test_contrast_by_rows_and_by_columns(limit: int, shape: int, loss: Callable[..., Tensor]) -> None:
    """A matrix and its transpose, also as targets that want a gradient (DALLE-pytorch #32, OpenAI-CLIP #16)."""
    compare(contrast, shape, loss)


def focal(api: Any, x: Tensor, y: Tensor) -> Any:
    p = torch.sigmoid(x)
    loss = api.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss *= 0.25 * y + 0.75 * (1 - y)  # in place, on the output itself
    return (loss * (1 - (p * y + (1 - p) * (1 - y))) ** 2).sum()


def weighted(api: Any, x: Tensor, y: Tensor, valid: Tensor) -> Any:
    p = torch.sigmoid(x.detach())
    factor = (1 - (p * y + (1 - p) * (1 - y))) ** 2 * (0.25 * y + 0.75 * (1 - y)) * valid[..., None]
    return api.binary_cross_entropy_with_logits(x, y, weight=factor, reduction="sum")


def pos_weighted(api: Any, x: Tensor, y: Tensor, valid: Tensor) -> Any:
    pos_weight = torch.linspace(1, 30, x.shape[-1], dtype=x.dtype)
    per_class = api.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight, reduction="none")
    return (per_class * valid[..., None]).flatten(1).sum(1).mean()


DETECTORS: dict[str, Callable[..., Tensor]] = {
    "indexed": lambda api, x, y, valid: focal(api, x[valid], y[valid]),
    "weighted": weighted,
    "pos_weight": pos_weighted,
}


def detector(api: Any, dtype: torch.dtype, shape: tuple[int, ...], spread: float, loss: str) -> dict[str, Tensor]:
    """A convolution's output as anchors, those of label -1 left out, divided by a running number of positives."""
    images, anchors, classes, size, labelled = shape
    g = rng()
    head = (torch.randn(images, anchors * classes, size, size, generator=g) * spread - 4.6).to(dtype).requires_grad_()
    flat = head.view(images, anchors, classes, size, size).permute(0, 3, 4, 1, 2).reshape(images, -1, classes)
    label = torch.randint(-1, classes + 1, flat.shape[:2], generator=g)
    label[torch.rand(label.shape, generator=g) < 0.7] = classes  # background
    if not labelled:
        label.fill_(-1)
    valid, positive = label >= 0, (label >= 0) & (label != classes)
    y = F.one_hot(label.clamp(min=0), classes + 1)[..., :-1].to(dtype)
    value = DETECTORS[loss](api, flat, y, valid) / (90 + 0.1 * max(int(positive.sum()), 1))
    value.backward()
    return {"loss": value.detach(), "gradient": head.grad}


@pytest.mark.parametrize("loss", DETECTORS)
@pytest.mark.parametrize("spread", [1, 40])
@small_and_real((2, 3, 4, 5, 1), (2, 3, 4, 5, 0), (1, 3, 80, 3, 1), real=(2, 9, 20, 32, 1))
def test_the_focal_loss_of_a_detector(limit: int, shape: tuple[int, ...], spread: float, loss: str) -> None:
    """BCE 'none' times a factor, in place; without an anchor 0 (detectron2 #703, pytorch-retinanet #49)."""
    compare(detector, shape, spread, loss)


AMP: dict[str, Callable[..., Tensor]] = {
    "plain": lambda api, x, y, q, w, n: api.cross_entropy(x, y, ignore_index=-1, reduction="sum") / n,
    "class weights": lambda api, x, y, q, w, n: api.cross_entropy(x, y, weight=w, ignore_index=-1, reduction="sum") / n,
    "mixup": lambda api, x, y, q, w, n: api.cross_entropy(x, q, label_smoothing=0.1) / 2,
    "multi-label": lambda api, x, y, q, w, n: api.binary_cross_entropy_with_logits(x, q, pos_weight=w) / 2,
}


def amp_training(api: Any, rows: int, classes: int, loss: str) -> tuple[list[torch.dtype], Tensor, Tensor]:
    """Four steps of two micro-batches in bfloat16, the third of infinities: dtypes, numbers and the last weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, classes)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    weight, dtypes, numbers = torch.linspace(0.5, 2, classes), [], []
    for step in range(4):
        batches = [(torch.randn(n, 16), torch.randint(-1, classes, (n,))) for n in (rows, rows // 2)]
        items = sum(int((y >= 0).sum()) for _, y in batches)
        for features, y in batches:
            one_hot = F.one_hot(y.clamp(min=0), classes).float()
            with torch.autocast("cpu", torch.bfloat16):
                logits = layer(features * (INF if step == 2 else 1))
                value = AMP[loss](api, logits, y, one_hot * 0.7 + one_hot.flip(0) * 0.3, weight, items)
            scaler.scale(value).backward()
            dtypes.append(value.dtype)
            numbers.append(value.detach())
        scaler.unscale_(optimizer)
        numbers.append(torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        numbers.append(torch.tensor(scaler.get_scale()))
    return dtypes, torch.stack(numbers), layer.weight.detach()


@pytest.mark.filterwarnings("ignore:.*non-finite norm")
@pytest.mark.parametrize("loss", AMP)
@small_and_real((12, 7), (40, 300), real=(900, 1000))
def test_mixed_precision_with_float32_weights_and_targets(limit: int, shape: tuple[int, int], loss: str) -> None:
    """Which dtypes may meet, and which steps are skipped (apex #837, pytorch #101213); to bfloat16's rounding of the gradient."""
    (dtypes, numbers, weight), (expected_dtypes, expected_numbers, expected_weight) = (
        amp_training(api, *shape, loss) for api in (fastloss, F)
    )
    assert dtypes == expected_dtypes
    torch.testing.assert_close(numbers, expected_numbers, rtol=2e-2, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(weight, expected_weight, rtol=2e-2, atol=5e-3)
