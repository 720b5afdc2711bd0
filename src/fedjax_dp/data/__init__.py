"""Host side: from images and masks to indexed tiles. Knows NumPy, never jax."""
