"""What is installed: one top-level name, the kernels inside it, the configs and the licence beside them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fcmae.kernels import build

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "fcmae", "kernels", "configs"]


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def copy_sources(to: Path) -> None:
    """The sources without what was built from them, so that the checkout stays clean."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "lib")
    to.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to)


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    """The wheel, built offline."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "-w", str(out), str(source)], capture_output=True, text=True, env=os.environ | env
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    copy_sources(tmp_path_factory.getbasetemp() / "source")
    return build_wheel(tmp_path_factory.getbasetemp() / "source", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fcmae"}


def test_wheel_holds_every_module_config_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"fcmae/{p.relative_to(ROOT / 'fcmae')}" for p in (ROOT / "fcmae").rglob("*.py")}
    expected |= {f"fcmae/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    configs = {f"fcmae/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) >= 8
    assert expected | configs <= names
    assert any(".dist-info/" in name and name.endswith("LICENSE") for name in names)


def test_wheel_holds_the_compiled_kernels_of_every_instruction_set(wheel):
    if build.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    sets = build.instruction_sets(platform.machine())
    assert names == {f"fcmae/kernels/lib/{build.file_name(name)}" for name in sets}
    python_tag, abi, tag = wheel.stem.split("-")[-3:]
    assert (python_tag, abi) == ("py3", "none") and tag != "any"


def test_an_installed_wheel_runs_the_kernels_it_holds(wheel, tmp_path):
    if build.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fcmae.kernels; print(fcmae.kernels.backends()['cpu'])"
    bare = {"CXX": "no-such-compiler", "PATH": "", "XDG_CACHE_HOME": str(tmp_path), "FCMAE_CPU": "portable"}
    done = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"), **bare)
    assert done.stdout.strip() == "C++, portable" and not done.stderr, done.stderr


def test_without_a_compiler_the_wheel_is_built_all_the_same(tmp_path):
    copy_sources(tmp_path / "source")
    path = build_wheel(tmp_path / "source", tmp_path / "wheel", CXX="no-such-compiler", PATH="")
    assert path.stem.endswith("py3-none-any")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    assert {"Name: fcmae", "Version: 0.1.0", "Requires-Python: >=3.10"} <= set(lines)
    assert {"License: MIT", "License-Expression: MIT"} & set(lines)


def test_installed_wheel_imports_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import fcmae, fcmae.kernels, importlib.resources as r\n"
        "print(fcmae.__file__, fcmae.kernels.__file__, sep='\\n')\n"
        "print((r.files('fcmae.configs') / 'pretrain' / 'fcmae_convnextv2_atto.yaml').read_text())"
    )
    done = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    package, kernels, *config = done.stdout.splitlines()
    assert Path(package) == tmp_path / "site" / "fcmae" / "__init__.py"
    assert Path(kernels) == tmp_path / "site" / "fcmae" / "kernels" / "__init__.py"
    assert config == (ROOT / "configs/pretrain/fcmae_convnextv2_atto.yaml").read_text().splitlines() + [""]


def test_kernels_is_no_top_level_module():
    done = python("from kernels import ops", ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ") and "the package fcmae.kernels" in done.stderr
    assert python("import fcmae.kernels", ROOT).returncode == 0
    assert python("import kernels; assert not hasattr(kernels, '__version__')", ROOT).returncode == 0


def test_a_package_called_kernels_is_found_from_a_checkout(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9'\n")
    (tmp_path / "kernels" / "layer.py").write_text("name = 'theirs'\n")
    code = "import kernels; from kernels.layer import name; import fcmae.kernels as ours\n"
    code += "print(kernels.__version__, name, ours.backends())"
    done = python(code, ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith("9 theirs {"), done.stderr
