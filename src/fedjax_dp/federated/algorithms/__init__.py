"""Federated algorithms, one paper a file."""
