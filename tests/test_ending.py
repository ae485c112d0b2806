"""A command that does not end tells where it hangs, and nothing of it stays."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ending import ended
from small_runs import environment

HANGING = """
import os, threading
def holds_what_is_waited_for():
    child = os.fork()
    threading.Event().wait() if child else waits_in_vain(os.getpid())
def waits_in_vain(pid):
    print(pid, flush=True)
    threading.Event().wait()
holds_what_is_waited_for()
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
    time.sleep(1)
    with pytest.raises(AssertionError, match="hung for 0.5 s") as told:
        ended(process, 0.5)
    lines = str(told.value).splitlines()
    child = int(next(line for line in lines if line.isdigit()))
    for stack in ("in holds_what_is_waited_for", "in waits_in_vain"):
        assert any(stack in line for line in lines), told.value
    assert any(line.startswith(f"{child}: ") and " in " in line for line in lines)
    command = Path(f"/proc/{child}/cmdline")
    assert not command.exists() or not command.read_bytes()  # of one that nobody has waited for yet nothing is left
