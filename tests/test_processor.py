import json
import os
import subprocess
import sys

import pytest

from fedjax_dp import processor


def test_cores_are_those_of_this_process():
    assert 1 <= processor.cores() <= (os.cpu_count() or 1)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Sets what the kernel says, and clears what the user said."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(processor.platform, "libc_ver", lambda: ("glibc", "2.36"))
    setting = tmp_path / "enabled"
    monkeypatch.setattr(processor, "_KERNEL_SETTING", setting)
    return setting.write_text


def test_huge_pages_are_asked_for_where_that_helps(kernel, monkeypatch):
    kernel("always [madvise] never\n")
    assert processor.wanted_environment() == processor.HUGE_PAGES
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")  # whoever sets it, knows
    assert processor.wanted_environment() == {}


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]"])
def test_nothing_is_asked_for_where_pages_are_large_or_cannot_be(setting, kernel):
    kernel(setting)
    assert processor.wanted_environment() == {}


def test_nothing_is_asked_for_of_another_library_or_system(kernel, monkeypatch, tmp_path):
    kernel("always [madvise] never")
    monkeypatch.setattr(processor.platform, "libc_ver", lambda: ("", ""))
    assert processor.wanted_environment() == {}
    monkeypatch.setattr(processor, "_KERNEL_SETTING", tmp_path / "absent")
    assert processor.wanted_environment() == {}


def test_the_same_command_starts_once_more_and_only_once():
    program = (
        "import json, os, sys; from fedjax_dp import processor; "
        "processor.wanted_environment = lambda: "
        "{} if 'SEEN' in os.environ else {'SEEN': str(os.getpid())}; "
        "processor.use_huge_pages(); "
        "found = [os.environ['SEEN'], str(os.getpid()), sys.argv[1:], sys.flags.utf8_mode]; "
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program, "--a=b c", ""],
        capture_output=True,
        text=True,
        check=True,
    )
    before, now, arguments, utf8 = json.loads(done.stdout)
    assert before == now
    assert arguments == ["--a=b c", ""]
    assert utf8 == 1
