"""A command that does not end tells where it hangs, and nothing of it stays."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ending import descendants, ended
from small_runs import environment

HANGING = """
import os, threading
def forks():
    threading.Event().wait() if os.fork() else waits_in_vain()
def waits_in_vain():
    threading.Event().wait()
forks()
"""


def start(program: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program], env=environment(), text=True, **pipes)


def test_what_is_said_by_the_end():
    process = start("import sys; print('said'); sys.exit('told')")
    assert ended(process, 50) == ("said\n", "told\n") and process.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the processes")
def test_one_that_hangs_tells_where():
    process, latest = start(HANGING), time.monotonic() + 50
    while len(descendants(process.pid)) < 2:
        assert time.monotonic() < latest
        time.sleep(0.1)
    child = descendants(process.pid)[1]
    with pytest.raises(AssertionError, match="hung for 2 s") as told:
        ended(process, 2)
    lines = str(told.value).splitlines()
    assert sum(line.endswith(" in forks") for line in lines) == 2, told.value  # of both
    assert sum(line.endswith(" in waits_in_vain") for line in lines) == 1
    assert any(line.startswith(f"{child}: ") and " in " in line for line in lines)
    command = Path(f"/proc/{child}/cmdline")
    assert not command.exists() or not command.read_bytes()  # of one that nobody has waited for yet nothing is left
