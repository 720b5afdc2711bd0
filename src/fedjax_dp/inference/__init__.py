"""A trained model over whole slides, and what leaves it for QuPath and other viewers."""
