"""The benchmark: it refuses what is wrong, measures what it says, and its reports say what was measured."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastloss.bench import accuracy, crossover, extras, report, tables
from fastloss.bench.cases import Case, inputs_to_miss, make_inputs
from fastloss.bench.child import child
from fastloss.bench.cli import broken, main, parser
from fastloss.bench.footprint import can_measure
from fastloss.bench.losses import LOSSES
from fastloss.bench.measure import measure
from fastloss.bench.presets import CPU_TARGETS, PRESETS, Target
from fastloss.bench.providers import COMPILED, EAGER, EAGER_HUGE, FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL, PROVIDERS
from fastloss.bench.runner import Runner, Times
from fastloss.bench.timing import Series, interleave

ROOT = Path(__file__).parent.parent
SMALL = Case("cross_entropy", (300, 100))
MEASURED = ROOT / "docs" / "measured" / "cpu.json"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A real run through the command line, with everything it can write."""
    folder = tmp_path_factory.mktemp("bench")
    what = ["--loss", "ce", "softmax", "--shape", "300x100", "--provider", FASTLOSS, INPLACE, EAGER]
    how = ["--seconds", "0", "--rounds", "2", "--no-memory", "--extra"]
    code = main([*what, *how, "--json", str(folder / "r.json"), "--csv", str(folder / "r.csv")])
    assert code == 0
    return folder / "r.json"


def case_of(loss, rows, classes):
    return Case(loss, (rows, 8, classes) if LOSSES[loss].linear else (rows, classes))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL])
def test_fastloss_passes_the_check_of_the_benchmark(name, loss, monkeypatch):
    monkeypatch.setitem(PROVIDERS[name].settings, "min_numel", 0)
    case = case_of(loss, 64, 33)
    if PROVIDERS[name].absent(case.spec, "cpu"):
        assert name == INPLACE
        return
    inputs = make_inputs(case, 1)
    true = accuracy.truth(case, inputs[0])
    errors = {}
    for who in (name, EAGER):
        output, gradient, _ = Runner(PROVIDERS[who], case, inputs).results(0, keep=True)
        errors[who] = accuracy.error_of(true, output, gradient)
    limit = accuracy.allowed(case, errors[EAGER])
    assert errors[name].output <= limit.output
    assert errors[name].gradient <= limit.gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_truth_in_pieces_is_the_whole_in_float64(loss, monkeypatch):
    monkeypatch.setattr(accuracy, "_CHUNK", 200)
    case = case_of(loss, 10, 50)
    (one,) = make_inputs(case, 1)
    found = accuracy.truth(case, one)
    x = one.input.double().requires_grad_()
    target = one.target.double() if one.target is not None and one.target.is_floating_point() else one.target
    options = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in one.options.items()}
    output = case.spec.call(case.spec.in_torch, x, target, options)
    output.backward(None if one.upstream is None else one.upstream.double())
    torch.testing.assert_close(found.output, output.detach())
    torch.testing.assert_close(found.gradient, x.grad)


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_provider_is_not_timed_and_fails_the_run(wrong, monkeypatch):
    def bind(loss):
        def function(x, y):
            loss = F.cross_entropy(x, y)
            return {"value": loss * 1.001, "gradient": loss + (x - x.detach()).mean() / 100, "nan": loss * float("nan")}[wrong]

        return function

    monkeypatch.setitem(PROVIDERS, FASTLOSS, replace(PROVIDERS[FASTLOSS], bind=bind))
    found = measure(SMALL, [FASTLOSS, EAGER], seconds=0, memory=False, least=1)
    assert found["providers"][FASTLOSS]["status"] == "wrong"
    assert "step" not in found["providers"][FASTLOSS]
    assert found["providers"][EAGER]["status"] == "timed"
    assert len(broken({"cases": [found]})) == 1


def test_a_rival_that_breaks_or_is_missing_is_named_and_the_rest_is_measured(monkeypatch):
    def explodes(loss):
        raise OSError("no compiler")

    monkeypatch.setitem(PROVIDERS, COMPILED, replace(PROVIDERS[COMPILED], bind=explodes))
    found = measure(SMALL, [COMPILED, "liger-kernel", "cut-cross-entropy", EAGER], seconds=0, memory=False, least=1)["providers"]
    assert found[COMPILED] == {"status": "failed", "reason": "OSError: no compiler"}
    assert found["liger-kernel"] == {"status": "skipped", "reason": "does not run on cpu"}
    assert found["cut-cross-entropy"]["status"] == "skipped"
    assert found[EAGER]["status"] == "timed"


def test_rounds_rotate_and_ratios_are_taken_within_rounds():
    order = []

    def step(name, seconds):
        def run(turn):
            order.append(name)
            return Times(seconds * (1 + 9 * (turn % 2)), 0.0)  # every other round ten times slower, for everybody

        return run

    series = interleave({"a": step("a", 1.0), "b": step("b", 3.0), "c": step("c", 2.0)}, seconds=0, least=3, warm=1)
    assert "".join(order[3:]) == "abcbcacab"
    spread = series["a"].ratio_to(series["b"])
    assert (spread.low, spread.middle, spread.high) == pytest.approx((3.0, 3.0, 3.0))
    assert Series([Times(1, 2)]).spread("backward").middle == 2


def test_inputs_are_out_of_the_cache_and_all_different():
    assert inputs_to_miss(Case("cross_entropy", (1024, 256)), 32 << 20) == 40
    assert inputs_to_miss(Case("cross_entropy", (4096, 32000)), 32 << 20) == 2
    first, second = make_inputs(SMALL, 2)
    assert not torch.equal(first.input, second.input)
    torch.testing.assert_close(make_inputs(SMALL, 2)[1].input, second.input, rtol=0, atol=0)


def test_steps_do_not_write_to_the_inputs():
    for name in (FASTLOSS, INPLACE):
        inputs = make_inputs(SMALL, 1)
        before = inputs[0].input.clone()
        Runner(PROVIDERS[name], SMALL, inputs).step(0)
        assert torch.equal(inputs[0].input, before)


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_counts_the_pool_and_sees_in_place(monkeypatch):
    case = Case("cross_entropy", (4096, 4096))
    with child() as process:
        peaks = {
            name: process.ask(do="memory", provider=name, case=case.key, threads=2)["peak"] / case.bytes
            for name in (FASTLOSS, INPLACE, NO_POOL, EAGER)
        }
    assert 0.95 < peaks[FASTLOSS] < 1.1
    assert 0.95 < peaks[NO_POOL] < 1.1
    assert peaks[INPLACE] < 0.1
    assert 1.9 < peaks[EAGER] < 3.2


def test_a_provider_in_another_process_is_checked_and_timed_in_turn():
    found = measure(SMALL, [EAGER, EAGER_HUGE], seconds=0, memory=False, least=2)["providers"][EAGER_HUGE]
    assert found["status"] == "timed"
    assert found["slower"][EAGER]["middle"] > 0


def test_a_child_that_cannot_answer_says_why():
    with child() as process, pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        process.ask(do="memory", provider="nobody", case=SMALL.key, threads=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_cases_and_providers_that_exist(preset):
    for case in PRESETS[preset].cases:
        assert Case.from_key(case.key) == case
    assert set(PRESETS[preset].providers) <= set(PROVIDERS)
    assert len(set(PRESETS[preset].cases)) == len(PRESETS[preset].cases)


def test_targets_are_judged_by_every_number():
    def measured(eager, compiled, copies):
        slower = {EAGER: {"middle": eager}, COMPILED: {"middle": compiled}}
        return {"slower": slower, "copies": {"middle": copies}}

    target = Target(SMALL, 15, 5, 1.6)
    assert tables.judge(target, measured(15, 5, 1.6)) == []
    assert tables.judge(target, measured(14.9, 4.9, 1.7)) == ["eager", "compile", "copies"]
    assert tables.judge(target, {"slower": {}, "copies": {"middle": 1}}) == ["eager", "compile"]
    assert {target.case for target in CPU_TARGETS} == set(PRESETS["cpu-table"].cases)


def test_the_command_line_writes_json_and_csv(result):
    found = json.loads(result.read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert {"processor", "threads", "commit", "cache_mib"} <= set(found["machine"])
    assert [case["key"] for case in found["cases"]] == ["ce 300x100 float32", "softmax 300x100 float32"]
    with result.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [FASTLOSS, INPLACE, EAGER] * 2
    assert lines[4]["status"] == "skipped"
    assert float(lines[0]["step_s"]) > 0


def test_report_draws_and_writes_one_page(result, tmp_path):
    assert report.main([str(result), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert {"speed.png", "error.png"} <= {path.name for path in tmp_path.glob("*.png")}
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert "cross_entropy" in page


def test_tables_are_written_between_markers_and_staleness_is_seen(result, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench-all -->\nold\n<!-- /bench-all -->\nafter\n")
    assert report.main([str(result), "--out", str(tmp_path), "--check", "--tables", str(page)]) == 1
    assert report.main([str(result), "--out", str(tmp_path), "--tables", str(page)]) == 0
    assert report.main([str(result), "--out", str(tmp_path), "--check", "--tables", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench-all -->\n")
    assert text.endswith("<!-- /bench-all -->\nafter\n")
    assert "| cross_entropy | 300×100 | float32 | in-place |" in text


def test_help_names_every_preset_provider_and_loss():
    text = " ".join(parser().format_help().split())
    for word in (*PRESETS, "bce-pos", "fastloss in-place", "--seconds", "--json"):
        assert word in text


@pytest.mark.skipif(not MEASURED.exists(), reason="nothing measured yet: make measure")
def test_tables_in_the_docs_are_the_measured_ones():
    for result in (MEASURED, MEASURED.with_name("sizes.json")):
        assert report.main([str(result), "--check", "--tables", str(ROOT / "README.md"), str(ROOT / "docs")]) == 0


def test_where_kernels_begin_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "CASES", (SMALL, Case("softmax", (8, 12))))
    found = crossover.crossover(seconds=0)
    assert list(found) == [SMALL.key, "softmax 8x12 float32"]
    for parts in found.values():
        assert all(parts[part][name]["middle"] > 0 for part in ("step", "forward") for name in (crossover.FORCED, crossover.USED))
    _, (header, lines) = tables.extras({"extras": {"crossover": found}})["crossover"]
    assert {len(line) for line in lines} == {len(header)}


@pytest.mark.long
def test_kernels_for_avx2_beside_those_for_this_cpu(monkeypatch):
    monkeypatch.setattr(extras, "TARGETED", (SMALL,))
    found = extras.avx2(seconds=0)
    if not found:
        pytest.skip("this CPU has no AVX-512")
    title, (header, lines) = tables.extras({"extras": {"avx2": found}})["avx2"]
    assert "haswell" in title
    assert [line[0] for line in lines] == [SMALL.key]
    assert len(lines[0]) == len(header)
    assert found[SMALL.key]["speed"]["middle"] > 0
