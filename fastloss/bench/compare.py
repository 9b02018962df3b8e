"""Two results side by side: did something get faster, slower, larger or less exact?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import tables
from .providers import EAGER, FASTLOSS
from .tables import Table


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if, by the measure, fastloss got slower than the tolerance allows; else 0."""
    found = argparse.ArgumentParser(
        "compare.py",
        description="Compare two results of bench/run.py --json. What is compared is the ratio to torch eager in the same run, which "
        "survives a change of load or machine; a line is marked where the quartiles of the two ratios do not overlap.",
    )
    found.add_argument("before", type=Path)
    found.add_argument("after", type=Path)
    found.add_argument("--provider", default=FASTLOSS, help=f"default: {FASTLOSS}")
    found.add_argument("--tolerance", type=float, default=0.1, help="how much slower is still the same (default: 0.1)")
    options = found.parse_args(arguments)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    table, slower = compare(before, after, options.provider, options.tolerance)
    print(f"before: commit {before['machine']['commit']}, {before['date']}\nafter:  commit {after['machine']['commit']}, {after['date']}\n")
    print(tables.as_text(table))
    return 1 if slower else 0


def compare(before: dict[str, Any], after: dict[str, Any], provider: str = FASTLOSS, tolerance: float = 0.1) -> tuple[Table, list[str]]:
    """The table, and the keys of the cases that got slower. Cases that are in one result only are left out."""
    header = ["case", "vs eager before", "after", "change", "error before", "after", "memory before", "after", ""]
    olds = {case["key"]: case for case in before["cases"]}
    lines, slower = [], []
    for case in after["cases"]:
        if case["key"] not in olds:
            continue
        old, new = (one["providers"].get(provider, {}) for one in (olds[case["key"]], case))
        if old.get("status") != "timed" or new.get("status") != "timed":
            lines.append([case["key"], old.get("status", "absent"), new.get("status", "absent"), *[""] * 6])
            continue
        was, now = (one["slower"].get(EAGER) for one in (old, new))
        change, mark = 1.0, ""
        if was and now:
            change = now["middle"] / was["middle"]
            if change < 1 - tolerance and now["high"] < was["low"]:
                mark = "slower"
                slower.append(case["key"])
            elif change > 1 + tolerance and now["low"] > was["high"]:
                mark = "faster"
        errors = [tables.error(old), tables.error(new), tables.memory(old, olds[case["key"]]), tables.memory(new, case)]
        lines.append([case["key"], tables.ratio(was), tables.ratio(now), f"{change - 1:+.0%}", *errors, mark])
    return (header, lines), slower
