"""Containers of whole slides: levels of pixels, and what a file says about their size."""
