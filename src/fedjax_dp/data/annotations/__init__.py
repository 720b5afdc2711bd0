"""What pathologists drew: read from the tools they draw with, and painted on a grid of pixels."""
