"""Build MinkowskiEngine 0.5.4 from its published source for the installed torch: `python -m fcmae.minkowski.build`.

The wheel is kept per torch, Python and kind of build under ~/.cache/fcmae/minkowski, so that it is built once.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from fcmae.errors import UsageError
from fcmae.files import aside, cache_folder

VERSION = "0.5.4"
SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"  # of the source on PyPI
TOOLS = ("pip>=23.1,<27", "setuptools>=77,<85", "wheel", "ninja")
PACKAGES = {
    "a C++ compiler": "g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one in CXX",
    "Python's headers": "python3-dev (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)",
    "OpenBLAS with cblas.h": "OpenBLAS (Debian, Ubuntu: apt install libopenblas-dev; Fedora: dnf install "
    "openblas-devel), or name its folders in CPATH and LIBRARY_PATH",
}
TOO_NEW = (
    "MinkowskiEngine's CUDA sources are known not to build with CUDA 12 and later without patches "
    "(threads 543, 621 and 632 of github.com/NVIDIA/MinkowskiEngine)"
)
OTHERS = "--cpu-only builds it for the CPU, and sparse.backend=native runs on this GPU without it"


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0 when the engine works, 2 when something is missing, 1 when the build fails."""
    parser = argparse.ArgumentParser("fcmae.minkowski.build", description=__doc__)
    parser.add_argument("--cpu-only", action="store_true", help="leave CUDA out even where there is a GPU")
    arguments = parser.parse_args(argv)
    cuda = torch.cuda.is_available() and not arguments.cpu_only
    try:
        check_pip()
        wheel = find_wheel(cuda)
        if wheel is None:
            check_needs(cuda)
            wheel = build(cuda)
        install(wheel)
    except (UsageError, OSError) as error:
        print(f"fcmae.minkowski.build: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"fcmae.minkowski.build: error: {failure(error, cuda)}", file=sys.stderr)
        return 1
    return 0


def check_pip() -> None:
    """Raises UsageError when this environment has no pip."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise UsageError(f"building MinkowskiEngine needs pip in this environment: {sys.executable} -m ensurepip")


def check_needs(cuda: bool) -> None:
    """Raises UsageError naming the first thing that the build would miss, and how to install it."""
    includes = f"-I{sysconfig.get_paths()['include']}"
    probes = {
        "a C++ compiler": "",
        "Python's headers": "#include <Python.h>\n",
        "OpenBLAS with cblas.h": "#include <cblas.h>\n",
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, source in probes.items():
            blas = ["-lopenblas"] if "cblas" in source else []
            program = Path(folder, "probe.cpp")
            program.write_text(f"{source}int main() {{ return 0; }}\n")
            command = [
                *shlex.split(os.environ.get("CXX", "c++")),
                str(program),
                includes,
                "-o",
                str(Path(folder, "probe")),
                *blas,
            ]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                raise UsageError(f"building MinkowskiEngine needs {what}: install {PACKAGES[what]}") from None
    if cuda:
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda is None or CUDA_HOME is None:
            raise UsageError(f"building MinkowskiEngine for a GPU needs NVIDIA's nvcc, and there is none; {OTHERS}")


def wheel_folder(cuda: bool) -> Path:
    """Where the wheel for this torch, this Python and this kind of build is kept."""
    kind = f"cu{torch.version.cuda}" if cuda else "cpu"
    python = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return cache_folder() / "minkowski" / f"torch-{torch.__version__}-{kind}-{python}"


def find_wheel(cuda: bool) -> Path | None:
    """The wheel that an earlier build left, if any; setuptools differ in how they spell its name."""
    return next(iter(sorted(wheel_folder(cuda).glob("[!.]*.whl"))), None)


def build(cuda: bool) -> Path:
    """The wheel, built now. Raises subprocess.CalledProcessError when pip or the compiler fails."""
    folder = wheel_folder(cuda)
    folder.mkdir(parents=True, exist_ok=True)
    kind = f"CUDA {torch.version.cuda}" if cuda else "the CPU"
    print(f"MinkowskiEngine {VERSION} for torch {torch.__version__} and {kind}: some 5 to 9 minutes on 2 cores")
    if cuda and int(torch.version.cuda.split(".")[0]) >= 12:
        print(f"{TOO_NEW}; trying all the same: {OTHERS}")
    with tempfile.TemporaryDirectory() as name:
        work, log = Path(name), folder / "build.log"
        log.unlink(missing_ok=True)
        requirement = work / "source.txt"
        flags = ["--blas=openblas", "--force_cuda" if cuda else "--cpu_only"]  # its setup.py's own
        settings = " ".join(f'--config-settings="--global-option={flag}"' for flag in flags)
        requirement.write_text(f"MinkowskiEngine=={VERSION} {settings} --hash=sha256:{SHA256}\n")
        pip(["install", "--target", str(work / "tools"), *TOOLS], log, os.environ)
        # Its setup.py imports torch even to name itself: no isolation.
        options = ["--no-deps", "--no-build-isolation", "--no-binary=MinkowskiEngine", "-w", str(work / "wheel")]
        pip(["wheel", "-v", *options, "-r", str(requirement)], log, build_environment(work, cuda), progress=True)
        built = next((work / "wheel").glob("*.whl"))
        with aside(folder / built.name) as part:
            shutil.copyfile(built, part)
        return folder / built.name


def build_environment(work: Path, cuda: bool) -> dict[str, str]:
    """Variables for the source's setup.py: the tools' folder, a `pip` that does nothing, and as many jobs as fit."""
    bin = work / "bin"
    bin.mkdir()
    # Its setup.py begins with `pip uninstall MinkowskiEngine`, in whatever environment that pip belongs to.
    (bin / "pip").write_text("#!/bin/sh\nexit 0\n")
    (bin / "pip").chmod(0o755)
    tools = work / "tools"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    jobs = max(1, min(os.cpu_count() or 1, int(memory // (6 if cuda else 3))))  # GiB that a compiler may take
    path = os.pathsep.join([str(bin), str(tools / "bin"), os.environ.get("PATH", os.defpath)])
    python_path = os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"MAX_JOBS": str(jobs), **os.environ, "PATH": path, "PYTHONPATH": python_path}


def pip(arguments: list[str], log: Path, environment: Mapping[str, str], progress: bool = False) -> None:
    """Run this Python's pip, its output into `log`; a bar follows the compiler's `[3/13]` lines when `progress`."""
    command = [sys.executable, "-m", "pip", arguments[0], "--retries", "10", *arguments[1:]]
    with open(log, "a") as file, tqdm(desc="compiling", unit="file", disable=not progress, mininterval=0) as bar:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in process.stdout:
            file.write(line)
            if match := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                bar.total = int(match[2])
                bar.update(int(match[1]) - bar.n)
    if status := process.wait():
        raise subprocess.CalledProcessError(status, command, output=log.read_text(), stderr=str(log))


def install(wheel: Path) -> None:
    """Put the wheel into this environment and see that the engine loads there.

    Raises UsageError when it does not; the wheel is then removed, so that the next time builds it anew, unless what
    tried it was killed.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", "--quiet", str(wheel)]
    done = subprocess.run(
        command, env=os.environ | {"PIP_ROOT_USER_ACTION": "ignore"}, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        _refuse(wheel, done, "pip could not install it")
    probe = "from fcmae.minkowski import engine; print(engine.describe())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, errors="replace")
    if done.returncode:
        _refuse(wheel, done, "it does not load")
    print(f"installed: {done.stdout.strip()} (kept: {wheel})")
    print("use it:    python -m fcmae.pretrain CONFIG.yaml sparse.backend=minkowski")


def _refuse(wheel: Path, done: subprocess.CompletedProcess, what: str) -> NoReturn:
    if done.returncode < 0:  # the wheel may well be good
        raise UsageError(f"{wheel.name}: a process that tried it was ended by signal {-done.returncode}; try again")
    wheel.unlink()
    said = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    raise UsageError(f"{wheel.name}: {what} (removed; try again to build it): {said}")


def failure(error: subprocess.CalledProcessError, cuda: bool) -> str:
    """Why a step failed, in one line."""
    lines = (error.output or error.stderr or "").splitlines()
    errors = [line.strip() for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    text = (errors or lines[-1:] or ["no message"])[0][:300]
    if os.path.isfile(error.stderr or ""):
        text += f" (all of it: {error.stderr})"
    return f"MinkowskiEngine did not build: {text}" + (f"; {TOO_NEW}; {OTHERS}" if cuda else "")


if __name__ == "__main__":
    sys.exit(main())
