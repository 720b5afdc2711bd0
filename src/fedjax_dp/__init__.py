"""Federated learning with differential privacy for H&E histopathology segmentation."""

__version__ = "0.1.0"
