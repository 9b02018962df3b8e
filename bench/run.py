#!/usr/bin/env python
"""`python bench/run.py --help`: the benchmark from a checkout; `fastloss bench` is the same from an installed package."""

import sys

from fastloss.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
