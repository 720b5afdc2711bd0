"""What this process has of the machine: its cores, and the size of its memory's pages."""

import os
import pathlib
import platform
import sys

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc asks for pages of 2 MB for large arrays."""

_KERNEL_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cores() -> int:
    """Cores that are allowed to this process, not those that the machine has."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def use_huge_pages() -> None:
    """Starts this program anew with pages of 2 MB, where the system gives them to who asks.

    XLA takes the memory of a program's temporaries from the system at every call and gives it back
    at the end; in pages of 4 KB that is some 16,000 interruptions for 64 MB. glibc reads its
    settings when a process starts, hence the new start: same command, same process number. Does
    nothing where pages are large anyway or cannot be, and where `GLIBC_TUNABLES` is set.
    """
    if missing := wanted_environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def wanted_environment() -> dict[str, str]:
    """What has to be added to the environment to get huge pages; empty if nothing helps."""
    try:
        setting = _KERNEL_SETTING.read_text(encoding="ascii")
    except OSError:  # another system
        return {}
    is_asked_for = "[madvise]" in setting and platform.libc_ver()[0] == "glibc"
    return HUGE_PAGES if is_asked_for and not HUGE_PAGES.keys() & os.environ.keys() else {}
