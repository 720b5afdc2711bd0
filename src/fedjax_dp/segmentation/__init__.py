"""Losses, metrics and augmentation of tiles; nothing here mixes units of privacy."""
