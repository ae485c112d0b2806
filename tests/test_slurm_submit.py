"""slurm/submit.py without a cluster: its script, its paths, its refusals; and how a process finds its place."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from fcmae.errors import UsageError
from fcmae.launch import lost_others
from fcmae.train.agreement import check_alike, code_version
from fcmae.train.lock import locked
from fcmae.train.place import Place, find_place, first_host, tasks_on_node
from slurm_cluster import ROOT
from small_runs import CONFIG

sys.path.insert(0, str(ROOT / "slurm"))
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
    assert "\nmodule load x\n" in text and "#SBATCH --exclude=n7\n#SBATCH --exclusive\n" in text


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
    before = sorted(p.name for p in place.iterdir())
    given = arguments.split() + ([] if "/dev/shm" in arguments else ["--not-shared"])
    assert submit.main(given) == 2
    out, err = capsys.readouterr()
    assert err.startswith("submit: error: ") and err.count("\n") == 1 and not out, err
    for word in words:
        assert word in err
    assert sorted(p.name for p in place.iterdir()) == before


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
    # In a batch script, which srun did not start: one process, whatever SLURM_NTASKS says.
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Place("none")
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert find_place(step | torchrun) == Place("torchrun", 0, 2, 0, 2)
    local = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_JOB_ID": "77"}
    assert find_place(local) == Place("submitit", 1, 2, 1, 2, "tcp://127.0.0.1:20077")
    assert find_place({}) == Place("none")


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


HOLDER = """
import sys, time
from pathlib import Path
from fcmae.train.lock import locked
held = locked(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_requeued_job_waits_for_its_former_self_and_no_other_does(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    env = {**os.environ, "SLURM_JOB_ID": "7"}
    command = [sys.executable, "-c", HOLDER, str(path), "3"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for job, restarts in (("8", "1"), ("7", "0")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            with pytest.raises(UsageError, match="another process is running in .* SLURM job 7"):
                locked(path, wait=60)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with locked(path, wait=60):
            assert path.read_text().endswith(", SLURM job 7\n") and f"process {os.getpid()}" in path.read_text()


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
    assert lost_others(RuntimeError("[.../gloo/transport/tcp/pair.cc:545] Connection closed by peer"))
    assert lost_others(torch.distributed.DistNetworkError("no route"))
    assert not lost_others(RuntimeError("shapes do not match")) and not lost_others(ValueError("gloo"))
