"""Compiles the C++ kernels for the CPU: when the package is installed, or else at first use, once a machine type.

Knows nothing of torch and imports only the standard library, because `setup.py` runs it where there is no torch. The
library it makes has a C interface, so it serves every version of torch and Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
PACKAGED = Path(__file__).parent / "lib"  # what the installation compiled

# Compiler flags and vector bytes of each instruction set.
INSTRUCTION_SETS = {
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"], 64),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], 32),
    "portable": ([], 16),
}


def instruction_sets(machine: str) -> list[str]:
    """Those that a kind of machine, such as x86_64, may have."""
    return list(INSTRUCTION_SETS) if machine.lower() in ("x86_64", "amd64") else ["portable"]


def flags(name: str) -> list[str]:
    """The compiler's flags for an instruction set. Without -ffp-contract GCC would not use the FMA instructions."""
    machine, vector_bytes = INSTRUCTION_SETS[name]
    common = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
    return [*common, *machine, f"-DFCMAE_BYTES={vector_bytes}"]


def file_name(name: str) -> str:
    """Changes with the sources, the flags, kind of machine and C library, so a stale library is never loaded."""
    content = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h"))
    key = hashlib.sha256(
        content + f"{flags(name)} {platform.system()} {platform.machine()} {platform.libc_ver()}".encode()
    )
    return f"kernels-{name}-{key.hexdigest()[:16]}.so"


def compiler() -> str | None:
    """CXX, g++ or clang++, whichever is there."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def compile_into(folder: Path, name: str) -> Path:
    """Compile for an instruction set. Raises OSError or subprocess.SubprocessError when that fails.

    Whoever else builds or reads meanwhile, the file appears whole: it is written aside and renamed.
    """
    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler (g++ or clang++)")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(name)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / path.name
        units = [str(unit) for unit in sorted(SOURCES.glob("*.cpp"))]
        subprocess.run([found, *flags(name), *units, "-o", str(made)], check=True, capture_output=True, text=True)
        os.replace(made, path)
    return path


def find_or_compile(name: str) -> Path:
    """The library for an instruction set: as installed, from the user's cache, or compiled into it now.

    Of the processes that start together one compiles and the others wait for it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae"
    packaged, cached = (folder / file_name(name) for folder in (PACKAGED, cache))
    if packaged.exists():
        return packaged
    if not cached.exists() and compiler():
        with _alone(cache):
            if not cached.exists():
                print(f"fcmae: compiling the {name} CPU kernels, once", file=sys.stderr)
                return compile_into(cache, name)
    return cached if cached.exists() else compile_into(cache, name)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lifts when a process dies; nothing where there are no such locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reason(error: Exception) -> str:
    """Why a build failed, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        wrong = [line for line in error.stderr.splitlines() if "error" in line]
        return (wrong or error.stderr.splitlines() or [str(error)])[0]
    return str(error)
