#!/usr/bin/env python
"""`python bench/report.py --help`."""

import sys

from fastloss.bench.report import main

if __name__ == "__main__":
    sys.exit(main())
