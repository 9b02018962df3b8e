"""The rehearsal of the day on a GPU: bench/gpu_day.py on a CPU, as a user starts it, with a stage that fails and one that never ends."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import fastloss
from fastloss import contract
from fastloss.bench import report
from fastloss.bench.gpu import probe, questions, suites, tables, warm
from fastloss.bench.gpu.compiled import watched
from fastloss.bench.gpu.launches import LAUNCHERS, Launch, planned
from fastloss.bench.gpu.stage import Day

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_day.py"
STAGES = ("probe", "fails", "device_tests", "parity", "speed", "hangs", "steps")
gpu_day = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def rehearse(out: Path, stages: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, with the stages of gpu_day_stages among its own."""
    # deadlines that even a CPU can keep which has compiled nothing yet
    chosen = {stage.name: f"{stage.function}:600" for stage in gpu_day.STAGES}
    chosen |= {"fails": "gpu_day_stages:fails:60", "hangs": "gpu_day_stages:hangs:2", "stops": "gpu_day_stages:stops:60"}
    # one thread: libgomp's barriers take twenty times the work of tiny inputs where cores are busy
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), "--budget", "5000", "--stages"]
    names = [chosen[name] for name in stages]
    return subprocess.run([*command, *names], cwd=out, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("day")
    return out, rehearse(out, STAGES)


@pytest.fixture(scope="module")
def found(day: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((day[0] / "h100.json").read_text())
    return result


def here(folder: Path, device: str = "cpu") -> Day:
    """What a stage is told, for stages that need no process of their own to be tried."""
    return Day(device=device, tiny=True, out=folder, part=folder / "part.json", seconds=600, before={"copy_gb_s": 1.0})


def test_neither_a_failing_nor_an_endless_stage_stops_the_next(found: dict[str, Any], day: Any) -> None:
    ended = {stage["name"]: stage for stage in found["stages"]}
    assert list(ended) == list(STAGES), day[1].stderr
    assert {name for name in STAGES if ended[name]["status"] != "ok"} == {"fails", "hangs"}, day[1].stdout
    assert ended["fails"]["status"] == "failed"
    assert "ValueError: a stage that fails" in ended["fails"]["note"]
    assert ended["hangs"]["status"] == "deadline"
    assert 2 <= ended["hangs"]["seconds"] < 20
    assert found["fails"] == found["hangs"] == "what was found before"
    assert day[1].returncode == 1


def test_every_stage_found_what_it_is_for(found: dict[str, Any]) -> None:
    assert found["machine"]["versions"]["torch"]
    assert found["copy_gb_s"] > 0 < found["read_gb_s"]
    device_tests = found["device_tests"]
    assert (device_tests["passed"], device_tests["failed"], device_tests["whole"]) == (0, {}, True)
    assert device_tests["skipped"] > 50  # there is no device
    assert (found["parity"]["passed"], found["parity"]["failed"], found["parity"]["whole"]) == (2, {}, True)
    assert {one["name"] for one in found["kernels"] if one["us"] > 0} == set(LAUNCHERS)
    timed = {(one["case"], one["provider"]) for one in found["steps"] if one["status"] == "timed"}
    assert {("ce 64x40 float32", "fastloss"), ("ce 64x40 float32", "fastloss in-place"), ("softmax 64x40 float32", "torch eager")} <= timed


def test_smoke_asks_our_kernels_and_not_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "min_numel", 1 << 18)  # as outside of the tests
    suites.smoke(asked := here(tmp_path))
    assert len(asked.found["smoke"]) > 10
    assert all(one["right"] for one in asked.found["smoke"])
    assert {"nll_loss_forward", "softmax_forward", "softmax_backward"} < set(asked.found["smoke_launchers"])
    assert json.loads(asked.part.read_text()) == asked.found


def test_every_launch_can_be_made_warm(tmp_path: Path) -> None:
    warm.warm(asked := here(tmp_path))
    assert asked.found["warm"]["failed"] == {}
    assert asked.found["warm"]["launches"] >= len(LAUNCHERS)


def test_every_question_has_an_answer(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4")
    questions.questions(asked := here(tmp_path))
    assert len(asked.found["questions"]) == 4
    assert all(isinstance(answer, list) for answer in asked.found["questions"].values()), asked.found["questions"]


def test_parity_is_left_out_where_everything_is_wrong(tmp_path: Path) -> None:
    asked = here(tmp_path)
    asked.before["smoke"] = [{"call": "softmax", "right": False}]
    suites.parity(asked)
    assert asked.found["parity"]["left_out"] == "wrong at first sight: softmax"


def test_no_file_with_tests_for_a_device_is_forgotten() -> None:
    marked = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/cuda/test_*.py") if "mark.gpu" in path.read_text()}
    assert set(suites.DEVICE_TESTS) == marked


@pytest.mark.long
def test_the_whole_day(tmp_path: Path) -> None:
    done = rehearse(tmp_path, [stage.name for stage in gpu_day.STAGES])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_end_is_a_table_that_fits_a_screen_and_says_it_in_one_line(day: Any) -> None:
    table = day[1].stdout.splitlines()[len(STAGES) :]
    assert 40 < len(table) <= 60
    assert re.match(r"gpu_day: \d\d kernels, worst share \d+%, parity 0/2, a rehearsal", table[-1])
    assert any(line.startswith("hangs deadline: cut off after 2 s") for line in table)
    assert (day[0] / "device_tests.xml").exists()
    assert (day[0] / "parity.xml").exists()


def test_the_report_shows_it(day: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    assert report.main([str(day[0] / "h100.json"), "--out", str(tmp_path), "--tables", str(page)]) == 0
    text = page.read_text()
    assert "| cross_entropy_forward |" in text
    assert "| ce 64x40 float32 |" in text
    assert "rehearsal" in text
    assert "cross_entropy_forward" in (tmp_path / "report.html").read_text()


def test_where_no_kernel_can_run_the_day_is_over_at_once(tmp_path: Path) -> None:
    """And the script exits with 1; what there is to know is in the file."""
    done = rehearse(tmp_path, ["stops", "fails", "speed"])
    assert done.returncode == 1
    stages = json.loads((tmp_path / "h100.json").read_text())["stages"]
    assert (stages[0]["status"], stages[0]["note"]) == ("stopped", "nothing works here")
    assert {stage["status"] for stage in stages[1:]} == {"left out"}
    assert done.stdout.splitlines()[-1].startswith("gpu_day: 0 kernels, worst share unknown, parity not run")


@pytest.mark.parametrize(("devices", "problem", "said"), [(0, None, "torch sees no CUDA device"), (1, "too old", "triton: too old")])
def test_the_probe_stops_the_day(
    devices: int, problem: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(probe.machine, "gpu", dict)
    monkeypatch.setattr(fastloss.backends, "unavailable", lambda name: problem)
    with pytest.raises(SystemExit) as ended:
        probe.probe(here(tmp_path, "cuda"))
    assert ended.value.code == gpu_day.STOP
    assert capsys.readouterr().err.strip() == said


def test_a_copy_of_the_working_tree_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what git ignores, and without git: the link to the kernels is made, and the sources say which they are."""
    for name in ("bench", "fastloss", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "out"), symlinks=True)
    link = tmp_path / "fastloss" / "kernels"
    for missing in (True, False):
        if missing:
            link.unlink(missing_ok=True)
        monkeypatch.delenv("FASTLOSS_COMMIT", raising=False)
        told = runpy.run_path(str(tmp_path / "bench" / "gpu_day.py"))["environment"]()
        assert (link / "cuda" / "__init__.py").exists()
        assert re.fullmatch("files [0-9a-f]{12}", told["FASTLOSS_COMMIT"])
        assert told["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
        assert told["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("FASTLOSS_COMMIT", "abc1234")
    assert runpy.run_path(str(tmp_path / "bench" / "gpu_day.py"))["environment"]()["FASTLOSS_COMMIT"] == "abc1234"


def test_where_the_checkout_is_installed_nothing_is_put_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes import from it at the same time, and a kernel's path is part of where it is cached."""
    script = gpu_day.environment.__globals__
    monkeypatch.setitem(script, "CHECKOUT", tmp_path)
    link = tmp_path / "fastloss" / "kernels"
    link.parent.mkdir()
    for url, editable, linked in ((tmp_path, True, False), (ROOT, True, True), (tmp_path, False, True)):
        found = Installed(url.as_uri(), editable)
        monkeypatch.setitem(script, "distribution", lambda name, found=found: found)
        gpu_day.environment()
        assert link.is_symlink() == linked
        link.unlink(missing_ok=True)


class Installed(NamedTuple):
    """What an installer says of a package (PEP 610)."""

    url: str
    editable: bool

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return json.dumps({"url": self.url, "dir_info": {"editable": self.editable}})


def test_deadlines_fit_into_nine_minutes() -> None:
    assert sum(stage.seconds for stage in gpu_day.STAGES) + gpu_day.REPORT + gpu_day.GRACE <= 530 <= 540
    table = (ROOT / "docs" / "cuda.md").read_text()
    for stage in gpu_day.STAGES:
        assert f"| {stage.name} | {stage.seconds} s |" in table


def test_bytes_that_a_launch_cannot_do_without() -> None:
    """In passes over the logits; what is one number a row is next to nothing."""
    passes = {
        "cross_entropy_forward": 1, "cross_entropy_backward": 2, "cross_entropy_forward_backward": 2, "soft_cross_entropy_forward": 2,
        "soft_cross_entropy_backward": 3, "soft_cross_entropy_target_backward": 2, "softmax_forward": 2, "softmax_backward": 3,
        "nll_loss_forward": 0, "nll_loss_backward": 1, "bce_with_logits_sum": 2, "bce_with_logits_backward": 3,
        "bce_with_logits_forward": 4, "sparse_soft_cross_entropy_prob_backward": 0, "token_statistics_forward": 1,
        "token_statistics_backward": 2,
    }  # fmt: skip
    for name, count in passes.items():
        launch = Launch(name, (8192, 32000), "bfloat16")
        assert launch.bytes() / (8192 * 32000 * 2) == pytest.approx(count, abs=1e-2), name


def test_what_is_timed_can_be_compiled_beforehand_without_memory() -> None:
    """For a GPU that is not here, on tensors without memory; and real tensors then take the very same machine code."""
    pytest.importorskip("triton", minversion="3.4")
    sys.path.insert(0, str(Path(__file__).parent / "cuda"))
    from triton_compiler import compiling

    from fastloss.kernels.cuda import cross_entropy

    launches = [Launch("cross_entropy_forward", (500, 32000), "bfloat16"), Launch("softmax_backward", (60, 7, 1000), "float32")]
    with compiling("sm_90") as launched:
        noted = [warm.compile_only(launch) for launch in launches]
        assert launched == []  # compiled, not launched
        assert [one[0]["kernel"] for one in noted] == ["_cross_entropy_forward_rows", "_softmax_backward_tiles"]
        kernel = cross_entropy._cross_entropy_forward_rows
        before = [len(cache[0]) for cache in kernel.device_caches.values()]
        with watched() as again:
            cross_entropy.cross_entropy_forward(*launches[0].arguments("cpu"))
        assert [len(cache[0]) for cache in kernel.device_caches.values()] == before
        assert [one.name for one in launched] == ["_cross_entropy_forward_rows"]
        assert again[0]["grid"] == noted[0][0]["grid"] == [500]
        assert again[0]["warps"] == 8


def test_every_launch_that_is_timed_fits_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, at full size."""
    monkeypatch.setattr(contract, "watch", lambda name, launcher, arguments, places: launcher(*arguments))
    package = contract.checked(SimpleNamespace(**{name: lambda *arguments: None for name in LAUNCHERS}), "meta")
    for launch in planned(tiny=False):
        getattr(package, launch.name)(*launch.arguments("meta"))


def test_the_most_telling_launches_come_first() -> None:
    launches = planned(tiny=False)
    assert launches[0] == Launch("cross_entropy_forward", (8192, 128256), "bfloat16")
    assert {launch.name for launch in launches} == set(LAUNCHERS)
    assert [launch.dtype for launch in launches] == sorted(
        (launch.dtype for launch in launches), key=["bfloat16", "float32", "float16"].index
    )
    assert max(launch.bytes() for launch in launches) < 20 << 30


def test_a_table_of_a_day_on_which_nothing_worked() -> None:
    nothing = {"kind": "gpu_day", "date": "2026-01-01", "device": "cuda", "stages": [{"name": "probe", "status": "failed", "note": "x"}]}
    assert tables.summary(nothing)[-2:] == ["probe failed: x", "gpu_day: 0 kernels, worst share unknown, parity not run"]
