"""The command line of the benchmark."""

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import compare, extras, machine, tables
from .cases import DTYPES, Case
from .losses import ALIASES
from .measure import measure
from .presets import PRESETS, RIVALS, Preset
from .progress import progress
from .providers import EAGER, FASTLOSS, PROVIDERS
from .shapes import SHAPES

_DESCRIPTION = """\
Check fastloss against float64, then time it against torch on this machine.

Every provider is checked at full size first, and one that is wrong is not timed. Then everybody takes a step f(x, y).backward()
in turn, round after round, in rotating order, on inputs that are out of the cache; the table shows medians of the ratios within
rounds. 'copies' is the time of the step in copies of the logits into mapped memory: what no loss can go far below.
"""
_EXAMPLES = """\
examples:
  fastloss bench                                       the quick preset
  fastloss bench --preset cpu-table --json table.json  every CPU target, met or not
  fastloss bench --loss ce bce --shape 4096x32000 8x21x512x512 --dtype float32 bfloat16
  fastloss bench --loss softmax --shape 4096x1000 --provider fastloss 'torch eager' --seconds 20

  fastloss bench compare before.json after.json        what got slower, faster, larger or less exact between two --json files

exit status: 0; 1 if fastloss was wrong or failed on any case; 2 for a wrong command line.
"""

_TIMED_COLUMNS = ("forward_s", "backward_s", "step_s", "step_low_s", "step_high_s", "copies", "error_output", "error_gradient")
_COLUMNS = ("loss", "shape", "dtype", "provider", "status", *_TIMED_COLUMNS)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("fastloss bench", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=_Help)
    presets = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    what = found.add_argument_group("what to measure")
    what.add_argument("--preset", choices=PRESETS, default="quick", help=f"{presets} (default: quick)")
    what.add_argument("--case", nargs="+", choices=SHAPES, metavar="CASE", help=f"instead of a preset's cases: {', '.join(SHAPES)}")
    what.add_argument("--loss", nargs="+", choices=ALIASES, metavar="LOSS", help=f"instead of a preset's cases: {', '.join(ALIASES)}")
    what.add_argument("--shape", nargs="+", type=_shape, metavar="NxC", help="shapes of the logits, classes second (default: 4096x32000)")
    what.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32)")
    what.add_argument("--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help=f"{', '.join(PROVIDERS)}")
    what.add_argument("--extra", nargs="*", choices=extras.EXTRAS, metavar="EXTRA", help=f"{', '.join(extras.EXTRAS)}; on CPU only")
    how = found.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    how.add_argument("--threads", type=int, default=0, metavar="T", help="torch.set_num_threads(T) (default: torch's own choice)")
    how.add_argument("--seconds", type=float, metavar="S", help="timing budget of a case; checks and compilation come on top")
    how.add_argument("--rounds", type=int, default=5, metavar="R", help="rounds at the least, whatever the budget (default: 5)")
    how.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process for each case")
    out = found.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, with machine, versions, commit; for fastloss bench compare")
    out.add_argument("--csv", type=Path, metavar="FILE", help="a line for each case and provider")
    out.add_argument("--details", action="store_true", help="also print a table of all providers for each case")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or compare two results; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["compare"]:
        return compare.main(words[1:])
    options = parser().parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no CUDA device")
    preset = _plan(options)
    result = run(preset, options.device, options.rounds, not options.no_memory, lambda so_far: _write_json(options.json, so_far))
    _print(result, options)
    if options.csv:
        _write_csv(options.csv, result)
    return 1 if broken(result) else 0


def run(
    preset: Preset, device: str = "cpu", rounds: int = 5, memory: bool = True, save: Callable[[dict[str, Any]], None] = lambda so_far: None
) -> dict[str, Any]:
    """Measure everything in a preset; plain data. `save` gets what there is after every case: a long run that is killed is not lost."""
    wanted_extras = extras.names(preset.extras) if device == "cpu" else []  # they compile, start and thread the CPU's kernels
    weights = [preset.seconds + 6 + 8 * case.bytes / 5e8 for case in preset.cases]
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "machine": machine.describe(),
        "copy_bytes_per_second": machine.copy_bandwidth(device),
        "seconds": preset.seconds,
        "cases": [],
        "extras": {},
    }
    with progress(sum(weights) + 20 * len(wanted_extras)) as bar:
        try:
            for case, weight in zip(preset.cases, weights, strict=True):
                bar.begin(case.key)
                found = measure(case, preset.providers, preset.seconds, device, memory, rounds, bar.now)
                result["cases"].append(found)
                bar.say(_one_line(found))
                bar.end(weight)
                save(result)
            for name in wanted_extras:
                bar.begin(name)
                result["extras"][name] = extras.EXTRAS[name]()
                bar.end(20)
                save(result)
        except KeyboardInterrupt:
            bar.say("interrupted: what follows is what was measured until now")
            result["interrupted"] = True
    return result


def broken(result: dict[str, Any]) -> list[str]:
    """The cases on which fastloss, in any mode, was wrong or failed."""
    return [
        f"{case['key']}, {name}: {found['reason']}"
        for case in result["cases"]
        for name, found in case["providers"].items()
        if found["status"] in ("wrong", "failed") and name.startswith(FASTLOSS)
    ]


def _plan(options: argparse.Namespace) -> Preset:
    """The preset, with what the command line overrules."""
    preset = PRESETS[options.preset]
    cases = preset.cases
    if options.case:
        cases = tuple(SHAPES[name] for name in options.case)
    elif options.loss or options.shape or options.dtype:
        cases = tuple(
            Case(ALIASES[loss], shape, dtype)
            for loss in options.loss or ["ce"]
            for shape in options.shape or [(4096, 32000)]
            for dtype in options.dtype or ["float32"]
        )
    names = tuple(options.provider or (*preset.providers, *(RIVALS if options.device == "cuda" else ())))
    seconds = preset.seconds if options.seconds is None else options.seconds
    return Preset(preset.about, cases, names, seconds, preset.extras if options.extra is None else tuple(options.extra))


def _print(result: dict[str, Any], options: argparse.Namespace) -> None:
    here = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items() if number)
    place = here["gpu"]["name"] if result["device"] == "cuda" else f"{here['processor']}, {here['threads']} threads"
    print(f"\n{place}; copies at {result['copy_bytes_per_second'] / 1e9:.1f} GB/s; {versions}\n")
    print(tables.as_text(tables.overview(result)))
    if options.details:
        for case in result["cases"]:
            print(f"\n{case['title']}, {case['rounds']} rounds\n" + tables.as_text(tables.providers(case)))
    for title, table in tables.extras(result).values():
        print(f"\n{title}\n{tables.as_text(table)}")
    if options.preset == "cpu-table":
        print("\nThe CPU targets\n" + tables.as_text(tables.targets(result)))
    skipped = {f"{name}: {found['reason']}" for case in result["cases"] for name, found in case["providers"].items() if "reason" in found}
    print("\nLeft out\n  " + "\n  ".join(sorted(skipped)) if skipped else "")
    for line in broken(result):
        print(f"BROKEN {line}", file=sys.stderr)


def _one_line(found: dict[str, Any]) -> str:
    ours = found["providers"].get(FASTLOSS, {})
    if ours.get("status") != "timed":
        return f"{found['key']:34} {ours.get('status', 'not asked for')} {ours.get('reason', '')}"
    eager, copies = tables.ratio(ours["slower"].get(EAGER)), tables.number(ours["copies"]["middle"])
    return f"{found['key']:34} correct; {eager or '?'} as fast as eager, {copies} copies, {tables.share(ours)} of the floor"


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _write_csv(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        write = csv.writer(file).writerow
        write(_COLUMNS)
        for case in result["cases"]:
            for name, found in case["providers"].items():
                line = [case["loss"], tables.size(case["shape"]), case["dtype"], name, found["status"]]
                if found["status"] == "timed":
                    line += [found[part]["middle"] for part in ("forward", "backward", "step")]
                    line += [found["step"]["low"], found["step"]["high"], found["copies"]["middle"], *found["error"].values()]
                write(line)


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(part) for part in text.lower().split("x"))
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 4096x32000")
    return shape


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and examples, uses the width of the other text, and breaks no name at a hyphen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=22, width=120)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
