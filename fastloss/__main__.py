"""`python -m fastloss doctor`, `warmup` and `bench`; the console script `fastloss` is the same."""

import sys
from collections.abc import Sequence

USAGE = """usage: fastloss doctor [--device cpu|cuda] [--json]     is this installation sound, and what will compute?
       fastloss warmup [LOSS ...] [--all] [options]     compile kernels before they are used (fastloss warmup --help)
       fastloss bench [options]     check and time the losses on this machine (fastloss bench --help)
       fastloss bench compare BEFORE.json AFTER.json     what got faster, slower, larger or less exact between two of its --json files
       fastloss --version"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    rest = rest[:-1]
    if command == "doctor":
        from .doctor import main as doctor

        return doctor(rest)
    if command == "warmup":
        from .startup import main as warmup

        return warmup(rest)
    if command == "bench":
        from .bench.cli import main as bench

        return bench(rest)
    if command == "--version":
        from ._version import __version__

        print(__version__)
        return 0
    print(USAGE, file=sys.stdout if command in ("-h", "--help", "") else sys.stderr)
    return 0 if command in ("-h", "--help", "") else 2


if __name__ == "__main__":
    sys.exit(main())
