"""Benchmarks: seeded, printed as ratios to something measured in the same run. Not tests."""
