"""What is asked of a machine before MinkowskiEngine is built, and what is said where it is missing or does not load."""

import importlib.machinery
import os
import shutil
import subprocess
import sys

import pytest

from fcmae.errors import UsageError
from fcmae.minkowski import build, engine
from fcmae.pretrain import main as pretrain
from small_runs import CONFIG


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(capsys) -> str:
    assert build.main(["--cpu-only"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_machine_without_a_compiler(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    error = refused(capsys)
    assert "needs a C++ compiler" in error and "apt install g++" in error
    assert not cache.exists()


def fake_compiler(folder, lacks: str) -> str:
    """The real compiler, but for one header that it does not find."""
    real = shutil.which("c++")
    if real is None:
        pytest.skip("needs a C++ compiler")
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\ngrep -q "{lacks}" "$1" && exit 1\ncase "$*" in *openblas*) exit 0;; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("header,package", [("Python.h", "python3-dev"), ("cblas.h", "libopenblas-dev")])
def test_a_machine_without_a_header(cache, tmp_path, monkeypatch, capsys, header, package):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, header))
    assert f"apt install {package}" in refused(capsys)
    assert not cache.exists()


def test_a_gpu_without_nvcc_is_told_the_other_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "nothing"))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(UsageError, match="nvcc.*--cpu-only.*sparse.backend=native"):
        build.check_needs(cuda=True)


def test_a_failed_build_is_one_line_with_the_reason(tmp_path):
    log = tmp_path / "build.log"
    log.write_text("[1/20] nvcc spmm.cu\nspmm.cu(46): error: namespace std has no member is_same_v\nninja: stopped\n")
    failed = subprocess.CalledProcessError(1, ["pip"], output=log.read_text(), stderr=str(log))
    line = build.failure(failed, cuda=True)
    assert "spmm.cu(46): error" in line and str(log) in line and "543, 621 and 632" in line and "--cpu-only" in line
    assert "543" not in build.failure(failed, cuda=False) and "\n" not in line


def test_wheels_are_kept_apart_by_torch_and_kind(cache):
    assert build.find_wheel(cuda=False) is None
    folder = build.wheel_folder(cuda=False)
    assert str(cache) in str(folder) and folder != build.wheel_folder(cuda=True)
    folder.mkdir(parents=True)
    (folder / ".MinkowskiEngine-0.5.part.whl").touch()
    assert build.find_wheel(cuda=False) is None
    (folder / "MinkowskiEngine-0.5.4-cp3-linux.whl").touch()
    assert build.find_wheel(cuda=False).name == "MinkowskiEngine-0.5.4-cp3-linux.whl"


def test_a_wheel_that_does_not_install_is_built_anew(cache, capsys):
    wheel = build.wheel_folder(cuda=False) / "MinkowskiEngine-0.5.4-cp3-linux.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"of another machine")
    error = refused(capsys)
    assert "MinkowskiEngine-0.5.4-cp3-linux.whl: pip could not install it (removed" in error and not wheel.exists()


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("MinkowskiEngine", None)])  # or a folder alone
def test_asked_for_and_not_installed(tmp_path, monkeypatch, capsys, spec):
    monkeypatch.delitem(sys.modules, "MinkowskiEngine", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = [f"out={tmp_path}/run", "data.source=sample", "sparse.backend=minkowski"]
    assert pretrain([str(tmp_path / "config.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "not installed" in error and "make minkowski" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_engine_built_for_another_torch(tmp_path):
    (tmp_path / "MinkowskiEngine").mkdir()
    (tmp_path / "MinkowskiEngine" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    done = subprocess.run(
        [sys.executable, "-c", "from fcmae.minkowski import engine; engine.load()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "does not load with torch" in done.stderr and "undefined symbol" in done.stderr
    assert engine.BUILD in done.stderr
