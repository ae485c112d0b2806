"""Where the packages lie, and the C++ kernels compiled into the wheel; everything else is in pyproject.toml.

No build fails for want of a compiler: without the libraries they are compiled at first use, or the reference runs.
"""

import importlib.util
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel


def kernel_builder():
    """kernels/build.py, which needs neither torch nor the package around it."""
    spec = importlib.util.spec_from_file_location("fcmae_build", Path(__file__).parent / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Compiles the kernels beside the modules. An editable install, whose sources change, leaves that to first use."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        builder, folder = kernel_builder(), Path(self.build_lib) / "fcmae" / "kernels" / "lib"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build of other sources

        def compiled(name: str) -> bool:
            try:
                builder.compile_into(folder, name)
            except (OSError, subprocess.SubprocessError) as error:
                print(f"fcmae: no {name} CPU kernels now: {builder.reason(error)}")
                return False
            return True

        with ThreadPoolExecutor() as pool:
            self.distribution.holds_libraries = any(pool.map(compiled, builder.instruction_sets(platform.machine())))


class PlatformWheel(bdist_wheel):
    """Tagged for this platform, and any Python, if the kernels were compiled."""

    def get_tag(self):
        holds = getattr(self.distribution, "holds_libraries", False)
        return ("py3", "none", super().get_tag()[2] if holds else "any")


class MaybeBinary(Distribution):
    """Installs as a distribution with libraries does where there is a compiler to make them."""

    def has_ext_modules(self):
        return kernel_builder().compiler() is not None


setup(
    license="MIT",  # here because setuptools 64-76 and 77+ want it written differently in pyproject.toml
    packages=[*find_packages(include=["fcmae", "fcmae.*"]), "fcmae.kernels", "fcmae.configs"],
    # A PyPI package is called `kernels`: ours must never be installed under that name.
    package_dir={"fcmae": "fcmae", "fcmae.kernels": "kernels", "fcmae.configs": "configs"},
    package_data={"fcmae.configs": ["**/*.yaml"], "fcmae.kernels": ["csrc/*"]},
    include_package_data=False,
    distclass=MaybeBinary,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
)
