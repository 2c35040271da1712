"""Adds the files of configs/ to the package; the rest is in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
folders = {
  path.parent.relative_to(ROOT) for path in ROOT.glob("configs/**/*.py")
}
configs = {f"tensorar_jax.{'.'.join(f.parts)}": f.as_posix() for f in folders}

setup(
  packages=[*find_packages(include=["tensorar_jax*"]), *configs],
  package_dir=configs,
)
