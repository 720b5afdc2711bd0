"""How many cores this process may use."""

import os


def cores() -> int:
    """Cores that are allowed to this process, not those that the machine has."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1
