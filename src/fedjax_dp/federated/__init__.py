"""One client, the cohort, the server."""
