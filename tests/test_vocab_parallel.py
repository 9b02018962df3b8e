"""Losses whose classes are sharded over real processes, against one process with all classes in float64."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded_cases as on_ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from sharded_cases import Call, Case, Found

import fastloss
from fastloss import losses
from fastloss.ops import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.close()


def assert_same_everywhere(found: list[Found], what: object) -> None:
    for other in found[1:]:
        assert torch.equal(other.loss.nan_to_num(7.5), found[0].loss.nan_to_num(7.5)), f"{what}: the ranks' losses differ"


def assert_right(case: Case, found: list[Found]) -> None:
    """Error of the loss no larger than that of our call with all classes in one place, plus an ulp; of gradients than twice that plus two,
    as in `assert_no_worse`; and the same bits on every rank."""
    assert_same_everywhere(found, case)
    truth, together = on_ranks.whole(case, F.cross_entropy, torch.float64), on_ranks.whole(case, fastloss.cross_entropy)
    joined = Found(
        found[0].loss,
        torch.cat([f.dinput for f in found], case.dim),
        torch.cat([f.dtarget for f in found], case.dim) if case.soft else None,  # type: ignore[misc]
    )
    for name, mine, ours, true in zip(Found._fields, joined, together, truth, strict=True):
        if mine is None or ours is None or true is None:
            continue
        assert (mine.shape, mine.dtype) == (ours.shape, ours.dtype), f"{case} {name}"
        # ulps of the numbers that cancel in the result; in float64 the truth is as far off
        scale = max(true.abs().max().item(), case.row_gradient() if name == "dinput" else 1e-4)
        ulp, times = (16 if case.dtype == torch.float64 else 1) * torch.finfo(mine.dtype).eps * scale, 1 if name == "loss" else 2
        error, allowed = (mine.double() - true).abs().max(), times * ((ours.double() - true).abs().max() + ulp)
        assert error <= allowed, f"{case} {name}: {error:.3g} off, allowed {allowed:.3g}"


def grid(dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...], smoothings: tuple[float, ...]) -> list[Case]:
    combinations = itertools.product(dtypes, shapes, (False, True), (False, True), ("none", "mean", "sum"), smoothings)
    return [Case(shape, dtype, soft, weighted, reduction, smoothing) for dtype, shape, soft, weighted, reduction, smoothing in combinations]


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, grid((torch.float32,), ((7, 53),), (0.0,)) + grid((torch.float32,), ((5, 40, 3),), (0.1,))),
        (2, grid((torch.bfloat16, torch.float64), ((7, 300),), (0.1,))),
        (3, grid((torch.float32,), ((7, 300),), (0.0, 0.1))),
        (4, grid((torch.bfloat16,), ((6, 300),), (0.1,))),
        (1, grid((torch.float32,), ((6, 300),), (0.0,))),
    ],
    ids=["2-every-option", "2-dtypes", "3-uneven", "4-uneven", "1"],
)
def test_losses_and_gradients(ranks: Ranks, count: int, cases: list[Case]) -> None:
    for case, *found in zip(cases, *ranks.returned(count, on_ranks.sharded, cases), strict=True):
        assert_right(case, found)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_of_more_shapes(ranks: Ranks, count: int, dtype: torch.dtype) -> None:
    cases = grid((dtype,), ((53,), (1, 53), (33, 9), (7, 53), (40, 1000), (5, 40, 3), (3, 70, 2, 4), (0, 20)), (0.0, 0.1, 1.0))
    for case, *found in zip(cases, *ranks.returned(count, on_ranks.sharded, cases), strict=True):
        if 0 not in case.shape:
            assert_right(case, found)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_32000_classes(ranks: Ranks, count: int) -> None:
    cases = [Case((9, 32000), sizes=tuple(32000 // count for _ in range(count - 1)), label_smoothing=s) for s in (0.0, 0.1)]
    for case, *found in zip(cases, *ranks.returned(count, on_ranks.sharded, cases), strict=True):
        assert_right(case, found)


SPECIAL = {
    "one row without a batch": Case((53,)),
    "one row without a batch, probabilities": Case((53,), soft=True),
    "vocab_start given": Case(explicit=True),
    "an ignored class": Case(ignore_index=3),
    "everything smoothed": Case(label_smoothing=1.0, weighted=True),
    "first rank without classes": Case(sizes=(0, 53)),
    "last rank without classes": Case(sizes=(53, 0)),
    "no rows": Case((0, 53), reduction="sum"),
    "plain torch": Case(backend="torch"),
    "plain torch, positions": Case((3, 20, 4), weighted=True, label_smoothing=0.1, backend="torch"),
    "plain torch, probabilities": Case((3, 20, 4), soft=True, weighted=True, label_smoothing=0.1, backend="torch"),
    "plain torch, bfloat16": Case((9, 200), torch.bfloat16, backend="torch", reduction="none"),
}


def test_special_calls(ranks: Ranks) -> None:
    for case, *found in zip(SPECIAL.values(), *ranks.returned(2, on_ranks.sharded, list(SPECIAL.values())), strict=True):
        if 0 in case.shape:
            assert found[0].loss == found[1].loss == 0
        else:
            assert_right(case, found)


def test_layouts_of_every_argument(ranks: Ranks) -> None:
    cases = []
    for soft, smoothing in ((False, 0.0), (False, 0.1), (True, 0.1)):
        for argument in ("input", "target", "weight", "dloss"):
            for layout in ("padded", "every_other", "misaligned", "transposed", "column"):
                if layout == "column" and argument in ("input", "weight"):
                    continue
                cases.append(
                    Case((6, 40, 2), soft=soft, weighted=True, reduction="none", label_smoothing=smoothing, layouts=((argument, layout),))
                )
    for case, *found in zip(cases, *ranks.returned(2, on_ranks.sharded, cases), strict=True):
        assert_right(case, found)


def test_the_same_bits_on_every_run_whoever_comes_first(ranks: Ranks) -> None:
    cases = [Case((40, 300)), Case((40, 300), soft=True), Case((40, 300), label_smoothing=0.1, weighted=True)]
    once = ranks.returned(4, on_ranks.sharded, cases)
    again = ranks.returned(4, on_ranks.staggered, cases, 0.1)
    for one, other in zip(once, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.loss, b.loss)
            assert torch.equal(a.dinput, b.dinput)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_and_infinities_are_torchs(ranks: Ranks, soft: bool, smoothing: float) -> None:
    loss, gradient = on_ranks.infinities(None, soft, smoothing)
    found = ranks.returned(2, on_ranks.infinities, soft, smoothing)
    for mine, _ in found:
        torch.testing.assert_close(mine, loss, equal_nan=True)
    torch.testing.assert_close(torch.cat([d for _, d in found], 1), gradient, equal_nan=True)


# ---------------------------------------------------------------- what ranks say to one another

NUMBERS = {"": Case((64, 40)), "smoothed": Case((64, 40), label_smoothing=0.1), "probabilities": Case((64, 40), soft=True),
           "weighted": Case((64, 40), weighted=True), "float64": Case((64, 40), torch.float64)}  # fmt: skip
BYTES_PER_ROW = {"": 12, "smoothed": 16, "probabilities": 16, "weighted": 16, "float64": 24}
HEADER = 128


@pytest.mark.parametrize("kind", NUMBERS)
def test_one_collective_forward_none_backward_and_its_bytes(ranks: Ranks, kind: str) -> None:
    for forward, backward in ranks.returned(2, on_ranks.talk_of_a_step, NUMBERS[kind]):
        ((name, shapes),) = forward
        assert "allgather" in name
        assert shapes[1] == [HEADER + 64 * BYTES_PER_ROW[kind]]
        assert backward == []


DISAGREEMENTS = {
    "rows": (Call(rows=(8, 7)), "the ranks disagree about rows: 8 on rank 0, 7 on rank 1"),
    "dtype": (Call(dtype=(torch.float32, torch.bfloat16)), "the ranks disagree about dtype: 'float32' on rank 0, 'bfloat16' on rank 1"),
    "reduction": (Call(options=({}, {"reduction": "sum"})), "about reduction: 'mean' on rank 0, 'sum' on rank 1"),
    "smoothing": (Call(options=({"label_smoothing": 0.1}, {})), "about label_smoothing: 0.1 on rank 0, 0.0 on rank 1"),
    "ignore_index": (Call(options=({"ignore_index": -1}, {})), "about ignore_index: -1 on rank 0, -100 on rank 1"),
    "weight": (Call(weighted=(True, False)), "about weight: 1 on rank 0, 0 on rank 1"),
    "kind of targets": (Call(target=("fits", "shares")), "about target: 'indices' on rank 0, 'shares' on rank 1"),
    "targets": (Call(target=("fits", "flipped")), "the ranks have different targets"),
    "overlap": (Call(options=({"vocab_start": 0}, {"vocab_start": 10})), "side by side from class 0 on: [0, 20), [10, 30), by rank"),
    "gap": (Call(options=({"vocab_start": 0}, {"vocab_start": 21})), "[0, 20), [21, 41)"),
    "one vocab_start": (Call(options=({"vocab_start": 0}, {})), "[0, 20), none"),
    "no classes": (Call(cut=((0, 0), (0, 0))), "there are no classes on any rank"),
    "index": (Call(target=("on no rank",) * 2), "IndexError: Target 40 is out of bounds."),
}  # fmt: skip


def test_ranks_that_disagree_get_the_same_error_and_go_on(ranks: Ranks) -> None:
    good = Call()
    expected = ranks.returned(2, on_ranks.outcomes, [good, good])[0][1]
    assert expected.startswith("1 ")
    calls = [call for what, _ in DISAGREEMENTS.values() for call in (what, good)]
    first, second = ranks.returned(2, on_ranks.outcomes, calls)
    for i, (kind, (_, message)) in enumerate(DISAGREEMENTS.items()):
        assert first[2 * i] == second[2 * i], kind
        assert message in first[2 * i], kind
        assert first[2 * i].startswith("1 "), kind
        assert first[2 * i + 1] == second[2 * i + 1] == expected, f"after {kind}"


def test_arguments_that_one_rank_refuses_are_an_error_on_all(ranks: Ranks) -> None:
    wrong = {"reduction": Call(options=({}, {"reduction": "average"})), "smoothing": Call(options=({}, {"label_smoothing": 2.0})),
             "target": Call(target=("fits", "short")), "vocab_start": Call(options=({}, {"vocab_start": -3}))}  # fmt: skip
    first, second = ranks.returned(2, on_ranks.outcomes, list(wrong.values()))
    for kind, one, other in zip(wrong, first, second, strict=True):
        assert "rank 1 refused its arguments" in one, kind
        assert "ValueError: vocab_parallel_cross_entropy: " in other, kind
        assert kind in other, kind


def test_what_changes_between_calls_costs_one_collective_more(ranks: Ranks) -> None:
    good, more, fewer = Call(), Call(rows=(40, 40)), Call(rows=(5, 5))
    other_slices = Call(cut=((0, 30), (30, 40)))
    only_one_changed = Call(cut=((0, 30), (30, 35)))
    calls = [good, good, more, more, good, good, more, fewer, good, other_slices, other_slices, only_one_changed, good, good]
    first, second = ranks.returned(2, on_ranks.outcomes, calls)
    assert first == second
    assert [int(outcome.split()[0]) for outcome in first][1:] == [1, 2, 1, 1, 1, 2, 1, 2, 2, 1, 2, 2, 1]
    assert first[1] == first[5] == first[13]
    assert first[9].split()[1] == first[1].split()[1]  # the same classes, cut elsewhere


def test_a_rank_that_does_not_come_ends_in_torchs_timeout(ranks: Ranks) -> None:
    error = ranks.returned(2, on_ranks.waits_in_vain)[0]
    assert "imed out" in error or "imeout" in error, error


# ---------------------------------------------------------------- with the rest of torch


def test_compiled_in_one_graph(ranks: Ranks) -> None:
    for compiled, eager in ranks.returned(2, on_ranks.compiled, Case(label_smoothing=0.1)):
        assert torch.equal(compiled.loss, eager.loss)
        torch.testing.assert_close(compiled.dinput, eager.dinput)


def test_second_derivatives_are_refused(ranks: Ranks) -> None:
    for message in ranks.returned(2, on_ranks.refusal_to_differentiate_twice):
        assert "cannot be differentiated again" in message


def test_with_ddp_around(ranks: Ranks) -> None:
    losses, head = on_ranks.alone()
    found = ranks.returned(4, on_ranks.beside_data_parallel)
    for a, b in ((0, 1), (2, 3)):
        assert found[a][0] == found[b][0]
    means = [(x + y) / 2 for x, y in zip(found[0][0], found[2][0], strict=True)]
    torch.testing.assert_close(torch.tensor(means), torch.tensor(losses))
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]]), head)


def test_the_example_has_the_loss_curve_of_the_unsharded_head(ranks: Ranks) -> None:
    for curve, together in ranks.returned(4, on_ranks.example):
        assert curve == pytest.approx(together, rel=1e-4)
        assert curve[-1] < curve[0] / 2


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [2, 4])
def test_dtensors(ranks: Ranks, count: int, wide: bool) -> None:
    assert ranks.returned(count, on_ranks.dtensors, wide) == [[]] * count


def test_dtensors_explained(ranks: Ranks) -> None:
    for reasons, inside, together in ranks.returned(2, on_ranks.dtensors_explained):
        on_classes, plain_target, on_rows, replicated, apart, chosen = reasons
        assert "classes sharded over 2 ranks: vocab_parallel_cross_entropy" in on_classes
        assert plain_target == on_classes
        assert "rows sharded over 2 ranks: the local rows, then a sum" in on_rows
        assert "a DTensor placed as (Replicate(),)" in replicated
        assert "target as (Replicate(),)" in apart
        assert chosen == "backend 'torch' was chosen"
        assert inside == pytest.approx(together, abs=1e-6)


# ---------------------------------------------------------------- with the linear layer before it

LINEAR = [on_ranks.Linear({"reduction": reduction, "label_smoothing": smoothing}, weighted=weighted, bias=weighted)
          for reduction in ("none", "mean", "sum") for smoothing in (0.0, 0.1) for weighted in (False, True)]  # fmt: skip
LINEAR += [
    on_ranks.Linear({"logit_scale": 0.5, "logit_softcap": 3.0}, bias=True),
    on_ranks.Linear(dtype=torch.bfloat16),
    on_ranks.Linear({"label_smoothing": 0.1}, backend="torch"),
    on_ranks.Linear(reduce=False),
]


@pytest.mark.parametrize("count", [2, 3])
def test_linear(ranks: Ranks, count: int) -> None:
    truths = on_ranks.linear(None, LINEAR)
    for call, (loss, dinput, *dlayer), *found in zip(LINEAR, truths, *ranks.returned(count, on_ranks.linear, LINEAR), strict=True):
        tolerance = {"rtol": 2**-6, "atol": 2**-7} if call.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        for mine in found:
            assert torch.equal(mine[0], found[0][0]), call
            torch.testing.assert_close(mine[0].double(), loss, **tolerance)
        given = [mine[1] for mine in found] if call.reduce else [sum(mine[1] for mine in found)]
        for mine_dinput in given:
            torch.testing.assert_close(mine_dinput.double(), dinput, **tolerance)
        for i, true in enumerate(dlayer, 2):
            torch.testing.assert_close(torch.cat([mine[i] for mine in found]).double(), true, **tolerance)


def test_linear_talks_once_forward_and_once_backward(ranks: Ranks) -> None:
    for forward, backward in ranks.returned(2, on_ranks.talk_of_a_linear_step):
        assert (len(forward), len(backward)) == (1, 1)
        assert "allgather" in forward[0]
        assert "allreduce" in backward[0]


# ---------------------------------------------------------------- token statistics

EVERYTHING = ("log_prob", "entropy", "lse", "sum_sq_prob", "argmax")


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(other, marks=pytest.mark.long) for other in (torch.bfloat16, torch.float64))], ids=str
)
@pytest.mark.parametrize(
    ("count", "shape", "dim", "per_row", "outputs"),
    [
        (2, (9, 70), -1, 1, EVERYTHING),
        (2, (4, 30, 3), 1, 3, EVERYTHING),
        (3, (9, 400), -1, 0, EVERYTHING[1:]),
        (3, (9, 400), -1, 2, ("log_prob",)),
        (4, (9, 400), -1, 1, ("lse", "argmax", "entropy")),
    ],
)
def test_token_statistics(
    ranks: Ranks, dtype: torch.dtype, count: int, shape: tuple[int, ...], dim: int, per_row: int, outputs: tuple[str, ...]
) -> None:
    truth, gradient = on_ranks.statistics(None, shape, dim, per_row, dtype, outputs)
    found = ranks.returned(count, on_ranks.statistics, shape, dim, per_row, dtype, outputs)
    for answers, _ in found:
        for mine, first, true in zip(answers, found[0][0], truth, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine.double(), true.double(), rtol=1e-5, atol=1e-6)
    joined = torch.cat([d for _, d in found], dim)
    torch.testing.assert_close(joined.double(), gradient, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


# ---------------------------------------------------------------- the registered ops


@pytest.fixture
def alone() -> Iterator[None]:
    """One rank that has all classes, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def op_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, y, w = torch.randn(6, 20), torch.arange(6) * 3, torch.rand(20)
    options = (0.1, "mean", torch.float32, "")
    return {
        "indices": (losses.vocab_parallel_cross_entropy, (x, y, w, -1, -100, *options)),
        "shares": (losses.vocab_parallel_soft_cross_entropy, (x, torch.softmax(x, 1), None, 0, *options)),
        "linear": (
            losses.vocab_parallel_linear_cross_entropy,
            (
                x[:, :7],
                torch.randn(20, 7),
                torch.randn(20),
                y,
                w,
                -1,
                -100,
                0.1,
                0.7,
                0.0,
                4,
                torch.float32,
                torch.float32,
                "mean",
                torch.float32,
                "",
                True,
            ),
        ),
        "statistics": (losses.vocab_parallel_token_statistics, (x, y, 1, -100, 0.7, "log_prob entropy lse sum_sq_prob argmax", "")),
    }


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", op_calls())
def test_opcheck(kind: str) -> None:
    loss, args = op_calls()[kind]
    torch.library.opcheck(OPS[loss.name].forward, args)
    leaves = [a.detach().clone().requires_grad_() for a in args[: loss.differentiable]]
    torch.library.opcheck(OPS[loss.name].forward, (*leaves, *args[loss.differentiable :]))
    t, o = loss.tensors(*args[: len(loss.tensors._fields)]), loss.options(*args[len(loss.tensors._fields) :])
    results = loss.forward(t, o)
    upstream = [torch.randn_like(a) if a.is_floating_point() else None for a in results[: loss.answers]]
    torch.library.opcheck(OPS[loss.name].backward, (*upstream, *loss.to_save(t, results), *o, [True] * loss.differentiable))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", op_calls())
def test_the_definition_is_what_one_rank_with_all_classes_gets(kind: str) -> None:
    loss, args = op_calls()[kind]
    t, o = loss.tensors(*args[: len(loss.tensors._fields)]), loss.options(*args[len(loss.tensors._fields) :])
    defined = loss.definition(t, o)
    for mine, theirs in zip(loss.forward(t, o), defined if isinstance(defined, tuple) else (defined,), strict=False):
        torch.testing.assert_close(mine, theirs)


def test_without_a_process_group_torch_says_so() -> None:
    with pytest.raises(ValueError, match="process group"):
        fastloss.vocab_parallel_cross_entropy(torch.randn(3, 5), torch.tensor([1, 2, 3]))


@pytest.mark.usefixtures("alone")
def test_explain_and_backends() -> None:
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 3])
    assert fastloss.explain(fastloss.vocab_parallel_cross_entropy, x, y).path == "kernel"
    with fastloss.use_backend("torch"):
        assert fastloss.explain(fastloss.vocab_parallel_cross_entropy, x, y).path == "torch"
    with pytest.raises(TypeError, match="float8"):
        fastloss.vocab_parallel_cross_entropy(x.to(torch.float8_e4m3fn), y)
    with pytest.raises(TypeError, match="input and target must be Tensors"):
        fastloss.vocab_parallel_cross_entropy([1.0], y)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="functorch"):
        torch.vmap(lambda x: fastloss.vocab_parallel_cross_entropy(x, y), in_dims=0)(x[None])
