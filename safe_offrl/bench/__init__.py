"""Benchmarks: methods as settings, and the suites that run them."""
