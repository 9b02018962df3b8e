"""Results as rows of words: one source for the terminal, the README and the HTML page."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from .crossover import FORCED, USED
from .extras import AVX2, NATIVE
from .presets import CPU_TARGETS, FRONT, Target
from .providers import COMPILED, COMPILED_HUGE, EAGER, EAGER_HUGE, FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL

Table = tuple[list[str], list[list[str]]]

MODES = {"default": FASTLOSS, "in-place": INPLACE, "no foresight": NO_FORESIGHT, "no pool": NO_POOL}
NOTHING = "–"  # not measured, in tables of which every cell is looked at


def front(result: dict[str, Any]) -> Table:
    """What decides, for some ten cases: how fast as used by default, beside torch and beside the machine's floor; memory; error."""
    header = ["loss", "logits", "dtype", "× eager", "× compile", "of the floor", "extra memory", "torch's", "error", "torch's"]
    by_key = {case["key"]: case for case in result["cases"]}
    lines = []
    for wanted in FRONT:
        case = by_key.get(wanted.key)
        ours = case["providers"].get(FASTLOSS) if case else None
        if case is None or ours is None or ours["status"] != "timed":
            continue
        eager = case["providers"].get(EAGER, {})
        times = [ratio(ours["slower"].get(other)) for other in (EAGER, COMPILED)]
        numbers = [*times, share(ours), memory(ours, case), memory(eager, case), error(ours), error(eager)]
        lines.append([case["loss"], size(case["shape"]), case["dtype"], *(word or NOTHING for word in numbers)])
    return header, lines


def overview(result: dict[str, Any]) -> Table:
    """One line for each case and mode of ours: error, ratios, memory."""
    header = ["loss", "logits", "dtype", "mode", "error", "torch's", "vs eager", "vs compile", "vs eager+huge", "vs compile+huge"]
    header += ["copies", "of the floor", "extra memory", "torch's"]
    lines = []
    for case in result["cases"]:
        eager = case["providers"].get(EAGER, {})
        for mode, name in MODES.items():
            found = case["providers"].get(name)
            if found is None or found["status"] == "skipped":
                continue
            line = [case["loss"], size(case["shape"]), case["dtype"], mode]
            if found["status"] != "timed":
                lines.append([*line, f"{found['status'].upper()}: {found['reason']}", *[""] * (len(header) - 5)])
                continue
            times = [ratio(found["slower"].get(other)) for other in (EAGER, COMPILED, EAGER_HUGE, COMPILED_HUGE)]
            copies = [number(found["copies"]["middle"]), share(found)]
            lines.append([*line, error(found), error(eager), *times, *copies, memory(found, case), memory(eager, case)])
    return header, lines


def targets(result: dict[str, Any]) -> Table:
    """The targets of the CPU kernels beside what was measured."""
    header = ["loss", "logits", "dtype", "mode", "vs eager", "target", "vs compile", "target", "copies", "target", "of the floor"]
    header += ["extra memory", "verdict"]
    by_key = {case["key"]: case for case in result["cases"]}
    lines = []
    for target in CPU_TARGETS:
        case = by_key.get(target.case.key)
        found = case["providers"].get(target.provider) if case else None
        if case is None or found is None or found["status"] != "timed":
            continue
        verdicts = judge(target, found)
        line = [case["loss"], size(case["shape"]), case["dtype"], "in-place" if target.provider == INPLACE else "default"]
        line += [ratio(found["slower"].get(EAGER)), f"≥ {target.eager:g}", ratio(found["slower"].get(COMPILED)), f"≥ {target.compiled:g}"]
        line += [number(found["copies"]["middle"]), "" if target.copies is None else f"≤ {target.copies:g}"]
        line += [share(found), memory(found, case)]
        lines.append([*line, "met" if not verdicts else "not met: " + ", ".join(verdicts)])
    return header, lines


def judge(target: Target, found: dict[str, Any]) -> list[str]:
    """Which parts of a target were missed. A peer that did not run is no excuse: it counts as missed."""
    missed = []
    for name, other, least in (("eager", EAGER, target.eager), ("compile", COMPILED, target.compiled)):
        measured = found["slower"].get(other)
        if measured is None or measured["middle"] < least:
            missed.append(name)
    if target.copies is not None and found["copies"]["middle"] > target.copies:
        missed.append("copies")
    return missed


def least(result: dict[str, Any], limit: float = 3.0) -> Table:
    """Every case and mode of ours that is less than `limit` times as fast as compiled torch, the worst first."""
    header = ["loss", "logits", "dtype", "mode", "× eager", "× compile"]
    found = []
    for case in result["cases"]:
        for mode, name in MODES.items():
            slower = case["providers"].get(name, {}).get("slower", {})
            if COMPILED in slower and slower[COMPILED]["middle"] < limit:
                line = [case["loss"], size(case["shape"]), case["dtype"], mode, ratio(slower.get(EAGER)), ratio(slower[COMPILED])]
                found.append((slower[COMPILED]["middle"], line))
    return header, [line for _, line in sorted(found, key=lambda pair: pair[0])]


def sizes(result: dict[str, Any]) -> Table:
    """A sweep over the number of classes, in milliseconds; no lines for a result that is none."""
    header = ["classes", "logits", "fastloss ms", "torch eager ms", "torch.compile ms", "× eager", "× compile", "of the floor"]
    cases = result["cases"]
    if len(cases) < 4 or len({(case["loss"], case["dtype"], case["shape"][0], len(case["shape"])) for case in cases}) > 1:
        return header, []
    lines = []
    for case in sorted(cases, key=lambda case: case["shape"][1]):
        timed = {name: found for name, found in case["providers"].items() if found["status"] == "timed"}
        if FASTLOSS not in timed:
            continue
        times = [number(timed[name]["step"]["middle"] * 1e3) if name in timed else NOTHING for name in (FASTLOSS, EAGER, COMPILED)]
        ratios = [ratio(timed[FASTLOSS]["slower"].get(other)) or NOTHING for other in (EAGER, COMPILED)]
        lines.append([str(case["shape"][1]), f"{prod(case['shape']):,}", *times, *ratios, share(timed[FASTLOSS])])
    return header, lines


def providers(case: dict[str, Any]) -> Table:
    """Everybody on one case, in milliseconds. On CUDA a step is what the device takes with its queue full; beside it, what a step takes
    from an idle device to an idle device, and how long the host is busy queueing it."""
    of_the_host = [part for part in ("latency", "host") if any(part in found for found in case["providers"].values())]
    header = ["provider", "forward ms", "backward ms", "step ms", "quartiles", *(f"{part} ms" for part in of_the_host)]
    header += ["copies", "of the floor", "error", "extra memory", "note"]
    lines = []
    for name, found in case["providers"].items():
        if found["status"] != "timed":
            lines.append([name, *[""] * (len(header) - 2), f"{found['status']}: {found['reason']}"])
            continue
        parts = [number(found[part]["middle"] * 1e3) for part in ("forward", "backward", "step")]
        parts.append(f"{number(found['step']['low'] * 1e3)} to {number(found['step']['high'] * 1e3)}")
        parts += [number(found[part]["middle"] * 1e3) if part in found else "" for part in of_the_host]
        copies = [number(found["copies"]["middle"]), share(found)]
        lines.append([name, *parts, *copies, error(found), memory(found, case), ""])
    return header, lines


def extras(result: dict[str, Any]) -> dict[str, tuple[str, Table]]:
    """Small calls, threads, start-up, AVX2: title and table for each that was measured."""
    tables: dict[str, tuple[str, Table]] = {}
    found = result.get("extras", {})
    if "overhead" in found:
        lines = [[name, number(spread["middle"] * 1e6)] for name, spread in found["overhead"]["seconds"].items()]
        tables["overhead"] = "A small step (cross_entropy 32x10, forward and backward)", (["provider", "µs"], lines)
    if "crossover" in found:
        header = ["loss and logits", FORCED, f"{FORCED}, forward alone", USED, f"{USED}, forward alone"]
        lines = []
        for key, parts in found["crossover"].items():
            lines.append([key, *(ratio(parts[part][name]) for name in (FORCED, USED) for part in ("step", "forward"))])
        tables["crossover"] = "Small calls, times as fast as eager torch (forward and backward, or forward alone)", (header, lines)
    if "scaling" in found:
        lines = []
        for key, names in found["scaling"].items():
            for name, counts in names.items():
                lines.append([key, name, *(number(spread["middle"]) for spread in counts.values())])
        counts = next(iter(next(iter(found["scaling"].values())).values()))
        tables["scaling"] = "Threads: times as fast as with one", (["case", "provider", *counts], lines)
    if "startup" in found:
        lines = []
        for name, states in found["startup"].items():
            if name not in ("case", "imports", "fastloss warmup"):
                lines += [[name, state, *(number(value) for value in times.values())] for state, times in states.items()]
        parts = list(found["startup"][FASTLOSS]["cold"])
        imports = found["startup"].get("imports", {})
        lines += [[f"import {name}", "", number(seconds), *[""] * (len(parts) - 1)] for name, seconds in imports.items()]
        if "fastloss warmup" in found["startup"]:
            lines.append(["the command fastloss warmup", "cold", number(found["startup"]["fastloss warmup"]), *[""] * (len(parts) - 1)])
        title = "A new process, seconds (cold: nothing compiled is cached yet)"
        tables["startup"] = title, (["provider", "caches", *parts], lines)
    if found.get("avx2"):
        lines = []
        for key, spreads in found["avx2"].items():
            times = [number(spreads[name]["middle"] * 1e3) for name in (NATIVE, AVX2)]
            lines.append([key, *times, f"{100 * spreads['speed']['middle']:.0f}%"])
        title = "Kernels compiled for AVX2 (NUMBA_CPU_NAME=haswell), on this CPU"
        tables["avx2"] = title, (["case", f"{NATIVE} ms", f"{AVX2} ms", f"speed of {NATIVE}"], lines)
    return tables


def size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{number(spread['middle'])}×"


def error(found: dict[str, Any]) -> str:
    return f"{max(found['error'].values()):.1e}" if "error" in found else ""


def share(found: dict[str, Any]) -> str:
    """How much of a step's time reading and writing what the loss has to takes alone."""
    measured = found.get("share_of_floor")
    return f"{measured['middle']:.0%}" if measured else NOTHING


def memory(found: dict[str, Any], case: dict[str, Any]) -> str:
    """Peak extra memory in units of the logits: a gradient is 1."""
    return number(found["memory"]["peak"] / case["bytes"]) + " N×C" if "memory" in found else ""


def as_text(table: Table) -> str:
    """Columns under their heads, for a terminal."""
    header, lines = table
    widths = [max(len(line[column]) if len(line) > column else 0 for line in (header, *lines)) for column in range(len(header))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in (header, *lines))


def as_markdown(table: Table) -> str:
    header, lines = table

    def row(words: Iterable[str]) -> str:
        return "| " + " | ".join(words) + " |"

    return "\n".join([row(header), row("---" for _ in header), *(row(line) for line in lines)])
