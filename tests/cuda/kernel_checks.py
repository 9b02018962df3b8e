"""What every launcher must compute, against float64 formulas in plain torch that share no code with the kernels.

Each check takes the kernel package `k`, makes random upstream gradients, poisons every output with NaN in a larger buffer, launches,
and compares. They run on any device: in the interpreter, on a GPU, and on deliberately broken copies of the package.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.kernels.groups import Focus, Rows, Smoothing

COUNT = 3  # that sums over elements are divided by
MARGIN = 64  # poisoned elements on both sides of an output
# |error| <= RELATIVE |truth| + ABSOLUTE * the largest number that entered it
RELATIVE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ABSOLUTE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
NOT_A_ROW = -100


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


SHAPES = {  # each with a layout
    "one class": ((3, 1), "contiguous"),
    "two classes": ((70, 2), "contiguous"),
    "few classes": ((5, 10), "contiguous"),
    "middling": ((5, 300), "contiguous"),
    "one long row": ((1, 5001), "contiguous"),
    "long rows, not a multiple of anything": ((3, 4099), "contiguous"),
    "long rows, aligned": ((2, 8192), "contiguous"),
    "just long": ((3, 1024), "contiguous"),
    "padded rows": ((3, 4101), "padded7"),
    "padded few": ((6, 11), "padded2"),
    "stored as [C, N]": ((37, 21), "classes last"),
    "images": ((2, 7, 5), "contiguous"),
    "images, channels last": ((2, 19, 6), "classes last"),
    "long images, channels last": ((2, 1500, 3), "classes last"),
    "shifted tokens": ((2, 1031, 3), "shifted"),
    "shifted few": ((3, 12, 4), "shifted"),
    "every other class": ((4, 1100), "every other class"),
    "no rows": ((0, 10), "contiguous"),
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is NaN."""
    if layout == "contiguous":
        return values.contiguous()
    if layout.startswith("padded"):  # "padded3": three more classes after each row
        shape = list(values.shape)
        shape[1] += int(layout.removeprefix("padded"))
        wide = torch.full(shape, float("nan"), dtype=values.dtype, device=values.device)
        wide[:, : values.shape[1]] = values
        return wide[:, : values.shape[1]]
    if layout == "classes last":  # [B, C, P] stored as [B, P, C]; [N, C] stored as [C, N]
        return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() == 3 else values.t().contiguous().t()
    if layout == "shifted":  # what logits[:, :-1].transpose(1, 2) makes of [B, P + 1, C]
        b, c, p = values.shape
        longer = torch.full((b, p + 1, c), float("nan"), dtype=values.dtype, device=values.device)
        longer[:, :-1] = values.movedim(1, -1)
        return longer[:, :-1].transpose(1, 2)
    if layout == "every other class":
        b, c, *rest = values.shape
        wide = torch.full((b, 2 * c, *rest), float("nan"), dtype=values.dtype, device=values.device)
        wide[:, ::2] = values
        return wide[:, ::2]
    raise ValueError(layout)


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output shaped like `like`, contiguous, NaN inside and for MARGIN elements around."""
    whole = torch.full((like.numel() + 2 * MARGIN,), float("nan"), dtype=dtype or like.dtype, device=like.device)
    return whole[MARGIN : MARGIN + like.numel()].view(like.shape)


def poisoned_rows(logits: Tensor) -> Tensor:
    return poisoned(logits.new_empty(logits.numel() // logits.shape[1]), real(logits.dtype))


def assert_inside(*outputs: Tensor) -> None:
    for out in outputs:
        whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        if whole.numel() == out.numel() + 2 * MARGIN:
            assert torch.cat([whole[:MARGIN], whole[-MARGIN:]]).isnan().all(), "written outside the output"


def assert_close(got: Tensor, want: Tensor, scale: float = 1.0, what: str = "") -> None:
    got64, dtype = got.double(), got.dtype
    assert_inside(got) if got.is_contiguous() else None
    assert torch.equal(got64.isnan(), want.isnan()), f"{what}: NaN where there should be none, or none where there should be"
    infinite = want.isinf()
    assert torch.equal(got64[infinite], want[infinite]), f"{what}: infinities differ"
    denormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    limit = RELATIVE[dtype] * want.abs() + ABSOLUTE[dtype] * scale + denormal
    worst = ((got64 - want).abs() - limit)[~infinite & ~want.isnan()]
    assert worst.numel() == 0 or worst.max() <= 0, f"{what}: error beyond the limit by {worst.max():.3g}"


def by_row(x: Tensor) -> Tensor:
    """[N, C] or [B, C, P] in float64 as [rows, C]."""
    return x.double().movedim(1, -1).reshape(-1, x.shape[1])


def like_logits(rows: Tensor, logits: Tensor) -> Tensor:
    """[rows, C] back in the shape of the logits."""
    if logits.dim() == 2:
        return rows
    return rows.view(logits.shape[0], logits.shape[2], logits.shape[1]).movedim(-1, 1)


def random_rows(logits: Tensor) -> Tensor:
    return torch.randn_like(poisoned_rows(logits))


class Truth:
    """Everything about rows of logits with factors k [rows, C], in float64."""

    def __init__(self, logits: Tensor, k: Tensor) -> None:
        x = by_row(logits)
        self.log_p = torch.log_softmax(x, 1)
        self.top, self.p, self.k, self.mass = x.amax(1), self.log_p.exp(), k, k.sum(1)
        self.log_total = -(self.log_p.gather(1, x.argmax(1, keepdim=True))[:, 0])
        self.loss = torch.where(k == 0, 0.0, -k * self.log_p).sum(1)

    def gradient(self, dloss: Tensor) -> Tensor:
        return dloss.double()[:, None] * (self.mass[:, None] * self.p - self.k)


def assert_same(separately: Sequence[Tensor], together: Sequence[Tensor]) -> None:
    """One launch gives the bits of two."""
    for a, b in zip(separately, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def cross_entropy(
    k: Any, logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float | None = None,
    inplace: bool = False, ignore_index: int = NOT_A_ROW, one_visit: bool = False,
) -> None:  # fmt: skip
    """Both directions; with `smoothing` the smoothed launchers. Targets outside [0, C) must make NaN rows."""
    classes, compute, before = logits.shape[1], real(logits.dtype), logits.clone()
    w = torch.ones((), dtype=compute, device=logits.device).expand(classes) if weight is None else weight
    keep, spread = eps = Smoothing(1.0, 0.0) if smoothing is None else Smoothing(1.0 - smoothing, smoothing / classes)
    is_row = target != ignore_index
    out_of_range = is_row & ((target < 0) | (target >= classes))
    y = torch.where(is_row & ~out_of_range, target, 0)
    onehot = torch.nn.functional.one_hot(y, classes).double()
    w64 = w.double()
    factors = onehot * keep * w64[y][:, None] + spread * w64
    truth = Truth(logits, factors)
    dloss = random_rows(logits)
    loss, row_weight, mass, top, total = (poisoned_rows(logits) for _ in range(5))
    rows = Rows(row_weight, mass, top, total)
    dlogits = logits if inplace else laid_out(poisoned(logits), "contiguous")
    if one_visit:
        k.cross_entropy_forward_backward(logits, target, w, ignore_index, dloss, loss, rows, dlogits)
    elif smoothing is None:
        k.cross_entropy_forward(logits, target, w, ignore_index, loss, rows)
        k.cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
    else:
        k.smoothed_cross_entropy_forward(logits, target, w, ignore_index, eps, loss, rows)
        k.smoothed_cross_entropy_backward(logits, target, w, ignore_index, eps, rows, dloss, dlogits)
        assert_close(mass, torch.where(is_row, torch.where(out_of_range, float("nan"), truth.mass), 0.0), what="mass")
        if not inplace:
            again = poisoned_rows(logits), Rows(*(poisoned_rows(logits) for _ in rows)), laid_out(poisoned(logits), "contiguous")
            k.smoothed_cross_entropy_forward_backward(logits, target, w, ignore_index, eps, dloss, *again)
            assert_same((loss, *rows, dlogits), (again[0], *again[1], again[2]))
    if not inplace:
        assert torch.allclose(logits, before, rtol=0, atol=0, equal_nan=True), "logits changed"
    bad = out_of_range | truth.log_total.isnan()
    assert_close(row_weight, torch.where(is_row, torch.where(out_of_range, float("nan"), w64[y]), 0.0), what="row_weight")
    assert_close(loss, torch.where(is_row, torch.where(bad, float("nan"), truth.loss), 0.0), what="loss")
    ordinary = is_row & ~bad
    assert torch.equal(top[ordinary].double(), truth.top[ordinary]), "top"
    assert_close(total[ordinary].log(), truth.log_total[ordinary], what="total")
    assert total[~is_row].isfinite().all()
    assert top[~is_row].isfinite().all()
    want = torch.where(is_row[:, None], torch.where(bad[:, None], float("nan"), truth.gradient(dloss)), 0.0)
    assert_close(by_row(dlogits).to(logits.dtype), want, scale=dloss.abs().max().item(), what="dlogits")
    assert_inside(dlogits) if not inplace else None


def soft_cross_entropy(
    k: Any, logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0, target_too: bool = True
) -> None:
    """Both directions, and the gradient of the target."""
    classes, compute = logits.shape[1], real(logits.dtype)
    w = torch.ones((), dtype=compute, device=logits.device).expand(classes) if weight is None else weight
    keep, spread = eps = Smoothing(1.0 - smoothing, smoothing / classes)
    truth = Truth(logits, w.double() * (keep * by_row(target) + spread))
    dloss = random_rows(logits)
    loss, mass, top, total = (poisoned_rows(logits) for _ in range(4))
    rows = Rows(None, mass, top, total)
    dlogits, dtarget = poisoned(logits), poisoned(logits, target.dtype)
    k.soft_cross_entropy_forward(logits, target, w, eps, loss, rows)
    k.soft_cross_entropy_backward(logits, target, w, eps, rows, dloss, dlogits)
    again = poisoned_rows(logits), Rows(None, *(poisoned_rows(logits) for _ in range(3))), poisoned(logits)
    k.soft_cross_entropy_forward_backward(logits, target, w, eps, dloss, *again)
    assert_same((loss, *rows[1:], dlogits), (again[0], *again[1][1:], again[2]))
    assert_close(loss, truth.loss, what="loss")
    assert_close(mass, truth.mass, what="mass")
    assert_close(total.log(), truth.log_total, what="total")
    scale = dloss.abs().max().item() * max(1.0, truth.mass.abs().max().item())
    assert_close(by_row(dlogits).to(logits.dtype), truth.gradient(dloss), scale=scale, what="dlogits")
    if target_too:
        k.soft_cross_entropy_target_backward(logits, w, keep, rows, dloss, dtarget)
        want = dloss.double()[:, None] * keep * w.double() * -truth.log_p
        assert_close(by_row(dtarget).to(target.dtype), want, scale=scale, what="dtarget")
    assert_inside(dlogits, dtarget)


def sparse_soft_cross_entropy(
    k: Any, logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> None:
    """Both directions, and the gradient of the probabilities. An index outside [0, C) must make a NaN row; a row of nothing but padding
    counts only if something is smoothed."""
    classes, compute = logits.shape[1], real(logits.dtype)
    w = torch.ones((), dtype=compute, device=logits.device).expand(classes) if weight is None else weight
    keep, spread = eps = Smoothing(1.0 - smoothing, smoothing / classes)
    padding = indices == NOT_A_ROW
    out_of_range = ~padding & ((indices < 0) | (indices >= classes))
    y = torch.where(padding | out_of_range, 0, indices)
    of_entries = torch.where(padding, 0.0, torch.where(out_of_range, float("nan"), keep * w.double()[y] * prob.double()))
    zeros = torch.zeros(indices.shape[0], classes, dtype=torch.float64, device=logits.device)
    truth = Truth(logits, zeros.scatter_add(1, y, of_entries) + spread * w.double())
    is_row = ~padding.all(1) if smoothing == 0 else padding.new_ones(indices.shape[0])
    bad = out_of_range.any(1)
    dloss = random_rows(logits)
    loss, row_weight, mass, top, total = (poisoned_rows(logits) for _ in range(5))
    rows, dlogits, dprob = Rows(row_weight, mass, top, total), poisoned(logits), poisoned(indices, compute)
    k.sparse_soft_cross_entropy_forward(logits, indices, prob, w, eps, loss, rows)
    k.sparse_soft_cross_entropy_backward(logits, indices, prob, w, eps, rows, dloss, dlogits)
    again = poisoned_rows(logits), Rows(*(poisoned_rows(logits) for _ in rows)), poisoned(logits)
    k.sparse_soft_cross_entropy_forward_backward(logits, indices, prob, w, eps, dloss, *again)
    assert_same((loss, *rows, dlogits), (again[0], *again[1], again[2]))
    k.sparse_soft_cross_entropy_prob_backward(logits, indices, w, keep, rows, dloss, dprob)

    def of_rows(want: Tensor) -> Tensor:
        """`want`, NaN in rows with an index that is no class, 0 in those that do not count."""
        shape = (-1, *(1,) * (want.dim() - 1))
        return torch.where(is_row.view(shape), torch.where(bad.view(shape), float("nan"), want), 0.0)

    scale = max(1.0, dloss.abs().max().item()) * max(1.0, truth.mass.nan_to_num().abs().max().item())
    assert_close(loss, of_rows(truth.loss), scale=scale, what="loss")
    assert_close(row_weight, of_rows(torch.ones_like(truth.loss)), what="row_weight")
    assert_close(mass, of_rows(truth.mass), what="mass")
    assert_close(total[is_row].log(), truth.log_total[is_row], what="total")
    assert_close(by_row(dlogits).to(logits.dtype), of_rows(truth.gradient(dloss)), scale=scale, what="dlogits")
    want = dloss.double()[:, None] * keep * w.double()[y] * -truth.log_p.gather(1, y)
    assert_close(dprob, torch.where(padding, 0.0, torch.where(out_of_range, float("nan"), want)), scale=scale, what="dprob")
    assert_inside(dlogits, dprob)


def softmax(k: Any, logits: Tensor, dtype: torch.dtype | None = None) -> None:
    """softmax and log_softmax into `dtype` (that of the logits), both directions. The backward kernels are given rounded results, as
    autograd would."""
    x, dtype = by_row(logits), dtype or logits.dtype
    p, log_p = torch.softmax(x, 1), torch.log_softmax(x, 1)
    prob, log_prob = (poisoned(logits, dtype) for _ in range(2))
    from_prob, from_log_prob = (poisoned(logits) for _ in range(2))
    upstream = torch.randn_like(logits, dtype=dtype)
    k.softmax_forward(logits, prob)
    assert_close(by_row(prob).to(dtype), p, what="softmax")
    k.log_softmax_forward(logits, log_prob)
    assert_close(by_row(log_prob).to(dtype), log_p, what="log_softmax")
    d = by_row(upstream)
    k.softmax_backward(prob, upstream, from_prob)
    p = by_row(prob)
    assert_close(by_row(from_prob).to(logits.dtype), p * (d - (p * d).sum(1, keepdim=True)), scale=8.0, what="softmax backward")
    k.log_softmax_backward(log_prob, upstream, from_log_prob)
    want = d - by_row(log_prob).exp() * d.sum(1, keepdim=True)
    assert_close(by_row(from_log_prob).to(logits.dtype), want, scale=8.0 + d.sum(1).abs().max().item(), what="log_softmax backward")
    assert_inside(prob, log_prob, from_prob, from_log_prob)


def nll_loss(k: Any, log_prob: Tensor, target: Tensor, weight: Tensor) -> None:
    """Both directions, and the sum of the weights. Targets outside [0, C) must make NaN rows."""
    classes = log_prob.shape[1]
    is_row = target != NOT_A_ROW
    out_of_range = is_row & ((target < 0) | (target >= classes))
    y = torch.where(is_row & ~out_of_range, target, 0)
    w = torch.where(is_row, torch.where(out_of_range, float("nan"), weight.double()[y]), 0.0)
    loss, row_weight = poisoned_rows(log_prob), poisoned_rows(log_prob)
    dloss, dlog_prob = random_rows(log_prob), poisoned(log_prob)
    k.nll_loss_forward(log_prob, target, weight, NOT_A_ROW, loss, row_weight)
    picked = by_row(log_prob).gather(1, y[:, None])[:, 0]
    assert_close(loss, torch.where(is_row, -w * picked, 0.0), what="loss")
    assert_close(row_weight, w, what="row_weight")
    totals = [poisoned(row_weight.new_empty(1)) for _ in range(2)]
    k.sum_rows(row_weight, totals[0])
    k.sum_weights(target, weight, NOT_A_ROW, totals[1])
    assert_same(totals[:1], totals[1:])
    k.nll_loss_backward(target, NOT_A_ROW, row_weight, dloss, dlog_prob)
    onehot = torch.nn.functional.one_hot(y, classes).bool()
    want = torch.where(is_row[:, None] & (onehot | out_of_range[:, None]), -dloss.double()[:, None] * w[:, None], 0.0)
    assert_close(by_row(dlog_prob).to(log_prob.dtype), want, what="dlog_prob")
    assert_inside(dlog_prob)


def bce_with_logits(k: Any, x: Tensor, y: Tensor, w: Tensor, pos_weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """Elements [A, B, P]: forward, into a loss of `dtype` (the compute dtype), sum, backward."""
    x64, y64, w64, pw = x.double(), y.double(), w.double(), pos_weight.double()
    softplus = torch.log1p(torch.exp(-x64.abs())) + (-x64).clamp(min=0)
    want = w64 * ((1 - y64) * x64 + (1 + (pw - 1) * y64) * softplus)
    loss, total = poisoned(x, dtype or real(x.dtype)), poisoned(x.new_empty(1), real(x.dtype))
    k.bce_with_logits_forward(x, y, w, pos_weight, loss)
    assert_close(loss, want, scale=x64.abs().max().item(), what="loss")
    k.bce_with_logits_sum(x, y, w, pos_weight, COUNT, total)
    assert_close(total[0], want.sum() / COUNT, scale=want.abs().sum().item() / COUNT, what="total")
    dloss, dlogits = torch.randn_like(x, dtype=total.dtype), poisoned(x)
    k.bce_with_logits_backward(x, y, w, pos_weight, dloss, dlogits)
    again = poisoned(total), poisoned(x)
    k.bce_with_logits_sum_backward(x, y, w, pos_weight, dloss, COUNT, *again)
    assert_same((total, dlogits), again)
    want = dloss.double() * w64 * ((1 - y64) - (1 + (pw - 1) * y64) * torch.sigmoid(-x64))
    assert_close(dlogits, want, scale=8.0, what="dlogits")
    assert_inside(total)


def tails(k: Any, device: str = "cpu") -> dict[str, float]:
    """The largest relative error, in eps of float32, of what is tiny far from 0: the loss of a sure and right prediction, its gradient."""
    x = torch.cat([torch.linspace(0, 80, 1601), -torch.linspace(0, 80, 1601)]).to(device).view(1, 1, -1)
    y, one, infinite = (x > 0).float(), torch.ones(1, 1, 1, device=device).expand(x.shape), torch.tensor([[[torch.inf, -torch.inf]]]).to(x)
    small, s = torch.log1p(torch.exp(-x.double().abs())), torch.sigmoid(-x.double().abs())
    right, found, eps = torch.where(y > 0, -s, s), {}, torch.finfo(torch.float32).eps

    def compare(name: str, got: Tensor, want: Tensor) -> None:
        assert_inside(got)
        found[name] = ((got.double() - want) / want).abs().max().item() / eps

    loss, dlogits = poisoned(x), poisoned(x)
    k.bce_with_logits_forward(x, y, one, one, loss)
    k.bce_with_logits_backward(x, y, one, one, one, dlogits)
    compare("bce", loss, small)
    compare("bce backward", dlogits, right)
    focus, loss, dlogits = Focus(1.0, 1.0, 1.0), poisoned(x), poisoned(x)
    k.sigmoid_focal_loss_forward(x, y, focus, loss)
    k.sigmoid_focal_loss_backward(x, y, focus, one, dlogits)
    normal = s * small > torch.finfo(torch.float32).smallest_normal
    compare("focal", loss[normal], (s * small)[normal])
    compare("focal backward", dlogits[normal], (right * (s + small * (1 - s)))[normal])
    dlogits = poisoned(infinite)
    k.bce_with_logits_backward(infinite, (infinite > 0).float(), *[one[..., :2]] * 3, dlogits)
    assert (dlogits == 0).all()
    # the limit of tests/test_bce.py; of products of two tiny numbers twice that
    assert max(found["bce"], found["bce backward"]) < 4, found
    assert max(found["focal"], found["focal backward"]) < 8, found
    return found


def binary_cross_entropy(k: Any, p: Tensor, y: Tensor, w: Tensor) -> None:
    """Elements [A, B, P]: forward, sum, backward."""
    p64, y64, w64 = p.double(), y.double(), w.double()
    want = -w64 * (y64 * p64.log().clamp(min=-100) + (1 - y64) * torch.log1p(-p64).clamp(min=-100))
    loss, total = poisoned(p, real(p.dtype)), poisoned(p.new_empty(1), real(p.dtype))
    k.binary_cross_entropy_forward(p, y, w, loss)
    assert_close(loss, want, what="loss")
    k.binary_cross_entropy_sum(p, y, w, COUNT, total)
    assert_close(total[0], want.sum() / COUNT, scale=want.abs().sum().item() / COUNT, what="total")
    dloss, dprob = torch.randn_like(loss), poisoned(p)
    k.binary_cross_entropy_backward(p, y, w, dloss, dprob)
    again = poisoned(total), poisoned(p)
    k.binary_cross_entropy_sum_backward(p, y, w, dloss, COUNT, *again)
    assert_same((total, dprob), again)
    want = dloss.double() * w64 * (p64 - y64) / ((1 - p64) * p64).clamp(min=1e-12)
    finite = torch.finfo(p.dtype).max
    want = torch.where(want.abs() > finite, want.sign() * torch.inf, want)
    assert_close(dprob, want, what="dprob")
    assert_inside(total)


def sigmoid_focal_loss(k: Any, x: Tensor, y: Tensor, alpha: float, gamma: float) -> None:
    """Elements [A, B, P]: forward, sum, backward."""
    positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    x64, y64, focus = x.double().requires_grad_(), y.double(), Focus(positive, negative, gamma)
    q = y64 * torch.sigmoid(-x64) + (1 - y64) * torch.sigmoid(x64)
    bce = (1 - y64) * x64 - torch.nn.functional.logsigmoid(x64)
    want = (positive * y64 + negative * (1 - y64)) * q**gamma * bce
    loss, total = poisoned(x, real(x.dtype)), poisoned(x.new_empty(1), real(x.dtype))
    k.sigmoid_focal_loss_forward(x, y, focus, loss)
    assert_close(loss, want.detach(), scale=x.abs().max().item(), what="loss")
    k.sigmoid_focal_loss_sum(x, y, focus, COUNT, total)
    assert_close(total[0], want.detach().sum() / COUNT, scale=want.detach().abs().sum().item() / COUNT, what="total")
    dloss, dlogits = torch.randn_like(loss), poisoned(x)
    k.sigmoid_focal_loss_backward(x, y, focus, dloss, dlogits)
    again = poisoned(total), poisoned(x)
    k.sigmoid_focal_loss_sum_backward(x, y, focus, dloss, COUNT, *again)
    assert_same((total, dlogits), again)
    (slope,) = torch.autograd.grad(want, x64, dloss.double())
    assert_close(dlogits, slope, scale=8.0 * (1 + gamma), what="dlogits")
    assert_inside(total)


def sum_rows(k: Any, values: Tensor) -> None:
    total = poisoned(values.new_empty(1))
    k.sum_rows(values, total)
    want = values.double().sum()
    # rounded once: the sum itself is in float64
    limit = torch.finfo(values.dtype).eps * want.abs() + 1e-13 * values.double().abs().sum()
    assert (total[0].double() - want).abs() <= limit
    assert_inside(total)


def mean_of_rows(k: Any, values: Tensor, weights: Tensor) -> None:
    """To the bits of two sums and torch's division; a sum rounded to the values' dtype."""
    divisor, mean, sums = poisoned(values.new_empty(1)), poisoned(values.new_empty(1)), [poisoned(values.new_empty(1)) for _ in range(2)]
    k.mean_of_rows(values, weights, divisor, mean)
    k.sum_rows(values, sums[0])
    k.sum_rows(weights, sums[1])
    assert_same((divisor, mean), (sums[1], sums[0] / sums[1]))
    assert_inside(divisor, mean)
