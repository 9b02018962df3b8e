"""Whole steps f(x, y).backward() through the public API, against eager and compiled torch and whoever else is installed."""

from typing import Any

from ..cases import Case
from ..machine import nvidia_smi
from ..measure import measure
from ..presets import PRESETS, RIVALS
from ..providers import COMPILED, EAGER, FASTLOSS, INPLACE, PROVIDERS
from .stage import Day

_COMPILED = 5  # cases: Inductor takes 10 to 15 s for each
_CASES = 7
_TINY = (Case("cross_entropy", (64, 40)), Case("softmax", (64, 40)))


def steps(day: Day) -> None:
    """The first cases of the preset `gpu`; a case for which there is no time is left out."""
    cases = _TINY if day.tiny else PRESETS["gpu"].cases[:_CASES]
    found: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        if day.left() < 8:
            day.save(steps_left_out=[left.key for left in cases[number:]])
            break
        compiled = [COMPILED] if number < _COMPILED and not day.tiny and day.left() > 30 else []
        names = [FASTLOSS, INPLACE, EAGER, *compiled, *_installed_rivals(case, day.device)]
        try:
            result = measure(case, names, seconds=0 if day.tiny else 1.5, device=day.device, memory=day.device == "cuda", least=3)
        except Exception as problem:
            found.append({"case": case.key, "provider": None, "status": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]})
        else:
            found += [_line(result, name) for name in result["providers"]]
        day.save(steps=found)
    day.save(clocks_after_steps=nvidia_smi())


def _installed_rivals(case: Case, device: str) -> list[str]:
    return [name for name in RIVALS if PROVIDERS[name].absent(case.spec, device) is None]


def _line(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Microseconds: `step_us` on a device whose queue is full, `latency_us` from idle to idle, `host_us` until all is queued."""
    one = result["providers"][name]
    line = {"case": result["key"], "provider": name, "status": one["status"], "reason": one.get("reason"), "error": one.get("error")}
    if one["status"] != "timed":
        return line
    line |= {f"{part}_us": one[part]["middle"] * 1e6 for part in ("forward", "backward", "step", "latency", "host") if part in one}
    line |= {"step_low_us": one["step"]["low"] * 1e6, "step_high_us": one["step"]["high"] * 1e6}
    line |= {"share_of_copy_speed": one["share_of_copy_speed"], "peak_bytes": one.get("memory", {}).get("peak"), "bytes": result["bytes"]}
    return line | {"slower": {other: spread["middle"] for other, spread in one["slower"].items()}}
