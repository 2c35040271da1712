"""Turns the shape annotations of the whole package into checks."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("tensorar_jax", "beartype.beartype")

import pytest

PARITY = pathlib.Path(
  os.environ.get(
    "TENSORAR_PARITY",
    pathlib.Path(__file__).parents[1].parent / "shared" / "parity",
  )
)


@pytest.fixture(scope="session")
def parity() -> pathlib.Path:
  """The folder of fixtures; absent, tests skip, but never under CI."""
  if not PARITY.is_dir():
    message = f"no parity fixtures at {PARITY}; set TENSORAR_PARITY"
    if os.environ.get("CI"):
      pytest.fail(message)
    pytest.skip(message)
  return PARITY
