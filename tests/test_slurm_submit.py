"""slurm/submit.py without a cluster: its script, its paths, its refusals; and how a process finds its place."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fcmae.errors import TryAgain, UsageError
from fcmae.train.agreement import check_alike, code_version
from fcmae.train.lock import locked
from fcmae.train.lost import lost
from fcmae.train.place import Place, find_place, first_host, tasks_on_node
from slurm_cluster import ROOT
from slurm_cluster import submit as submitted
from small_runs import CONFIG, assert_same_run, command, environment, make_pictures, metrics, run

sys.path.insert(0, str(ROOT / "slurm"))
import jobs  # noqa: E402
import paths  # noqa: E402
import requeue  # noqa: E402
import submit  # noqa: E402
import watch  # noqa: E402


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG + "init: weights/atto.pt\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys, *arguments: str) -> str:
    """The script of a dry run."""
    assert submit.main(["pretrain", "config.yaml", "out=run", "--not-shared", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def test_dry_run_shows_the_script_and_writes_nothing(place, capsys):
    text = shown(
        capsys, "data.source=pictures", "--nodes", "2", "train.steps=5", "--gpus-per-node", "a100:4",
        "--cpus-per-task", "6", "--mem", "100G", "--timeout", "30", "--partition", "gpu", "--account", "me",
        "--qos", "low", "--constraint", "ib",
    )  # fmt: skip
    for flag in (
        "nodes=2", "gpus-per-node=a100:4", "ntasks-per-node=4", "cpus-per-task=6", "mem=100G", "time=30",
        "partition=gpu", "account=me", "qos=low", "constraint=ib", "requeue", "signal=USR2@120", "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{flag}\n" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert f"--output {place}/run/slurm/%j_%t_log.out" in srun and "--kill-on-bad-exit=1" in srun
    assert "--cpus-per-task=6" in srun
    call = f"# python -m fcmae.pretrain {place}/config.yaml init={place}/weights/atto.pt data.source={place}/pictures "
    assert f"{call}train.steps=5 out={place}/run" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert [p.name for p in place.iterdir()] == ["config.yaml"]


def test_an_array_has_a_folder_for_each_line(place, capsys):
    (place / "lines").write_text(
        "train.lr=1e-3  # the recipe's\n\n# twice\ntrain.lr=2e-3 'data.source=my pictures'\nout=own\n"
    )
    text = shown(capsys, "data.source=sample", "--array", "lines")
    assert "#SBATCH --array=0-2%3\n" in text and f"runs=({place}/run/0 {place}/run/1 {place}/own)" in text
    assert f"'data.source={place}/my pictures' out={place}/run/1" in text and "data.source=sample train.lr=1e-3" in text
    assert f"{place}/run/slurm/%A_%a_%t_log.out" in text


def test_the_command_line_wins_over_the_profile_and_that_over_the_defaults(place, capsys):
    (place / "site.yaml").write_text(
        "partition: slow\nnodes: 3\nsetup: [module load x]\nsbatch: [--exclude=n7, --exclusive]\n"
    )
    text = shown(capsys, "--profile", "site.yaml", "--partition", "fast")
    assert "--partition=fast\n" in text and "--nodes=3\n" in text and "--time=60\n" in text
    assert "\nmodule load x\nset +e\n" in text and "#SBATCH --exclude=n7\n#SBATCH --exclusive\n" in text


@pytest.mark.parametrize("name", ["example", "preemptible"])
def test_the_profiles_are_accepted(place, capsys, name):
    assert "#SBATCH --gpus-per-node=" in shown(capsys, "--profile", str(ROOT / "slurm/profiles" / f"{name}.yaml"))


@pytest.mark.parametrize("minutes,seconds", [("1", 15), ("4", 60), ("240", 120)])
def test_a_short_job_is_told_in_time(place, capsys, minutes, seconds):
    assert f"#SBATCH --signal=USR2@{seconds}\n" in shown(capsys, "--timeout", minutes)


REFUSED = [  # arguments, words of the message
    ("pretrian config.yaml out=run", ["'pretrian'", "'pretrain'"]),
    ("convert config.yaml out=run", ["'convert'", "takes a CONFIG"]),
    ("pretrain none.yaml out=run", ["no such config file", "none.yaml"]),
    ("pretrain config.yaml", ["out=FOLDER"]),
    ("pretrain config.yaml run", ["'run' is not of the form key=value"]),
    ("pretrain config.yaml out=run --nodes", ["--nodes", "expected one argument"]),
    ("pretrain config.yaml out=run --nodes two", ["--nodes two", "int"]),
    ("pretrain config.yaml out=run --nodes 0", ["nodes=0", "1 or more"]),
    ("pretrain config.yaml out=run --node-count 2", ["--node-count"]),
    ("pretrain config.yaml out=run --gpus-per-node many", ["gpus_per_node=many", "TYPE:NUMBER"]),
    ("pretrain config.yaml out=run --timeout 1 --signal-delay 60", ["signal_delay=60", "timeout of 1 min"]),
    ("pretrain config.yaml out=run --profile none.yaml", ["none.yaml"]),
    ("pretrain config.yaml out=run --profile typo.yaml", ["unknown setting 'partitoin'", "'partition'"]),
    ("pretrain config.yaml out=run --array none", ["--array none", "no such file"]),
    ("pretrain config.yaml out=run --array twice", ["two runs have out="]),
    ("pretrain config.yaml out=run --array words", ["'fast' is not of the form key=value"]),
    ("pretrain config.yaml out=run --array empty", ["no line of overrides"]),
    ("pretrain config.yaml out=run --array quote", ["--array quote, line 2", "closing quotation"]),
    ("pretrain config.yaml out=run --array bytes", ["--array bytes", "UTF-8"]),
    ("pretrain bytes out=run", ["bytes is not valid YAML"]),
    ("pretrain config.yaml out=null", ["out=FOLDER"]),
    ("pretrain config.yaml out=run/50%", ["out=run/50% has %"]),
    ("pretrain config.yaml out=${oc.env:HOME}/run", ["out=${oc.env:HOME}/run has ${"]),
    ("pretrain config.yaml out=run --local --nodes 2", ["--local", "--tasks-per-node"]),
    ("pretrain config.yaml out=config.yaml/run", ["cannot write into"]),
    ("pretrain config.yaml out=/dev/shm/fcmae/run", ["/dev/shm", "--not-shared"]),
]


@pytest.mark.parametrize("arguments,words", REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_bad_input_is_one_line_and_nothing_is_written(place, capsys, arguments, words):
    (place / "typo.yaml").write_text("partitoin: gpu\n")
    (place / "twice").write_text("out=a\nout=a\n")
    (place / "words").write_text("train.lr=1 fast\n")
    (place / "empty").write_text("# none yet\n")
    (place / "quote").write_text("train.lr=1\n'data.source=my pictures\n")
    (place / "bytes").write_bytes(b"train.lr=\xff\n")
    before = sorted(p.name for p in place.iterdir())
    given = arguments.split() + ([] if "/dev/shm" in arguments else ["--not-shared"])
    assert submit.main(given) == 2
    out, err = capsys.readouterr()
    assert err.startswith("submit: error: ") and err.count("\n") == 1 and not out, err
    for word in words:
        assert word in err
    assert sorted(p.name for p in place.iterdir()) == before


def test_without_submitit_it_says_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not there
    for flag in ("--dry-run", "--local"):
        assert submit.main(["pretrain", "config.yaml", "out=run", "--not-shared", flag]) == 2
        assert capsys.readouterr().err == 'submit: error: submitit is not installed: pip install -e ".[slurm]"\n'


def test_paths_that_are_none(place):
    (place / "other.yaml").write_text("data: {source: sample, val: sample}\ninit: ${oc.env:HOME}/x.pt\nresume: null\n")
    found = paths.absolute_overrides("other.yaml", ["data.train=hf://x", "data.labelled=~/y", "data.source=s3"])
    own = [f"data.val={place}/sample", "data.train=hf://x", f"data.labelled={os.path.expanduser('~')}/y"]
    assert found == [*own, f"data.source={place}/s3"]


def test_a_plan_without_slurm_is_no_script(place, capsys):
    text = shown(capsys, "data.source=sample", "--local", "--tasks-per-node", "2")
    assert "#SBATCH" not in text and "2 ranks each" in text
    assert f"python -m fcmae.pretrain {place}/config.yaml " in text


def test_the_config_file_is_copied(place):
    base, runs = submit.runs_of(submit.parse(["pretrain", "config.yaml", "out=run"]))
    (base / "slurm").mkdir(parents=True)
    (copied,) = jobs.with_own_config(base, runs)
    before = (place / "config.yaml").read_bytes()
    (place / "config.yaml").write_text("seed: 1\n")
    (again,) = jobs.with_own_config(base, runs)
    one, two = (open(r.launch.arguments[0], "rb").read() for r in (copied, again))
    assert one == before and two == b"seed: 1\n" and copied.launch.arguments[1:] == runs[0].launch.arguments[1:]


def test_the_environment_of_another_job_is_left_and_the_users_kept(monkeypatch):
    for key in ("SLURM_PROCID", "RANK", "MASTER_PORT", "WORLD_SIZE", "LOCAL_RANK", "SLURM_CLUSTERS", "SLURM_JWT"):
        monkeypatch.setenv(key, "1")
    jobs.leave_job()
    assert {key for key in os.environ if key.startswith(("SLURM_", "RANK", "MASTER_", "WORLD", "LOCAL_RANK"))} <= {
        "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF",
    }  # fmt: skip
    assert os.environ["SLURM_JWT"] == "1"


MOUNTS = """overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sda1 /data ext4 rw 0 0
tmpfs /data/scratch tmpfs rw 0 0
/dev/sdb /mnt/my\\040disk xfs rw 0 0
"""


def test_what_other_machines_see(tmp_path):
    assert paths.check_shared("/home/me/run", MOUNTS) is None
    assert "ext4" in paths.check_shared("/data/run", MOUNTS)
    assert "xfs" in paths.check_shared("/mnt/my disk/run", MOUNTS)
    for folder in ("/data/scratch/run", "/opt/run"):
        with pytest.raises(UsageError, match="all nodes share"):
            paths.check_shared(folder, MOUNTS)


def test_a_process_finds_its_place():
    step = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6"}
    step |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_CPUS_PER_TASK": "3"}
    assert find_place(step) == Place("SLURM", 5, 6, 1, 2, "tcp://gpu07:22345", 3)
    assert find_place(step | {"SLURM_RESTART_COUNT": "1"}).address == "tcp://gpu07:22446"
    # Not one core where SLURM says nothing of cores.
    assert find_place({k: v for k, v in step.items() if k != "SLURM_CPUS_PER_TASK"}).cores is None
    # In a batch script, which srun did not start: one process, whatever SLURM_NTASKS says.
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Place("none")
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert find_place(step | torchrun) == Place("torchrun", 0, 2, 0, 2)
    local = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_JOB_ID": "77"}
    assert find_place(local) == Place("submitit", 1, 2, 1, 2, "tcp://127.0.0.1:20077")
    assert find_place({}) == Place("none")


def test_a_shell_of_srun_with_a_terminal_is_alone_and_the_steps_it_starts_are_not():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000"}
    step |= {"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "5"}
    ask = [sys.executable, "-c", f"from fcmae.train.place import find_place; print(find_place({step}).size)"]
    in_terminal = [sys.executable, "-c", f"import pty; pty.spawn({ask})"]
    for line, size in ((in_terminal, "1"), (ask, "4")):
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, start_new_session=True
        )
        assert re.findall(r"\d", done.stdout) == [size], done


def test_lists_as_slurm_writes_them():
    hosts = {"n1": "n1", "n[1-2]": "n1", "n[03,7-9],m1": "n03", "a,b": "a", "r1n[2-3].site.org": "r1n2.site.org"}
    assert {text: first_host(text) for text in hosts} == hosts
    assert [tasks_on_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]


def test_ranks_that_differ_are_named():
    one = ("0.1.0, sources aa", {"train": {"steps": 3}})
    check_alike([one, one, one])
    with pytest.raises(UsageError, match=r"^ranks 1, 2 have other code \(fcmae 0.1.0, sources bb\) than rank 0"):
        check_alike([one, ("0.1.0, sources bb", one[1]), ("0.1.0, sources bb", one[1])])
    with pytest.raises(UsageError, match=r"^rank 2 has other settings than rank 0 \(train.steps: 3 -> 4\)"):
        check_alike([one, one, (one[0], {"train": {"steps": 4}})])
    assert re.fullmatch(r"\d+\.\d+\.\d+, sources [0-9a-f]{12}", code_version())


def test_watch_reads_the_files_of_a_run_without_slurm(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("train: {steps: 60}\n")
    rows = [f'{{"step": {s}, "epoch": {s / 10}, "images": {8 * s}, "loss": 0.5}}\n' for s in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 31, "lo')
    (tmp_path / "times.jsonl").write_text("".join(f'{{"step": {s}, "seconds": {s / 4}}}\n' for s in range(1, 31)))
    assert watch.main([str(tmp_path)]) == 0
    assert "running, step 30 of 60, epoch 3.00, loss 0.5000, 32 img/s, 0:00:08 left" in capsys.readouterr().out
    assert watch.main([str(tmp_path / "none")]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_watch_is_not_misled_by_a_second_copy_that_was_refused(tmp_path, capsys):
    logs = tmp_path / "slurm"
    logs.mkdir()
    both = [{"job": job, "logs": str(logs), "ranks": 1, "task": "pretrain"} for job in ("71", "72")]
    (logs / "jobs.json").write_text(json.dumps(both))
    (logs / "71_0_log.out").write_text("step 1\n")
    (logs / "72_0_log.out").write_text("refused\n")
    (logs / "72_0_failed").write_text("2\n")
    assert watch.main([str(tmp_path)]) == 0
    assert "job 72 failed on rank 0" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "images": 8, "loss": 0.5}\n')
    (tmp_path / "times.jsonl").write_text('{"step": 1, "seconds": 0.25}\n')
    assert watch.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}: running, step 1" in said and "[rank 0] step 1" in said and "refused" not in said


def test_watch_shows_the_logs_of_every_run_of_a_sweep(tmp_path, capsys):
    logs = tmp_path / "slurm"
    logs.mkdir()
    for number in range(2):
        (tmp_path / str(number) / "slurm").mkdir(parents=True)
        told = {"job": f"5_{number}", "logs": str(logs), "ranks": 1, "task": "pretrain"}
        (tmp_path / str(number) / "slurm" / "jobs.json").write_text(json.dumps([told]))
        (logs / f"5_{number}_0_log.out").write_text(f"hello from {number}\n")
    assert watch.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("] ")[-1] for line in said if "hello" in line] == ["hello from 0", "hello from 1"]
    assert said[0].startswith(str(tmp_path / "0")) and "hello from 0" in said[1]


HOLDER = """
import sys
from pathlib import Path
from fcmae.train.lock import locked
held = locked(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Call it to have a file locked by another process, of job 7's first start, until its stdin is closed."""
    started = []

    def hold(path):
        env = {**os.environ, "SLURM_JOB_ID": "7"}
        env.pop("SLURM_RESTART_COUNT", None)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_a_requeued_job_waits_for_its_former_self_and_no_other_does(tmp_path, monkeypatch, capsys, holder):
    path = tmp_path / ".lock"
    other = holder(path)
    for job, restarts in (("8", "1"), ("7", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(UsageError, match="another process is running in .* SLURM job 7"):
            locked(path, wait=60)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(TryAgain, match="former start .* SLURM job 7"):  # whose machine is lost: no error of the user's
        locked(path, wait=0)
    threading.Timer(0.5, other.stdin.close).start()
    with locked(path, wait=60):
        assert path.read_text().endswith(", SLURM job 7\n") and f"process {os.getpid()}" in path.read_text()
    assert "waiting for this job's former start" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_from_what_its_former_self_saved_last(tmp_path, holder):
    """Its last checkpoint appears while the new start waits for the lock; that start reads it, and keeps it."""
    source, out = f"data.source={make_pictures(tmp_path / 'pictures')}", tmp_path / "run"
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = (tmp_path / "config.yaml", source, f"out={out}", "checkpoint.every=2", "checkpoint.keep_last=3")
    run(*arguments, "train.steps=6")
    (out / "encoder.safetensors").unlink()
    last, aside = out / "checkpoints" / "step_000000006.pt", tmp_path / "aside.pt"
    shutil.move(last, aside)
    other = holder(out / ".lock")
    env = {**environment(), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    with subprocess.Popen(
        command(*arguments, "train.steps=6"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as again:
        lines = iter(again.stdout.readline, "")
        assert any("waiting for this job's former start" in line for line in lines)
        shutil.move(aside, last)
        other.stdin.close()
        assert "going on from step 6 of 6" in again.stdout.read()
    assert again.returncode == 0 and last.exists() and (out / "encoder.safetensors").exists()


def test_a_rank_that_ran_out_of_patience_with_its_former_self_asks_to_be_started_again(tmp_path):
    """Status 75 through every layer of a command, which a job's script takes for a reason to requeue."""
    from fcmae.cli import run_command
    from fcmae.schema import Config

    def refuse(config):
        raise TryAgain("not yet")

    (tmp_path / "config.yaml").write_text(CONFIG)
    assert run_command("fcmae.pretrain", Config, refuse, [str(tmp_path / "config.yaml")]) == 75


@pytest.fixture
def local(tmp_path):
    """What submit.py is told for a small run of two ranks here."""
    (tmp_path / "config.yaml").write_text(CONFIG.replace("steps: 60, batch_size: 8", "steps: 6, batch_size: 4"))
    source = make_pictures(tmp_path / "pictures")
    return [
        "pretrain", str(tmp_path / "config.yaml"), f"data.source={source}", f"out={tmp_path / 'run'}",
        "--local", "--tasks-per-node", "2", "--cpus-per-task", "1",
    ]  # fmt: skip


def test_local_is_the_run_that_torchrun_starts(local, tmp_path):
    (tmp_path / "profile.yaml").write_text("setup: [export FROM_PROFILE=1]\n")
    done = submitted(*local, "--profile", str(tmp_path / "profile.yaml"))
    assert done.returncode == 0, done.stderr
    run(tmp_path / "config.yaml", local[2], f"out={tmp_path / 'other'}", processes=2)
    assert_same_run(tmp_path / "run", tmp_path / "other")
    assert not list((tmp_path / "run" / "slurm").glob("*_running"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "killed"])
def test_a_rank_that_ends_ends_the_others_here_too(local, tmp_path, how):
    """Rank 1 fails, or dies, before it meets rank 0, which would wait for it for half an hour."""
    act = {"error": "raise ArithmeticError('nothing adds up')", "killed": "os.kill(os.getpid(), 9)"}[how]
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '1':\n"
        "    import torch.distributed as dist\n"
        f"    def meet(*_, **__): {act}\n"
        "    dist.init_process_group = meet\n"
    )
    (tmp_path / "profile.yaml").write_text(f"setup: [export PYTHONPATH={tmp_path / 'breaks'}]\n")
    done = submitted(*local, "--profile", str(tmp_path / "profile.yaml"))  # gives up after 5 minutes
    assert done.returncode == 1 and "did not end well" in done.stderr
    (log,) = (tmp_path / "run" / "slurm").glob("*_0_log.out")
    assert "fcmae.pretrain: error: rank 1 ended" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_a_run_that_is_here(local, tmp_path, number):
    """Ctrl-C reaches every process of the terminal, SIGTERM the command alone, also with a profile's setup."""
    (tmp_path / "profile.yaml").write_text("setup: [export FROM_PROFILE=1]\n")
    out = tmp_path / "run"
    started = [sys.executable, str(ROOT / "slurm" / "submit.py"), *local, "train.steps=100000"]
    with subprocess.Popen(
        [*started, "--profile", str(tmp_path / "profile.yaml")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=environment(), text=True, start_new_session=True,
    ) as job:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(job.pid, number)
        else:
            job.send_signal(number)
        said = job.communicate(timeout=120)[1]
    assert job.returncode == 128 + number and "is saved; the same command goes on" in said, said
    assert list((out / "checkpoints").glob("step_*.pt"))


def test_the_users_gpus_are_the_runs(local, monkeypatch, capsys):
    import here
    from options import Resources

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,3,1")
    found = here.python_here(Resources(setup=["export A=1"]), 2)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['A'])"
    assert (
        subprocess.run(["bash", "-c", f'{found} -c "{code}"'], capture_output=True, text=True).stdout == "GPU-5,3 1\n"
    )
    assert submit.main([*local, "--gpus-per-node", "4"]) == 2
    assert "CUDA_VISIBLE_DEVICES=GPU-5,3,1 names 3" in capsys.readouterr().err


def test_starts_without_a_new_checkpoint_are_counted(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "5_restarts.json"
    folder = run / "arms" / "a" / "checkpoints"
    folder.mkdir(parents=True)
    counted = [requeue.starts_without_progress(run, kept)]
    for name in ("step_000000003.pt", None, None, "step_000000010.pt"):
        if name:
            (folder / name).touch()
        counted.append(requeue.starts_without_progress(run, kept))
    assert counted == [1, 0, 1, 2, 0]


def test_a_rank_that_failed_is_not_tried_again(tmp_path):
    (tmp_path / "12_3_1_log.out").write_text("a line\nfcmae.pretrain: error: [rank 1] no such thing\n\n")
    (tmp_path / "12_3_1_failed").write_text("2\n")
    (tmp_path / "12_3_10_failed").write_text("1\n")
    env = {**os.environ, "SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    command = [sys.executable, str(ROOT / "slurm" / "requeue.py"), "--run", str(tmp_path), "--logs", str(tmp_path)]
    done = subprocess.run(
        [*command, "--status", "143", "--restarts", "3"], env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "rank 1: fcmae.pretrain: error: [rank 1] no such thing\n" in done.stdout
    assert "not requeued" in done.stdout


def test_which_errors_mean_that_others_are_gone():
    for gone in (
        RuntimeError("[.../gloo/transport/tcp/pair.cc:545] Connection closed by peer"),
        torch.distributed.DistNetworkError("no route"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
        RuntimeError("DataLoader timed out after 1800 seconds"),
    ):
        assert lost(gone).status == TryAgain.status
    assert lost(RuntimeError("shapes do not match")) is None and lost(ValueError("gloo")) is None


def test_the_end_of_a_script_is_for_python_3_6():
    text = (ROOT / "slurm" / "requeue.py").read_text()
    tree = ast.parse(text, feature_version=(3, 6))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    assert imported <= {"argparse", "json", "os", "subprocess", "sys", "time", "Path"}  # not `annotations`, of 3.7
    named = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not named & {"capture_output", "text", "missing_ok"}  # later than 3.6


def test_when_slurm_does_not_answer_the_run_is_not_given_up_silently(tmp_path, monkeypatch, capsys):
    """Neither squeue nor scontrol is there to be had; srun itself had failed, no rank had said anything."""
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(requeue, "PAUSE", 0)
    line = ["requeue", "--run", str(tmp_path), "--logs", str(tmp_path), "--status", "1", "--restarts", "2"]
    monkeypatch.setattr(sys, "argv", line)
    assert requeue.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("slurm: squeue does not answer: ")
    assert said[1] == "slurm: requeued after status 1" and said[2].startswith("slurm: not requeued after all, SLURM re")
    assert requeue.main() == 1 and "2 starts in a row wrote no new checkpoint" in capsys.readouterr().out
