"""slurm/watch.py without a cluster: where runs stand, from their files."""

from __future__ import annotations

import json

import watch


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
