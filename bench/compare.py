#!/usr/bin/env python
"""`python bench/compare.py --help`."""

import sys

from fastloss.bench.compare import main

if __name__ == "__main__":
    sys.exit(main())
