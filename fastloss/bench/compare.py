"""Two results side by side: did something get faster, slower, larger or less exact? A table, and a verdict in words."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import tables
from .cases import DTYPES
from .providers import EAGER, FASTLOSS
from .tables import Table

BAD = ("broken", "slower", "less exact", "more memory")
GOOD = ("mended", "faster")
OTHER = ("unclear", "not timed", "only in the first", "only in the second", "the same")

_TWICE = 2.0  # errors are largest ones of some million: they move by less than this from run to run
_MEMORY = 0.05  # in units of the logits; and a megabyte, which any process has more or less of


@dataclass(frozen=True)
class Verdict:
    """What became of one case, in a word, and the numbers it is said of."""

    case: str
    word: str
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if fastloss got slower than the tolerance allows, less exact, larger, or broke; else 0."""
    found = argparse.ArgumentParser(
        "fastloss bench compare",
        description="Compare two results of fastloss bench --json. Times are taken in copies of the logits, timed in the same rounds: "
        "eager torch's own time is that of fresh pages, which another hour has at another price. A case is slower or faster if its time "
        "changed by more than the tolerance and the quartiles of the two do not overlap; 'unclear' if only the first is so.",
        epilog="exit status: 0; 1 if a case got slower, less exact, larger or broke; 2 for a wrong command line.",
    )
    found.add_argument("before", type=Path, help="what an earlier fastloss bench --json wrote")
    found.add_argument("after", type=Path, help="and a later one")
    found.add_argument("--provider", default=FASTLOSS, help=f"whose results (default: {FASTLOSS})")
    found.add_argument("--tolerance", type=float, default=0.1, metavar="SHARE", help="how much slower is still the same (default: 0.1)")
    options = found.parse_args(arguments)
    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    except (OSError, ValueError) as problem:
        found.error(str(problem))
    table, verdicts = compare(before, after, options.provider, options.tolerance)
    for name, result in (("before", before), ("after", after)):
        print(f"{name + ':':8}{result['date'][:16].replace('T', ' ')}, commit {result['machine']['commit'] or '?'}")
    print("".join(f"\n! another {what}: {old}, then {new}" for what, old, new in _differences(before, after)))
    print(tables.as_text(table) + "\n")
    print("\n".join(in_words(verdicts, options.provider)))
    return 1 if any(verdict.word in BAD for verdict in verdicts) else 0


def compare(before: dict[str, Any], after: dict[str, Any], provider: str = FASTLOSS, tolerance: float = 0.1) -> tuple[Table, list[Verdict]]:
    """The table and the verdicts, in the order of the later result; what only the earlier one has comes last."""
    header = ["case", "copies before", "after", "time", "vs eager before", "after", "error before", "after", "memory before", "after", ""]
    olds, news = ({case["key"]: case for case in result["cases"] if provider in case["providers"]} for result in (before, after))
    lines, verdicts = [], []
    for key in [*news, *(key for key in olds if key not in news)]:
        sides = [{**case[key], "ours": case[key]["providers"][provider]} if key in case else None for case in (olds, news)]
        change, found = _judged(key, sides[0], sides[1], tolerance)
        verdicts += found
        columns = [(_copies(side), _ratio(side), _error(side), _memory(side)) for side in sides]
        pairs = [word for pair in zip(*columns, strict=True) for word in pair]
        word = ", ".join(verdict.word for verdict in found if verdict.word != "the same")
        lines.append([key, *pairs[:2], "" if change is None else f"{change - 1:+.0%}", *pairs[2:], word])
    return (header, lines), verdicts


def in_words(verdicts: Sequence[Verdict], provider: str = FASTLOSS) -> list[str]:
    """What a person wants to know: the sum, and then each case that is not as it was, the bad ones first."""
    counts = {word: sum(verdict.word == word for verdict in verdicts) for word in (*BAD, *GOOD, *OTHER)}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no case in common"
    if any(counts[word] for word in BAD):
        head = "WORSE"
    elif any(counts[word] for word in GOOD):
        head = "better"
    elif counts["the same"]:
        head = "the same"
    else:
        head = "nothing to compare"
    width = max(map(len, counts))
    told = [verdict for word in (*BAD, *GOOD, *OTHER[:-1]) for verdict in verdicts if verdict.word == word]
    return [f"{provider}: {head} ({said})", *(f"  {v.word:{width}}  {v.case:34}  {v.why}".rstrip() for v in told)]


def _judged(key: str, old: Any, new: Any, tolerance: float) -> tuple[float | None, list[Verdict]]:
    """How many times as long it takes, and what there is to say."""
    if old is None or new is None:
        return None, [Verdict(key, "only in the second" if old is None else "only in the first")]
    was, now = old["ours"], new["ours"]
    if was["status"] != "timed" or now["status"] != "timed":
        word = "not timed" if was["status"] == now["status"] or "skipped" in (was["status"], now["status"]) else "mended"
        word = "broken" if now["status"] in ("wrong", "failed") and was["status"] == "timed" else word
        return None, [Verdict(key, word, f"{was['status']}, then {now['status']}: {now.get('reason', was.get('reason', ''))}")]
    verdicts = [*_time(key, was["copies"], now["copies"], tolerance), *_rest(key, old, new)]
    return now["copies"]["middle"] / was["copies"]["middle"], verdicts or [Verdict(key, "the same")]


def _time(key: str, was: dict[str, float], now: dict[str, float], tolerance: float) -> Iterator[Verdict]:
    change = now["middle"] / was["middle"]
    why = f"{tables.number(was['middle'])} copies, then {tables.number(now['middle'])} ({change - 1:+.0%})"
    if change > 1 + tolerance:
        yield Verdict(key, "slower" if now["low"] > was["high"] else "unclear", why)
    elif change < 1 / (1 + tolerance):
        yield Verdict(key, "faster" if now["high"] < was["low"] else "unclear", why)


def _rest(key: str, old: Any, new: Any) -> Iterator[Verdict]:
    was, now = (max(side["ours"]["error"].values()) for side in (old, new))
    if now > _TWICE * was + torch.finfo(DTYPES[new["dtype"]]).eps / 4:
        yield Verdict(key, "less exact", f"error {was:.1e}, then {now:.1e}")
    if "memory" in old["ours"] and "memory" in new["ours"]:
        was, now = (side["ours"]["memory"]["peak"] for side in (old, new))
        if now > was + max(_MEMORY * new["bytes"], 1 << 20):
            yield Verdict(key, "more memory", f"{was / new['bytes']:.2f} N×C, then {now / new['bytes']:.2f}")


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What beside fastloss is not the same: then the two may differ for that reason."""
    for what in ("processor", "threads", "gpu", "huge_pages"):
        old, new = (result["machine"].get(what) for result in (before, after))
        if old != new:
            yield what, old, new
    for package in ("torch", "numba", "triton"):
        old, new = (result["machine"]["versions"].get(package) for result in (before, after))
        if old != new:
            yield package, old, new


def _copies(side: Any) -> str:
    return "" if side is None or "copies" not in side["ours"] else tables.number(side["ours"]["copies"]["middle"])


def _ratio(side: Any) -> str:
    return "" if side is None else tables.ratio(side["ours"].get("slower", {}).get(EAGER))


def _error(side: Any) -> str:
    return "" if side is None else tables.error(side["ours"])


def _memory(side: Any) -> str:
    return "" if side is None else tables.memory(side["ours"], side)
