"""Benchmarks: our operators against their real peers, as ratios in one run on one machine.

`measure.py` times, `peers/` holds what others would run, `test_*.py` are pytest-benchmark suites (`pytest benchmarks/`)
and `mkf bench` prints the tables that the README shows. `results/` keeps runs with machine, versions and commit.
"""
