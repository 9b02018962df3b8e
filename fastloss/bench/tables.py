"""Results as rows of words: one source for the terminal, the README and the HTML page."""

from collections.abc import Iterable, Sequence
from typing import Any

from .presets import CPU_TARGETS, Target
from .providers import COMPILED, COMPILED_HUGE, EAGER, EAGER_HUGE, FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL

Table = tuple[list[str], list[list[str]]]


def overview(result: dict[str, Any]) -> Table:
    """One line for each case and mode of ours: error, ratios, memory."""
    header = ["loss", "logits", "dtype", "mode", "error", "torch's", "vs eager", "vs compile", "vs eager+huge", "vs compile+huge"]
    header += ["copies", "of copy speed", "extra memory", "torch's"]
    lines = []
    for case in result["cases"]:
        eager = case["providers"].get(EAGER, {})
        for mode, name in (("default", FASTLOSS), ("in-place", INPLACE), ("no foresight", NO_FORESIGHT), ("no pool", NO_POOL)):
            found = case["providers"].get(name)
            if found is None or found["status"] == "skipped":
                continue
            line = [case["loss"], size(case["shape"]), case["dtype"], mode]
            if found["status"] != "timed":
                lines.append([*line, f"{found['status'].upper()}: {found['reason']}", *[""] * (len(header) - 5)])
                continue
            times = [ratio(found["slower"].get(other)) for other in (EAGER, COMPILED, EAGER_HUGE, COMPILED_HUGE)]
            copies = [number(found["copies"]["middle"]), f"{found['share_of_copy_speed']:.0%}"]
            lines.append([*line, error(found), error(eager), *times, *copies, memory(found, case), memory(eager, case)])
    return header, lines


def targets(result: dict[str, Any]) -> Table:
    """The targets of the CPU kernels beside what was measured."""
    header = [
        "loss",
        "logits",
        "dtype",
        "mode",
        "vs eager",
        "target",
        "vs compile",
        "target",
        "copies",
        "target",
        "extra memory",
        "verdict",
    ]
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
        line += [number(found["copies"]["middle"]), "" if target.copies is None else f"≤ {target.copies:g}", memory(found, case)]
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


def providers(case: dict[str, Any]) -> Table:
    """Everybody on one case, in milliseconds. On CUDA a step is what the device takes with its queue full; beside it, what a step takes
    from an idle device to an idle device, and how long the host is busy queueing it."""
    of_the_host = [part for part in ("latency", "host") if any(part in found for found in case["providers"].values())]
    header = ["provider", "forward ms", "backward ms", "step ms", "quartiles", *(f"{part} ms" for part in of_the_host)]
    header += ["copies", "bytes/logit", "error", "extra memory", "note"]
    lines = []
    for name, found in case["providers"].items():
        if found["status"] != "timed":
            lines.append([name, *[""] * (len(header) - 2), f"{found['status']}: {found['reason']}"])
            continue
        parts = [number(found[part]["middle"] * 1e3) for part in ("forward", "backward", "step")]
        parts.append(f"{number(found['step']['low'] * 1e3)} to {number(found['step']['high'] * 1e3)}")
        parts += [number(found[part]["middle"] * 1e3) if part in found else "" for part in of_the_host]
        copies = [number(found["copies"]["middle"]), number(found["bytes_per_logit"])]
        lines.append([name, *parts, *copies, error(found), memory(found, case), ""])
    return header, lines


def extras(result: dict[str, Any]) -> dict[str, Table]:
    """Small calls, threads, start-up: a table for each that was measured."""
    tables: dict[str, Table] = {}
    found = result.get("extras", {})
    if "overhead" in found:
        lines = [[name, number(spread["middle"] * 1e6)] for name, spread in found["overhead"]["seconds"].items()]
        tables["A small step (cross_entropy 32x10, forward and backward)"] = (["provider", "µs"], lines)
    if "scaling" in found:
        lines = []
        for key, names in found["scaling"].items():
            for name, counts in names.items():
                lines.append([key, name, *(number(spread["middle"]) for spread in counts.values())])
        counts = next(iter(next(iter(found["scaling"].values())).values()))
        tables["Threads: times as fast as with one"] = (["case", "provider", *counts], lines)
    if "startup" in found:
        lines = []
        for name, states in found["startup"].items():
            if name not in ("case", "imports"):
                lines += [[name, state, *(number(value) for value in times.values())] for state, times in states.items()]
        parts = list(found["startup"][FASTLOSS]["cold"])
        imports = found["startup"].get("imports", {})
        lines += [[f"import {name}", "", number(seconds), *[""] * (len(parts) - 1)] for name, seconds in imports.items()]
        tables["A new process, seconds (cold: nothing compiled is cached yet)"] = (["provider", "caches", *parts], lines)
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
