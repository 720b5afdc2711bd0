"""Benchmarks: one question a file, run as `python -m benchmarks.NAME`, one harness."""
