"""What is installed: one top-level name, the kernels inside it, the configs and the licence beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "fcmae", "kernels", "configs"]


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(out), str(copy)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


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
    done = python("import kernels", ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ") and "import fcmae.kernels" in done.stderr
    assert python("import fcmae.kernels", ROOT).returncode == 0
