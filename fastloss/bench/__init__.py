"""The benchmark suite: `fastloss bench`, or bench/run.py in a checkout. Providers are checked against float64 before they are timed."""
