"""Segmentation networks as pure functions."""
