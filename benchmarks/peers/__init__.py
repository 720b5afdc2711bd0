"""The same network, weights and batches in other libraries, side by side with ours."""
