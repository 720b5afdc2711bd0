"""Experiments: short absl programs over `fedjax_dp`, run as `python -m experiments.NAME`."""
