"""A command that does not end tells where it hangs, and nothing of it stays."""

import subprocess
import sys

import pytest

from ending import ended
from small_runs import environment
from soak.processes import children, status_of, until

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
    process = start(HANGING)
    (child,) = until(lambda: children(process.pid), 50, "a child")
    with pytest.raises(AssertionError, match="hung for 2 s") as told:
        ended(process, 2)
    lines = str(told.value).splitlines()
    assert sum(line.endswith(" in forks") for line in lines) == 2, told.value  # of both
    assert sum(line.endswith(" in waits_in_vain") for line in lines) == 1
    assert any(line.startswith(f"{child}: ") and " in " in line for line in lines)
    assert status_of(child)[:1] in ([], ["Z"], ["X"])  # nobody may have waited for it yet
