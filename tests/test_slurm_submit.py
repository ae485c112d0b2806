"""slurm/submit.py without a cluster: its script, its paths, its refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import jobs
import paths
import submit
from fcmae.errors import UsageError
from slurm_cluster import ROOT
from small_runs import CONFIG


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
