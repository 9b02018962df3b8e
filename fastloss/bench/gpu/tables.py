"""What bench/gpu_day.py found, as tables: for the terminal (`python -m fastloss.bench.gpu.tables h100.json`) and for `report`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..presets import RIVALS
from ..providers import COMPILED, EAGER, FASTLOSS, INPLACE
from ..tables import Table, as_text, number, size

_MOST_LINES = 60


def main(arguments: Sequence[str]) -> int:
    """Print at most 60 lines."""
    result = json.loads(Path(arguments[0]).read_text())
    *lines, last = summary(result)
    print("\n".join([*lines[: _MOST_LINES - 1], last]))
    return 0


def where(result: dict[str, Any]) -> str:
    """One line: the machine, its versions, how fast it copies."""
    here = result.get("machine")
    if here is None:
        return "a machine that could not be asked"
    gpu = here.get("gpu") or {}
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("torch", "triton") if here["versions"].get(name))
    name = f"{gpu['name']}, {gpu['processors']} SMs, driver {gpu.get('driver_version', '?')}" if gpu else here["processor"]
    rates = f"copies at {result['copy_gb_s']:.0f} GB/s, reads at {result['read_gb_s']:.0f}" if "copy_gb_s" in result else "not timed"
    return f"{name}; {rates}; {versions}; commit {result.get('commit')}; {result['date'][:10]}"


def summary(result: dict[str, Any]) -> list[str]:
    """The tables as lines; the last says it all in one."""
    found = [table for table in (kernels(result), steps(result)) if table[1]]
    lines = [where(result), *(line for table in found for line in as_text(table).splitlines())]
    lines += [f"{name}: {_outcome(result[name])}" for name in ("device_tests", "parity") if name in result]
    wrong = [one["call"] for one in result.get("smoke", ()) if not one["right"]]
    lines += [f"WRONG at first sight: {', '.join(wrong)}"] if wrong else []
    lines += [f"{one['name']} {one['status']}: {one['note']}" for one in result["stages"] if one["status"] not in ("ok", "left out")]
    left_out = [one["name"] for one in result["stages"] if one["status"] == "left out"]
    lines += [f"left out: {', '.join(left_out)}"] if left_out else []
    return [*lines, last_line(result)]


def kernels(result: dict[str, Any]) -> Table:
    """A line for each launcher: microseconds and share of the copy rate, for each shape in the first dtype; the worst share in any."""
    found = [one for one in result.get("kernels", ()) if "us" in one]
    dtype = found[0]["dtype"] if found else ""
    shapes = list(dict.fromkeys(size(one["shape"]) for one in found))
    lines = []
    for name in dict.fromkeys(one["name"] for one in found):
        mine = [one for one in found if one["name"] == name]
        by_shape = {size(one["shape"]): one for one in mine if one["dtype"] == dtype}
        cells = [_time_and_share(by_shape.get(shape)) for shape in shapes]
        worst = min((one for one in mine if one["share"] is not None), key=lambda one: one["share"], default=None)
        lines.append([name, *cells, f"{worst['share']:.0%} {worst['dtype']} {size(worst['shape'])}" if worst else ""])
    return [f"µs, share of copy, {dtype}", *shapes, "worst"], lines


def steps(result: dict[str, Any]) -> Table:
    """A line for each case: milliseconds, and how many times as long others take."""
    others = [EAGER, COMPILED, *RIVALS[:3]]
    lines = []
    for case in dict.fromkeys(one["case"] for one in result.get("steps", ())):
        timed = {one["provider"]: one for one in result["steps"] if one["case"] == case and one["status"] == "timed"}
        ours, inplace = timed.get(FASTLOSS), timed.get(INPLACE)
        if ours is None:
            reasons = [one["reason"] for one in result["steps"] if one["case"] == case and one["provider"] in (FASTLOSS, None)]
            lines.append([case, *reasons[:1], *[""] * (len(others) + 4)])
            continue
        # rivals overwrite the logits, as our in-place mode does
        slower = [(ours if other in (EAGER, COMPILED) else inplace or ours)["slower"].get(other) for other in others]
        lines.append(
            [
                case,
                number(ours["step_us"] / 1e3),
                number(inplace["step_us"] / 1e3) if inplace else "",
                f"{ours['share_of_copy_speed']:.0%}",
                *("" if ratio is None else f"{number(ratio)}×" for ratio in slower),
                f"{max(ours['error'].values()):.1e}",
                number(ours["host_us"]) if "host_us" in ours else "",
            ]
        )
    return ["step", "ms", "in-place ms", "share", *(f"vs {other}" for other in others), "error", "host µs"], lines


def last_line(result: dict[str, Any]) -> str:
    """How many kernels were timed, the worst share of the copy rate, tests failed and passed."""
    shares = [one["share"] for one in result.get("kernels", ()) if one.get("share") is not None]
    worst = f"{min(shares):.0%}" if shares else "unknown"
    parity = result.get("parity", {})
    tests = f"{sum(parity.get('failed', {}).values())}/{parity['passed']}" if "passed" in parity else "not run"
    rehearsal = ", a rehearsal: no number means anything" if result.get("tiny") else ""
    return f"gpu_day: {len(shares)} kernels, worst share {worst}, parity {tests}{rehearsal}"


def _time_and_share(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    return number(one["us"]) + (f" {one['share']:.0%}" if one["share"] is not None else "")


def _outcome(tests: dict[str, Any]) -> str:
    failed = tests["failed"]
    text = f"{sum(failed.values())} failed, {tests['passed']} passed" + ("" if tests.get("whole") else ", not to the end")
    if "left_out" in tests:
        return f"left out: {tests['left_out']}"
    most = sorted(failed, key=lambda test: -failed[test])[:3]
    return text + ("; " + ", ".join(f"{test} {failed[test]}×" for test in most) if most else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
