"""Where the packages lie; everything else about the distribution is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    license="MIT",  # here because setuptools 64-76 and 77+ want it written differently in pyproject.toml
    packages=[*find_packages(include=["fcmae", "fcmae.*"]), "fcmae.kernels", "fcmae.configs"],
    # A PyPI package is called `kernels`: ours must never be installed under that name.
    package_dir={"fcmae": "fcmae", "fcmae.kernels": "kernels", "fcmae.configs": "configs"},
    package_data={"fcmae.configs": ["**/*.yaml"], "fcmae.kernels": ["csrc/*"]},
    include_package_data=False,
)
