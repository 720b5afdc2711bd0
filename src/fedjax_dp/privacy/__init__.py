"""Clipping, noise, accounting and secrets; `mechanism` is the one file that couples them."""
