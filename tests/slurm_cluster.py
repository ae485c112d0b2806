"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, stopped when the block ends."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
MARK = "# fcmae's SLURM tests"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

CONF = """
ClusterName=fcmae-tests
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs SLURM ({', '.join(absent)} not found): apt install slurm-wlm munge"
    if os.geteuid() != 0:
        return "needs root, to run SLURM's daemons and to name two nodes in /etc/hosts"
    return None


class Cluster:
    """The running cluster: submit to it, ask it, interrupt its jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUBMITIT", "SBATCH"))}
        self.env = {**inherited, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command of SLURM."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Submit by slurm/submit.py; the job's id."""
        done = submit(*arguments, "--not-shared", env=self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(":")[0].removeprefix("job ").split("_")[0]

    def states(self, job: str) -> list[str]:
        """State and reason of the job, or of each element of an array, also when it has ended."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T %r", check=False).splitlines()

    def until(self, job: str, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for the condition; False when the job ended before. A requeued job does not wait its two minutes."""
        deadline, ended = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            if condition():
                return True
            found = self.states(job)
            ended = ended + 1 if found and all(state.split()[0] in ENDED for state in found) else 0
            if ended == 20:  # for two seconds: a job that is being requeued passes through such a state
                return condition()
            # The two minutes that SLURM waits are for its daemons' sake: a step that starts while the one of the same
            # number is still being put away fails.
            if "PENDING BeginTime" in found and not self.put_away(job):
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.1)
        raise AssertionError(f"nothing after {seconds} s: {self.states(job)}")

    def wait(self, job: str, seconds: float = 120) -> list[str]:
        """Wait for the job's end; the state of it, or of each element of an array."""
        self.until(job, lambda: False, seconds)
        return [state.split()[0] for state in self.states(job)]

    def refused(self, *arguments: str) -> str:
        """Submit what SLURM refuses; what is said of it."""
        done = submit(*arguments, "--not-shared", env=self.env)
        assert done.returncode == 2, done.stderr
        return done.stderr

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        words = self.run("scontrol", "show", "job", job).split()
        return int(next(word for word in words if word.startswith("Restarts=")).removeprefix("Restarts="))

    def put_away(self, job: str) -> bool:
        """Whether daemons of a former start are still there, of the job or of an element of an array."""
        numbers = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%A", check=False).split()
        names = tuple(f"slurmstepd: [{number}.".encode() for number in numbers)
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "cmdline").read_bytes().startswith(names):
                    return True
        return False

    def kill_rank(self, job: str, rank: int) -> None:
        """SIGKILL for one rank of a running job."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"submitit.core._submit" not in (folder / "cmdline").read_bytes().split(b"\0"):
                    continue
                words = (folder / "environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job}".encode() in words and f"SLURM_PROCID={rank}".encode() in words:
                    os.kill(int(folder.name), signal.SIGKILL)
                    return
        raise AssertionError(f"no rank {rank} of job {job} is running")


def submit(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run slurm/submit.py."""
    command = [sys.executable, str(ROOT / "slurm" / "submit.py"), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2, idle and waiting for jobs."""
    folder = Path(tempfile.mkdtemp(prefix="fcmae-slurm-"))
    daemons: list[subprocess.Popen] = []
    made = Cluster(folder)

    def start(*command: str) -> None:
        with open(folder / f"{Path(command[0]).name}-{len(daemons)}.out", "wb") as said:
            daemons.append(subprocess.Popen(command, env=made.env, stdout=said, stderr=said))

    try:
        for name in ("state", *NODES):
            (folder / name).mkdir()
        ports = free_ports(3)
        host = socket.gethostname().split(".")[0]
        # Where ranks meet follows from the job's number: another session's jobs, on the same machine, have others.
        first_job = random.randrange(1000, 1_000_000)
        conf = CONF.format(folder=folder, host=host, port=ports[0], port1=ports[1], port2=ports[2], first_job=first_job)
        (folder / "slurm.conf").write_text(conf)
        (folder / "munge.key").write_bytes(random.randbytes(1024))
        (folder / "munge.key").chmod(0o600)
        own_hosts(folder)
        files = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "munge.seed"}
        files |= {"pid-file": "munged.pid", "log-file": "munged.log"}
        start("munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in files.items()))
        wait_for(lambda: (folder / "munge.socket").exists(), "munged", daemons)
        config = ("-f", str(folder / "slurm.conf"))
        start("slurmctld", "-D", *config)
        for name in NODES:
            start("slurmd", "-D", "-N", name, *config)
        idle = lambda: made.run("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle"] * 2  # noqa: E731
        wait_for(idle, f"SLURM (see {folder})", daemons)
        yield made
    finally:
        if len(daemons) > 1 and daemons[1].poll() is None:
            made.run("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not made.run("squeue", "-h", check=False), "the last jobs", [], 30)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)
        forget_hosts()


def wait_for(condition: Callable[[], bool], what: str, daemons: list[subprocess.Popen], seconds: float = 60) -> None:
    """Wait until the condition holds; an AssertionError when it does not in time, or one of the daemons ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not get ready in {seconds} s"
        assert all(daemon.poll() is None for daemon in daemons), f"{what}: a daemon ended"
        time.sleep(0.2)


def own_hosts(folder: Path) -> None:
    """Name the nodes as this machine, in a line that is this session's own: another's goes when that one ends."""
    with open(HOSTS, "a") as file:
        file.write(f"127.0.0.1 {' '.join(NODES)} {MARK} {folder}\n")


def forget_hosts() -> None:
    """Remove the lines of sessions whose folder is gone: of this one, and of any that was killed."""
    lines = HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if MARK not in line or Path(line.split(MARK)[1].strip() or "/none").is_dir()]
    if kept != lines:
        HOSTS.write_text("".join(kept))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
