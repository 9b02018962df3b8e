"""Two results of the benchmark side by side: every change is called by its name, and nothing that is noise is called a change."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fastloss.__main__ import main
from fastloss.bench import compare
from fastloss.bench.providers import EAGER, FASTLOSS

KEY = "ce 300x100 float32"


def spread(middle: float, width: float = 0.05) -> dict[str, float]:
    return {"low": middle * (1 - width), "middle": middle, "high": middle * (1 + width)}


def result(copies: float = 1.0, width: float = 0.05, error: float = 1e-7, peak: float = 1.0, key: str = KEY, **ours: Any) -> dict[str, Any]:
    size = 1 << 30
    timed = {
        "status": "timed",
        "copies": spread(copies, width),
        "slower": {EAGER: spread(10 / copies)},
        "error": {"output": error / 2, "gradient": error},
        "memory": {"peak": int(peak * size)},
    }
    case = {"key": key, "dtype": key.split()[-1], "bytes": size, "providers": {FASTLOSS: {**timed, **ours}}}
    machine = {"commit": "abc", "processor": "P", "threads": 2, "gpu": None, "huge_pages": "madvise", "versions": {"torch": "2.13.0"}}
    return {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "cases": [case]}


WRONG = {"status": "wrong", "reason": "error 1e-3"}


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (result(), result(), "the same"),
        (result(1.0), result(1.09, 0.01), "the same"),  # within the tolerance
        (result(1.0), result(1.5), "slower"),
        (result(1.5), result(1.0), "faster"),
        (result(1.0, 0.4), result(1.3, 0.4), "unclear"),  # the quartiles overlap
        (result(), result(error=1.9e-7), "the same"),
        (result(), result(error=1e-6), "less exact"),
        (result(), result(peak=1.04), "the same"),
        (result(), result(peak=1.2), "more memory"),
        (result(), result(**WRONG), "broken"),
        (result(**WRONG), result(), "mended"),
        (result(**WRONG), result(**WRONG), "not timed"),
    ],
)
def test_what_became_of_a_case(before: dict[str, Any], after: dict[str, Any], word: str) -> None:
    table, verdicts = compare.compare(before, after)
    assert [verdict.word for verdict in verdicts] == [word]
    assert table[1][0][-1] == ("" if word == "the same" else word)
    assert len({len(table[0]), *map(len, table[1])}) == 1


def test_a_case_can_be_two_things_and_one_that_is_missing_is_named() -> None:
    before, after = result(), result(2.0, error=1e-5)
    before["cases"] += result(key="bce 1x2 float32")["cases"]
    after["cases"] += result(key="ce 8x8 bfloat16")["cases"]
    words = {verdict.case: verdict.word for verdict in compare.compare(before, after)[1]}
    assert words == {KEY: "less exact", "ce 8x8 bfloat16": "only in the second", "bce 1x2 float32": "only in the first"}
    said = "\n".join(compare.in_words(compare.compare(before, after)[1]))
    assert said.startswith("fastloss: WORSE (1 slower, 1 less exact, 1 only in the first, 1 only in the second)")
    assert "slower" in said
    assert "1.00 copies, then 2.00 (+100%)" in said


@pytest.mark.parametrize(
    ("after", "code", "head"),
    [(result(), 0, "the same (1 the same)"), (result(0.5), 0, "better (1 faster)"), (result(2.0), 1, "WORSE (1 slower)")],
)
def test_the_command(after: dict[str, Any], code: int, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, one in zip(files, (result(), after), strict=True):
        path.write_text(json.dumps(one))
    assert main(["bench", "compare", *map(str, files)]) == code
    text = capsys.readouterr().out
    assert f"fastloss: {head}" in text
    assert "! another" not in text


def test_another_machine_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy.deepcopy(result())
    other["machine"].update(processor="Q", versions={"torch": "2.14.0"})
    for name, one in (("a", result()), ("b", other)):
        (tmp_path / name).write_text(json.dumps(one))
    assert main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "! another processor: P, then Q\n! another torch: 2.13.0, then 2.14.0" in text


def test_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text("no json")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "absent")])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_measured_results_of_this_repository_are_the_same_as_themselves() -> None:
    measured = json.loads((Path(__file__).parent.parent / "docs" / "measured" / "cpu.json").read_text())
    verdicts = compare.compare(measured, measured)[1]
    assert {verdict.word for verdict in verdicts} == {"the same"}
    assert len(verdicts) == len(measured["cases"])


def test_progress_says_what_is_being_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fastloss.bench import cli
    from fastloss.bench.cases import Case
    from fastloss.bench.presets import Preset

    monkeypatch.setitem(sys.modules, "tqdm", None)  # lines, then
    cli.run(Preset("", (Case("cross_entropy", (30, 10)),), (FASTLOSS, EAGER), 0.0), rounds=1, memory=False)
    said = capsys.readouterr().err
    for words in ("[  0%] ce 30x10 float32", "checking fastloss", "checking torch eager", "timing 2 providers in turn", "correct"):
        assert words in said
