"""Which packages ship: all of kitseg, and ``conf`` as ``kitseg.conf``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kitseg*"]), "kitseg.conf"],
    package_dir={"kitseg": "kitseg", "kitseg.conf": "conf"},
)
